"""`red-kernels merge`: a base model and a folder of edits into a folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.base import DTYPES, load_source, source_of, source_tokenizer
from ..checkpoints.checkpoint import Found, load_found, located
from ..checkpoints.folder import config_of
from ..checkpoints.reading import read_described
from ..patching.patch import patch
from ..support.base_models import quietly
from ..support.output_folder import check_output, writing
from ..support.replaced import OutputFolder, refuse_overlap
from ..support.text import listed
from .merge import MergeReport, is_finite, merge, unfinite

__all__ = ["merge_folder"]


def merge_folder(
    model: str,
    edits: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    force: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    model_revision: str | None = None,
    say: Callable[[str], object] | None = None,
) -> tuple[MergeReport, tuple[str, ...]]:
    """Merge saved edits into their base model, and save the result as transformers does, with its tokenizer.

    A trained head next to the edits goes into a model of the class of its training, with the names of its labels. The
    folder is written under a temporary name next to its place and moved there in one step, with a `red_merge.json` that
    lists its files.

    Args:
        model: the base model's folder or hub id, a `.gguf` file, or the name of a packaged model.
        edits: a folder of `rk.save_edits`, `red-kernels finetune` or `RedTrainer`, or of a RED adapter saved by PEFT;
            or, as text, a hub id of one of these.
        output: the folder to write.
        dtype: of the saved weights: `"auto"` (the base model's; fp32 for a `.gguf` file), `"fp32"`,
            `"bf16"` or `"fp16"`.
        force: as for `rk.merge`.
        overwrite: replace the output folder, if this function wrote it and it has no other files.
        revision: branch, tag or commit of the edits' repository on the hub.
        model_revision: that of the base model's.
        say: called with a line for each stage, before it starts.

    Returns:
        The `MergeReport`, and further remarks.

    Raises:
        ValueError: an unknown dtype; edits that do not fit the model or cannot be merged; a head that fits no class of
            the model; a damaged file; an output that equals, contains or is inside the model or the edits.
        FileExistsError: the output exists without `overwrite`, was not written by this function, has other files, or
            was created or changed by another process in the meantime.
        FileNotFoundError, OSError: model or edits cannot be found, or the output cannot be written; former files stay.
    """
    check_output(output, "output")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(map(repr, DTYPES))}")
    source = source_of(model, model_revision)
    place = located(edits, revision)
    inputs = {"the folder of the edits": place}
    refuse_overlap(output, inputs if source.path is None else {"the base model": source.path, **inputs})
    target = OutputFolder(output, overwrite)
    found = read_described(place, "edits", edits)
    for name, value in {} if found.trained is None else found.trained.values.items():
        if not is_finite(value):
            raise ValueError(f"{found.head_source}: {name} is not finite ({unfinite(value)})")
    say = say or (lambda stage: None)
    with target.written() as folder:
        say(f"Loading the model: {model}")
        loaded = load_source(source, DTYPES[dtype], found.trained)
        assert found.description is not None
        patch(loaded, config_of(found.source, found.description))
        report = load_found(loaded, found, place, None, strict=True)
        notes = [*report.warnings, *_rounded(loaded, found)]
        say("Merging")
        merged = merge(loaded, force=force, keep_original=False)
        tokenizer, reason = source_tokenizer(source)
        if tokenizer is None:
            notes.append(f"no tokenizer was saved: {reason}")
        say(f"Writing {output}")
        with writing(output), quietly():
            loaded.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    return merged, (*notes, *target.notes)


def _rounded(model: Any, found: Found) -> list[str]:
    """A note on a head that the model's dtype has rounded. Raises ValueError for a head too large for it."""
    own = dict(model.named_parameters(remove_duplicate=False))
    values = {} if found.trained is None else found.trained.values
    over = [name for name in values if name in own and not is_finite(own[name])]
    if over:
        raise ValueError(
            f"{found.head_source}: {listed(over)} would overflow {own[over[0]].dtype}; merge into --dtype fp32 or bf16"
        )
    lost = [name for name, value in values.items() if name in own and not torch.equal(own[name].to(value.dtype), value)]
    if not lost:
        return []
    dtype = str(own[lost[0]].dtype).removeprefix("torch.")
    return [f"the head was rounded to {dtype} ({listed(lost)}); --dtype fp32 keeps what was trained"]
