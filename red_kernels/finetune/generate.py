"""`red-kernels generate`: continuations of prompts, with edits by name, next to those of the base model."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

__all__ = ["add_options", "run"]

BASE = "base"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="[NAME=]SOURCE",
        help="edits of one base model: runs' folders, folders of saved edits or hub ids; NAME= names them, and the "
        "default is the folder's name",
    )
    parser.add_argument(
        "--prompt", action="append", help="repeat it for several prompts (default: lines of standard input)"
    )
    parser.add_argument("--model", help="the base model (default: the one that the edits name)")
    parser.add_argument("--base", action="store_true", help="also show the base model's continuation")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="most new tokens (default: 64)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sample at this temperature (default: take the likeliest token)"
    )
    parser.add_argument("--seed", type=int, help="the seed of sampling at a --temperature (default: 0)")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the model's chat template (default: if it has one)",
    )
    parser.add_argument("--template", metavar="FILE", help="a chat template (default: the run's, or the model's own)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if available)")


def run(options: argparse.Namespace) -> int:
    """The command.

    Raises:
        ValueError: two edits of one name, an invalid name, a number out of range, an option without effect, a chat
            without a template, edits that do not fit the first one's base model.
    """
    import torch

    from ..checkpoints.checkpoint import load_edits
    from ..checkpoints.whole import from_pretrained, load_tokenizer
    from ..edits.named import active_edit, disable_edits, use_edits
    from .watching import continued

    if options.new_tokens < 1:
        raise ValueError(f"new_tokens: got {options.new_tokens}, expected at least 1")
    if options.temperature is not None and not 0 < options.temperature < float("inf"):
        raise ValueError(f"temperature: got {options.temperature}, expected a number above 0")
    if options.seed is not None and options.temperature is None:
        raise ValueError(f"seed: got {options.seed}, which has no effect: without temperature nothing is sampled")
    if options.template is not None and options.chat is False:
        raise ValueError(f"template: got {options.template!r}, which has no effect with no_chat")
    sources = _named(options.sources)
    (first, folder), *others = sources.items()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = from_pretrained(folder, base=options.model, device=device)
    if not model.can_generate():
        raise ValueError(f"source: {folder!r} is of a {type(model).__name__}, which generates no text")
    tokenizer = load_tokenizer(folder, base=options.model)
    templates = {name: _template(source, options) or tokenizer.chat_template for name, source in sources.items()}
    templates[BASE] = templates[first]
    if options.chat and not all(templates.values()):
        raise ValueError("chat: the model's tokenizer has no chat template; pass one by template")
    for name, other in others:
        load_edits(model, other, name)
    active = active_edit(model)
    blocks: dict[str, AbstractContextManager[Any]] = {BASE: disable_edits(model)} if options.base else {}
    for name in sources:
        blocks[name] = use_edits(model, [active if name == first else name])
    for prompt in options.prompt or (line.rstrip("\n") for line in sys.stdin):
        if len(options.prompt or ()) != 1:
            print(f"> {prompt}")
        for name, block in blocks.items():
            torch.manual_seed(options.seed or 0)
            tokenizer.chat_template = templates[name]
            with block:
                text = continued(model, tokenizer, prompt, options.new_tokens, options.chat, options.temperature)
            print(f"{name}: {text}" if len(blocks) > 1 else text, flush=True)
    return 0


def _template(source: str, options: argparse.Namespace) -> str | None:
    """The given chat template, or that of an edit's run; None for the model's own."""
    from .run_folder import EDITS_NAME, RUN_NAME, former_run
    from .settings import chat_template

    path = options.template
    folder = Path(source).parent if Path(source).name == EDITS_NAME else Path(source)
    if path is None and options.chat is not False and (folder / RUN_NAME).is_file():
        path = former_run(folder, "source")["settings"].get("template")
    return chat_template(path)


def _named(sources: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in sources:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            source = text
            path = Path(text)
            name = (path.parent if path.name == "edits" and path.parent.name else path).name.replace(".", "-")
        if not name or not source:
            raise ValueError(f"source: got {text!r}, expected SOURCE or NAME=SOURCE")
        if name in found or name == BASE:
            raise ValueError(f"source: the name {name!r} is taken; pass another one by NAME={source}")
        found[name] = source
    return found
