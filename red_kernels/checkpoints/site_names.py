"""Matching the site names of a checkpoint with those of a model.

The same layer has several names: `encoder.layer.0.output.dense` from the inner model, `inner.encoder.layer.0...` with
a head around it, `base_model.model.inner...` inside a wrapper. They differ in one prefix, the same for all sites. So
one rule "remove this prefix, add that one" must fit the whole checkpoint. Sites are never matched one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..support.parse import layer_number


def match_sites(checkpoint_sites: Iterable[str], model_sites: Iterable[str]) -> dict[str, str]:
    """Map each checkpoint site to a model site, by one change of prefix for all of them.

    Equal names win. Otherwise it takes the change of prefix that maps the most checkpoint sites to model sites, among
    the changes that only add or only remove parts of the name.

    Args:
        checkpoint_sites: dotted module names in the checkpoint.
        model_sites: dotted module names in the model.

    Returns:
        Checkpoint site to model site, one to one; a checkpoint site without a partner is absent.

    Raises:
        ValueError: two changes of prefix fit equally well, for example the same encoder twice in one model.
    """
    ours = list(dict.fromkeys(checkpoint_sites))
    theirs = list(dict.fromkeys(model_sites))
    known = set(theirs)
    if any(site in known for site in ours):
        return {site: site for site in ours if site in known}

    best: dict[str, str] = {}
    best_rules: list[tuple[str, str]] = []
    for rule in sorted(_candidate_rules(ours, theirs)):
        mapping = _apply(rule, ours, known)
        if len(mapping) > len(best):
            best, best_rules = mapping, [rule]
        elif mapping and len(mapping) == len(best):
            best_rules.append(rule)
    if len(best_rules) > 1:
        choices = ", ".join(f"{remove or '(nothing)'!s} -> {add or '(nothing)'!s}" for remove, add in best_rules)
        raise ValueError(
            f"the checkpoint's site names fit the model in more than one way, changing the prefix {choices}; "
            "load into the intended inner model, so that the names match"
        )
    return best


def renamed(name: str, mapping: Mapping[str, str]) -> str:
    """Another name of the checkpoint, for example of a head's parameter, under the change of prefix in `mapping`."""
    for site, to in mapping.items():
        parts, other = site.split("."), to.split(".")
        common = _common_tail(parts, other)
        remove, add = ".".join(parts[: len(parts) - common]), ".".join(other[: len(other) - common])
        if remove and not name.startswith(f"{remove}."):
            return name
        core = name[len(remove) + 1 :] if remove else name
        return f"{add}.{core}" if add else core
    return name


def _candidate_rules(ours: list[str], theirs: list[str]) -> set[tuple[str, str]]:
    # Sites of one layer kind share their last parts; a site with another ending is skipped at once, so that not every
    # pair is compared.
    by_tail: dict[str, list[list[str]]] = {}
    for site in theirs:
        by_tail.setdefault(site.rpartition(".")[2], []).append(site.split("."))
    rules = set()
    for site in ours:
        parts = site.split(".")
        for other in by_tail.get(parts[-1], []):
            common = _common_tail(parts, other)
            remove, add = parts[: len(parts) - common], other[: len(other) - common]
            if _is_prefix_change(remove, add):
                rules.add((".".join(remove), ".".join(add)))
    return rules


def _common_tail(first: list[str], second: list[str]) -> int:
    count = 0
    for left, right in zip(reversed(first), reversed(second), strict=False):
        if left != right:
            break
        count += 1
    return count


def _is_prefix_change(remove: list[str], add: list[str]) -> bool:
    """Whether one prefix is the other plus parts: `encoder` must never become `decoder`, nor layer 1 layer 2."""
    if any(layer_number(part) is not None for part in remove):
        return False
    if remove and any(layer_number(part) is not None for part in add):
        return False
    shorter, longer = sorted((remove, add), key=len)
    rest = iter(longer)
    return len(shorter) < len(longer) and all(part in rest for part in shorter)


def _apply(rule: tuple[str, str], ours: Iterable[str], known: Collection[str]) -> dict[str, str]:
    remove, add = rule
    mapping = {}
    for site in ours:
        if remove and not site.startswith(remove + "."):
            continue
        core = site[len(remove) + 1 :] if remove else site
        target = f"{add}.{core}" if add else core
        if target in known:
            mapping[site] = target
    return mapping
