"""The choice between the two backends of an NVIDIA GPU for an operation: one table, with reasons.

No row was measured on a GPU yet: every cause states its reasoning. ``rk.backend`` and the variable
RED_KERNELS_BACKEND override the table.
"""

from __future__ import annotations

from dataclasses import dataclass

_KERNELS = ("edit", "edit_norm", "norm_edit")
_BACKWARD = "edit_norm backward"
_NO_LIMIT = 1 << 63


@dataclass(frozen=True)
class Row:
    """A choice: ``backend`` for some operations, numbers of elements of an activation, widths and architectures.

    Ranges are half-open. ``capabilities`` are compute capabilities.
    """

    backend: str
    cause: str
    operations: tuple[str, ...] = _KERNELS
    elements: tuple[int, int] = (0, _NO_LIMIT)
    widths: tuple[int, int] = (0, _NO_LIMIT)
    capabilities: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (1 << 31, 0))

    @property
    def where(self) -> str:
        """When the row applies, in words: "edit_norm norm_edit, width >= 8193, compute capability >= 9.0"."""
        words = [" ".join(self.operations)]
        first, last = ((f"{major}.{minor}") for major, minor in self.capabilities)
        for name, low, high, known in (
            ("elements", *self.elements, self.elements),
            ("width", *self.widths, self.widths),
            ("compute capability", first, last, self.capabilities),
        ):
            if known[0] not in (0, (0, 0)):
                words.append(f"{name} >= {low}")
            if known[1] not in (_NO_LIMIT, (1 << 31, 0)):
                words.append(f"{name} < {high}")
        return ", ".join(words)


# The first match is taken. A backward runs on the backend of its forward, unless it has its own row.
TABLE = (
    Row(
        "cuda",
        "reasoned: below 4 million elements a kernel takes less than about 10 us on an H200, so the host's time "
        "shows. Without launches, edit_add_rms_norm with its backward costs the host 52 us here and 68 us in "
        "Triton. Where this package's launch cannot be used, each launch of Triton's takes about 13 us more",
        elements=(0, 1 << 22),
    ),
    Row(
        "cuda",
        "reasoned: a cluster of blocks holds the row, so a backward moves 6 activations. Triton reads the row again "
        "and moves 8",
        operations=("edit_norm", "norm_edit"),
        widths=(8193, _NO_LIMIT),
        capabilities=((9, 0), (1 << 31, 0)),
    ),
    Row(
        "triton",
        "reasoned: both move the same bytes, also for rows wider than 8,192 without clusters (8 activations in a "
        "backward). Triton's launch rules can be tuned on the device: red-kernels bench --tune",
    ),
    Row(
        "cuda",
        "reasoned: at 5,120 and 8,192 columns it copies rows while it computes others. A multiprocessor has room "
        "for one Triton program, which waits for its loads. A usual call takes 26 instructions an element",
        operations=(_BACKWARD,),
        widths=(4097, _NO_LIMIT),
    ),
    Row(
        "triton",
        "reasoned: several programs share a multiprocessor, so loads and arithmetic overlap as in the CUDA kernels. "
        "Its launch rules can be tuned on the device",
        operations=(_BACKWARD,),
    ),
    Row(
        "triton",
        "reasoned: only Triton has a matrix product with the edit behind it. Where the product does not win, the "
        "edit's backend is chosen separately",
        operations=("linear_edit",),
    ),
)


def preferred(operation: str, elements: int, width: int, capability: tuple[int, int]) -> Row:
    """The first row of the table for an operation on an activation of this many elements in rows of ``width``.

    "edit_norm backward" is the backward behind a forward by Triton's kernels. Raises ValueError for an operation that
    the table does not know.
    """
    for row in TABLE:
        if (
            operation in row.operations
            and row.elements[0] <= elements < row.elements[1]
            and row.widths[0] <= width < row.widths[1]
            and row.capabilities[0] <= capability < row.capabilities[1]
        ):
            return row
    raise ValueError(
        f"operation is {operation!r}, expected one of 'edit', 'edit_norm', 'norm_edit', 'linear_edit', {_BACKWARD!r}"
    )
