"""`red-kernels convert`: saved edits from one form to another: our own, the authors', and PEFT's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..edits.config import POSITIONS, RedConfig
from ..support.require import require
from ..support.text import listed
from .authors import CLASSIFIER_NAME, HEAD, VECTORS_NAME, inner_prefix, write_authors
from .checkpoint import write_saved
from .folder import CONFIG_NAME, HEAD_NAME, TENSORS_NAME, Base, Head, Saved, config_of, make_saved
from .found import Found
from .infer import config_from_model, config_from_names, kind_of
from .peft_names import TENSORS_NAMES as PEFT_TENSORS
from .peft_write import PEFT_NAMES, beside_own, whole_layers, write_peft
from .reading import located, read
from .vectors import SiteTensors

__all__ = ["FORMS", "Conversion", "convert", "model_on_meta"]

OWN, AUTHORS, PEFT = FORMS = ("own", "authors", "peft")
_OWN_CODE = {"trust_remote_code": False}
_NO_POSITION = {
    OWN: "the authors' form does not hold one; the folder states its own",
    PEFT: "a PEFT folder names its sites itself",
}


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`; `print` shows it in a few lines.

    Attributes:
        files: the written files.
        sites: the number of sites.
        parameters: the number of values in the vectors.
        what: the position and kind, if the files state them; and the source of an inferred position.
        notes: further remarks.
    """

    files: tuple[Path, ...]
    sites: int
    parameters: int
    what: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.parameters:,} parameters at {self.sites} sites; {self.what}"]
        lines += [f"wrote {path}" for path in self.files]
        return "\n".join(lines + [f"note: {text}" for text in self.notes])


def convert(
    source: str | Path,
    output: str | Path,
    model: str | None = None,
    position: str | None = None,
    overwrite: bool = False,
    to: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Convert edits from one form to another: a folder of `rk.save_edits`, the authors' files, a folder of PEFT.

    The files of `source` determine its form. All files of the output are written together or not at all. No weights are
    read: a model is built from its configuration alone, on the meta device.

    Args:
        source: a folder, or a file `delta_vector.pth` or `red_edits.safetensors`. If the folder is named, a trained
            head next to the edits is converted too. It may also be the folder of a RED adapter saved by PEFT, with its
            trained `modules_to_save`; the folder of a run of `red-kernels finetune`; or, as text, a hub id of one of
            these.
        output: another folder; created if missing.
        model: the base model: the name of a packaged one, a folder, a `config.json`, a `.gguf` file or a hub id. From
            the authors' form it gives position, layers and site names, and widths are checked; without it, only the
            names do. To the authors' form it is needed if the files do not state the prefix that the authors' names
            omit.
        position: from the authors' form, the position, if it cannot be inferred.
        overwrite: replace files of an earlier conversion.
        to: the form of the output: `"own"`, `"authors"` or `"peft"`; None for `"authors"` from a folder of
            `rk.save_edits`, and for `"own"` from the others.
        revision: branch, tag or commit of the repository, where `source` is a hub id.

    Raises:
        ValueError: a damaged or foreign file; an unknown form, or that of the source; a position that cannot be
            inferred, with the reason; a model that does not fit; trained parameters for which the authors' form has no
            place.
        FileExistsError: the output has such files already, and `overwrite` is False.
        OSError: the source or the model does not exist, or the output cannot be written.
    """
    if to is not None and to not in FORMS:
        raise ValueError(f"to: got {to!r}, expected one of {', '.join(map(repr, FORMS))}")
    place = located(source, revision)
    found = read(place)
    form = PEFT if found.source.name in PEFT_TENSORS else OWN if found.source.suffix == ".safetensors" else AUTHORS
    to = to or (AUTHORS if form == OWN else OWN)
    if to == form:
        raise ValueError(f"to: got {to!r}, but {str(source)!r} is in that form already")
    target = Path(output)
    if target.exists() and target.resolve() == found.source.parent.resolve():
        raise ValueError(f"output: {str(target)!r} is the folder of the source; each form needs its own folder")
    if position is not None and position not in tuple(POSITIONS):
        raise ValueError(f"position: got {position!r}, supported: {', '.join(map(repr, POSITIONS))}")
    if position is not None and form != AUTHORS:
        raise ValueError(f"position: got {position!r}, but {_NO_POSITION[form]}; omit the option")
    if to == AUTHORS and form != AUTHORS:
        return _to_authors(found, place, target, model, overwrite)
    content = _content(found, place, form, model, position)
    return (_to_own if to == OWN else _to_peft)(content, target, overwrite)


@dataclass(frozen=True)
class _Content:
    """The content to convert, with the names of the model's own form."""

    config: RedConfig
    vectors: SiteTensors
    base: Base
    prefix: str
    head: Head | None
    what: str
    notes: list[str]

    def saved(self) -> Saved:
        return make_saved(self.config, self.vectors, self.base, self.prefix, self.head)


def _content(found: Found, source: Path, form: str, model: str | None, position: str | None) -> _Content:
    if form == AUTHORS:
        return _authors_content(found, source, model, position)
    if found.description is None:
        raise ValueError(
            f"{found.source}: has no description of its edits; name the folder that save_edits wrote, with a "
            f"{CONFIG_NAME} in it"
        )
    said = found.description
    base = Base.of(said)
    config = config_of(found.source, said)
    where = f"position {config.position!r}" if config.sites is None else "sites by their names"
    what = f"{where}, kind {config.kind!r}" + (", from an adapter of PEFT" if form == PEFT else "")
    notes = [] if found.trained is not None else _left_out(found.source.with_name(HEAD_NAME), source)
    notes += [found.newer] if found.newer else []
    return _Content(config, found.vectors, base, str(said.get("inner_prefix") or ""), found.trained, what, notes)


def _to_own(content: _Content, target: Path, overwrite: bool) -> Conversion:
    saved = content.saved()
    replaced = (*saved.names, CONFIG_NAME)  # the file of an earlier version is removed
    _refuse(target, (TENSORS_NAME, CONFIG_NAME, HEAD_NAME), replaced, overwrite)
    beside = beside_own(content.config, content.vectors, content.base, content.head)
    return _conversion(write_saved(target, saved, beside), content.vectors, content.what, content.notes)


def _to_peft(content: _Content, target: Path, overwrite: bool) -> Conversion:
    _refuse(target, (TENSORS_NAME, *dict.fromkeys((*PEFT_NAMES, *PEFT_TENSORS))), PEFT_NAMES, overwrite)
    write_peft(target, content.config, content.vectors, content.base, content.head)
    notes = [*content.notes, "PEFT loads it once red_kernels.integrations.peft is imported"]
    if content.config.edit_kind.shared:
        notes.append("PEFT will warn of missing keys: those of other sites that share their vectors")
    if whole_layers(content.config):
        notes.append("PEFT cannot wrap a whole layer: it refuses the adapter if a site is one")
    files = tuple(target / name for name in PEFT_NAMES)
    return _conversion(files, content.vectors, f"{content.what}, in PEFT's form", notes)


def _left_out(beside: Path, source: Path) -> list[str]:
    if not source.is_file() or not beside.exists():
        return []
    return [f"{beside.name} next to the file was not converted; name the folder to convert both"]


def model_on_meta(name: str) -> nn.Module:
    """A transformers model without values, built from its configuration.

    Args:
        name: the name of a packaged model, a folder with a `config.json`, that file, a `.gguf` file or a hub id.

    Raises:
        ModuleNotFoundError: transformers is missing.
        OSError: the model does not exist, or cannot be reached.
        ValueError: its configuration is not that of a model.
    """
    transformers = require("transformers", "reading a model's configuration")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: the folder {name!r} has no config.json")
    try:
        from ..support.base_models import PACKAGED, described_base, named_class

        known = path.suffix == ".gguf" or any(one.name == name for one in PACKAGED)
        config = described_base(name) if known else transformers.AutoConfig.from_pretrained(name, **_OWN_CODE)
        kind = named_class(config)
        with torch.device("meta"):
            if kind is not None:
                return kind(config)
            # A GGUF file names no class; it contains a language model.
            auto = transformers.AutoModelForCausalLM if known else transformers.AutoModel
            return auto.from_config(config, **_OWN_CODE)
    except (ModuleNotFoundError, FileNotFoundError):
        raise  # of a package, or of the file, with what to do
    except Exception as error:  # whatever a parser of damaged files may raise means the same here
        reason = str(error).partition("\n")[0]
        if path.exists():
            raise ValueError(f"model: {name!r} has no usable configuration: {reason}") from error
        raise OSError(f"model: {name!r} is no file or folder, and could not be found on the hub: {reason}") from error


def _authors_content(found: Found, source: Path, model: str | None, position: str | None) -> _Content:
    vectors = {
        # fp32 at least, as in patched models
        site: {part: own.to(torch.promote_types(own.dtype, torch.float32), copy=True) for part, own in parts.items()}
        for site, parts in found.vectors.items()
    }
    if model is None:
        config = config_from_names(found.source, vectors, position)
        told = "inferred from the names" if position is None else "as given"
        prefix = ""
    else:
        base = model_on_meta(model)
        config, mapping = config_from_model(found.source, vectors, base, position)
        vectors = {mapping[site]: parts for site, parts in vectors.items()}
        told = f"inferred from {type(base).__name__}"
        prefix = inner_prefix(base, vectors)
    head = Head({f"{HEAD}.{name}": own for name, own in found.head.items()}) if found.head else None
    notes = [] if head is not None else _left_out(source.with_name(CLASSIFIER_NAME), source)
    layers = "" if config.layers is None else f" in the layers {listed([str(layer) for layer in config.layers])}"
    what = f"position {config.position!r}{layers} ({told}), kind {config.kind!r}"
    return _Content(config, vectors, Base(model), prefix, head, what, notes)


def _to_authors(found: Found, source: Path, target: Path, model: str | None, overwrite: bool) -> Conversion:
    kind = kind_of(found.source, found.vectors)
    if model is not None:
        prefix = inner_prefix(model_on_meta(model), found.vectors)
    else:
        said = (found.description or {}).get("inner_prefix")
        if said is None:
            raise ValueError(
                f"{found.source}: the description has no entry 'inner_prefix', so the part of site names that the "
                f"authors' names omit is unknown, such as {next(iter(found.vectors))}; pass --model with the base "
                "model's id, folder or config.json"
            )
        prefix = str(said)
    head = {} if found.trained is None else _authors_head(found, found.trained)
    notes = [] if found.trained is not None else _left_out(found.source.with_name(HEAD_NAME), source)
    notes += [found.newer] if found.newer else []
    names = [VECTORS_NAME, *([CLASSIFIER_NAME] if head else [])]
    _refuse(target, (VECTORS_NAME, CLASSIFIER_NAME), names, overwrite)
    write_authors(target, found.vectors, prefix, head)
    what = f"kind {kind!r}, in the authors' form" + (f" ({prefix!r} removed from the site names)" if prefix else "")
    return _conversion(tuple(target / name for name in names), found.vectors, what, notes)


def _authors_head(found: Found, head: Head) -> dict[str, torch.Tensor]:
    other = [name for name in head.values if not name.startswith(f"{HEAD}.")]
    if other:
        raise ValueError(
            f"{found.head_source}: holds {listed(other)}, for which the authors' form has no place beside {HEAD!r}; "
            f"name {TENSORS_NAME} itself to convert the vectors alone"
        )
    return {name.removeprefix(f"{HEAD}."): value for name, value in head.values.items()}


def _refuse(target: Path, possible: tuple[str, ...], new: Iterable[str], overwrite: bool) -> None:
    """Refuse existing files: a file left next to the new ones would not match them."""
    there = [name for name in possible if (target / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"output: {str(target)!r} has {listed(there)}; pass --overwrite to replace them")
    staying = [name for name in there if name not in new]
    if staying:
        raise ValueError(
            f"output: {str(target)!r} has {listed(staying)}, which would not belong to the new files; choose another "
            "folder or remove it"
        )


def _conversion(files: tuple[Path, ...], vectors: SiteTensors, what: str, notes: list[str]) -> Conversion:
    parameters = sum(own.numel() for parts in vectors.values() for own in parts.values())
    return Conversion(files, len(vectors), parameters, what, tuple(notes))
