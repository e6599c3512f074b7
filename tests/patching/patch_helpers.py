"""Running the same thing on a patched model, on the unfused composition, and on that in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import model_zoo as zoo
import pytest
import torch
from torch import Tensor, nn

from red_kernels.backends import choose, nodes, reference
from red_kernels.backends.arguments import Edit, Norm
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.fusion import quick, scopes, site, sums, takers, waiting
from red_kernels.fusion.record import Record
from red_kernels.fusion.waiting import NO_EDIT
from red_kernels.ops import fused, handover
from red_kernels.ops.handover import Handover
from red_kernels.patching import classes as patched
from red_kernels.patching import expect
from red_kernels.patching.patch import patch

Run = Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]]

expect._MOST = 60.0  # what a report foresees is not to depend on how busy this machine is


@dataclass
class Watch:
    """The norms that notes were left for, and those that took what they were to return from one.

    `across` has those of the latter that lie outside of the layer in which the note was left.
    """

    left: list[nn.Module] = field(default_factory=list)
    taken: list[nn.Module] = field(default_factory=list)
    across: list[nn.Module] = field(default_factory=list)

    def clear(self) -> None:
        self.left.clear()
        self.taken.clear()
        self.across.clear()


def watching(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Watch the notes on sums: those that have the norm's value, and those it was computed by when the norm came."""
    watch = Watch()
    take = sums.take_note

    class Note(sums.Note):
        def __init__(self, total: Tensor, *args: Any, **kwargs: Any) -> None:
            super().__init__(total, *args, **kwargs)
            if self.norm is not None and not total.is_meta:  # what `patch` foresees is computed without values
                watch.left.append(self.norm)

    def take_note(norm: nn.Module, z: Tensor) -> Tensor | None:
        note = z.__dict__.get(sums.NOTE)
        if note is None and z._base is not None:  # of a view, the note is on the sum
            note = z._base.__dict__.get(sums.NOTE)
        normed = take(norm, z)
        if normed is not None and not z.is_meta:
            watch.taken.append(norm)
            if note.norm is None:
                watch.left.append(norm)
            if scopes.running()[-1] is not note.scope:
                watch.across.append(norm)
        return normed

    normed = nodes.normed

    def left(total: Tensor) -> None:
        if not total.is_meta:
            watch.left.append(total.__dict__[sums.NOTE].norm)

    def watched_norm(norm: nn.Module, x: Any) -> Any:
        note = x.__dict__.get(sums.NOTE) if type(x) is Tensor else None
        found = normed(norm, x)
        if found is not None and note is not None and not x.is_meta:
            watch.taken.append(norm)
            if scopes.running()[-1] is not note.scope:
                watch.across.append(norm)
        return found

    monkeypatch.setattr(sums, "Note", Note)
    monkeypatch.setattr(patched, "take_note", take_note)
    monkeypatch.setattr(nodes, "normed", watched_norm)
    watch_quick_sums(monkeypatch, left)
    return watch


def watch_quick_sums(monkeypatch: pytest.MonkeyPatch, seen: Callable[[Tensor], None]) -> None:
    """Call `seen` with each sum that is computed with its norm in C++, as one that is as in an earlier call is."""
    added = nodes.added
    for name in ("__add__", "__radd__"):  # which do not ask Python
        if name in vars(waiting.Waiting):
            monkeypatch.delattr(waiting.Waiting, name)

    def watched(value: Any, residual: Any) -> Any:
        total = added(value, residual)
        if type(total) is Tensor:
            seen(total)
        return total

    monkeypatch.setattr(nodes, "added", watched)


@contextlib.contextmanager
def stack_running(module: nn.Module) -> Iterator[scopes.Scope]:
    """As while the forward of a stack of blocks is running."""
    scope = scopes.Scope(module, scopes.Verdict(stack=True))
    scopes.running().append(scope)
    try:
        yield scope
        scope.close(None)
    finally:
        scopes.running().remove(scope)


def leave_note(z: Tensor, normed: Tensor, norm: nn.Module) -> None:
    """What a block of the running stack does that knows the norm behind it."""
    stack = scopes.running()[-1]
    sums.Note(z, Record(), stack, stack, None, Handover(NO_EDIT, None), normed, norm)


def operations_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Edit]]:
    """What fused passes run from now on: the operation, by its public name, and the edit it is given."""
    calls: list[tuple[str, Edit]] = []

    def recorded(operation: str, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            own = next((one for one in arguments if isinstance(one, Edit)), None)
            if own is None:
                own = next(one.edit for one in arguments if isinstance(one, Handover))
            centered = any(one.centered for one in arguments if isinstance(one, Norm))
            if arguments[0].is_meta:  # of the twin that the report is foreseen by
                return function(*arguments)
            calls.append((name.replace("norm", "layer_norm" if centered else "rms_norm"), own))
            return function(*arguments)

        return run

    ours = ("edit", "edit_add", "edit_add_norm", "norm_edit")
    watched = {name: recorded(name, getattr(fused, name), name) for name in ours}
    rest = {name: getattr(fused, name) for name in fused.__all__ if name not in ours}
    for module in (site, sums, takers, waiting):
        if hasattr(module, "fused"):
            monkeypatch.setattr(module, "fused", SimpleNamespace(**watched, **rest))
    # Where the norm is not known yet, the sum and its norm are computed one after the other.
    # Where it is, one pass computes both, and what is called for the norm only hands its part out.
    alone, both = (recorded("sum_of", handover.sum_of, name) for name in ("edit_add", "edit_add_norm"))
    norm_of = recorded("norm_of", handover.norm_of, "edit_add_norm")

    def sum_of(*arguments: Any) -> Any:
        return (both if isinstance(arguments[-1], Norm) else alone)(*arguments)

    def norm_of_sum(z: Tensor, given: Handover, norm: Norm) -> Tensor:
        return (norm_of if given.norm is None else handover.norm_of)(z, given, norm)

    monkeypatch.setattr(sums, "sum_of", sum_of)
    monkeypatch.setattr(sums, "norm_of", norm_of_sum)

    # What is as in an earlier call goes to the nodes in C++ at once.
    def watched_nodes(found: Any) -> Any:
        if found is None:
            return None
        named = {"sum_norm": "edit_add_norm", "edit_norm": "edit_add_norm", "edit": "edit"}
        quick = {name: recorded(name, getattr(found, name), public) for name, public in named.items()}
        return SimpleNamespace(norm_of=found.norm_of, **quick)

    monkeypatch.setattr(quick, "choose", lambda *given: SimpleNamespace(nodes=watched_nodes(choose(*given).nodes)))
    if nodes.forget_choices is not None:
        nodes.forget_choices(False)  # each call asks
    return calls


def is_edited(own: Edit) -> bool:
    """Whether an operation has anything of an edit to apply."""
    return any(vector is not None for vector in own.vectors.values())


def batch_for(model: nn.Module, name: str, **arguments: Any) -> dict[str, Tensor]:
    """A batch in the model's dtype."""
    dtype = next(model.parameters()).dtype
    batch = zoo.inputs(name, **arguments)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def patched_and_peer(
    name: str, dtype: torch.dtype = torch.float32, prepare: Callable[[nn.Module], Any] | None = None, **changes: Any
) -> tuple[nn.Module, zoo.Unfused, zoo.Unfused]:
    """A patched model, the unfused composition of the same, and that in float64; all with the same vectors."""
    model = zoo.tiny(name, **changes).to(dtype)
    values = zoo.vectors(zoo.sites(name))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    patch(model, RedConfig())
    zoo.fill(edit_parameters(model), values)
    for one in (model, unfused.model, truth.model):
        if prepare is not None:
            prepare(one)
    return model, unfused, truth


def learn(model: nn.Module, name: str) -> None:
    """Run a model in each mode until it knows what follows its sites, as in all forwards but the first."""
    modes = [module.training for module in model.modules()]
    for training in (True, False):
        model.train(training)
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                for _ in range(2):
                    model(**batch_for(model, name))
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training


def compare(
    name: str,
    run: Run,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[nn.Module], Any] | None = None,
    gradients: bool = True,
    **changes: Any,
) -> nn.Module:
    """Hold whatever `run` returns, and the gradients of the vectors, to the unfused composition."""
    model, unfused, truth = patched_and_peer(name, dtype, prepare, **changes)
    wanted = run(truth.model, batch_for(truth.model, name))
    plain = run(unfused.model, batch_for(unfused.model, name))
    found = run(model, batch_for(model, name))
    assert found.keys() == wanted.keys()
    for key in wanted:
        zoo.assert_as_exact(key, found[key], plain[key], wanted[key], dtype)
    if gradients:
        exact, unfused_gradients, own = truth.gradients(), unfused.gradients(), zoo.gradients(edit_parameters(model))
        assert exact
        assert own.keys() == exact.keys()
        for key in exact:
            zoo.assert_as_exact(key, own[key], unfused_gradients[key], exact[key], dtype)
    return model


def loss_and_backward(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    output = model(**batch)
    output.loss.backward()
    return {"logits": output.logits.detach()}


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The (first) list of layers."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)


def without_gradients(model, batch):
    with torch.no_grad():
        return {"logits": model(**batch).logits}


def in_inference_mode(model, batch):
    with torch.inference_mode():
        return {"logits": model(**batch).logits.clone()}


def philox_dropout(x, p=0.5, training=True, inplace=False):
    """torch's dropout with the mask of the fused operations, drawn from the same generator in the same order."""
    if type(x) is waiting.Waiting:
        taken = takers._dropout(None, (x, p, training, inplace), {})
        if taken is not NotImplemented:
            return taken
        x = x.settle()
    if not training or p == 0.0:
        return x
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)
    return x * reference.dropout_factor(seed, p, x).to(x.dtype)


def snapshot(model):
    """Everything that a patch may change: classes, forwards, hooks, attributes, requires_grad, state_dict."""
    modules = {}
    for name, module in model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("hooks")}
        others = sorted(key for key in vars(module) if not key.endswith("hooks"))
        modules[name] = (type(module), type(module).forward, hooks, others)
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()}
    return modules, gradients, state


def refused(model, config, match, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        patch(model, config)
    assert snapshot(model) == before
