"""SaRA and SPT: a few entries of each weight are trained, chosen once. PEFT's SHiRA (Apache-2.0) trains them.

SHiRA adds a sparse matrix that starts as zeros, with `rank * (in + out)` entries for each layer: as many as LoRA. Both
papers choose with one threshold for the whole model, so that some layers have more entries than others. Here all have
the same share, because SHiRA has one rank for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..frame import Method, Prepared, with_peft
from ..known import RANK
from ..linears import as_linears, block_linears, sizes


def sara(model: nn.Module, rank: int = RANK) -> Prepared:
    """SaRA: trains the entries of least magnitude, which contribute least to the pretrained model (arXiv 2409.06633).

    `(W + M) x`, where M has the positions of the least `|W|` (section 4). It omits the penalty on M's nuclear norm,
    which would be a part of the loss, and the second choice in the middle of the training.

    - Layers: all linear ones of the blocks.
    - Start: `M = 0`.
    - Parameters: `rank * (in + out)` for each layer.
    """
    return _trained_at(model, rank, lambda linear: -linear.weight.detach().abs().float())


def spt(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], rank: int = RANK) -> Prepared:
    """SPT: trains the entries to which the loss is most sensitive (arXiv 2303.08566, section 3).

    The sensitivity of an entry w is the loss saved by one step, to first order: the gradient g times the change of w.
    That step is along the gradient, so it is `g^2` up to a factor, summed over batches of the task.

    Only the unstructured part: in the paper, weights with many sensitive entries get a LoRA or an adapter instead.

    - Layers: all linear ones of the blocks.
    - Start: the added entries are 0.
    - Parameters: `rank * (in + out)` for each layer.

    Args:
        model: the model.
        batches: its inputs with labels; a gradient is taken on each.
        rank: see above.
    """
    as_linears(model, block_linears(model))
    found = sensitivities(model, batches)
    return _trained_at(model, rank, found.__getitem__)


def sensitivities(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> dict[nn.Module, Tensor]:
    """Linear layer to the squared gradient of its weight, summed over batches: fp32, of the weight's shape.

    In evaluation mode; the model's mode, gradients, and which of its parameters need one are as before.
    """
    linears = list(block_linears(model).values())
    found: dict[nn.Module, Tensor] = {}

    def take(linear: Any, weight: Tensor) -> None:
        assert weight.grad is not None
        squared = weight.grad.float().square()
        weight.grad = None  # immediately, so that only one layer's gradient is in memory
        found[linear] = found[linear].add_(squared) if linear in found else squared

    with _only_weights_of(model, linears):
        handles = [
            own.weight.register_post_accumulate_grad_hook(lambda weight, own=own: take(own, weight))
            for own in linears
            if isinstance(own.weight, Tensor)
        ]
        try:
            for batch in batches:
                output: Any = model(**batch)
                output.loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    return found


@contextlib.contextmanager
def _only_weights_of(model: nn.Module, linears: Sequence[Any]) -> Iterator[None]:
    """Make only these weights require gradients, in evaluation mode; then restore the former state."""
    needed = [(own, own.requires_grad) for own in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    for linear in linears:
        linear.weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for own, need in needed:
            own.requires_grad_(need)
        model.train(training)


def _trained_at(model: nn.Module, rank: int, worth: Callable[[Any], Tensor]) -> Prepared:
    """Train, in every linear layer of the blocks, the entries of greatest worth; a layer to those of its weight.

    Raises ValueError if a layer has fewer entries than requested.
    """
    import peft

    linears = block_linears(model)
    for name, own in linears.items():
        into, out = sizes(own)
        if rank * (into + out) > into * out:
            raise ValueError(
                f"rank: got {rank}, but {name!r} of {into} x {out} entries has fewer than a LoRA of this rank"
            )
    as_linears(model, linears)

    def mask(linear: nn.Module, rank: int, **options: object) -> Tensor:
        values = worth(linear)
        chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
        chosen[values.flatten().topk(rank * sum(sizes(linear)), sorted=False).indices] = True
        return chosen.view(values.shape)

    config = peft.ShiraConfig(r=rank, target_modules=list(linears))
    config.mask_fn = mask
    prepared = with_peft(model, config)
    for module in prepared.model.modules():
        prepared.fixed += [*getattr(module, "shira_indices", {}).values()]
    return prepared


METHODS = (
    Method("sara", f"SaRA, as many as LoRA r={RANK}", sara, "peft"),
    Method("spt", f"SPT (unstructured), as many as LoRA r={RANK}", spt, "peft", looks=True),
)
