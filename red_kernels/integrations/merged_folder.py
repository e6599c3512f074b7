"""`red-kernels merge`: a base model and a folder of edits into a folder that plain transformers loads."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from ..checkpoint import HEAD_NAME, load_edits, saved_config
from ..merge import MergeReport, merge
from ..patch import patch

__all__ = ["merge_folder"]

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge_folder(
    model: str,
    edits: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    force: bool = False,
    overwrite: bool = False,
) -> tuple[MergeReport, tuple[str, ...]]:
    """Merge saved edits into their base model, and save the whole as transformers does, with its tokenizer.

    The folder is written under a temporary name beside its place and renamed.

    Args:
        model: the base model's folder or hub id.
        edits: a folder made by `rk.save_edits`.
        output: the folder to write.
        dtype: of the weights that are saved: `"auto"` (as the base model is stored), `"fp32"`, `"bf16"` or `"fp16"`.
        force: as for `rk.merge`.
        overwrite: replace the output folder.

    Returns:
        The `MergeReport`, and notes on what else there is to know.

    Raises:
        ValueError: an unknown dtype, edits that do not fit the model, cannot be merged or have a trained head beside
            them.
        FileExistsError: the output is there, without `overwrite`.
        FileNotFoundError, OSError: model or edits cannot be found, the output cannot be written; what was there stays.
    """
    target = Path(output)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(map(repr, DTYPES))}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"output: {str(target)!r} is there already; pass --overwrite to replace it")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"output: {str(target)!r} is a file, expected a folder")
    config = saved_config(edits)
    if (Path(edits) / HEAD_NAME).exists():
        raise ValueError(
            f"edits: {str(edits)!r} holds a trained head ({HEAD_NAME}), which would be missing from the merged model; "
            "load it into the model yourself, and merge that by rk.merge(model)"
        )
    loaded = _load(model, DTYPES[dtype])
    patch(loaded, config)
    load_edits(loaded, edits)
    report = merge(loaded, force=force, keep_original=False)
    notes = []
    beside = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary, former = beside.with_suffix(".tmp"), beside.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        loaded.save_pretrained(temporary)
        try:
            transformers.AutoTokenizer.from_pretrained(model).save_pretrained(temporary)
        except (OSError, ValueError, KeyError) as error:
            notes.append(f"no tokenizer was saved: {str(error).partition(chr(10))[0]}")
        if target.exists():
            os.replace(target, former)
        os.replace(temporary, target)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if former.exists() and not target.exists():
            os.replace(former, target)
        raise
    return report, tuple(notes)


def _load(name: str, dtype: Any) -> Any:
    """The model in its own class, as its config names it."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model: the folder {name!r} has no config.json; expected one that save_pretrained wrote"
        )
    config = transformers.AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model: {name!r} is quantised; merge into the base model in half or full precision")
    names = getattr(config, "architectures", None) or [None]
    kind = getattr(transformers, names[0] or "", None)
    if kind is None:
        raise ValueError(f"model: {name!r} names the class {names[0]!r}, which transformers does not have")
    return kind.from_pretrained(name, dtype=dtype).eval()
