"""The arguments from the public operations to a backend, and the flat lists of registered operators.

The edit is an :class:`red_kernels.edits.kinds.Edit` whose vectors are the operands of its kernel, ``scale`` and
``bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..edits.kinds import Dropout, Edit, affine_edit, mix_edit
from ..edits.kinds.mixes import PAIR

__all__ = [
    "PAIR",
    "Dropout",
    "Edit",
    "FromFlat",
    "Mix",
    "Norm",
    "Statistics",
    "affine_edit",
    "edit_of",
    "flat_edit",
    "mix_of_edit",
    "operands_of",
]


class Norm(NamedTuple):
    """A norm in front of an edit or behind it: ``normed * (offset + weight) + bias``.

    Attributes:
        weight, bias: of shape ``(d,)``; None for none.
        eps: added to the variance, or to the mean square.
        offset: 1 for norms that store ``weight - 1``.
        centered: LayerNorm; else RMSNorm.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float = 0.0
    centered: bool = False


class Statistics(NamedTuple):
    """The statistics from a norm's forward for its backward, in the activation's leading shape, fp32 (fp64 for fp64).

    Attributes:
        mean: of each row; None for RMSNorm.
        rstd: one over the root of the mean square, after subtracting the mean if there is one.
    """

    mean: Tensor | None
    rstd: Tensor


class Mix(NamedTuple):
    """An edit whose columns depend on other columns of their row: pairs that rotate, or blocks that are reflected.

    With ``blocks = 0``, a rotation (RoAd, arXiv 2409.00119): ``first * x + second * x'``, where ``x'`` has the column
    ``j ^ 32`` in place of column ``j``. ``second`` includes the sign of the sine. Otherwise reflections (ETHER, arXiv
    2405.20271) of this number of blocks of columns, each separately: ``x - first * (first . x) + second * (second .
    x)``.

    Attributes:
        first, second: ``(d,)``, or ``(n, d)`` with ``ids``. Reflections may have no second.
        bias: the same, added to the result; None for none.
        blocks: number of blocks, all of equal width; 0 for a rotation.
        ids, dropout: as in :class:`Edit`.
    """

    first: Tensor
    second: Tensor | None
    bias: Tensor | None = None
    blocks: int = 0
    ids: Tensor | None = None
    dropout: Dropout | None = None

    @property
    def seed_and_p(self) -> tuple[Tensor | None, float]:
        """The arguments of its dropout, for operators."""
        return (None, 0.0) if self.dropout is None else (self.dropout.seed, self.dropout.p)


def mix_of(
    first: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    blocks: int,
) -> Mix:
    """The mix of an operator's arguments."""
    return Mix(first, second, bias, blocks, ids, None if seed is None else Dropout(dropout_p, seed))


def operands_of(edit: Edit) -> Edit:
    """The same with the operands of its kernel as vectors, if its kind trains other ones."""
    kind, vectors, ids, dropout = edit
    if kind.operands is None:
        return edit
    vectors = kind.operands(vectors)
    if kind.kernel == "mix":
        first, second, bias = vectors.get("first"), vectors.get("second"), vectors.get("bias")
        assert first is not None
        return mix_edit(first, second, bias, kind.blocks, ids, dropout)
    return affine_edit(vectors.get("scale"), vectors.get("bias"), ids, dropout)


def mix_of_edit(edit: Edit) -> Mix:
    """An edit of the kernel "mix", for the operations on mixes."""
    kind, vectors, ids, dropout = edit
    first = vectors["first"]
    assert first is not None
    return Mix(first, vectors.get("second"), vectors.get("bias"), kind.blocks, ids, dropout)


def flat_edit(edit: Edit) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
    """``scale, bias, edit_ids, seed, dropout_p``; without a dropout, the last two are None and 0."""
    _, vectors, ids, dropout = edit
    scale, bias = vectors.get("scale"), vectors.get("bias")
    return (scale, bias, ids, None, 0.0) if dropout is None else (scale, bias, ids, dropout.seed, dropout.p)


def edit_of(
    scale: Tensor | None,
    bias: Tensor | None,
    ids: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Edit:
    """The inverse of :func:`flat_edit`."""
    return affine_edit(scale, bias, ids, None if seed is None else Dropout(dropout_p, seed))


class FromFlat:
    """The functions of :mod:`red_kernels.backends.reference`, built from functions with separate arguments.

    Args:
        functions: by name, with arguments as in ``SCHEMAS``; those of mixes may be missing.
        needs: turns the flags of requested gradients into the argument of these functions.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]], needs: Callable[[tuple[bool, ...]], Any]) -> None:
        self._edit_forward = functions["edit_forward"]
        self._edit_backward = functions["edit_backward"]
        self._edit_norm_forward = functions["edit_norm_forward"]
        self._edit_norm_backward = functions["edit_norm_backward"]
        self._norm_edit_forward = functions["norm_edit_forward"]
        self._norm_edit_backward = functions["norm_edit_backward"]
        self._needs = needs
        if "mix_forward" in functions:
            self.mix_forward, self.mix_backward = self._mix(functions["mix_forward"], functions["mix_backward"])
            self.mix_norm_forward, self.mix_norm_backward = self._mix_norm(
                functions["mix_norm_forward"], functions["mix_norm_backward"]
            )

    def _mix(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
        def mix_forward(x: Tensor, residual: Tensor | None, mix: Mix) -> Any:
            return forward(x, residual, mix.first, mix.second, mix.bias, mix.ids, *mix.seed_and_p, mix.blocks)

        def mix_backward(dz: Tensor, x: Tensor | None, mix: Mix, n_edits: int, needs: tuple[bool, ...]) -> Any:
            return backward(
                dz, x, mix.first, mix.second, mix.ids, *mix.seed_and_p, mix.blocks, n_edits, self._needs(needs)
            )

        return mix_forward, mix_backward

    def _mix_norm(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
        def mix_norm_forward(x: Tensor, residual: Tensor | None, mix: Mix, norm: Norm) -> Any:
            weight, norm_bias, *rest = norm
            vectors = (mix.first, mix.second, mix.bias, weight, norm_bias)
            return forward(x, residual, *vectors, mix.ids, *mix.seed_and_p, *rest, mix.blocks)

        def mix_norm_backward(
            dy: Tensor,
            dz: Tensor | None,
            z: Tensor,
            x: Tensor | None,
            mix: Mix,
            norm: Norm,
            statistics: Statistics,
            n_edits: int,
            needs: tuple[bool, ...],
        ) -> Any:
            seed, p = mix.seed_and_p
            return backward(
                dy, dz, z, x, mix.first, mix.second, norm.weight, mix.ids, seed, *statistics, p, norm.offset,
                mix.blocks, n_edits, self._needs(needs),
            )  # fmt: skip

        return mix_norm_forward, mix_norm_backward

    def edit_forward(self, x: Tensor, residual: Tensor | None, edit: Edit) -> Tensor:
        return self._edit_forward(x, residual, *flat_edit(edit))

    def edit_backward(self, dz: Tensor, x: Tensor | None, edit: Edit, n_edits: int, needs: tuple[bool, ...]) -> Any:
        scale, _, ids, seed, p = flat_edit(edit)
        return self._edit_backward(dz, x, scale, ids, seed, p, n_edits, self._needs(needs))

    def edit_norm_forward(self, x: Tensor, residual: Tensor | None, edit: Edit, norm: Norm, keep_z: bool) -> Any:
        scale, bias, ids, seed, p = flat_edit(edit)
        weight, norm_bias, eps, offset, centered = norm
        return self._edit_norm_forward(
            x, residual, scale, bias, weight, norm_bias, ids, seed, p, eps, offset, centered, keep_z
        )

    def edit_norm_backward(
        self,
        dy: Tensor,
        dz: Tensor | None,
        z: Tensor | None,
        x: Tensor | None,
        residual: Tensor | None,
        edit: Edit,
        norm: Norm,
        statistics: Statistics,
        n_edits: int,
        needs: tuple[bool, ...],
    ) -> Any:
        scale, bias, ids, seed, p = flat_edit(edit)
        return self._edit_norm_backward(
            dy, dz, z, x, residual, scale, bias, norm.weight, ids, seed, *statistics, p, norm.offset, n_edits,
            self._needs(needs),
        )  # fmt: skip

    def norm_edit_forward(self, x: Tensor, norm: Norm, edit: Edit) -> Any:
        scale, bias, ids, _, _ = flat_edit(edit)
        weight, norm_bias, eps, offset, centered = norm
        return self._norm_edit_forward(x, weight, norm_bias, scale, bias, ids, eps, offset, centered)

    def norm_edit_backward(
        self,
        dy: Tensor,
        x: Tensor,
        norm: Norm,
        edit: Edit,
        statistics: Statistics,
        n_edits: int,
        needs: tuple[bool, ...],
    ) -> Any:
        scale, _, ids, _, _ = flat_edit(edit)
        return self._norm_edit_backward(
            dy, x, norm.weight, norm.bias, scale, ids, *statistics, norm.offset, n_edits, self._needs(needs)
        )


def flattened(functions: Any, flags: Callable[[int, int], tuple[bool, ...]]) -> dict[str, Callable[..., Any]]:
    """The inverse of :class:`FromFlat`: implementations of the operators of ``SCHEMAS``, from a backend's functions.

    ``flags`` converts an operator's ``needs`` into one flag for each gradient.
    """

    def edit_forward(x: Any, residual: Any, *edit: Any) -> Any:
        return functions.edit_forward(x, residual, edit_of(*edit))

    def edit_backward(dz: Any, x: Any, scale: Any, ids: Any, seed: Any, p: Any, n_edits: int, needs: int) -> Any:
        return functions.edit_backward(dz, x, edit_of(scale, None, ids, seed, p), n_edits, flags(needs, 3))

    def edit_norm_forward(x: Any, residual: Any, scale: Any, bias: Any, weight: Any, norm_bias: Any, *rest: Any) -> Any:
        ids, seed, p, *of_norm, keep_z = rest
        edit = edit_of(scale, bias, ids, seed, p)
        return functions.edit_norm_forward(x, residual, edit, Norm(weight, norm_bias, *of_norm), keep_z)

    def edit_norm_backward(*arguments: Any) -> Any:
        *activations, scale, bias, weight, ids, seed, mean, rstd, p, offset, n_edits, needs = arguments
        edit, norm = edit_of(scale, bias, ids, seed, p), Norm(weight, None, 0.0, offset, mean is not None)
        statistics = Statistics(mean, rstd)
        return functions.edit_norm_backward(*activations, edit, norm, statistics, n_edits, flags(needs, 6))

    def norm_edit_forward(x: Any, weight: Any, norm_bias: Any, scale: Any, bias: Any, ids: Any, *of_norm: Any) -> Any:
        return functions.norm_edit_forward(x, Norm(weight, norm_bias, *of_norm), edit_of(scale, bias, ids))

    def norm_edit_backward(dy: Any, x: Any, weight: Any, norm_bias: Any, scale: Any, ids: Any, *rest: Any) -> Any:
        mean, rstd, offset, n_edits, needs = rest
        norm, statistics = Norm(weight, norm_bias, 0.0, offset, mean is not None), Statistics(mean, rstd)
        return functions.norm_edit_backward(
            dy, x, norm, edit_of(scale, None, ids), statistics, n_edits, flags(needs, 5)
        )

    def mix_forward(x: Any, residual: Any, *flat: Any) -> Any:
        return functions.mix_forward(x, residual, mix_of(*flat))

    def mix_backward(dz: Any, x: Any, first: Any, second: Any, ids: Any, seed: Any, p: Any, *rest: Any) -> Any:
        blocks, n_edits, needs = rest
        mix = mix_of(first, second, None, ids, seed, p, blocks)
        return functions.mix_backward(dz, x, mix, n_edits, flags(needs, 4))

    def mix_norm_forward(x: Any, residual: Any, first: Any, second: Any, bias: Any, *rest: Any) -> Any:
        weight, norm_bias, ids, seed, p, *of_norm, blocks = rest
        mix = mix_of(first, second, bias, ids, seed, p, blocks)
        return functions.mix_norm_forward(x, residual, mix, Norm(weight, norm_bias, *of_norm))

    def mix_norm_backward(*arguments: Any) -> Any:
        *activations, first, second, weight, ids, seed, mean, rstd, p, offset, blocks, n_edits, needs = arguments
        mix = mix_of(first, second, None, ids, seed, p, blocks)
        norm, statistics = Norm(weight, None, 0.0, offset, mean is not None), Statistics(mean, rstd)
        return functions.mix_norm_backward(*activations, mix, norm, statistics, n_edits, flags(needs, 7))

    every = (
        edit_forward, edit_backward, edit_norm_forward, edit_norm_backward, norm_edit_forward, norm_edit_backward,
        mix_forward, mix_backward, mix_norm_forward, mix_norm_backward,
    )  # fmt: skip
    return {function.__name__: function for function in every}
