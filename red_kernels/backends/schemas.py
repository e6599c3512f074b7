"""Common data of the registered operators of all compiled backends: schemas, shapes of results, flags of gradients.

Results that were not requested are undefined tensors, None in Python. ``needs`` has a bit for each gradient, the first
one lowest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels' activations

# The schemas of csrc/ops.cpp, which defines them in the namespace red_kernels and implements them for the CPU.
SCHEMAS = (
    "edit_forward(Tensor x, Tensor? residual, Tensor? scale, Tensor? bias, Tensor? edit_ids, Tensor? seed, "
    "float dropout_p) -> Tensor",
    "edit_backward(Tensor dz, Tensor? x, Tensor? scale, Tensor? edit_ids, Tensor? seed, float dropout_p, "
    "int n_edits, int needs) -> (Tensor dx, Tensor dscale, Tensor dbias)",
    "edit_norm_forward(Tensor x, Tensor? residual, Tensor? scale, Tensor? bias, Tensor? weight, Tensor? norm_bias, "
    "Tensor? edit_ids, Tensor? seed, float dropout_p, float eps, float weight_offset, bool centered, bool keep_z) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    "edit_norm_backward(Tensor dy, Tensor? dz, Tensor? z, Tensor? x, Tensor? residual, Tensor? scale, Tensor? bias, "
    "Tensor? weight, Tensor? edit_ids, Tensor? seed, Tensor? mean, Tensor rstd, float dropout_p, "
    "float weight_offset, int n_edits, int needs) "
    "-> (Tensor dx, Tensor dresidual, Tensor dscale, Tensor dbias, Tensor dweight, Tensor dnorm_bias)",
    "norm_edit_forward(Tensor x, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? bias, Tensor? edit_ids, "
    "float eps, float weight_offset, bool centered) -> (Tensor y, Tensor mean, Tensor rstd)",
    "norm_edit_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? edit_ids, "
    "Tensor? mean, Tensor rstd, float weight_offset, int n_edits, int needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dnorm_bias, Tensor dscale, Tensor dbias)",
    "mix_forward(Tensor x, Tensor? residual, Tensor first, Tensor? second, Tensor? bias, Tensor? edit_ids, "
    "Tensor? seed, float dropout_p, int blocks) -> Tensor",
    "mix_backward(Tensor dz, Tensor? x, Tensor first, Tensor? second, Tensor? edit_ids, Tensor? seed, "
    "float dropout_p, int blocks, int n_edits, int needs) "
    "-> (Tensor dx, Tensor dfirst, Tensor dsecond, Tensor dbias)",
    "mix_norm_forward(Tensor x, Tensor? residual, Tensor first, Tensor? second, Tensor? bias, Tensor? weight, "
    "Tensor? norm_bias, Tensor? edit_ids, Tensor? seed, float dropout_p, float eps, float weight_offset, "
    "bool centered, int blocks) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    "mix_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor? x, Tensor first, Tensor? second, Tensor? weight, "
    "Tensor? edit_ids, Tensor? seed, Tensor? mean, Tensor rstd, float dropout_p, float weight_offset, int blocks, "
    "int n_edits, int needs) -> (Tensor dx, Tensor dresidual, Tensor dfirst, Tensor dsecond, Tensor dbias, "
    "Tensor dweight, Tensor dnorm_bias)",
)
NAMES = tuple(schema[: schema.index("(")] for schema in SCHEMAS)
REQUIRED = tuple(name for name in NAMES if not name.startswith("mix_"))  # of a backend; the reference has the others


def bits(needs: tuple[bool, ...]) -> int:
    """The ``needs`` of an operator, from a flag for each gradient."""
    found, place = 0, 1
    for need in needs:
        if need:
            found |= place
        place <<= 1
    return found


def flags(needs: int, count: int) -> tuple[bool, ...]:
    """The inverse of :func:`bits`, for ``count`` gradients."""
    return tuple(bool(needs >> place & 1) for place in range(count))


def not_plain(x: Tensor) -> str | None:
    """Why a kernel cannot take ``x`` because of its class, or None."""
    if type(x) is not Tensor and not isinstance(x, _PLAIN_SUBCLASSES):
        return f"x is a {type(x).__name__}, and these kernels take plain tensors"
    return None


def register_fakes(namespace: str) -> None:
    """Shape functions for all operators of a namespace, for torch.compile and tensors on the meta device."""
    for fake in (
        edit_forward,
        edit_backward,
        edit_norm_forward,
        edit_norm_backward,
        norm_edit_forward,
        norm_edit_backward,
        mix_forward,
        mix_backward,
        mix_norm_forward,
        mix_norm_backward,
    ):
        torch.library.register_fake(f"{namespace}::{fake.__name__}", fake)


def edit_forward(x: Tensor, *rest: Any) -> Any:
    return _like(x)


def edit_backward(
    dz: Tensor, x: Any, scale: Any, edit_ids: Tensor | None, seed: Any, dropout_p: Any, n_edits: int, needs: int
) -> Any:
    vector = _sum_like(dz, edit_ids, n_edits)
    return _asked(needs, (_like, vector, vector), dz)


def edit_norm_forward(x: Tensor, *rest: Any) -> Any:
    centered, keep_z = rest[-2:]
    return _like(x), _like(x) if keep_z else None, _statistic(x) if centered else None, _statistic(x)


def edit_norm_backward(dy: Tensor, *rest: Any) -> Any:
    edit_ids, n_edits, needs = rest[7], rest[-2], rest[-1]
    edits, norm = _sum_like(dy, edit_ids, n_edits), _sum_like(dy, None, 1)
    return _asked(needs, (_like, _like, edits, edits, norm, norm), dy)


def norm_edit_forward(x: Tensor, *rest: Any) -> Any:
    return _like(x), _statistic(x) if rest[-1] else None, _statistic(x)


def norm_edit_backward(dy: Tensor, *rest: Any) -> Any:
    edit_ids, n_edits, needs = rest[4], rest[-2], rest[-1]
    edits, norm = _sum_like(dy, edit_ids, n_edits), _sum_like(dy, None, 1)
    return _asked(needs, (_like, norm, norm, edits, edits), dy)


def mix_forward(x: Tensor, *rest: Any) -> Any:
    return _like(x)


def mix_backward(dz: Tensor, *rest: Any) -> Any:
    edit_ids, n_edits, needs = rest[3], rest[-2], rest[-1]
    vector = _sum_like(dz, edit_ids, n_edits)
    return _asked(needs, (_like, vector, vector, vector), dz)


def mix_norm_forward(x: Tensor, *rest: Any) -> Any:
    return _like(x), _like(x), _statistic(x) if rest[-2] else None, _statistic(x)


def mix_norm_backward(dy: Tensor, *rest: Any) -> Any:
    edit_ids, n_edits, needs = rest[6], rest[-2], rest[-1]
    edits, norm = _sum_like(dy, edit_ids, n_edits), _sum_like(dy, None, 1)
    return _asked(needs, (_like, _like, edits, edits, edits, norm, norm), dy)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _sum_like(x: Tensor, edit_ids: Tensor | None, n_edits: int) -> Any:
    shape = (x.shape[-1],) if edit_ids is None else (n_edits, x.shape[-1])
    return lambda like: like.new_empty(shape, dtype=torch.float32)


def _asked(needs: int, makers: tuple[Any, ...], like: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(make(like) if needs >> place & 1 else None for place, make in enumerate(makers))


_PLAIN_SUBCLASSES = (torch.nn.Parameter,)
