"""Figures from results: ratios to peers and to the floor, least and greatest, by operation, dtype, size and pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..harness import geometric_mean
from .results import Content

OURS = ("cpu", "cuda", "triton")
COPY = "copy"
PEERS = (
    "eager",
    "eager-fused",
    "compile",
    "compile-max-autotune",
    "liger",
    "quack",
    "flash-attention",
    "apex",
)
PASSES = ("forward", "backward", "both")
DTYPES = ("bf16", "fp16", "fp32")
OPERATIONS = (
    "edit",
    "edit_add",
    "edit_add_rms_norm",
    "edit_add_layer_norm",
    "rms_norm_edit",
    "layer_norm_edit",
    "linear_edit",
)
FLOOR = "frozen-fused"
OUR_METHODS = ("red", "red-compile")
WITHOUT_TRAINING = (FLOOR, "frozen", "frozen-compile")
NEIGHBOURS = ("road", "vera", "hra", "sara", "spt", "lorta", "loretta-adp", "loretta-rep", "melora")
# Other kinds of edit, ours.
KINDS = (
    *("scaling", "bias", "ln", "ssf", "rotation", "reflection", "reflections", "reflection_pair"),
    *("lowrank", "direct", "generated", "gift", "initial"),
)
POSITIONS = ("red-attn", "red-more", "red-res")
METHODS = (
    *WITHOUT_TRAINING,
    *OUR_METHODS,
    *POSITIONS,
    *KINDS,
    "naive",
    "naive-compile",
    "lora-qv",
    "lora-all",
    "lora-all-r1",
    "ia3",
    "bitfit",
    "beft",
    "ln-tuning",
    *NEIGHBOURS,
    "full",
)
QUALITY_METHODS = (
    *("base", "red", *POSITIONS, *KINDS, "naive", "lora-all", "lora-all-r1", "ia3", "beft", "ln-tuning"),
    *(*NEIGHBOURS, "linear-probe", "full"),
)
GROWN = ("layers", "width", "batch", "length", "edits")
STEP_GOAL = 1.01  # of a step of ours over the frozen model with the same norms
HOST_GOAL = 10e-6  # seconds of a forward call of the CUDA kernels at HOST_SHAPE
HOST_SHAPE = (512, 768)


@dataclass(frozen=True)
class Spread:
    """The geometric mean of some figures, the least, the greatest, and how many there are."""

    mean: float
    least: float
    greatest: float
    count: int


@dataclass(frozen=True)
class OperationFigures:
    """One operation of one dtype, size class, kind of inputs and pass, by one of our backends.

    Attributes:
        peers: peer to its time over ours: above 1 ours is faster.
        best_peer: the same against the best peer of each case; None without peers.
        over_floor: our time over that of copies of as many bytes; None if no copies were timed.
        gigabytes: the least bytes moved over our time, in 10^9 bytes a second.
    """

    operation: str
    variant: str
    dtype: str
    size: str
    inputs: str
    which: str
    ours: str
    peers: dict[str, Spread]
    best_peer: Spread | None
    over_floor: Spread | None
    gigabytes: Spread | None


@dataclass(frozen=True)
class Worst:
    """The case with the worst ratio: its value, the peer, and the case."""

    value: float
    peer: str
    where: str


@dataclass(frozen=True)
class Loss:
    """A peer that is better than ours by more than the spread.

    Attributes:
        job: the file that it is in; "host" for host times.
        where: the case.
        what: "time", "memory", or the name of a model's score.
        ours, peer: the compared implementations.
        figures: both, as text.
        ratio: our value over the peer's, so that above 1 is worse; for scores None.
    """

    job: str
    where: str
    what: str
    ours: str
    peer: str
    figures: str
    ratio: float | None


@dataclass(frozen=True)
class Missed:
    """A missed goal: the case, the goal and the measured value."""

    where: str
    goal: str
    found: str


@dataclass(frozen=True)
class MethodFigures:
    """One method of one training step.

    Attributes:
        seconds: median, low and high quartile.
        over_floor: its time over that of the frozen model with the same norms, the median over the rounds; in older
            files the ratio of the medians; None if the floor was not timed.
        tokens: per second.
        peak: bytes; memory_over_floor: over the floor's.
        trainable: parameters, or None.
    """

    method: str
    seconds: dict[str, float]
    over_floor: float | None
    tokens: float | None
    peak: int | None
    memory_over_floor: float | None
    trainable: int | None


def spread(values: Iterable[float]) -> Spread | None:
    """The spread of some positive figures; None of none."""
    found = list(values)
    return Spread(geometric_mean(found), min(found), max(found), len(found)) if found else None


def in_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Names in the order of ``known``, then others alphabetically."""
    found = set(names)
    return [name for name in known if name in found] + sorted(found - set(known))


def rank(name: str, known: Sequence[str]) -> tuple[int, str]:
    """For sorting as :func:`in_order` does."""
    return (known.index(name) if name in known else len(known), name)


def size_classes(gpu: bool) -> tuple[tuple[int, str], ...]:
    """The upper bounds of size classes, in elements, and their names."""
    last = ((1 << 62, "over 3M"),) if not gpu else ((16 * 10**6, "3M to 16M"), (1 << 62, "over 16M"))
    return ((10**6 - 1, "under 1M"), (3 * 10**6, "1M to 3M"), *last)


def size_class(elements: int, gpu: bool) -> str:
    """The class of a tensor of this many elements."""
    return next(name for end, name in size_classes(gpu) if elements <= end)


def ours_in(seconds: dict[str, Any]) -> list[str]:
    """Which of these implementations are ours."""
    return [name for name in OURS if name in seconds]


def peers_in(seconds: dict[str, Any]) -> list[str]:
    """Which of these implementations are peers."""
    return in_order((name for name in seconds if name not in OURS and name != COPY), PEERS)


def best_peer(seconds: dict[str, Any]) -> str | None:
    """The peer with the least median, or None."""
    return min(peers_in(seconds), key=lambda name: seconds[name]["median"], default=None)


def operation_figures(content: Content, gpu: bool) -> list[OperationFigures]:
    """All groups of the file of operations, in the order of the tables."""
    groups: dict[tuple[str, ...], list[tuple[dict[str, Any], float | None]]] = {}
    sizes = [name for _, name in size_classes(gpu)]
    for case in content["cases"]:
        size = size_class(case["rows"] * case["width"], gpu)
        for which, seconds in case["seconds"].items():
            for ours in ours_in(seconds):
                key = (case["operation"], case["variant"], case["dtype"], size, case["inputs"], which, ours)
                groups.setdefault(key, []).append((seconds, case.get("bytes", {}).get(which)))

    def order(key: tuple[str, ...]) -> tuple[Any, ...]:
        operation, variant, dtype, size, inputs, which, ours = key
        ranks = (rank(operation, OPERATIONS), variant, rank(dtype, DTYPES), inputs, sizes.index(size))
        return (*ranks, rank(which, PASSES), rank(ours, OURS))

    return [_operation_group(key, groups[key]) for key in sorted(groups, key=order)]


def _operation_group(key: tuple[str, ...], found: list[tuple[dict[str, Any], float | None]]) -> OperationFigures:
    operation, variant, dtype, size, inputs, which, ours = key

    def median(seconds: dict[str, Any], name: str) -> float:
        value: float = seconds[name]["median"]
        return value

    def over_ours(seconds: dict[str, Any], name: str) -> float:
        return median(seconds, name) / median(seconds, ours)

    all_peers = in_order({name for seconds, _ in found for name in peers_in(seconds)}, PEERS)
    peers = {name: spread(over_ours(seconds, name) for seconds, _ in found if name in seconds) for name in all_peers}
    best = [(seconds, best_peer(seconds)) for seconds, _ in found]
    return OperationFigures(
        operation,
        variant,
        dtype,
        size,
        inputs,
        which,
        ours,
        peers={name: value for name, value in peers.items() if value is not None},
        best_peer=spread(over_ours(seconds, name) for seconds, name in best if name is not None),
        over_floor=spread(1 / over_ours(seconds, COPY) for seconds, _ in found if COPY in seconds),
        gigabytes=spread(moved / median(seconds, ours) / 1e9 for seconds, moved in found if moved),
    )


def case_of_operation(case: dict[str, Any], which: str | None = None) -> str:
    """A case of an operation in words."""
    name = case["operation"] + (f" ({case['variant']})" if case["variant"] else "")
    words = [name, case["dtype"], f"{case['rows']} x {case['width']}", case["inputs"]]
    return ", ".join([*words, *([which] if which else [])])


def worst_cases(content: Content, operation: str, variant: str, ours: str) -> tuple[Worst | None, Worst | None]:
    """Of an operation: the case least ahead of (or furthest behind) its best peer, and the one furthest from copies."""
    behind, above = [], []
    for case in content["cases"]:
        if (case["operation"], case["variant"]) != (operation, variant):
            continue
        for which, seconds in case["seconds"].items():
            if ours not in seconds:
                continue
            where, time = case_of_operation(case, which), seconds[ours]["median"]
            peer = best_peer(seconds)
            if peer is not None:
                behind.append(Worst(seconds[peer]["median"] / time, peer, where))
            if COPY in seconds:
                above.append(Worst(time / seconds[COPY]["median"], COPY, where))
    return (
        min(behind, key=lambda worst: worst.value, default=None),
        max(above, key=lambda worst: worst.value, default=None),
    )


def operation_memory(content: Content) -> dict[tuple[str, str, str, str], dict[str, Spread]]:
    """By operation, variant, dtype and ours: each peer's peak of memory over ours."""
    values: dict[tuple[str, str, str, str], dict[str, list[float]]] = {}
    for case in content["cases"]:
        peak = case.get("peak_bytes", {})
        for ours in ours_in(peak):
            key = (case["operation"], case["variant"], case["dtype"], ours)
            for peer in peers_in(peak):
                if peak[ours]:
                    values.setdefault(key, {}).setdefault(peer, []).append(peak[peer] / peak[ours])
    ordered = sorted(values, key=lambda key: (rank(key[0], OPERATIONS), key[1], rank(key[2], DTYPES), key[3]))
    found = {key: {peer: spread(values[key][peer]) for peer in in_order(values[key], PEERS)} for key in ordered}
    return {key: {peer: value for peer, value in row.items() if value} for key, row in found.items()}


def over_floor(case: dict[str, Any], method: str) -> dict[str, float]:
    """A method's time over the floor's: median and quartiles of the ratios of each round.

    Older files have only quartiles of the times.
    """
    found: dict[str, float] | None = case.get("over_floor", {}).get(method)
    if found is not None:
        return found
    own, floor = case["seconds"][method], case["seconds"][FLOOR]
    return {
        "median": own["median"] / floor["median"],
        "low": own["low"] / floor["high"],
        "high": own["high"] / floor["low"],
    }


def method_figures(case: dict[str, Any]) -> list[MethodFigures]:
    """The methods of one training step, in order, without those left out."""
    seconds, peak = case["seconds"], case.get("peak_bytes", {})
    floor = seconds.get(FLOOR)
    found = []
    for method in in_order(seconds, METHODS):
        own = seconds[method]
        memory = peak.get(method)
        base = peak.get(FLOOR)
        found.append(
            MethodFigures(
                method,
                own,
                over_floor(case, method)["median"] if floor else None,
                case["tokens"] / own["median"] if case.get("tokens") else None,
                memory,
                memory / base if memory is not None and base else None,
                case.get("trainable", {}).get(method),
            )
        )
    return found


def case_of_step(case: dict[str, Any]) -> str:
    """A training step in words."""
    return f"{case['model']}, {case['dtype']}, {case['batch']} x {case['length']}"


def case_of_growth(case: dict[str, Any]) -> str:
    """A case of growth in words."""
    others = [f"{name} {case[name]}" for name in GROWN if case.get(name) is not None and name != case["axis"]]
    return ", ".join([f"{case['axis']} {case['value']}", *others])


def growth_series(content: Content) -> list[tuple[str, list[dict[str, Any]]]]:
    """By axis (and its fixed sizes): its cases by value."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in content["cases"]:
        found.setdefault((case["axis"], _fixed(case)), []).append(case)
    axes = ("layers", "width", "tokens", "edits")
    keys = sorted(found, key=lambda key: (rank(key[0], axes), key[1]))
    return [
        (key[0] + (f" ({key[1]})" if key[1] else ""), sorted(found[key], key=lambda case: case["value"]))
        for key in keys
    ]


def _fixed(case: dict[str, Any]) -> str:
    # More tokens are a larger batch.
    growing = {"tokens": ("batch", "tokens")}.get(case["axis"], (case["axis"],))
    return ", ".join(f"{name} {case[name]}" for name in GROWN if name not in growing and case.get(name) is not None)


def lower_is_better(metric: str) -> bool:
    """Whether a lower score is better."""
    return metric in ("perplexity", "loss")
