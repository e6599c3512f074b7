"""docs/architectures.md, from the results of `architecture_runs`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from architecture_runs import NOT_BUILT, NOT_CALLED, Group, Release, Result, with_addition, with_norm

# Of the architectures that have nothing to edit at `ffn`, those that have no FFN of linear layers or experts. Any other
# one counts as not edited.
WITHOUT_FFN = {
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), "mixers alone"),
    **dict.fromkeys(("mobilevitv2", "poolformer", "squeezebert", "swiftformer"), "FFNs of convolutions"),
    **dict.fromkeys(
        ("bit", "efficientnet", "hgnet_v2", "mobilenet_v1", "mobilenet_v2", "pp_lcnet", "regnet", "resnet", "textnet"),
        "convolutions alone",
    ),
}
SUBLAYERS = ("ffn", "attn")  # places whose output is added to the stream


def is_built(result: Result) -> bool:
    return not result.reason.startswith(NOT_BUILT)


def is_fused(group: Group) -> bool:
    """Whether sites share a pass with the addition that follows; or with a norm, where no addition follows them."""
    return with_addition(group.fused) if group.place in SUBLAYERS else group.fused is not None


def is_normed(group: Group) -> bool:
    return is_fused(group) and with_norm(group.fused)


def _counted(result: Result) -> list[Group]:
    """The sites that were called, without queries, keys and values, which heads take: no addition follows them."""
    return [group for group in result.groups if group.reason != NOT_CALLED and group.place != "qkv"]


class Counts:
    """What became of some results at one position."""

    def __init__(self, results: Sequence[Result]) -> None:
        groups = [_counted(result) for result in results]
        self.all = len(results)
        self.built = sum(map(is_built, results))
        self.edited = sum(bool(result.groups) for result in results)
        self.wrong = sum(bool(result.wrong) for result in results)
        self.fused = sum(bool(one) and all(map(is_fused, one)) for one in groups)
        self.normed = sum(bool(one) and all(map(is_normed, one)) for one in groups)
        self.sites = sum(group.count for one in groups for group in one)
        self.fused_sites = sum(group.count for one in groups for group in one if is_fused(group))

    def row(self, position: str) -> str:
        fused = "" if position == "res" else self.fused
        normed = "" if position == "more" else self.normed
        return f"{self.all} | {self.built} | {self.edited} | {fused} | {normed} | {self.shared} | {self.wrong}"

    @property
    def shared(self) -> str:
        """How many sites are fused."""
        return f"{self.fused_sites} of {self.sites} ({_share(self.fused_sites, self.sites)})"


COLUMNS = "architectures | built | edited | with addition | with norm | sites fused | wrong"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none"


def _table(*rows: str) -> list[str]:
    return [f"| {rows[0]} |", "|" + "---|" * (rows[0].count(" | ") + 1), *(f"| {row} |" for row in rows[1:]), ""]


def _totals(releases: Sequence[Release]) -> list[str]:
    """What is asked for, of all tasks together: a column for each release."""
    columns = []
    for release in releases:
        ffn = [result for result in release.results if result.position == "ffn"]
        built = [result for result in ffn if is_built(result)]
        have = [result for result in built if result.groups or result.model_type not in WITHOUT_FFN]
        counts, attn = Counts(have), Counts([result for result in release.results if result.position == "attn"])
        shares = [f"{n} ({_share(n, counts.all)})" for n in (counts.edited, counts.fused, counts.normed)]
        columns.append(
            {
                "architectures": f"{len(ffn)}",
                "can be built": f"{len(built)}",
                "of these have an FFN of linear layers or experts": f"{counts.all}",
                "of these are edited at `ffn`": shares[0],
                "have all `ffn` sites fused with their addition": shares[1],
                "have a norm in that pass too, at every site": shares[2],
                "`attn` sites fused with their addition": attn.shared,
                "wrong, at any position": f"{len({one.key[:3] for one in release.results if one.wrong})}",
            }
        )
    rows = [" | ".join([name, *(column[name] for column in columns)]) for name in columns[0]]
    return _table(" | ".join(["", *(f"transformers {release.version}" for release in releases)]), *rows)


def _by(results: Iterable[Result], *names: str) -> dict[tuple[str, ...], list[Result]]:
    found = defaultdict(list)
    for result in results:
        found[tuple(getattr(result, name) for name in names)].append(result)
    return found


def _positions(releases: Sequence[Release]) -> list[str]:
    rows = [
        f"{release.version} | `{position}` | {Counts(results).row(position)}"
        for release in releases
        for (position,), results in _by(release.results, "position").items()
    ]
    return _table(f"transformers | position | {COLUMNS}", *rows)


def _tasks(release: Release) -> list[str]:
    rows = [
        f"{task} | `{position}` | {Counts(results).row(position)}"
        for (task, position), results in _by(release.results, "task", "position").items()
    ]
    return _table(f"task | position | {COLUMNS}", *rows)


def _why(group: Group) -> str:
    """What takes the value of sites that are not fused."""
    return group.reason.removeprefix("its output is taken by ").partition(";")[0] or "not told"


def _unfused(release: Release) -> list[str]:
    """The sites that are not fused, by what takes their value."""
    counts: Counter[tuple[str, str]] = Counter()
    names = defaultdict(list)
    for result in release.results:
        for group in _counted(result) if result.position in SUBLAYERS else ():
            if not is_fused(group):
                key = result.position, _short(group.fused) if group.fused else _why(group)
                counts[key] += group.count
                names[key] += [result.model_type] if result.model_type not in names[key] else []
    rows = [
        f"`{position}` | {what} | {count} | {', '.join(names[position, what])}"
        for (position, what), count in sorted(counts.items())
    ]
    return _table("position | taken by, or fused with | sites | architectures", *rows)


def _short(fused: str) -> str:
    for long, short in (
        ("its own ", "own "),
        ("; then ", ", "),
        ("residual ", ""),
        ("next layer's ", ""),
        ("final ", ""),
    ):
        fused = fused.replace(long, short)
    return fused


def _outcome(group: Group) -> str:
    if group.fused is not None:
        return _short(group.fused)
    return NOT_CALLED if group.reason == NOT_CALLED else f"not fused ({_why(group)})"


def _reason(result: Result) -> str:
    """Why an architecture has no sites, or was not compared."""
    if not is_built(result):
        needs = re.search(r"requires the (\w+) library|No module named '(\w+)'", result.reason)
        told = f"{needs[1] or needs[2]} is not installed" if needs else result.reason.removeprefix(NOT_BUILT)[:100]
        return f"not built: {told}"
    text = re.sub(r"^.*? lacks sites of position '[^']*': ", "", result.reason)
    if text == result.reason:
        return result.reason.partition(" [")[0][:120]
    text = re.sub(r"the \d+ layers that were found \(([^)]*)\) have ", r"\1 has ", text)
    return "refused: " + text.rstrip(".").partition(", so the model ")[0]


def cell(result: Result) -> str:
    """What became of one architecture at one position, for the table."""
    if not result.groups:
        return _reason(result)
    if result.position not in SUBLAYERS:
        groups = _counted(result)
        text = f"{sum(group.count for group in groups if is_fused(group))} of {sum(group.count for group in groups)}"
    else:
        outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        for group in result.groups:
            outcomes[_outcome(group)][group.site] += group.count
        text = "; ".join(
            f"{', '.join(f'{count} `{site}`' for site, count in sites.items())}: {outcome}"
            for outcome, sites in outcomes.items()
        )
    return "; ".join(filter(None, (text, result.reason and _reason(result), *(f"WRONG {one}" for one in result.wrong))))


def _listed(release: Release, positions: Sequence[str]) -> list[str]:
    """Every architecture, and what became of it at each position."""
    lines = []
    for (task,), results in _by(release.results, "task").items():
        rows = []
        taken = Counter(model_type for model_type, _ in _by(results, "model_type", "class_name"))
        for (model_type, class_name), own in _by(results, "model_type", "class_name").items():
            cells = {result.position: cell(result) for result in own}
            if not own[0].groups and len(set(cells.values())) == 1:
                cells = {positions[0]: f"{cells[positions[0]]} (all positions)"}
            name = model_type if taken[model_type] == 1 else f"{model_type} ({class_name})"
            rows.append(" | ".join([name, *(cells.get(position, "") for position in positions)]))
        lines += [f"## {task}", "", *_table(" | ".join(["architecture", *map("`{}`".format, positions)]), *rows)]
    return lines


_TOP = """# Architectures

Every architecture of transformers {version}, built tiny from its own configuration class and patched at each position.
Values and the gradients of all vectors are held to plain forward hooks, in training and in evaluation.
`python tests/patching/architecture_runs.py` writes this page.
"""

_TERMS = """An architecture is one class in the mapping of one task; a position is what `rk.RedConfig` takes.

| column | what it counts |
|---|---|
| built | architectures whose model can be made with the packages that are installed |
| edited | those with at least one site |
| with addition | those whose every site shares its pass with the addition to the stream |
| with norm | those whose every site has a norm in that pass too: not those where no norm follows a site |
| sites fused | sites that share their pass with the addition, and at `res` with the norm, of all that were called |
| wrong | architectures that differ from plain hooks |

At `more` these are the sites of attention and FFN. Heads take queries, keys and values: no addition follows those.
"""

_CELLS = """For `ffn` and `attn` the lists say how many sites there are, and what their edits share a pass with.

| word | what it means |
|---|---|
| add | the addition to the stream |
| + LayerNorm, + RMSNorm | the norm that reads the stream next |
| own LayerNorm, own RMSNorm | a norm that the output goes through before it is added |
| not fused (mul) | the edit has a pass of its own: `mul` takes the output |
| not called | no forward in training reached the site: its layer was dropped, or the input left it out |
| refused | `rk.patch` raises an error and says so |

For `more` and `res` they say how many sites are fused, of those that were called. Where a cell does not say *WRONG*,
values and gradients of the sites in it are those of plain hooks.
"""


def page(releases: Sequence[Release]) -> str:
    """The text: everything of the first release, and the totals of all."""
    first = releases[0]
    positions = [position for (position,) in _by(first.results, "position")]
    wrong = [
        f"{one.task} | {one.model_type} | `{one.position}` | {'; '.join(one.wrong)}"
        for one in first.results
        if one.wrong
    ]
    reasons = defaultdict(list)
    for model_type, why in WITHOUT_FFN.items():
        if any(one.model_type == model_type for one in first.results):
            reasons[why].append(model_type)
    without = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    lines = [
        _TOP.format(version=first.version),
        *_totals(releases),
        f"These have no FFN of linear layers or experts: {without}.",
        "",
        "## Counts",
        "",
        _TERMS,
        *_positions(releases),
        *_tasks(first),
        "## Sites that are not fused",
        "",
        *_unfused(first),
        *(["## Wrong", "", *_table("task | architecture | position | what differs", *wrong)] if wrong else []),
        "## How to read the lists",
        "",
        _CELLS,
        *_listed(first, positions),
    ]
    return "\n".join(lines).rstrip() + "\n"
