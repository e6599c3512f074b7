"""What a training step of a patched model costs the host, beside the same edits as plain forward hooks, in pairs.

The models are so small that their arithmetic hardly counts. `python -m benchmarks.tools.host_cost --steps` runs this.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.patching.naive import naive_edit

LAYERS, TOKENS = 8, 8
BLOCK = 6  # steps in a row, for one measurement
# Each width with the models of these names.
MODELS = ("llama", "bert", "gpt2", "t5")


class StepCost(NamedTuple):
    """Milliseconds of one step, medians, and the ratio of the two in each pair: median and quartiles."""

    patched: float
    hooks: float
    ratio: float
    low: float
    high: float


def tiny(name: str, width: int) -> nn.Module:
    """A model of random weights whose layers are of one width."""
    shared: dict[str, Any] = {"vocab_size": 64}
    if name == "llama":
        shared |= {"num_key_value_heads": 4, "hidden_size": width, "intermediate_size": 2 * width}
        config: Any = transformers.LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=4, **shared)
        return transformers.LlamaForCausalLM(config)
    if name == "bert":
        shared |= {"hidden_size": width, "intermediate_size": 2 * width}
        return transformers.BertModel(
            transformers.BertConfig(num_hidden_layers=LAYERS, num_attention_heads=4, **shared)
        )
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=width, n_layer=LAYERS, n_head=4, **shared))
    if name == "t5":
        shared |= {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width}
        return transformers.T5EncoderModel(transformers.T5Config(num_layers=LAYERS, num_heads=4, **shared))
    raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, MODELS))}")


def step_cost(name: str, width: int, seconds: float) -> StepCost:
    """Measure one model of one width for about so many seconds, on one thread and without collecting garbage."""
    torch.manual_seed(0)
    model = tiny(name, width).train().requires_grad_(False)
    plain = copy.deepcopy(model)
    rk.patch(model, rk.RedConfig())
    naive_edit(plain, list(rk.edit_parameters(model)))
    ids = torch.randint(0, 64, (1, TOKENS))
    pairs: list[tuple[float, float]] = []
    collecting, threads = gc.isenabled(), torch.get_num_threads()
    gc.disable()
    torch.set_num_threads(1)
    try:
        for one in (model, plain):
            _timed(one, ids)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(pairs) < 5:
            order: tuple[nn.Module, ...] = (model, plain) if len(pairs) % 2 else (plain, model)
            found = {id(one): _timed(one, ids) for one in order}
            pairs.append((found[id(model)], found[id(plain)]))
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
    low, middle, high = statistics.quantiles((ours / other for ours, other in pairs), n=4)
    patched, hooks = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    return StepCost(patched, hooks, middle, low, high)


def steps(widths: list[int], seconds: float, said: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """All models at all widths, by a name such as `bert, width 64`; each result is said as it comes."""
    found = {}
    for width in widths:
        for name in MODELS:
            cost = step_cost(name, width, seconds)
            found[f"{name}, width {width}"] = cost._asdict()
            said(
                f"{name}, width {width}: {cost.patched:.2f} ms patched, {cost.hooks:.2f} ms with hooks, "
                f"{cost.ratio:.3f} ({cost.low:.3f} to {cost.high:.3f})"
            )
    return found


def _timed(model: nn.Module, ids: Tensor) -> float:
    """Seconds of one step, after one that is not counted: the other model has just used the processor's caches."""
    _step(model, ids)
    begin = time.perf_counter()
    for _ in range(BLOCK):
        _step(model, ids)
    return (time.perf_counter() - begin) / BLOCK


def _step(model: nn.Module, ids: Tensor) -> None:
    output: Any = model(input_ids=ids)
    value: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    value.sum().backward()
