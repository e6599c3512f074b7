"""Checks that the methods compute the same, before they are timed.

Each method is compared with the same mathematics in twice the precision (fp64 for fp32 models, fp32 for others). Its
error may be twice that of plain PyTorch in the model's dtype, and a rounding step. Errors are norms over all logits,
and over the gradients of all scales and of all biases. The bound on the logits gives the bound on the loss: the
gradient of a target's loss has a norm of at most sqrt(2), so the mean over n targets moves by at most sqrt(2 / n) times
as much.

A classifier has few logits, whose error in plain PyTorch may be next to nothing by chance. There the error is that of
the last linear layer's input, and the logits may be off by that layer's norm times as much.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from red_kernels.fusion.norms import NormSpec, could_be_norm, norm_spec

from ..methods import Prepared, sister

EDITED = ("naive", "red", "red-compile", "naive-compile")
TOKENS = 4096  # gradients are checked on about this many tokens: twice the precision takes more memory
Naive = Callable[[nn.Module, torch.dtype, int], Prepared]  # of a model, the dtype of the vectors, the rows of a batch


class _Found(NamedTuple):
    logits: Tensor
    loss: Tensor
    gradients: Tensor | None  # of all vectors, in their order
    head: tuple[Tensor, nn.Linear] | None  # the input of a classifier's last linear layer, and that layer


def check(base: nn.Module, prepared: Mapping[str, Prepared], naive: Naive, batch: Mapping[str, Tensor]) -> None:
    """Compare every method's logits and loss, and the gradients of all edits, with twice the precision.

    At its start each method equals the frozen model, except those with a random start. The methods of RED's edits then
    get the same random ones. Dropout is off. If a model has any, compiled methods are checked without gradients, as
    compiling another backward takes as long again. Values, gradients and the mode are restored.

    Args:
        base: the frozen model.
        prepared: the methods by name.
        naive: gives a model the eager edits of the reference: called with a model, the dtype of the vectors and the
            number of rows of the batch. `trained` has the vectors in the order of those of `"red"`.
        batch: the batch.

    Raises:
        ArithmeticError: an error is larger; the message has its subject, its size and the bound.
    """
    dropping = _has_dropout(base)
    dtype = next(base.parameters()).dtype
    twice = torch.float64 if dtype == torch.float32 else torch.float32
    truth = _run(Prepared(_exact(base, twice), []), batch, False, False, watched=True)
    frozen = _run(Prepared(base, []), batch, False, False, watched=True)
    for name, made in prepared.items():
        if not made.as_frozen:
            continue
        compiled = name.endswith("-compile")
        found = _run(made, batch, not (compiled and dropping), not dropping, backward=False)
        _hold(f"{name}, at its start", found, frozen, truth, dtype, batch)
        del found

    rows = next(iter(batch.values())).shape[0]
    tokens = batch["input_ids"].numel()
    few = max(1, rows * TOKENS // tokens) if tokens > TOKENS else rows
    part = batch if few == rows else {name: value[:few] for name, value in batch.items()}
    edited = {name: prepared[name] for name in EDITED if name in prepared}
    if not edited:
        return
    reference = naive(
        _exact(base, twice), twice, few
    )  # made again: kept this long it would be twice the model's memory
    start = _flat(reference.trained).clone()
    generator = torch.Generator().manual_seed(0)
    values = start + 0.1 * torch.randn(start.shape, generator=generator, dtype=torch.float32).to(start)
    _fill(reference.trained, values)
    truth = _run(reference, part, True, False, watched=True)
    del reference
    gc.collect()  # hooks hold it in a cycle
    whole = few == rows and "naive" in edited
    plain = edited.pop("naive") if whole else naive(sister(base), torch.float32, few)
    peer = _edited(plain, values, start, part, True, False, watched=True)
    for name, made in edited.items():
        compiled = name.endswith("-compile")
        if compiled and few < rows:
            continue  # another shape would have to be compiled; the whole batch was checked at the start
        found = _edited(made, values, start, part, not (compiled and dropping), not dropping)
        _hold(f"{name}, edited", found, peer, truth, dtype, part)
        for kind, where in (("scales", start == 1), ("biases", start == 0)):
            if found.gradients is not None:
                own, theirs, right = (_chosen(each, where) for each in (found, peer, truth))
                _bound(f"{name}: the gradients of all {kind}", own, right, _allowed(theirs, right, dtype))


def _chosen(found: _Found, where: Tensor) -> Tensor:
    assert found.gradients is not None
    return found.gradients[where]


def _run(
    made: Prepared,
    batch: Mapping[str, Tensor],
    gradients: bool,
    training: bool,
    *,
    backward: bool = True,
    watched: bool = False,
) -> _Found:
    """One forward, with `gradients` also a backward unless that is left out; the mode is restored."""
    was = made.model.training
    made.model.train(training)
    heads: list[tuple[Tensor, nn.Linear]] = []
    handles = []
    if watched and batch["labels"].dim() == 1:
        linears = [module for module in made.model.modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_pre_hook(functools.partial(_note_head, heads)) for module in linears]
    try:
        with made.active(), torch.set_grad_enabled(gradients):
            output = made.model(**batch)
            if gradients and backward:
                output.loss.backward()
        found = torch.cat([_gradient(own) for own in made.trained]) if gradients and backward else None
        return _Found(output.logits.detach(), output.loss.detach(), found, heads[0] if heads else None)
    finally:
        made.model.train(was)
        for handle in handles:
            handle.remove()
        for own in made.trained:
            own.grad = None


def _note_head(heads: list[tuple[Tensor, nn.Linear]], module: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
    heads[:] = [(arguments[0].detach(), module)]  # the last one called stays


def _gradient(own: nn.Parameter) -> Tensor:
    return (torch.zeros_like(own) if own.grad is None else own.grad).flatten()


def _edited(
    made: Prepared,
    values: Tensor,
    start: Tensor,
    batch: Mapping[str, Tensor],
    gradients: bool,
    training: bool,
    watched: bool = False,
) -> _Found:
    _fill(made.trained, values)
    try:
        return _run(made, batch, gradients, training, watched=watched)
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
    bound = _allowed(plain.logits, truth.logits, dtype)
    if plain.head is not None and truth.head is not None:
        (theirs, _), (right, head) = plain.head, truth.head
        terms = right.abs() @ head.weight.abs().T + (0 if head.bias is None else head.bias.abs())
        bound = float(torch.linalg.matrix_norm(head.weight, 2)) * _allowed(theirs, right, dtype)
        bound += torch.finfo(dtype).eps * float(terms.norm())
    _bound(f"{what}: the logits", found.logits, truth.logits, bound)
    labels = batch["labels"]
    targets = max(1, labels.numel() - (labels.shape[0] if labels.dim() > 1 else 0))  # at least: a decoder shifts them
    loss = float(truth.loss)
    step = torch.finfo(found.loss.dtype).eps * abs(loss)
    allowed = 2 * abs(float(plain.loss) - loss) + step + math.sqrt(2 / targets) * bound
    error = abs(float(found.loss) - loss)
    if not error <= allowed:
        raise ArithmeticError(f"{what}: the loss is off by {error:.3e}, allowed is {allowed:.3e}")


def _allowed(plain: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    return 2 * float((plain.to(truth.dtype) - truth).norm()) + torch.finfo(dtype).eps * float(truth.norm())


def _bound(what: str, found: Tensor, truth: Tensor, allowed: float) -> None:
    error = float((found.to(truth.dtype) - truth).norm())
    if not error <= allowed:
        raise ArithmeticError(f"{what} are off by {error:.3e}, allowed is {allowed:.3e}")


def _has_dropout(model: nn.Module) -> bool:
    """Whether a module is a dropout, or has the probability of one, like attentions."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any("drop" in name and isinstance(value, float) and value > 0 for name, value in module.__dict__.items())
        for module in model.modules()
    )


def _exact(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, including its RMSNorms, which transformers computes in fp32 at most."""
    made = copy.deepcopy(model).to(dtype)
    for module in made.modules():
        spec = norm_spec(module) if could_be_norm(module) else None
        if spec is not None and not spec.centered:
            module.forward = _rms_norm(module, spec)
    return made


def _rms_norm(module: Any, spec: NormSpec) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        eps = spec.epsilon(module, hidden.dtype)
        normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
        return normed * (getattr(module, spec.weight) + spec.offset) if spec.weight else normed

    return forward
