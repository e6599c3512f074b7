"""Which cases are left of a grid: all combinations that count, in few cases, the same ones in every run."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import sampling


class Case(SimpleNamespace):
    __hash__ = object.__hash__


def cases(*parameters: tuple[Any, ...], name: str = "test") -> list[Any]:
    return [
        Case(path="a", name=name, originalname=name, callspec=SimpleNamespace(params=dict(enumerate(values))))
        for values in itertools.product(*parameters)
    ]


def combinations(chosen: list[Any], number: int) -> set[Any]:
    return {pair for item in chosen for pair in itertools.combinations(sorted(item.callspec.params.items()), number)}


@pytest.mark.parametrize(
    ("sizes", "number", "expected"),
    [((4, 5), 1, 5), ((2, 2, 3), 2, 6), ((4, 5), 2, 20), ((3, 3, 3, 3), 2, 16), ((7,), 2, 7), ((7,), 1, 7)],
)
def test_every_combination_is_there_in_few_cases(sizes: tuple[int, ...], number: int, expected: int) -> None:
    grid = cases(*(tuple(range(size)) for size in sizes))
    chosen = list(sampling.sampled(dict.fromkeys(grid, number)))
    number = min(number, len(sizes))
    assert combinations(chosen, number) == combinations(grid, number)
    assert len(chosen) == len(set(map(id, chosen))) <= expected
    assert [item.callspec.params for item in sampling.sampled(dict.fromkeys(grid, number))] == [
        item.callspec.params for item in chosen
    ]


def test_tests_are_sampled_by_themselves() -> None:
    one, other = cases((1, 2), (1, 2), name="one"), cases((1, 2), (1, 2), name="other")
    alone = cases(name="alone")
    assert len(alone) == 1
    numbers = dict.fromkeys([*one, *other], 1) | dict.fromkeys(alone, 2)
    assert len(list(sampling.sampled(numbers))) == 5
