"""Long runs on a small model: drift from the eager edit, memory, resuming, and many edits in one process.

    python -m benchmarks.tools.long_run --output results.json

Three models with the same weights learn the same batches: the fused edit, the eager edit, and the eager edit in fp64.
The distance of an fp32 run from the fp64 one is what rounding makes of it; a fused run whose distance is no larger than
the eager one's has no drift of its own. Memory is that of the process, and the number of objects that Python's garbage
collector knows. The fused run is done again, stopped and resumed twice with a new model each time, and its vectors are
compared bit by bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.patching.naive import naive_edit
from red_kernels.support.files import write_files

from ..harness import environment

VOCABULARY, HIDDEN, LAYERS = 256, 64, 2
BATCHES, ROWS, LENGTH = 64, 4, 32
RATE = 1e-2
LOOKS = 10
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def small_model(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama-shaped model with random weights; always the same."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(dtype).eval()


@dataclass
class Learner:
    """A model that learns by its vectors alone.

    Attributes:
        model: the whole one.
        vectors: what is trained, in the order of the sites.
        optimizer: of these; its rate falls to 0 over all steps.
        done: the steps so far.
    """

    model: Any
    vectors: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    done: int = 0

    @classmethod
    def of(cls, model: Any, vectors: list[nn.Parameter]) -> Learner:
        """At its first step."""
        return cls(model, vectors, torch.optim.AdamW(vectors, lr=RATE, weight_decay=0.0))

    @classmethod
    def fused(cls) -> Learner:
        """The patched model."""
        model = small_model()
        rk.patch(model)
        return cls.of(model, [own for parts in rk.edit_parameters(model).values() for own in parts.values()])

    @classmethod
    def eager(cls, dtype: torch.dtype) -> Learner:
        """The same edits as hooks, all of it in a dtype."""
        model = small_model(dtype)
        sites = [f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]
        return cls.of(model, naive_edit(model, sites, dtype=dtype).vectors())

    def step(self, ids: Tensor, steps: int) -> float:
        """Learn one batch; returns its loss, before the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * (1 - self.done / steps)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """The edits as a user saves them, and the optimizer's state."""
        rk.save_edits(self.model, folder)
        torch.save({"optimizer": self.optimizer.state_dict(), "done": self.done}, folder / "optimizer.pt")

    @classmethod
    def resumed(cls, folder: Path) -> Learner:
        """A new model that goes on from there."""
        learner = cls.fused()
        rk.load_edits(learner.model, folder)
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.done = state["done"]
        return learner


def batches() -> list[Tensor]:
    """What is learnt, over and over."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(BATCHES)]


def drift(steps: int) -> dict[str, Any]:
    """What the fused and the eager run differ by from the eager one in fp64, and the memory of the fused one.

    Returns:
        `looks`: for each tenth of the steps the number of the step, the mean loss since the last one by run, the
        largest and the mean difference of a vector's element by run, the process's bytes and the collector's objects.
    """
    data = batches()
    runs = {"fused": Learner.fused(), "eager": Learner.eager(torch.float32), "fp64": Learner.eager(torch.float64)}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    looks = []
    for step in range(1, steps + 1):
        for name, learner in runs.items():
            losses[name].append(learner.step(data[step % BATCHES], steps))
        if step % max(1, steps // LOOKS) == 0:
            far = {name: _distance(runs[name], runs["fp64"]) for name in ("fused", "eager")}
            mean = {name: statistics.fmean(own) for name, own in losses.items()}
            looks.append({"step": step, "loss": mean, "distance": far, **_memory()})
            losses = {name: [] for name in runs}
    moved = _distance(runs["fp64"], Learner.eager(torch.float64))
    return {"looks": looks, "moved": moved}


def _distance(one: Learner, other: Learner) -> dict[str, float]:
    parts = zip(one.vectors, other.vectors, strict=True)
    apart = torch.cat([(own.detach().double() - held.detach().double()).abs() for own, held in parts])
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def _memory() -> dict[str, int]:
    gc.collect()
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except OSError:
        resident = 0
    return {"resident_bytes": resident, "objects": len(gc.get_objects())}


def resumed_equals(steps: int) -> bool:
    """Whether a run that is stopped and resumed twice ends with the same bits as one that is not."""
    data = batches()

    def learn(learner: Learner, until: int) -> Learner:
        while learner.done < until:
            learner.step(data[learner.done % BATCHES], steps)
        return learner

    whole = learn(Learner.fused(), steps)
    parts = Learner.fused()
    with tempfile.TemporaryDirectory() as place:
        for number, until in enumerate((steps // 3, 2 * steps // 3)):
            folder = Path(place, str(number))
            learn(parts, until).save(folder)
            parts = Learner.resumed(folder)
    learn(parts, steps)
    return all(torch.equal(own, other) for own, other in zip(whole.vectors, parts.vectors, strict=True))


def many_edits(count: int) -> dict[str, Any]:
    """Add, train for a step, save, use by row and delete so many edits in one model.

    Returns:
        `same_rows`: whether each row of a batch has the logits that its edit gives it alone; `loaded`: whether edits
        that were saved and loaded have the same vectors; `before` and `after`: the memory without them.
    """
    model = small_model()
    rk.patch(model)
    ids = batches()[0]
    names = [f"edit{number}" for number in range(count)]
    with tempfile.TemporaryDirectory() as place:
        _one_edit(model, "first", ids, Path(place))  # what is imported and made once is no growth
        with torch.no_grad(), rk.use_edits(model, ["first"] * ROWS):
            model(input_ids=ids)
        rk.delete_edit(model, "first")
        before = _memory()
        loaded = all(_one_edit(model, name, ids, Path(place)) for name in names)
    same = True
    with torch.no_grad():
        for chosen in _groups(names, ROWS):
            with rk.use_edits(model, [*chosen, *([None] * (ROWS - len(chosen)))]):
                together = model(input_ids=ids).logits
            for row, name in enumerate(chosen):
                with rk.use_edits(model, [name]):
                    alone = model(input_ids=ids[row : row + 1]).logits
                same = same and torch.allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)
    for name in names:
        rk.delete_edit(model, name)
    return {"same_rows": same, "loaded": loaded, "before": before, "after": _memory()}


def _one_edit(model: Any, name: str, ids: Tensor, folder: Path) -> bool:
    rk.add_edit(model, name)
    rk.switch_edit(model, name)
    vectors = [own for parts in rk.edit_parameters(model, name).values() for own in parts.values()]
    optimizer = torch.optim.AdamW(vectors, lr=RATE * (1 + len(name)), weight_decay=0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    trained = [own.detach().clone() for own in vectors]
    rk.save_edits(model, folder, name)
    with torch.no_grad():
        for own in vectors:
            own.zero_()
    rk.load_edits(model, folder, name)
    rk.switch_edit(model, "default")
    return all(torch.equal(own, was) for own, was in zip(vectors, trained, strict=True))


def _groups(names: list[str], size: int) -> Iterator[list[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print what they found, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.long_run", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="steps of a run (default: 10000)")
    parser.add_argument("--edits", type=int, default=1000, metavar="N", help="edits in one model (default: 1000)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a file of results")
    options = parser.parse_args(arguments)
    if options.steps < LOOKS or options.edits < 1:
        parser.error(f"expected at least {LOOKS} steps and 1 edit")
    found: dict[str, Any] = {"environment": environment(), "steps": options.steps, "edits": options.edits}
    parts: dict[str, Callable[[], Any]] = {
        "drift": lambda: drift(options.steps),
        "resumed_equals": lambda: resumed_equals(options.steps),
        "many_edits": lambda: many_edits(options.edits),
    }
    for name, part in parts.items():
        found[name] = part()
        _show(name, found[name])
    if options.output is not None:
        content = (json.dumps(found, indent=1) + "\n").encode()
        write_files(options.output.parent, {options.output.name: content})
    return 0


def _show(name: str, found: Any) -> None:
    if name == "drift":
        for look in found["looks"]:
            far = ", ".join(
                f"{run} {own['mean']:.2e} (at most {own['largest']:.2e})" for run, own in look["distance"].items()
            )
            memory = f"{look['resident_bytes'] / 2**20:.1f} MiB, {look['objects']:,} objects"
            print(f"step {look['step']:,}: from fp64 {far}; loss {look['loss']['fused']:.5f}; {memory}", flush=True)
        print(f"the vectors moved by {found['moved']['mean']:.2e}")
    elif name == "resumed_equals":
        print(f"resumed twice, the same bits: {'yes' if found else 'no'}")
    else:
        kept = {when: f"{found[when]['resident_bytes'] / 2**20:.1f} MiB" for when in ("before", "after")}
        print(
            f"edits: rows as alone: {found['same_rows']}; loaded as saved: {found['loaded']}; memory {kept['before']} "
            f"before, {kept['after']} after; objects {found['before']['objects']:,}, {found['after']['objects']:,}"
        )


if __name__ == "__main__":
    sys.exit(main())
