"""The final answer of a worked one, and comparing two of them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

# In order of preference: MetaMathQA's, those of chat models, GSM8K's.
_MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def final_answer(text: str) -> str | None:
    """The text after the last mark of a final answer, to the end of its line; None without a mark."""
    text = text.strip().rstrip(".!?")
    for mark in _MARKS:
        if mark in text:
            behind = text.rpartition(mark)[2].strip()
            return behind.partition("\n")[0].strip(" .!?$%")
    return None


def same_answer(one: str | None, other: str | None) -> bool:
    """Whether two final answers are the same number, or the same text; a missing one equals no other."""
    if one is None or other is None:
        return False
    first, second = _number(one), _number(other)
    if first is not None and second is not None:
        return float(first) == float(second)  # 20/35 is 0.5714285714285714
    return first is second and one == other


def accuracy(generated: Sequence[str], answers: Sequence[str]) -> float:
    """The share of the generated texts with the right final answer, from 0 to 1.

    Raises:
        ValueError: another number of texts, none, or a worked answer without a final one.
    """
    if len(generated) != len(answers) or not answers:
        raise ValueError(f"generated: got {len(generated)} texts, expected one for each of {len(answers)} answers")
    wanted = [final_answer(text) for text in answers]
    if None in wanted:
        raise ValueError(f"answers: {answers[wanted.index(None)]!r} has no final answer")
    right = [same_answer(final_answer(text), want) for text, want in zip(generated, wanted, strict=True)]
    return sum(right) / len(right)


def _number(text: str) -> Fraction | None:
    try:
        above, *below = (Fraction(part.strip()) for part in text.split("/"))
        return above if not below else above / below[0] if len(below) == 1 else None
    except (ValueError, ZeroDivisionError):
        return None
