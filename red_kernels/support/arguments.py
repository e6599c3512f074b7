"""Reading the command line: errors show the usage of the current command, and a likely correction."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from .parse import MOST_LAYERS, layer_number, shown

__all__ = ["Parser", "layers"]

# Other programs' names of these options; the nearest spelling would be wrong.
_OTHER_NAMES = {
    "--adapter": "--edits",
    "--base-model": "--model",
    "--batch": "--batch-size",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--early-stopping-patience": "--patience",
    "--eval-steps": "--eval-every",
    "--gradient-accumulation-steps": "--accumulate",
    "--gradient-checkpointing": "--checkpointing",
    "--lr-scheduler-type": "--schedule",
    "--max-grad-norm": "--clip",
    "--max-length": "--length",
    "--max-seq-length": "--length",
    "--max-steps": "--steps",
    "--model-name": "--model",
    "--model-name-or-path": "--model",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--out-dir": "--output",
    "--output-dir": "--output",
    "--per-device-train-batch-size": "--batch-size",
    "--save-steps": "--save-every",
    "--scheduler": "--schedule",
    "--seq-length": "--length",
    "--target-modules": "--sites",
    "--test-size": "--held-out",
    "--time": "--minutes",
    "--train-file": "--data",
    "--validation-split": "--held-out",
    "--warmup-ratio": "--warmup",
    "--warmup-steps": "--warmup",
}


class Parser(argparse.ArgumentParser):
    """A parser that refuses unknown options itself.

    argparse passes unknown options of a command to the top level, whose usage lacks the command's options.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but unknown arguments are an error, so the returned list of them is empty."""
        if args is not None and self._subparsers is None:  # before an unknown option's value is taken for another's
            known = [option for option in self._option_string_actions if option.startswith("--")]
            given = args[: args.index("--")] if "--" in args else args
            options = [text.partition("=")[0] for text in given if text.startswith("--")]
            strange = [name for name in options if not any(option.startswith(name) for option in known)]
            if strange:
                self._refuse(strange)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return found, unknown

    def _refuse(self, unknown: list[str]) -> NoReturn:
        options = [name.partition("=")[0] for name in unknown if name.startswith("-") and len(name) > 1]
        if not options:
            self.error(f"unexpected {shown(unknown[0])}")
        meant = {name: self._meant(name) for name in options}
        self.error(
            "; ".join(f"{name}: unknown" + (f"; did you mean {near}?" if near else "") for name, near in meant.items())
        )

    def _meant(self, name: str) -> str:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        spelt = f"--{name.lstrip('-').replace('_', '-').lower()}"
        for candidate in (spelt, _OTHER_NAMES.get(spelt)):
            if candidate in known:
                return str(candidate)
        near = difflib.get_close_matches(spelt, known, n=1)
        return near[0] if near else ""


def layers(text: str) -> tuple[int, ...]:
    """`0-5,8` as (0, 1, 2, 3, 4, 5, 8). Raises argparse.ArgumentTypeError for an invalid or too long list."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        start, end = layer_number(first), layer_number(last if dash else first)
        if start is None or end is None:
            raise argparse.ArgumentTypeError(f"got {shown(text)}, expected layer indices such as 0-5,8")
        if end < start:
            raise argparse.ArgumentTypeError(f"got {part.strip()!r}, expected an end not below the start")
        if len(found) + end - start >= MOST_LAYERS:
            raise argparse.ArgumentTypeError(f"got {shown(text)}, expected at most {MOST_LAYERS:,} layers")
        found.extend(range(start, end + 1))
    return tuple(found)
