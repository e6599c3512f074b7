"""`red-kernels merge`: a base model and a folder of edits into a folder that plain transformers loads."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import torch

from ..checkpoint import HEAD_NAME, load_edits, saved_config
from ..merge import MergeReport, merge
from ..patch import patch
from .base_models import load_as_saved, load_tokenizer, quietly
from .output_folder import check_output, writing
from .peft_folder import is_peft_folder, own_form

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
        edits: a folder made by `rk.save_edits`, or of a RED adapter saved by PEFT.
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
    check_output(output, "output")
    if is_peft_folder(edits):
        if Path(edits).resolve().is_relative_to(Path(output).resolve()):
            raise ValueError(f"output: {str(output)!r} is or holds the folder of the edits; choose another")
        with own_form(edits) as own:
            return merge_folder(model, own, output, dtype=dtype, force=force, overwrite=overwrite)
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
    tokenizer, without = load_tokenizer(model)
    loaded = load_as_saved(model, DTYPES[dtype])
    patch(loaded, config)
    load_edits(loaded, edits)
    report = merge(loaded, force=force, keep_original=False)
    notes = [] if tokenizer is not None else [f"no tokenizer was saved: {without}"]
    beside = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary, former = beside.with_suffix(".tmp"), beside.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        with writing(target), quietly():
            loaded.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
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
