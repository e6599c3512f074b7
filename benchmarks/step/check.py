"""Whether the methods compute the same, before they are timed.

What each computes is held to the same mathematics in twice the precision (fp64 for fp32 models, fp32 for others): its
error may be twice that of plain PyTorch in the model's dtype, and a rounding step. Errors are norms over all logits,
and over the gradients of all scales and of all biases. The bound on the logits gives that on the loss: the gradient of
a target's loss has a norm of at most sqrt(2), so the mean over n targets moves by at most sqrt(2 / n) times as much.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from red_kernels.models.norms import norm_spec

from ..methods import Prepared

EDITED = ("naive", "red", "red-compile", "naive-compile")
TOKENS = 4096  # gradients are checked on the first rows, about as many: twice the precision takes more memory
Naive = Callable[[nn.Module, torch.dtype, int], Prepared]  # of a model, the dtype of the vectors, the rows of a batch


class _Found(NamedTuple):
    logits: Tensor
    loss: Tensor
    gradients: Tensor | None  # of all vectors, in their order


def check(base: nn.Module, prepared: Mapping[str, Prepared], naive: Naive, batch: Mapping[str, Tensor]) -> None:
    """Hold every method's logits and loss, and the gradients of all edits, to the same in twice the precision.

    At its start each method computes what the frozen model does. Those that train edits are then given the same random
    ones. Dropout is off; where a model has any, compiled methods are checked without gradients, as compiling another
    backward takes as long again. Values, gradients and the mode are left as they were found.

    Args:
        base: the frozen model.
        prepared: the methods by name.
        naive: gives a model the eager edits that the others are held to: called with a model, the dtype of the vectors
            and the number of rows of the batch. `trained` has the vectors in the order of those of `"red"`.
        batch: what is computed on.

    Raises:
        ArithmeticError: an error is larger; the message says of what, how large and what was allowed.
    """
    dropping = _has_dropout(base)
    dtype = next(base.parameters()).dtype
    twice = torch.float64 if dtype == torch.float32 else torch.float32
    exact = _exact(base, twice)
    plain = Prepared(base, [])
    truth = _run(Prepared(exact, []), batch, False, False)
    frozen = _run(plain, batch, False, False)
    for name, made in prepared.items():
        compiled = name.endswith("-compile")
        found = _run(made, batch, not (compiled and dropping), not dropping, backward=False)
        _hold(f"{name}, at its start", found, frozen, truth, dtype, batch)
        del found

    rows = next(iter(batch.values())).shape[0]
    tokens = batch["input_ids"].numel()
    few = max(1, rows * TOKENS // tokens) if tokens > TOKENS else rows
    part = {name: value[:few] for name, value in batch.items()}
    edited = {name: prepared[name] for name in EDITED if name in prepared}
    if not edited:
        return
    reference = naive(exact, twice, few)
    start = _flat(reference.trained).clone()
    generator = torch.Generator().manual_seed(0)
    values = start + 0.1 * torch.randn(start.shape, generator=generator, dtype=torch.float32).to(start)
    _fill(reference.trained, values)
    truth = _run(reference, part, True, False)
    del exact, reference
    peer: _Found | None = None
    if "naive" in edited and few == rows:
        ours = edited.pop("naive")
        peer = _edited(ours, values, start, part, True, False)
    else:
        peer = _edited(naive(_shared(base), torch.float32, few), values, start, part, True, False)
    for name, made in edited.items():
        compiled = name.endswith("-compile")
        if compiled and few < rows:
            continue  # another shape would have to be compiled; at the start the whole batch was checked
        found = _edited(made, values, start, part, not (compiled and dropping), not dropping)
        _hold(f"{name}, edited", found, peer, truth, dtype, part)
        for kind, where in (("scales", start == 1), ("biases", start == 0)):
            if found.gradients is not None:
                own, theirs, right = (_chosen(each, where) for each in (found, peer, truth))
                _bound(f"{name}: the gradients of all {kind}", own, theirs, right, dtype)


def _chosen(found: _Found, where: Tensor) -> Tensor:
    assert found.gradients is not None
    return found.gradients[where]


def _shared(base: nn.Module) -> nn.Module:
    from ..methods import sister

    return sister(base)


def _run(made: Prepared, batch: Mapping[str, Tensor], gradients: bool, training: bool, backward: bool = True) -> _Found:
    """One forward, with `gradients` also a backward unless that is left out; the mode is given back."""
    was = made.model.training
    made.model.train(training)
    try:
        with made.active(), torch.set_grad_enabled(gradients):
            output = made.model(**batch)
            if gradients and backward:
                output.loss.backward()
        grads = None
        if gradients and backward:
            grads = torch.cat([_gradient(own) for own in made.trained])
        return _Found(output.logits.detach(), output.loss.detach(), grads)
    finally:
        made.model.train(was)
        for own in made.trained:
            own.grad = None


def _gradient(own: nn.Parameter) -> Tensor:
    return (torch.zeros_like(own) if own.grad is None else own.grad).flatten()


def _edited(
    made: Prepared, values: Tensor, start: Tensor, batch: Mapping[str, Tensor], gradients: bool, training: bool
) -> _Found:
    _fill(made.trained, values)
    try:
        return _run(made, batch, gradients, training)
    finally:
        _fill(made.trained, start)


def _flat(vectors: list[nn.Parameter]) -> Tensor:
    return torch.cat([own.detach().flatten() for own in vectors])


def _fill(vectors: list[nn.Parameter], values: Tensor) -> None:
    with torch.no_grad():
        for own, value in zip(vectors, values.split([own.numel() for own in vectors]), strict=True):
            own.copy_(value.view_as(own))


def _hold(
    what: str, found: _Found, plain: _Found, truth: _Found, dtype: torch.dtype, batch: Mapping[str, Tensor]
) -> None:
    bound = _bound(f"{what}: the logits", found.logits, plain.logits, truth.logits, dtype)
    labels = batch["labels"]
    targets = max(1, labels.numel() - (labels.shape[0] if labels.dim() > 1 else 0))  # at least: a decoder shifts them
    right = float(truth.loss)
    step = torch.finfo(found.loss.dtype).eps * abs(right)
    allowed = 2 * abs(float(plain.loss) - right) + step + math.sqrt(2 / targets) * bound
    error = abs(float(found.loss) - right)
    if not error <= allowed:
        raise ArithmeticError(f"{what}: the loss is off by {error:.3e}, allowed are {allowed:.3e}")


def _bound(what: str, found: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    allowed = 2 * float((plain.to(truth.dtype) - truth).norm()) + torch.finfo(dtype).eps * float(truth.norm())
    error = float((found.to(truth.dtype) - truth).norm())
    if not error <= allowed:
        raise ArithmeticError(f"{what} are off by {error:.3e}, allowed are {allowed:.3e}")
    return allowed


def _has_dropout(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    named = config.to_dict() if config is not None else {}
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in named.items()) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )


def _exact(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, its RMSNorms too, which transformers computes in fp32 at most."""
    made = copy.deepcopy(model).to(dtype)
    for module in made.modules():
        spec = norm_spec(type(module))
        if spec is not None and not spec.centered:
            module.forward = _rms_norm(module, spec.eps, spec.offset)
    return made


def _rms_norm(module: Any, eps: str, offset: float) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + getattr(module, eps))
        return hidden * scale * (module.weight + offset)

    return forward
