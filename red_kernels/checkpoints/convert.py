"""`red-kernels convert`: a checkpoint of the authors' form into a folder of `rk.save_edits`, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..edits.config import POSITIONS
from ..support.require import require
from ..support.text import listed
from .authors import CLASSIFIER_NAME, HEAD, VECTORS_NAME, inner_prefix, write_authors
from .checkpoint import Found, read, write_saved
from .folder import CONFIG_NAME, HEAD_NAME, TENSORS_NAME, Head, make_saved
from .infer import config_from_model, config_from_names, kind_of
from .peft_folder import is_peft_folder, own_content, read_peft_folder
from .vectors import SiteTensors

__all__ = ["Conversion", "convert", "model_on_meta"]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; `print` shows it in a few lines.

    Attributes:
        files: what was written.
        sites: how many sites the edits have.
        parameters: the number of values in the vectors.
        what: the position and kind, where the files say them; and what the position was told from.
        notes: what else there is to know.
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
) -> Conversion:
    """Convert edits from the authors' form to a folder of `rk.save_edits`, or the other way round.

    Which way is told by what `source` holds. All files of the output are written together or not at all. No weights are
    read: a model is built from its configuration alone, on the meta device.

    Args:
        source: a folder, or a file `delta_vector.pth` or `red_edits.safetensors`. A classifier head beside them is
            converted too where the folder is named. Or the folder of a RED adapter saved by PEFT, which becomes one of
            `rk.save_edits`; what `modules_to_save` has trained is converted with it.
        output: another folder; made if missing.
        model: the base model's hub id, folder or `config.json`. From the authors' form it tells position, layers and
            site names, and widths are checked; without it, names alone have to. To the authors' form it is needed for
            files that do not say what the authors' names leave out.
        position: from the authors' form, the position where it is not to be told.
        overwrite: replace files of an earlier conversion.

    Raises:
        ValueError: a damaged or foreign file; a position that cannot be told, with the reason; a model that does not
            fit; trained parameters for which the authors' form has no place.
        FileExistsError: the output has such files already, and `overwrite` is False.
        OSError: there is no such source or model, or the output cannot be written.
    """
    if is_peft_folder(source):
        return _from_peft(Path(source), Path(output), position, overwrite)
    found = read(Path(source))
    target = Path(output)
    if target.exists() and target.resolve() == found.source.parent.resolve():
        raise ValueError(f"output: {str(target)!r} is the folder of the source; the two forms need a folder each")
    if position is not None and position not in tuple(POSITIONS):
        raise ValueError(f"position: got {position!r}, supported: {', '.join(map(repr, POSITIONS))}")
    if found.source.suffix == ".safetensors":
        if position is not None:
            raise ValueError(f"position: got {position!r}, but the authors' form does not hold one; leave it out")
        return _to_authors(found, Path(source), target, model, overwrite)
    return _to_own(found, Path(source), target, model, position, overwrite)


def _from_peft(source: Path, target: Path, position: str | None, overwrite: bool) -> Conversion:
    if position is not None:
        raise ValueError(f"position: got {position!r}, but a PEFT folder names its sites itself; leave it out")
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"output: {str(target)!r} is the folder of the source; the two forms need a folder each")
    config, vectors, _, _ = read_peft_folder(source)
    content = own_content(source)
    _refuse(target, (TENSORS_NAME, CONFIG_NAME, HEAD_NAME), (*content.names, CONFIG_NAME), overwrite)
    write_saved(target, content)
    where = f"position {config.position!r}" if config.sites is None else "sites by their names"
    what = f"{where}, kind {config.kind!r}, from an adapter of PEFT"
    return _conversion(target, list(content.names), vectors, what, [])


def model_on_meta(name: str) -> nn.Module:
    """A transformers model without values, built from its configuration.

    Args:
        name: a hub id, a folder with a `config.json`, or that file.

    Raises:
        ModuleNotFoundError: transformers is missing.
        OSError: there is no such model, or it cannot be reached.
        ValueError: its configuration is not one of a model.
    """
    transformers = require("transformers", "reading a model's configuration")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: the folder {name!r} has no config.json")
    try:
        from ..support.base_models import named_class

        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = named_class(config)
        with torch.device("meta"):
            if kind is not None:
                return kind(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a parser of damaged files may raise means the same here
        reason = str(error).partition("\n")[0]
        if path.exists():
            raise ValueError(f"model: {name!r} has no configuration that can be used: {reason}") from error
        raise OSError(f"model: {name!r} is no file or folder, and could not be found on the hub: {reason}") from error


def _to_own(
    found: Found, source: Path, target: Path, model: str | None, position: str | None, overwrite: bool
) -> Conversion:
    notes = []
    vectors = {
        # fp32 at least, as patched models have them
        site: {part: own.to(torch.promote_types(own.dtype, torch.float32), copy=True) for part, own in parts.items()}
        for site, parts in found.vectors.items()
    }
    if model is None:
        config = config_from_names(found.source, vectors, position)
        told = "told from the names alone" if position is None else "as it was said"
        prefix = ""
    else:
        base = model_on_meta(model)
        config, mapping = config_from_model(found.source, vectors, base, position)
        vectors = {mapping[site]: parts for site, parts in vectors.items()}
        told = f"told from {type(base).__name__}"
        prefix = inner_prefix(base, vectors)
    head = Head({f"{HEAD}.{name}": own for name, own in found.head.items()}) if found.head else None
    saved = make_saved(config, vectors, model, prefix, head)
    if head is None and source.is_file() and source.with_name(CLASSIFIER_NAME).exists():
        notes.append(f"{CLASSIFIER_NAME} beside the file was left out; name the folder to convert it too")
    replaced = (*saved.names, CONFIG_NAME)  # that of an earlier version goes
    _refuse(target, (TENSORS_NAME, CONFIG_NAME, HEAD_NAME), replaced, overwrite)
    write_saved(target, saved)
    layers = "" if config.layers is None else f" in the layers {listed([str(layer) for layer in config.layers])}"
    what = f"position {config.position!r}{layers} ({told}), kind {config.kind!r}"
    return _conversion(target, list(saved.names), vectors, what, notes)


def _to_authors(found: Found, source: Path, target: Path, model: str | None, overwrite: bool) -> Conversion:
    kind = kind_of(found.source, found.vectors)
    if model is not None:
        prefix = inner_prefix(model_on_meta(model), found.vectors)
    else:
        said = (found.description or {}).get("inner_prefix")
        if said is None:
            raise ValueError(
                f"{found.source}: nothing says which part of its site names, such as {next(iter(found.vectors))}, the "
                f"authors' names leave out (the entry 'inner_prefix' of the description); pass --model with the base "
                "model's id, folder or config.json"
            )
        prefix = str(said)
    notes = []
    head: dict[str, torch.Tensor] = {}
    beside = found.source.with_name(HEAD_NAME)
    if found.trained is not None:
        head = _authors_head(beside, found.trained)
    elif beside.exists() and source.is_file():
        notes.append(f"{HEAD_NAME} beside the file was left out; name the folder to convert it too")
    names = [VECTORS_NAME, *([CLASSIFIER_NAME] if head else [])]
    _refuse(target, (VECTORS_NAME, CLASSIFIER_NAME), names, overwrite)
    write_authors(target, found.vectors, prefix, head)
    what = f"kind {kind!r}, in the authors' form" + (f" ({prefix!r} taken off the site names)" if prefix else "")
    return _conversion(target, names, found.vectors, what, notes)


def _authors_head(path: Path, head: Head) -> dict[str, torch.Tensor]:
    other = [name for name in head.values if not name.startswith(f"{HEAD}.")]
    if other:
        raise ValueError(
            f"{path}: holds {listed(other)}, for which the authors' form has no place beside {HEAD!r}; name "
            f"{TENSORS_NAME} itself to convert the vectors alone"
        )
    return {name.removeprefix(f"{HEAD}."): value for name, value in head.values.items()}


def _refuse(target: Path, possible: tuple[str, ...], new: Iterable[str], overwrite: bool) -> None:
    """Refuse files that are there; one that would stay beside the new ones would not belong to them."""
    there = [name for name in possible if (target / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"output: {str(target)!r} has {listed(there)}; pass --overwrite to replace them")
    staying = [name for name in there if name not in new]
    if staying:
        raise ValueError(
            f"output: {str(target)!r} has {listed(staying)}, which would not belong to the new files; choose another "
            "folder or remove it"
        )


def _conversion(target: Path, names: list[str], vectors: SiteTensors, what: str, notes: list[str]) -> Conversion:
    parameters = sum(own.numel() for parts in vectors.values() for own in parts.values())
    return Conversion(tuple(target / name for name in names), len(vectors), parameters, what, tuple(notes))
