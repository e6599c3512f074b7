"""One batch with 1, 16 and 1,000 edits: a small decoder, forward and with backward, and the fused operation alone.

    python -m benchmarks.tools.many_edits --output results.json

Every row of a batch has an edit of its own by `rk.use_edits`, in turn where there are fewer edits than rows. The peers
have the same batch: `single`, the patched model with one edit for all rows; `frozen`, the base model, whose backward
goes to its input embeddings; and `lora`, PEFT's adapters of rank 8 on the same layers, by `adapter_names` (forward
only, as PEFT allows). `use_edits` enters its block in each call. An optimizer's step is no part of it. Weights are
random.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.finetune.base_dtype import ASKED, AUTO, DTYPES, resolve_dtype
from red_kernels.support.files import write_files

from ..harness import Timing, environment, interleave

VOCABULARY = 1024
RANK = 8
PASSES = ("forward", "forward and backward")
Calls = dict[str, Callable[[int], object]]


def decoder(hidden: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """A Llama-shaped model with random weights; always the same."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 192),
        max_position_embeddings=4096,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    made: nn.Module = model.to(dtype).requires_grad_(False).eval()
    return made


def patched(model: nn.Module, edits: int) -> list[str]:
    """Patch a model and give it as many edits with values of their own; returns their names."""
    rk.patch(model)
    names = [f"edit{number}" for number in range(edits)]
    generator = torch.Generator().manual_seed(1)
    for name in names:
        rk.add_edit(model, name)
        with torch.no_grad():
            for parts in rk.edit_parameters(model, name).values():
                for vector in parts.values():
                    vector.add_(0.1 * torch.randn(vector.shape, generator=generator))
    return names


def with_lora(model: Any, adapters: int) -> tuple[Any, list[str]] | None:
    """PEFT's model with as many adapters; None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    config = peft.LoraConfig(r=RANK, target_modules=["down_proj"], init_lora_weights=False)
    names = [f"adapter{number}" for number in range(adapters)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            found.add_adapter(name, config)
    return found.eval(), names


def model_calls(
    hidden: int, layers: int, rows: int, length: int, edits: list[int], dtype: torch.dtype, lora: int
) -> tuple[Calls, Calls]:
    """Forwards, and forwards with backward, by name."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))
    frozen, single, many = (decoder(hidden, layers, dtype) for _ in range(3))
    patched(single, 0)
    names = patched(many, max(edits))

    def of_rows(count: int) -> list[str | None]:
        return [names[row % count] for row in range(rows)]

    def forward(model: nn.Module) -> Callable[[int], object]:
        def call(number: int) -> object:
            with torch.no_grad():
                return model(input_ids=ids).logits

        return call

    def by_rows(count: int, inner: Callable[[int], object]) -> Callable[[int], object]:
        def call(number: int) -> object:
            with rk.use_edits(many, of_rows(count)):
                return inner(number)

        return call

    def step(model: nn.Module, trained: list[nn.Parameter]) -> Callable[[int], object]:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]

        def call(number: int) -> object:
            inputs = embeddings(ids).requires_grad_()
            model(inputs_embeds=inputs).logits.float().square().mean().backward()
            for vector in trained:
                vector.grad = None
            return inputs.grad

        return call

    def vectors(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
        return [
            vector for name in names for parts in rk.edit_parameters(model, name).values() for vector in parts.values()
        ]

    forwards: Calls = {"frozen": forward(frozen), "single": forward(single)}
    steps: Calls = {"frozen": step(frozen, []), "single": step(single, vectors(single, ["default"]))}
    for count in edits:
        forwards[f"use_edits, {count}"] = by_rows(count, forward(many))
        steps[f"use_edits, {count}"] = by_rows(count, step(many, vectors(many, names[:count])))
    for count in [count for count in edits if count <= lora]:
        found = with_lora(decoder(hidden, layers, dtype), count)
        if found is None:
            continue
        model, adapters = found
        chosen = [adapters[row % count] for row in range(rows)]

        def mixed(number: int, model: Any = model, chosen: list[str] = chosen) -> object:
            with torch.no_grad():
                return model(input_ids=ids, adapter_names=chosen).logits

        forwards[f"lora, {count}"] = mixed
    return forwards, steps


def operation_calls(rows: int, width: int, edits: list[int], dtype: torch.dtype) -> tuple[Calls, Calls]:
    """`edit_add_rms_norm` with one edit, with ids for each row, and in eager PyTorch with ids."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, residual = (draw(rows, width).to(dtype).requires_grad_() for _ in range(2))
    dy, dz = (draw(rows, width).to(dtype) for _ in range(2))
    weight = draw(width).to(dtype)
    forwards: Calls = {}
    steps: Calls = {}

    def add(name: str, function: Callable[[], tuple[Tensor, Tensor | None]], vectors: list[Tensor]) -> None:
        def forward(number: int) -> object:
            with torch.no_grad():
                return function()

        def step(number: int) -> object:
            y, z = function()
            assert z is not None
            return torch.autograd.grad([y, z], [x, residual, *vectors], [dy, dz])

        forwards[name], steps[name] = forward, step

    one = [(1 + 0.1 * draw(width)).requires_grad_(), (0.1 * draw(width)).requires_grad_()]
    add("single", lambda: rk.edit_add_rms_norm(x, residual, one[0], one[1], weight), one)
    for count in edits:
        scale, bias = (1 + 0.1 * draw(count, width)).requires_grad_(), (0.1 * draw(count, width)).requires_grad_()
        ids = torch.arange(rows) % count

        def fused(scale: Tensor = scale, bias: Tensor = bias, ids: Tensor = ids) -> tuple[Tensor, Tensor | None]:
            return rk.edit_add_rms_norm(x, residual, scale, bias, weight, edit_ids=ids)

        def eager(scale: Tensor = scale, bias: Tensor = bias, ids: Tensor = ids) -> tuple[Tensor, Tensor | None]:
            z = residual + (scale[ids] * x + bias[ids]).to(dtype)
            return nn.functional.rms_norm(z, (width,), weight, 1e-6), z

        for kind in (0, 1):
            expected, found = eager()[kind], fused()[kind]
            assert expected is not None
            assert found is not None
            bound = 8 * torch.finfo(dtype).eps * expected.double().norm()
            assert (found.double() - expected.double()).norm() <= bound, f"{count} edits: the results differ"
        add(f"ids, {count}", fused, [scale, bias])
        add(f"eager, {count}", eager, [scale, bias])
    return forwards, steps


def timed(calls: Calls, seconds: float, what: dict[str, Any]) -> dict[str, Any]:
    """Time calls against each other: one entry of the results."""
    times: dict[str, Timing] = interleave(calls, seconds=seconds)
    over = {name: t.median / times["single"].median for name, t in times.items() if name != "single"}
    return {**what, "seconds": {name: t.json() for name, t in times.items()}, "over_single": over}


def measure(
    hidden: int,
    layers: int,
    batches: list[tuple[int, int]],
    edits: list[int],
    dtype: str,
    lora: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """All results: each batch of `(rows, length)` with as many edits as it has rows for, then the operation."""
    results = []
    for rows, length in batches:
        fitting = [count for count in edits if count <= rows]
        both = model_calls(hidden, layers, rows, length, fitting, DTYPES[dtype], lora)
        for name, calls in zip(PASSES, both, strict=True):
            what = {"what": "model", "pass": name, "rows": rows, "length": length, "dtype": dtype}
            results.append(timed(calls, seconds, {**what, "hidden": hidden, "layers": layers}))
    most = max(rows * length for rows, length in batches)
    for name, calls in zip(PASSES, operation_calls(most, hidden, edits, DTYPES[dtype]), strict=True):
        what = {"what": "edit_add_rms_norm", "pass": name, "rows": most, "width": hidden, "dtype": dtype}
        results.append(timed(calls, seconds, what))
    return results


def print_results(results: list[dict[str, Any]], console: Console) -> None:
    """A table for each entry."""
    for result in results:
        shape = f"{result['rows']} x {result.get('length', result.get('width'))}"
        table = Table("variant, edits", "median ms", "quartiles ms", "over single")
        table.title = f"{result['what']}, {result['pass']}, {shape}, {result['dtype']}"
        for name, t in result["seconds"].items():
            quartiles = f"{t['low'] * 1e3:.2f} to {t['high'] * 1e3:.2f}"
            over = result["over_single"].get(name, 1.0)
            table.add_row(name, f"{t['median'] * 1e3:.2f}", quartiles, f"{over:.2f}")
        console.print(table)


def _batch(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    return int(rows), int(length)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 or more")
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, and write the result where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.many_edits", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", nargs="+", type=_batch, default=[(16, 128), (1000, 2)], help="ROWSxLENGTH")
    parser.add_argument("--edits", nargs="+", type=int, default=[1, 16, 1000])
    parser.add_argument("--dtype", choices=ASKED, default=AUTO, help="auto: bf16 if native here, else fp32")
    parser.add_argument("--lora", type=int, default=16, help="the most LoRA adapters to compare with; 0 for none")
    parser.add_argument("--seconds", type=_seconds, default=20.0, help="for each table")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    chosen = parser.parse_args(arguments)
    dtype = resolve_dtype(chosen.dtype, torch.device("cpu"))
    print(f"dtype: {dtype.name} ({dtype.reason})" + (f"\nWarning: {dtype.warning}" if dtype.warning else ""))
    results = measure(
        chosen.hidden, chosen.layers, chosen.batches, chosen.edits, dtype.name, chosen.lora, chosen.seconds
    )
    print_results(results, Console(file=sys.stdout, width=120))
    if chosen.output:
        import transformers

        versions = {"transformers": transformers.__version__}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions["peft"] = importlib.metadata.version("peft")
        where = environment() | versions | {"device": "cpu"}
        said = {"environment": where, "base_dtype": dtype.json(), "results": results}
        write_files(chosen.output.parent, {chosen.output.name: (json.dumps(said, indent=1) + "\n").encode()})


if __name__ == "__main__":
    main()
