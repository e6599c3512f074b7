"""A failure that the benchmarks name: nothing that its frames had is kept, whoever keeps the error."""

import gc
import weakref

import torch

from benchmarks.failure import in_words


def _fails(message: str, seen: list[weakref.ref[torch.Tensor]]) -> None:
    large = torch.zeros(8)
    seen.append(weakref.ref(large))
    raise ValueError(message)


def _fails_behind(message: str, seen: list[weakref.ref[torch.Tensor]]) -> None:
    own = torch.zeros(8)
    seen.append(weakref.ref(own))
    try:
        _fails("the first one", seen)
    except ValueError as error:
        raise RuntimeError(message) from error


def test_words_without_the_tensors() -> None:
    kept, seen = list[Exception](), list[weakref.ref[torch.Tensor]]()
    try:
        _fails_behind("what went wrong\n" + 300 * "x", seen)
    except RuntimeError as error:
        kept.append(error)
        words = in_words(error)
    assert words == "RuntimeError: what went wrong " + 184 * "x"
    gc.collect()
    assert [one() for one in seen] == [None, None]
    assert str(kept[0].__cause__) == "the first one"


def test_an_error_without_a_message() -> None:
    assert in_words(KeyError()) == "KeyError: without a message"
