"""The rated sentences of the quality job: fetching their archive, reading it, dividing it."""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
from collections import defaultdict
from types import SimpleNamespace

import pytest

from benchmarks.quality import sentiment

RATED = [
    *((f"Film {i} is a joy, number {i * i}.", 0.5 + i / 100) for i in range(60)),
    *((f"Film {i} is a bore, number {i * i}.", -0.5 - i / 100) for i in range(60)),
    *((f"Nobody knows about film {i}.", 0.0) for i in range(7)),
]


def packed(members, mode="w:gz"):
    """A tar of `(name, bytes)`, or of ready-made members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def as_lines(rated):
    return "".join(f"{i}\t{rating}\t{text}\r\n" for i, (text, rating) in enumerate(rated, start=1)).encode()


def source_distribution(content, setup=""):
    """An archive of the form of vaderSentiment's; None for one without the sentences."""
    inner = [("data/_README_.txt", b"read me"), ("data/other_GroundTruth.txt", b"1\t2\tno review\r\n")]
    if content is not None:
        inner.append((f"data/{sentiment.SENTENCES}", content))
    folder = f"{sentiment.PROJECT}-{sentiment.VERSION}"
    said = f"Metadata-Version: 1.0\nName: {sentiment.PROJECT}\nVersion: {sentiment.VERSION}\n"
    setup = f"{setup}\nfrom setuptools import setup\nsetup(name={sentiment.PROJECT!r}, version={sentiment.VERSION!r})\n"
    files = [(f"{folder}/PKG-INFO", said.encode()), (f"{folder}/setup.py", setup.encode())]
    return packed([*files, (f"{folder}/additional_resources/data.tar.gz", packed(inner))])


def test_sentences_are_read_as_they_stand():
    rated = [("It's ''great''\x85 really – \"so\" good", 2.25), ("Não.", -1.5), ("  spaces  ", 1.0)]
    found = sentiment.read_sentences(source_distribution(as_lines(rated)))
    assert found == [*rated[:2], ("spaces", 1.0)]


def test_labels_and_parts(tmp_path):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(source_distribution(as_lines(RATED)))
    found = sentiment.load(path)
    assert found.neutral == 7
    everything = [*found.train, *found.validation, *found.test]
    assert sorted(everything) == sorted((text, int(rating > 0)) for text, rating in RATED if rating)
    for part, share in ((found.test, sentiment.TEST), (found.validation, sentiment.VALIDATION)):
        positive = sum(label for _, label in part)
        assert abs(positive - 60 * share) <= 1
        assert abs(len(part) - positive - 60 * share) <= 1
    assert sentiment.load(path) == found


def test_repetitions_stay_together():
    """Also those that differ in case and punctuation, and those that were rated differently."""
    repeated = [(form.format(text), rating) for text, rating in RATED for form in ("{}", "'{}'", "{}..")]
    repeated += [(text.upper(), -rating) for text, rating in RATED[:60:2]]
    found = sentiment.split(repeated)
    seen = defaultdict(set)
    for name in ("train", "validation", "test"):
        for text, _ in getattr(found, name):
            seen[text.lower().strip("'.")].add(name)
    assert {len(parts) for parts in seen.values()} == {1}
    assert set().union(*seen.values()) == {"train", "validation", "test"}


def test_majority():
    train_pairs = [("a", 1), ("b", 1), ("c", 1), ("d", 0)]
    accuracy, loss = sentiment.majority(train_pairs, [("e", 1), ("f", 0)])
    assert accuracy == 0.5
    assert loss == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"no archive at all", "is damaged or no source distribution"),
        (source_distribution(as_lines(RATED))[:-200], "is damaged or no source distribution"),
        (source_distribution(None), "contains movieReviewSnippets"),
        (packed([("elsewhere/data.tar.gz", packed([(sentiment.SENTENCES, as_lines(RATED))]))]), "no archive in its"),
        (source_distribution(b"1\t2.0\tgood\r\n2\tbad\r\n"), "line 2: expected an id, a rating and a sentence"),
        (source_distribution(b"1\thigh\tgood\r\n"), "line 1: expected an id, a rating"),
        (source_distribution(b"1\t4.5\tgood\r\n"), "line 1: expected a rating from -4 to 4"),
        (source_distribution(b"1\tnan\tgood\r\n"), "line 1: expected a rating from -4 to 4"),
        (source_distribution(b"1\t2.0\t \r\n"), "line 1: expected a rating from -4 to 4 and a sentence"),
        (source_distribution("1\t2.0\tcafé\r\n".encode("latin-1")), "is not UTF-8"),
    ],
    ids=[
        "no archive",
        "cut off",
        "no sentences",
        "elsewhere",
        "two fields",
        "no number",
        "5",
        "nan",
        "no text",
        "latin-1",
    ],
)
def test_archives_that_do_not_fit_are_refused(archive, message):
    with pytest.raises(ValueError, match=message):
        sentiment.read_sentences(archive)


def test_links_and_paths_of_an_archive_are_not_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(as_lines(RATED))
    link = tarfile.TarInfo(f"data/{sentiment.SENTENCES}")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
    outside = packed([(f"../../{sentiment.SENTENCES}", as_lines(RATED))])
    for inner in (packed([(link, b"")]), outside):
        archive = packed([("x/additional_resources/data.tar.gz", inner)])
        if inner is outside:
            assert len(sentiment.read_sentences(archive)) == len(RATED)  # read, and written nowhere
        else:
            with pytest.raises(ValueError, match="no archive in its"):
                sentiment.read_sentences(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """pip sees only the files of a folder, which is empty at first; the cache is a folder of the test."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no-configuration"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return links


def test_pip_fetches_once(offline, monkeypatch):
    archive = source_distribution(as_lines(RATED))
    (offline / sentiment.ARCHIVE).write_bytes(archive)
    monkeypatch.setattr(sentiment, "SHA256", hashlib.sha256(archive).hexdigest())
    kept = sentiment.fetch()
    assert kept == sentiment.cache_folder() / sentiment.ARCHIVE
    assert kept.read_bytes() == archive
    assert [path.name for path in kept.parent.iterdir()] == [sentiment.ARCHIVE]
    kept.write_bytes(archive[:100])  # damaged: it is fetched again
    assert sentiment.fetch().read_bytes() == archive
    (offline / sentiment.ARCHIVE).unlink()
    assert len(sentiment.load().train) + sentiment.load().neutral < len(RATED)


def test_without_a_network(offline):
    with pytest.raises(OSError, match="pip cannot fetch the source distribution of vaderSentiment") as raised:
        sentiment.fetch()
    assert str(sentiment.cache_folder() / sentiment.ARCHIVE) in str(raised.value)
    assert "No matching distribution" in str(raised.value)
    assert not sentiment.cache_folder().exists()


def test_another_archive_is_refused_before_its_setup_is_run(offline, tmp_path):
    mark = tmp_path / "was run"
    setup = f"open({str(mark)!r}, 'w').close()"
    (offline / sentiment.ARCHIVE).write_bytes(source_distribution(as_lines(RATED), setup))
    with pytest.raises(ValueError, match="expected the SHA-256"):
        sentiment.fetch()
    assert not mark.exists()
    assert not sentiment.cache_folder().exists()


def test_what_pip_leaves_is_checked_as_well(offline, monkeypatch):
    def pretend(command, **options):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{sentiment.ARCHIVE}", "wb") as file:
            file.write(b"something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(sentiment.subprocess, "run", pretend)
    with pytest.raises(ValueError, match=r"has the SHA-256 .* it was not kept"):
        sentiment.fetch()
    assert not sentiment.cache_folder().exists()


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sentiment.sys, "platform", "linux")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert sentiment.cache_folder() == tmp_path / ".cache" / "red-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert sentiment.cache_folder() == tmp_path / "own" / "red-kernels"


def test_the_true_data():
    try:
        found = sentiment.load()
    except OSError as error:
        pytest.skip(f"the sentences cannot be fetched: {error}")
    everything = [*found.train, *found.validation, *found.test]
    assert len(everything) + found.neutral == 10605
    assert (found.neutral, sum(label for _, label in everything)) == (37, 5242)
    assert ("Effective but too tepid biopic", 0) in everything
    assert len(set(found.test) & set(found.train)) == 0
    assert abs(len(found.test) / len(everything) - sentiment.TEST) < 0.01
    assert abs(len(found.validation) / len(everything) - sentiment.VALIDATION) < 0.01
    assert not any("â€" in text or "\ufffd" in text for text, _ in everything)
