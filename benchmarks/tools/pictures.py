"""Draws the pictures of README.md and docs/ as SVG: `python -m benchmarks.tools.pictures`; `--check` only compares.

Each picture has a light and a dark version, in docs/pictures/. `edit` shows the passes over memory of an edit in eager
PyTorch and here. `layer` shows what is fused in a Llama and a BERT layer: the modules in the order in which a tiny
model calls them, and what the report of the patched model says of each site.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "pictures"
FONT = "ui-sans-serif, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
# What an eager pass reads and writes, in activations (rows x width). A norm of several kernels moves more.
EAGER = (
    ("a = scale * h", ("h",), ("a",)),
    ("b = a + bias", ("a",), ("b",)),
    ("z = residual + b", ("residual", "b"), ("z",)),
    ("y = RMSNorm(z)", ("z",), ("y",)),
)
FUSED = (("z = residual + scale * h + bias", "y = RMSNorm(z)"), ("h", "residual"), ("z", "y"))


@dataclass(frozen=True)
class Palette:
    """The colours of one version."""

    text: str
    faint: str
    line: str
    box: str
    accent: str
    accent_box: str
    memory: str


PALETTES = {
    "light": Palette("#1f2328", "#59636e", "#818b98", "#f6f8fa", "#0969da", "#ddf4ff", "#eaeef2"),
    "dark": Palette("#e6edf3", "#9198a1", "#7d8590", "#161b22", "#4493f8", "#0c2044", "#21262d"),
}


@dataclass
class Canvas:
    """An SVG in the making; sizes in pixels."""

    width: int
    height: int
    palette: Palette
    title: str
    parts: list[str] = field(default_factory=list)

    def box(
        self, x: float, y: float, width: float, height: float, *, accent: bool = False, dashed: bool = False
    ) -> None:
        """A rectangle; a dashed one is a frame around others."""
        p = self.palette
        fill = "none" if dashed else p.accent_box if accent else p.box
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
            f'stroke="{p.accent if accent else p.line}" stroke-width="{1.5 if accent else 1}"{dash}/>'
        )

    def memory(self, x: float, y: float, height: float) -> None:
        """The bar that stands for memory."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="18" height="{height:g}" rx="3" fill="{self.palette.memory}"/>'
        )
        middle = f"{x + 9:g},{y + height / 2:g}"
        self.parts.append(
            f'<text transform="translate({middle}) rotate(-90)" text-anchor="middle" dominant-baseline="central" '
            f'font-size="11" fill="{self.palette.faint}">memory</text>'
        )

    def text(self, x: float, y: float, words: str, *, size: int = 13, kind: str = "", anchor: str = "middle") -> None:
        """A line of text around a height; kinds: "" plain, "faint", "bold", "code"."""
        fill = self.palette.faint if kind == "faint" else self.palette.text
        more = (
            ' font-weight="600"'
            if kind == "bold"
            else ' font-family="ui-monospace, Menlo, monospace"' * (kind == "code")
        )
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" dominant-baseline="central" '
            f'fill="{fill}"{more}>{html.escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float], accent: bool = False) -> None:
        """A line through points with a head at its end."""
        p = self.palette
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{p.accent if accent else p.line}" stroke-width="1.5" '
            f'marker-end="url(#{"accent" if accent else "plain"})"/>'
        )

    def svg(self) -> str:
        """The file's text."""
        p = self.palette
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0.5 L8,4 L0,7.5 z" fill="{color}"/></marker>'
            for name, color in (("plain", p.line), ("accent", p.accent))
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="{FONT}" role="img">',
            f"<title>{html.escape(self.title)}</title>",
            f"<defs>{heads}</defs>",
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def edit_picture(palette: Palette) -> str:
    """The edit as separate passes over memory, and as one."""
    moved = sum(len(reads) + len(writes) for _, reads, writes in EAGER)
    lines, reads, writes = FUSED
    ours = len(reads) + len(writes)
    canvas = Canvas(860, 330, palette, f"An edit in eager PyTorch moves {moved} activations, fused {ours}")
    left, right, wide, top = 150, 555, 170, 58
    canvas.text(left + wide / 2, 20, f"eager PyTorch: {len(EAGER)} passes", size=16, kind="bold")
    canvas.memory(20, top - 6, 58 * len(EAGER) - 2)
    for number, (words, ins, outs) in enumerate(EAGER):
        y = top + 58 * number
        canvas.box(left, y, wide, 44)
        canvas.text(left + wide / 2, y + 22, words, kind="code")
        ends = [(name, True) for name in ins] + [(name, False) for name in outs]
        for place, (name, read) in enumerate(ends):
            height = y + 44 * (place + 0.5) / len(ends)
            _transfer(canvas, 38, left, height, name, read)
    canvas.text(left + wide / 2, 302, f"reads and writes at least {moved} activations", kind="faint")

    canvas.text(right + 110, 20, "red-kernels: 1 pass", size=16, kind="bold")
    canvas.memory(430, top - 6, 58 * len(EAGER) - 2)
    y, height = top + 44, 128
    canvas.box(right, y, 270, height, accent=True)
    for number, words in enumerate(lines):
        canvas.text(right + 135, y + height * (number + 0.5) / len(lines), words, kind="code")
    ends = [(name, True) for name in reads] + [(name, False) for name in writes]
    for place, (name, read) in enumerate(ends):
        _transfer(canvas, 448, right, y + height * (place + 0.5) / len(ends), name, read, accent=True)
    canvas.text(right + 110, 302, f"reads and writes {ours} activations", kind="faint")
    return canvas.svg()


def _transfer(
    canvas: Canvas, memory: float, box: float, y: float, name: str, read: bool, *, accent: bool = False
) -> None:
    start, end = (memory + 4, box - 4) if read else (box - 4, memory + 4)
    canvas.arrow((start, y), (end, y), accent=accent)
    canvas.text((memory + box) / 2, y - 7, name, size=11, kind="faint")


@dataclass(frozen=True)
class Step:
    """One module, or several side by side, of a layer: what it is, and of a site the edit's pass.

    Attributes:
        words: the names of the modules.
        parent: the module of the layer that they are in; "" for the layer itself.
        fused: of a site what its edit is fused with, as the report says; else None.
        norm: of a site the norm of its pass; None where there is none.
    """

    words: tuple[str, ...]
    parent: str
    fused: str | None = None
    norm: str | None = None


def layer_steps(model: Any, layers: str, ids: Any) -> list[Step]:
    """The modules of the first layer in the order of their calls, with the edits of position `ffn_attn`.

    Args:
        model: a model of transformers with at least two layers; it is patched.
        layers: the name of its list of layers.
        ids: integers `(batch, length)` to call it with.

    Raises:
        ValueError: a site is not fused with an addition.
    """
    import red_kernels as rk

    order: list[tuple[str, bool]] = []
    hooks = [
        module.register_forward_hook(_noter(order, name, "norm" in type(module).__name__.lower()))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    report = rk.patch(model, rk.RedConfig(position="ffn_attn"))
    model(input_ids=ids)
    fused = {site.site: site.fused for site in report.sites}
    if None in fused.values():
        raise ValueError(f"expected every site fused, got {fused}")
    first = f"{layers}.0."
    steps: list[Step] = []
    taken: set[int] = set()
    for number, (name, _) in enumerate(order):
        if not name.startswith(first) or number in taken or name.endswith("dropout"):
            continue
        short = name.removeprefix(first)
        parent, _, leaf = short.rpartition(".")
        parent = parent.partition(".")[0]
        if name in fused:
            norm = next(at for at in range(number, len(order)) if order[at][1])
            taken.add(norm)
            inside = order[norm][0].startswith(first)
            shown = (
                order[norm][0].removeprefix(first) if inside else f"next layer's {order[norm][0].rpartition('.')[2]}"
            )
            steps.append(Step((short,), parent, fused[name], shown))
        elif steps and steps[-1].fused is None and steps[-1].parent == parent and parent:
            steps[-1] = Step((*steps[-1].words, leaf), parent)
        else:
            steps.append(Step((short,), parent))
    return steps


def _noter(order: list[tuple[str, bool]], name: str, norm: bool) -> Callable[..., None]:
    def note(module: Any, args: Any, output: Any) -> None:
        order.append((name, norm))

    return note


def layer_picture(palette: Palette) -> str:
    """What is fused where in a Llama and a BERT layer."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    ids = torch.randint(0, 64, (2, 5))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    columns = {
        "Llama: norm before": layer_steps(llama, "model.layers", ids),
        "BERT: norm behind": layer_steps(bert, "bert.encoder.layer", ids),
    }
    tall = max(_column_height(steps) for steps in columns.values())
    canvas = Canvas(860, tall + 96, palette, "What is fused where in a Llama layer and a BERT layer, position ffn_attn")
    for x, (title, steps) in zip((30, 460), columns.items(), strict=True):
        canvas.text(x + 200, 18, title, size=16, kind="bold")
        _column(canvas, x, 48, steps)
    canvas.box(250, tall + 64, 26, 18, accent=True)
    canvas.text(286, tall + 73, "one pass over memory: edit, residual add and norm", kind="faint", anchor="start")
    return canvas.svg()


GAP, PLAIN, PASS = 24, 32, 88


def _column_height(steps: Sequence[Step]) -> int:
    return sum(PLAIN + GAP + (PASS + GAP if step.fused else 0) for step in steps) + GAP


def _column(canvas: Canvas, x: float, y: float, steps: Sequence[Step]) -> None:
    middle, left, wide = x + 210, x + 50, 320
    canvas.text(middle, y - 6, "stream", size=11, kind="faint")
    stream = y + GAP / 3
    for step in steps:
        canvas.arrow((middle, y), (middle, y + GAP - 1))
        y += GAP
        canvas.box(left, y, wide, PLAIN)
        canvas.text(middle, y + PLAIN / 2, ", ".join(step.words), kind="code", size=12)
        y += PLAIN
        if step.fused is None:
            continue
        canvas.arrow((middle, y), (middle, y + GAP - 1), accent=True)
        canvas.text(middle + 10, y + GAP / 2 - 2, "h", size=11, kind="faint")
        y += GAP
        canvas.box(left, y, wide, PASS, accent=True)
        dropout = ", dropout" if "dropout" in step.fused else ""
        canvas.text(middle, y + 16, f"scale * h + bias{dropout}", kind="code", size=12)
        canvas.text(middle, y + 36, "+ residual", kind="code", size=12)
        canvas.text(middle, y + 56, str(step.norm), kind="code", size=12)
        canvas.text(middle, y + 75, f"report: {step.fused}", size=11, kind="faint")
        # The stream passes by what lies between, and enters the pass.
        canvas.arrow((middle, stream), (x + 20, stream), (x + 20, y + 36), (left - 1, y + 36), accent=True)
        y += PASS
        stream = y + GAP / 3
    canvas.arrow((middle, y), (middle, y + GAP - 1))


PICTURES: dict[str, Callable[[Palette], str]] = {"edit": edit_picture, "layer": layer_picture}


def draw(names: Sequence[str] = tuple(PICTURES)) -> dict[str, str]:
    """File name to text, of each picture in both versions."""
    return {f"{name}-{look}.svg": PICTURES[name](palette) for name in names for look, palette in PALETTES.items()}


def main(arguments: list[str] | None = None) -> int:
    """Write, or compare; returns 1 where a file differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.pictures", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write no file; fail if a picture differs")
    chosen = parser.parse_args(arguments)
    differing = []
    for name, text in draw().items():
        path = FOLDER / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            differing.append(name)
            if not chosen.check:
                FOLDER.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    print(f"{'differ' if chosen.check else 'written'}: {', '.join(differing) or 'none'}")
    return 1 if chosen.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
