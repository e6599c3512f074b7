"""The hub: recognising its ids, fetching a repository of edits, and its errors in one line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..support.bars import bars_on_terminals_only
from ..support.errors import one_line

__all__ = ["EDIT_FILES", "ID", "explaining_hub", "fetched", "is_hub_id", "only_commit"]

# The files of edits, in every form. Other files of a repository are not fetched.
EDIT_FILES = (
    *("red_edits.safetensors", "red_head*.safetensors", "red_config.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "delta_vector.pth", "classifier.pth"),
)
ID = re.compile(r"(?!\.)[A-Za-z0-9._-]+/(?!\.)[A-Za-z0-9._-]+")
_PATTERNS = (*EDIT_FILES, *(f"edits/{name}" for name in EDIT_FILES))


def is_hub_id(source: object) -> bool:
    """Whether a value is text of the form `user/name`, and not a local file or folder."""
    return isinstance(source, str) and ID.fullmatch(source) is not None and not os.path.lexists(source)


def fetched(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The path of a file or folder; for an id of the hub, that of its files of edits in the hub's cache.

    Raises:
        FileNotFoundError: neither the folder nor the repository exists.
        OSError: the hub cannot be reached, or refuses.
        ValueError: a revision, but no repository.
    """
    path = Path(source)
    if not is_hub_id(source):
        if revision is not None:
            raise ValueError(
                f"revision: got {revision!r}, but {str(source)!r} is no id of the hub, expected the form 'user/name'"
            )
        return path
    import huggingface_hub

    name = str(source)
    what = f"folder_or_file: {name!r} does not exist here, and could not be fetched from the hub"
    with explaining_hub(what, name), bars_on_terminals_only():
        found = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    if not found.is_dir():
        raise FileNotFoundError(f"folder_or_file: the repository {name!r} holds no edits")
    return found


@contextlib.contextmanager
def explaining_hub(what: str, repository: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into an OSError of one line that starts with `what`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: there is no repository {repository!r}, or it is private and the token has no read access"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{what}: {repository!r} has no such revision") from error
    except errors.LocalEntryNotFoundError as error:  # caused by the network's error
        raise FileNotFoundError(f"{what}: {_reason(error)}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"{what}: the hub refuses (status {status}); log in by 'hf auth login', or set HF_TOKEN to a token "
                "with access"
            ) from error
        raise OSError(f"{what}: {one_line(error)}") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the HTTP library, which differs by version
        raise OSError(f"{what}: the hub cannot be reached: {type(error).__name__}: {one_line(error)}") from error


def only_commit(repository: str, commit: str | None = None) -> str | None:
    """The commit of a repository in the hub's cache, if there is just one: the loaded one.

    With a `commit` that is in the cache, that commit.
    """
    from huggingface_hub import constants

    if not is_hub_id(repository):
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    try:
        commits = [entry.name for entry in folder.iterdir() if re.fullmatch("[0-9a-f]{40}", entry.name)]
    except OSError:
        return None
    if commit is not None:
        return commit if commit in commits else None
    return commits[0] if len(commits) == 1 else None


def _reason(error: BaseException) -> str:
    cause: Any = error.__cause__
    if cause is None:
        return one_line(error)
    return f"the hub cannot be reached: {type(cause).__name__}: {one_line(cause)}"
