"""The expected fusion of a patched model before it runs: a forward of its twin on tensors without values."""

from __future__ import annotations

import contextlib
import copy
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..edits.find import edit_modules
from ..fusion.norms import is_own
from ..fusion.scopes import OWN_HOOKS
from .module_facts import experts_in
from .report import what_of

__all__ = ["expected"]

_MOST = 0.5  # seconds of CPU time for all attempts at the forward


class _TooLate(Exception):
    pass


def expected(model: nn.Module, example: Any = None) -> dict[str, tuple[str | None, str]]:
    """The expected fusion of each site's edit, or the reason for none; empty if half a second does not suffice.

    Args:
        model: patched; it does not run, and no random numbers are drawn.
        example: the arguments of its call, as a dict or a single one; None for its own `dummy_inputs`.
    """
    given = _dummy(model) if example is None else example
    if given is None:
        return {}
    try:
        twin = _twin(model)
    except Exception:  # raised by a foreign class
        return {}
    until = time.thread_time() + _MOST
    with _aside():
        for attempt in _attempts(twin, given):
            try:
                _run(twin, until, *attempt)
                break
            except _TooLate:
                return {}
            except Exception:  # a dependence on values has none
                continue
    return {site: found for site, own in edit_modules(twin).items() if (found := what_of(own)) is not None}


def _attempts(twin: nn.Module, example: Any) -> Iterator[tuple[Any, bool]]:
    """The arguments of a twin's call, and whether its integers keep their values, which some models read."""
    yield example, False
    if isinstance(example, Mapping):
        ids = example.get("input_ids")
        if isinstance(ids, Tensor) and "attention_mask" not in example:
            yield {**example, "attention_mask": torch.ones_like(ids)}, False
    without = _without_masks(example)
    if without is not None:
        yield without, False
        yield without, True
    _bypass_experts(twin)
    yield example, False


def _without_masks(example: Any) -> Any:
    """The same without masks, also if the batch is the only argument; None if there is no batch."""
    if isinstance(example, Mapping):
        return {name: value for name, value in example.items() if "mask" not in name}
    if isinstance(example, (tuple, list)):
        parts = [_without_masks(one) if isinstance(one, Mapping) else one for one in example]
        return parts if any(isinstance(one, Mapping) for one in example) else None
    return None


def _dummy(model: nn.Module) -> Any:
    """transformers' trial arguments of a model, as far as its forward accepts them."""
    if not hasattr(model, "dummy_inputs"):
        return None
    try:
        name = getattr(model, "main_input_name", "input_ids")
        if name == "pixel_values":
            size = getattr(model.config, "image_size", 224)
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            return {name: torch.empty(1, getattr(model.config, "num_channels", 3), height, width, device="meta")}
        found = dict(model.dummy_inputs)  # type: ignore[arg-type]
        if getattr(model.config, "is_encoder_decoder", False):
            found.setdefault("decoder_input_ids", found.get("input_ids"))
        return found
    except Exception:
        return None


def _twin(model: nn.Module) -> nn.Module:
    """A copy without memory for its tensors, and without foreign hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if not _is_plain(parameter):
            memo[id(parameter)] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
            continue
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta", requires_grad=False), parameter.requires_grad
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not is_own(hook)]:
                del hooks[key]
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    for name, module in model.named_modules():
        width = getattr(module, "out_features", None)
        if isinstance(width, int) and not all(map(_is_plain, module._parameters.values())):
            twin.get_submodule(name).forward = partial(_of_width, width)
    return twin


def _is_plain(parameter: Tensor | None) -> bool:
    return parameter is None or (type(parameter.data) is Tensor and parameter.is_floating_point())


def _of_width(width: int, x: Tensor) -> Tensor:
    """Replaces a quantised layer, of which only the output's width matters."""
    return x.new_empty(*x.shape[:-1], width)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Leaves the caller's random numbers, warnings and grad mode unchanged."""
    python = random.getstate()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            try:
                yield
            finally:
                random.setstate(python)


def _run(twin: nn.Module, until: float, example: Any, integers: bool) -> None:
    def look(module: nn.Module, args: Any) -> None:
        if time.thread_time() > until:
            raise _TooLate

    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)

    def emptied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if integers and not value.is_floating_point():
            return value.cpu()
        return torch.empty_like(value, device="meta", dtype=dtype if value.is_floating_point() else value.dtype)

    handles = [module.register_forward_pre_hook(look) for module in _outer(twin)]
    OWN_HOOKS.add(look)
    try:
        batch = tree_map(emptied, dict(example) if isinstance(example, Mapping) else example)
        if isinstance(batch, dict):
            twin(**batch)
        elif isinstance(batch, (tuple, list)):
            twin(*batch)
        else:
            twin(batch)
    finally:
        OWN_HOOKS.discard(look)
        for handle in handles:
            handle.remove()


def _outer(twin: nn.Module) -> list[nn.Module]:
    """Entries of lists, at which the time is checked."""
    lists = [module for module in twin.modules() if isinstance(module, nn.ModuleList)]
    return list(dict.fromkeys(child for one in lists for child in one if len(list(child.children())) > 1))


def _bypass_experts(twin: nn.Module) -> None:
    """The expert of a token depends on values, so a mixture returns its input."""
    for name in experts_in(twin):
        module = twin.get_submodule(name)
        module.forward = lambda hidden, *args, **kwargs: hidden
