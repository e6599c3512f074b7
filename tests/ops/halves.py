"""Every number of a half precision, and the fp32 numbers between, for tests of conversions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EVERY_HALF = torch.arange(1 << 16).to(torch.uint16)


def assert_same_numbers(found: Tensor, expected: Tensor) -> None:
    """The same bits; a NaN may be any NaN."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    words = {2: torch.int16, 4: torch.int32}[found.element_size()]
    different = (found.view(words) != expected.view(words)) & ~expected.isnan()
    assert not different.any(), f"{found[different][:8]}, expected {expected[different][:8]}"


def between(dtype: torch.dtype) -> Tensor:
    """Every number of a half precision, the middle to the next, their fp32 neighbours, NaNs, random fp32 words."""
    halves = EVERY_HALF.view(dtype).double()
    following = (EVERY_HALF.int() + 1).to(torch.uint16).view(dtype).double()
    middles = ((halves + following) / 2).float()  # has one digit more, which fp32 holds
    infinity = torch.full_like(middles, math.inf)
    neighbours = [torch.nextafter(t, e) for t in (halves.float(), middles) for e in (infinity, -infinity)]
    payloads = [0x7F800001, 0x7F80FFFF, 0x7F817FFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF]
    payloads += [word | 0x80000000 for word in payloads]
    nans = torch.tensor(payloads).to(torch.uint32).view(torch.float32)
    words = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).int()
    return torch.cat([halves.float(), middles, *neighbours, nans, words.view(torch.float32)])


def rows_of(values: Tensor, width: int = 1003) -> list[Tensor]:
    """Rows with a tail that is no whole vector."""
    return list(values.split(width))
