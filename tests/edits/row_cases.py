"""A batch whose rows have different edits, and the same rows run one by one."""

from __future__ import annotations

import copy

import model_zoo as zoo
import position_cases as cases
import torch
from test_positions import compare_gradients, peers

import red_kernels as rk

ROWS = ("a", None, "b", "default", "a")
NAMES = ("default", "a", "b")


def several(name, position="ffn", kind="all", *, dropout=0.0, **changes):
    """The base model, the patched one with three edits, and their values."""
    plain = zoo.tiny(name, dropout=dropout, **changes)
    model = copy.deepcopy(plain)
    rk.patch(model, rk.RedConfig(position=position, kind=kind))
    values = {}
    for seed, edit in enumerate(NAMES):
        if edit != "default":
            rk.add_edit(model, edit)
        values[edit] = cases.values(rk.edit_parameters(model, edit), seed=seed)
        zoo.fill(rk.edit_parameters(model, edit), values[edit])
    return plain, model, values


def inputs(name, rows, **changes):
    batch = zoo.inputs(name, batch=rows, **changes)
    labels = batch.pop("labels")
    if name == "t5":
        batch["decoder_input_ids"] = labels
    return batch


def weighted(logits):
    """A loss that adds up over rows and tells every output from every other."""
    weights = torch.linspace(-1.0, 1.0, logits[0].numel(), dtype=logits.dtype).view(logits[0].shape)
    return (logits * weights).sum()


def all_gradients(model):
    return {
        f"{edit}:{key}": value
        for edit in NAMES
        for key, value in zoo.gradients(rk.edit_parameters(model, edit)).items()
    }


def row_by_row(name, position, plain, model, values, rows, compiled=False):
    """Logits and gradients of each edit: of a peer with one edit at a time, and of the plain model in float64.

    The peer is the patched model; the plain one with hooks where that is compiled, which leaves the fused operations
    out. The gradients of an edit that no row has are not there.
    """
    batch = inputs(name, len(rows))
    single = copy.deepcopy(model)
    unfused, truths = {}, {}
    for edit in set(rows) - {None}:
        unfused[edit], truths[edit] = peers(plain, name, position, values[edit])
    base = zoo.exact(plain, {}).model
    found: tuple[list, list] = ([], [])
    for row, edit in enumerate(rows):
        of_row = {key: value[row : row + 1] for key, value in batch.items()}
        if edit is None:
            with rk.disable_edits(single), torch.no_grad():
                found[0].append(single(**of_row).logits)
            with torch.no_grad():
                found[1].append(base(**of_row).logits)
            continue
        rk.switch_edit(single, edit)
        for which, one in enumerate((unfused[edit].model if compiled else single, truths[edit].model)):
            logits = one(**of_row).logits
            weighted(logits).backward()
            found[which].append(logits.detach())
    exact = {f"{edit}:{key}": value for edit in truths for key, value in truths[edit].gradients().items()}
    peer = {f"{edit}:{key}": value for edit in unfused for key, value in unfused[edit].gradients().items()}
    return torch.cat(found[0]), torch.cat(found[1]), peer if compiled else all_gradients(single), exact


def hold(name, position, plain, model, values, rows, run, compiled=False):
    """Hold what `run` gives for a batch, and the gradients that it leaves, to the rows one by one."""
    logits = run(inputs(name, len(rows)))
    peer, truth, peer_gradients, exact = row_by_row(name, position, plain, model, values, rows, compiled)
    zoo.assert_as_exact("logits", logits.detach(), peer, truth)
    found = all_gradients(model)
    unused = found.keys() - exact.keys()
    assert all(not found[key].any() for key in unused)
    compare_gradients({key: found[key] for key in exact}, peer_gradients, exact)


def eager(model, rows):
    def run(batch):
        with rk.use_edits(model, rows):
            logits = model(**batch).logits
            weighted(logits).backward()
        return logits

    return run
