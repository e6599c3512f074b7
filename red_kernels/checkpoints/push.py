"""`red-kernels push`: uploading a folder of edits to the hub."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..support.bars import bars_on_terminals_only
from ..support.files import locked
from ..support.text import listed
from .card import CARD_NAME, is_own_card, renamed_card, write_model_card
from .found import Found
from .hub import EDIT_FILES, ID, explaining_hub
from .reading import located_folder, read_described

__all__ = ["Pushed", "add_options", "push_edits", "run"]


@dataclass(frozen=True)
class Pushed:
    """The result of `push_edits`; `print` shows it in a few lines.

    Attributes:
        repository: its id.
        url: of the commit.
        commit: its hash.
        files: the uploaded files.
        left_out: other files of the folder, which were not uploaded.
        notes: further remarks.
    """

    repository: str
    url: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"uploaded {', '.join(self.files)} to {self.repository}: {self.url}"]
        lines += [f"not uploaded: {listed(self.left_out)}"] if self.left_out else []
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join([*lines, f'rk.from_pretrained("{self.repository}") loads it'])


def push_edits(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload a folder of edits to the hub, in one commit, with a model card.

    The files are read and checked first, all of one save even if others write to the folder. The folder is unchanged.
    A card of `rk.write_model_card` is uploaded with the repository's id in its code; without a `README.md` one is made
    for the upload. Files of edits that only the repository has are deleted there.

    Args:
        folder: of `rk.save_edits`, of a run of `red-kernels finetune` (its `edits/`), or of a RED adapter that PEFT
            has saved.
        repository: its id, `"user/name"`; created if missing.
        private: whether a new repository is private.
        revision: the branch; created if missing. None for the main one.
        message: of the commit.
        token: of the hub; None for the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        ValueError: the id is invalid; the folder's edits are damaged, or in the authors' form.
        FileNotFoundError: the folder does not exist, or a file of it is missing.
        PermissionError: there is no token, or it has no write access; the repository is public despite `private`.
        OSError: the hub cannot be reached.
    """
    if not isinstance(repository, str) or not ID.fullmatch(repository):
        raise ValueError(f"repository: got {repository!r}, expected an id of the hub such as 'user/name'")
    place = located_folder(folder)
    with tempfile.TemporaryDirectory(prefix="red-push-") as made:
        copy = Path(made)
        left_out = _copy(place, copy)
        found = read_described(copy, "folder", folder)
        notes = [*_put_card(copy, repository, found), *([found.newer] if found.newer else [])]
        return _upload(copy, repository, private, revision, message, token, left_out, notes)


def _copy(place: Path, copy: Path) -> tuple[str, ...]:
    """Copy the files of edits and the card; returns the names of other files."""
    left_out = []
    with locked(place):
        for path in sorted(place.iterdir()):
            wanted = path.name == CARD_NAME or any(fnmatch(path.name, pattern) for pattern in EDIT_FILES)
            if wanted and path.is_file():
                (copy / path.name).write_bytes(path.read_bytes())
            elif not path.name.startswith("."):  # temporary files of a save have such names
                left_out.append(path.name)
    return tuple(left_out)


def _put_card(copy: Path, repository: str, found: Found) -> list[str]:
    """Give the card the repository's id, or make one; returns notes."""
    notes = []
    card = copy / CARD_NAME
    if not card.exists():
        write_model_card(copy, name=repository)
        notes.append(f"the folder has no {CARD_NAME}; one was made for the upload")
    elif is_own_card(card):
        card.write_text(renamed_card(card.read_text(encoding="utf-8"), repository), encoding="utf-8")
    base = (found.description or {}).get("base_model_name")
    if not base:
        notes.append("the edits name no base model: rk.from_pretrained needs base=")
    elif Path(base).exists() or not ID.fullmatch(base):
        from ..support.base_models import is_packaged

        if not is_packaged(base):
            notes.append(f"the base model is the folder {base!r}; elsewhere rk.from_pretrained needs base=")
    return notes


def _upload(
    copy: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    token: str | None,
    left_out: tuple[str, ...],
    notes: list[str],
) -> Pushed:
    import huggingface_hub

    token = token or huggingface_hub.get_token()
    if token is None:
        raise PermissionError(
            "token: there is none for the hub; log in by 'hf auth login', or set the variable HF_TOKEN to a token that "
            "may write"
        )
    files = tuple(sorted(path.name for path in copy.iterdir()))
    api = huggingface_hub.HfApi(token=token)
    with explaining_hub(f"could not upload to {repository!r}", repository), bars_on_terminals_only():
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise PermissionError(
                f"private: the repository {repository!r} is there already and is public; nothing was uploaded. Make it "
                "private in its settings, or push without --private"
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=repository,
            folder_path=copy,
            revision=revision,
            commit_message=message or "RED edits",
            delete_patterns=list(EDIT_FILES),
        )
    return Pushed(repository, str(done.commit_url), str(done.oid), files, left_out, tuple(notes))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `red-kernels push`."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of saved edits, or of a run of red-kernels finetune")
    parser.add_argument("repository", metavar="USER/NAME", help="repository on the hub; created if missing")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch; created if missing (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit (default: RED edits)")


def run(options: argparse.Namespace) -> int:
    """Push by the command's arguments, and print the result."""
    done = push_edits(
        options.folder,
        options.repository,
        private=options.private,
        revision=options.revision,
        message=options.message,
    )
    print(done)
    return 0
