"""A model card for saved edits: `README.md`, with the front matter that the hub reads."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.bars import bars_on_terminals_only
from ..support.files import write_files
from ..support.text import listed
from .found import Found
from .hub import ID, is_hub_id
from .peft_names import is_peft_folder
from .reading import located_folder, read_described

__all__ = ["CARD_NAME", "is_own_card", "renamed_card", "write_model_card"]

CARD_NAME = "README.md"
LIBRARY = "red-kernels"
_MARK = "<!-- Written by red-kernels, which replaces this file. Remove this line to keep your own changes. -->"
_CALL = re.compile(r'(?<=rk\.)(from_pretrained|load_tokenizer)\("(?:[^"\\]|\\.)*"\)')


@dataclass(frozen=True)
class _Licence:
    """As a card's front matter has it: `other` goes with a name and a link."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    data: str | None = None,
    datasets: Sequence[str] = (),
    figures: Mapping[str, tuple[float | None, float | None]] | None = None,
    settings: Mapping[str, object] | None = None,
    licence: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Write a model card into a folder of saved edits: `README.md`.

    The folder gives the facts: base model and revision, position, kind, layers, the number of trained parameters. The
    licence is that of the base model, from its card, its configuration or its GGUF file.

    Args:
        folder: of `rk.save_edits`, or of a run of `red-kernels finetune` (its `edits/`).
        data: the training data, in words.
        datasets: ids of data sets on the hub, for the front matter.
        figures: scores on held-out data: name to the values before and after the training; None for an unknown one.
        settings: of the training, name to value.
        licence: of the base model, as the hub abbreviates it (`"apache-2.0"`), instead of searching for it.
        name: the name of the edits in the code that loads them; None for the folder. `rk.push_edits` replaces it by
            the repository's id.
        overwrite: replace a foreign `README.md`.

    Returns:
        The file; None if a foreign `README.md` was kept.

    Raises:
        ValueError: the folder's edits have no config; a figure is no pair; an invalid id.
        FileNotFoundError: the folder does not exist, or has no edits.
        OSError: the file cannot be written.

    Warns:
        UserWarning: a foreign `README.md` was kept.
    """
    place = located_folder(folder)
    found = read_described(place, "folder", folder)
    for key, pair in (figures or {}).items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"figures: got {pair!r} for {key!r}, expected the values before and after the training")
    if isinstance(datasets, str) or not all(isinstance(one, str) and one for one in datasets):
        raise ValueError(f"datasets: got {datasets!r}, expected a list of ids of the hub")
    card = place / CARD_NAME
    if card.exists() and not overwrite and not is_own_card(card):
        warnings.warn(
            f"{card}: was not written by red-kernels and is left as it is; write_model_card(..., overwrite=True) "
            "replaces it",
            stacklevel=2,
        )
        return None
    text = _card(found, str(name or place), data, tuple(datasets), figures or {}, settings or {}, licence)
    write_files(place, {CARD_NAME: text.encode()})
    return card


def is_own_card(path: Path) -> bool:
    """Whether a file is of `write_model_card`, and the user has not taken it over."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return _MARK in path.read_text(encoding="utf-8")
    return False


def renamed_card(text: str, name: str) -> str:
    """A card of ours with code that loads the edits from another place."""
    return _CALL.sub(lambda call: f"{call[1]}({_quoted(name)})", text)


def _card(
    found: Found,
    name: str,
    data: str | None,
    datasets: tuple[str, ...],
    figures: Mapping[str, tuple[float | None, float | None]],
    settings: Mapping[str, object],
    licence: str | None,
) -> str:
    from huggingface_hub import ModelCardData

    said = found.description or {}
    base = said.get("base_model_name") or ""
    identity = _hub_id(base)
    terms = _Licence(licence) if licence else _licence_of(base)
    classifies = found.trained is not None and bool(found.trained.labels)
    front: dict[str, Any] = {
        "base_model": identity,
        "base_model_relation": "adapter" if identity else None,
        "library_name": LIBRARY,
        "tags": ["red", "representation-editing", "peft", LIBRARY],
        "license": terms.license,
        "license_name": terms.license_name,
        "license_link": terms.license_link,
        "datasets": list(datasets) or None,
        "pipeline_tag": "text-classification" if classifies and _classifies(found) else None,
    }
    yaml = ModelCardData(**{key: value for key, value in front.items() if value is not None}).to_yaml()
    parts = [
        f"---\n{yaml.strip()}\n---",
        _MARK,
        f"# RED edits of {_title(base, identity)}",
        "Edits of the representations of a frozen model (RED, [arXiv:2402.15179](https://arxiv.org/abs/2402.15179)). "
        "The base model's weights are not in here.",
        _table(("", ""), _facts(found, base, identity, terms, data, datasets)),
    ]
    if figures:
        rows = [(key, _number(before), _number(after)) for key, (before, after) in figures.items()]
        parts += ["## Figures", _table(("held-out", "before", "after"), rows)]
    if settings:
        parts += ["## Training", _table(("setting", "value"), [(key, str(value)) for key, value in settings.items()])]
    quoted = _quoted(name)
    parts += [
        "## How to load",
        "\n".join(
            [
                "```python",
                "import red_kernels as rk",
                "",
                f"model = rk.from_pretrained({quoted})",
                f"tokenizer = rk.load_tokenizer({quoted})",
                "```",
            ]
        ),
        "`pip install red-kernels` installs what this needs. The first line loads the base model, patches it, and "
        "loads the edits" + (" and the trained head." if found.trained is not None else "."),
    ]
    if is_peft_folder(found.source.parent):
        parts.append(
            "`peft.PeftModel.from_pretrained` takes them too, once `red_kernels.integrations.peft` is imported."
        )
    return "\n\n".join(parts) + "\n"


def _facts(
    found: Found, base: str, identity: str | None, terms: _Licence, data: str | None, datasets: tuple[str, ...]
) -> list[tuple[str, str]]:
    said = found.description or {}
    count = sum(own.numel() for parts in found.vectors.values() for own in parts.values())
    layers = said.get("layers")
    where = said["position"] if said.get("site_patterns") is None else f"modules named {listed(said['site_patterns'])}"
    parameters = f"{count:,} in vectors"
    facts = [
        ("base model", f"[{identity}](https://huggingface.co/{identity})" if identity else _title(base, identity)),
        ("revision of the base model", said.get("base_model_revision") or "not known"),
        ("licence of the base model", terms.license_name or terms.license or "not known: see the base model"),
        ("position of the edits", str(where)),
        ("kind of edit", str(said["kind"])),
        ("layers", "all" if layers is None else ", ".join(map(str, layers))),
        ("edited modules", f"{len(found.vectors):,}"),
    ]
    if found.trained is not None:
        parameters += f", {sum(own.numel() for own in found.trained.values.values()):,} in a trained head"
    facts.append(("trained parameters", parameters))
    if found.trained is not None and found.trained.labels:
        facts.append(("labels", listed(list(found.trained.labels.values()))))
    if data or datasets:
        links = [f"[{one}](https://huggingface.co/datasets/{one})" for one in datasets]
        facts.append(("data", "; ".join([*([data] if data else []), *links])))
    return facts


def _classifies(found: Found) -> bool:
    return found.trained is not None and "SequenceClassification" in (found.trained.architecture or "")


def _title(base: str, identity: str | None) -> str:
    """A readable name; of a folder only the last part, since the rest reveals a user's paths."""
    if identity or not base:
        return identity or "a model without a name"
    parts = [part for part in re.split(r"[/\\]+", base) if part]
    return f"the local model `{parts[-1] if parts else base}`"


def _hub_id(base: str) -> str | None:
    """The id of a base model on the hub; None if its name contains none."""
    from ..support.base_models import PACKAGED

    packaged = next((model for model in PACKAGED if model.name == base), None)
    if packaged is not None:
        return packaged.hub_id
    if is_hub_id(base):
        return base
    cached = re.search(r"models--([A-Za-z0-9._-]+?)--([A-Za-z0-9._-]+)[/\\]+snapshots[/\\]", base)
    found = f"{cached[1]}/{cached[2]}" if cached else ""
    return found if ID.fullmatch(found) else None


def _licence_of(base: str) -> _Licence:
    from ..support.base_models import PACKAGED

    packaged = next((model for model in PACKAGED if model.name == base), None)
    if packaged is not None:
        return _Licence(packaged.licence)
    path = Path(base)
    if path.suffix == ".gguf" and path.is_file():
        return _licence_of_gguf(path)
    if base and path.is_dir():
        return _licence_of_card(path / CARD_NAME)
    if is_hub_id(base):
        return _licence_of_repository(base)
    return _Licence()


def _licence_of_card(path: Path) -> _Licence:
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception:  # no card, or an unreadable one
        return _Licence()
    found = [getattr(said, key, None) for key in ("license", "license_name", "license_link")]
    return _Licence(*(value if isinstance(value, str) and value else None for value in found))


def _licence_of_repository(repository: str) -> _Licence:
    import huggingface_hub

    try:
        with bars_on_terminals_only():
            path = huggingface_hub.hf_hub_download(repository, CARD_NAME, etag_timeout=5)
    except Exception:  # no network, no card, no access: the licence is unknown
        return _Licence()
    return _licence_of_card(Path(path))


def _licence_of_gguf(path: Path) -> _Licence:
    try:
        from gguf import GGUFReader

        field = GGUFReader(str(path)).fields.get("general.license")
        return _Licence(None if field is None else bytes(field.parts[-1]).decode() or None)
    except Exception:  # as of a card
        return _Licence()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
