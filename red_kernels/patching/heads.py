"""The head of a model, outside of the edited base model: finding it and training it.

A task head (a classifier, a question answerer, a value head) is usually random when the model is loaded, so it has to
be trained. A patch freezes it with the base model, unless `train_head` is set. The head of a language model is not a
task head: it maps to the vocabulary of the input embeddings, and comes with the checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..edits.config import RedConfig
from ..support.text import listed

__all__ = ["Head", "find_head", "make_trainable", "release_head"]

_FORMER = "_red_kernels_head"  # in a head's module: parameter name to its former dtype and requires_grad
_LABELS = ("labels", "start_positions")  # arguments of transformers' models with a head


@dataclass(frozen=True)
class Head:
    """The treatment of a model's head in a patch.

    Attributes:
        trained: the parameters that stay trainable, by name.
        were_trainable: the names of those of them that were trainable before.
        trained_modules: the outermost modules of these.
        frozen_modules: the outermost modules of a task head that is frozen.
        around: ids of the modules that contain the base model as well.
    """

    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    were_trainable: frozenset[str] = frozenset()
    trained_modules: tuple[str, ...] = ()
    frozen_modules: tuple[str, ...] = ()
    around: frozenset[int] = frozenset()

    def train(self, model: nn.Module) -> None:
        """Make the head trainable after all parameters were frozen; `release_head` undoes it."""
        make_trainable(model, self.trained, self.were_trainable, self.around)


def find_head(model: nn.Module, sites: Iterable[str], config: RedConfig) -> Head:
    """The planned treatment of the head of a model whose parameters are unchanged. It changes nothing.

    Args:
        model: the model to patch.
        sites: the names of its sites.
        config: with `train_head` the head stays trainable: its parameters that are trainable now, or all of them if
        none is.

    Raises:
        ValueError: `train_head`, but the model has no parameters outside its base model, an unknown base model, or a
        quantised (integer) head, which cannot be trained.
    """
    bodies, holders = _bodies(model, sites)
    inside = {id(own) for body in bodies for own in body.parameters()}
    outside = {name: own for name, own in model.named_parameters() if bodies and id(own) not in inside}
    if not config.train_head:
        of_language_models = {id(own) for one in holders if _is_language_model(one) for own in one.parameters()}
        task = {name: own for name, own in outside.items() if id(own) not in of_language_models}
        return Head(frozen_modules=_outermost(model, task))
    if not outside:
        raise ValueError(
            f"train_head: {type(model).__name__} has no parameters outside its base model, so it has no head; "
            "patch without it, and set requires_grad of the parameters to train"
        )
    packed = [name for name, own in outside.items() if not own.is_floating_point()]
    if packed:
        raise ValueError(f"train_head: the head's {listed(packed)} is quantised and cannot be trained; keep it dense")
    around = frozenset(
        id(module) for module in model.modules() if any(child is body for body in bodies for child in module.modules())
    )
    were_trainable = {name: own for name, own in outside.items() if own.requires_grad}
    trained = were_trainable or outside
    return Head(trained, frozenset(were_trainable), _outermost(model, trained), around=around)


def make_trainable(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    were_trainable: Iterable[str] = (),
    around: Iterable[int] = (),
) -> None:
    """Make parameters trainable, in fp32 at least: in half precision small updates would be lost, as in the edits.

    Modules whose parameters turn to fp32 take their inputs in that dtype.

    Args:
        model: it contains them.
        parameters: name in the model to parameter.
        were_trainable: the names of those that `release_head` leaves trainable.
        around: ids of modules whose own parameters keep their dtype, since other modules read the same inputs.
    """
    before, kept = set(were_trainable), set(around)
    for prefix, module in model.named_modules():
        former: dict[str, tuple[torch.dtype, bool]] = {}
        for name, own in module._parameters.items():
            full = f"{prefix}.{name}" if prefix else name
            if own is None or full not in parameters:
                continue
            former[name] = own.dtype, full in before
            own.requires_grad_(True)
            if own.dtype.itemsize < 4 and id(module) not in kept:
                own.data = own.data.float()
        if not former:
            continue
        module.__dict__[_FORMER] = {**former, **module.__dict__.get(_FORMER, {})}
        narrow = any(dtype.itemsize < 4 for dtype, _ in module.__dict__[_FORMER].values())
        if narrow and id(module) not in kept and _as_weights not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_as_weights, with_kwargs=True)


def release_head(model: nn.Module) -> None:
    """Undo `make_trainable`: the dtypes (trained values are rounded), `requires_grad` and the hooks."""
    for module in model.modules():
        for name, (dtype, trainable) in module.__dict__.pop(_FORMER, {}).items():
            own = module._parameters.get(name)
            if own is None:
                continue
            if own.dtype == torch.float32 != dtype:
                own.data = own.data.to(dtype)
                own.grad = None
            own.requires_grad_(trainable)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _as_weights]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _as_weights(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the inputs in the dtype of the module's weights."""
    dtype = next(own.dtype for own in module._parameters.values() if own is not None)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def _bodies(model: nn.Module, sites: Iterable[str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The base models that contain the sites, and transformers' models around them; empty if a site has no base."""
    bodies: dict[int, nn.Module] = {}
    holders: dict[int, nn.Module] = {}
    for site in sites:
        path = [model]
        for part in filter(None, site.split(".")):
            path.append(path[-1]._modules[part])  # type: ignore[arg-type]
        body: nn.Module | None = None
        below = False  # a model with a head that does not name its base model
        for module in path:
            if not _is_transformers(module):
                body = module if below else None
            else:
                base: Any = module.base_model
                if base is not module:
                    body = base
                    holders[id(module)] = module
                elif _takes_labels(module):
                    holders[id(module)] = module
                    below = True
                else:
                    body = module
            if body is not None:
                break
        if body is None:
            return [], []
        bodies[id(body)] = body
    return list(bodies.values()), list(holders.values())


def _is_transformers(module: nn.Module) -> bool:
    kind = type(module)
    return isinstance(getattr(kind, "base_model_prefix", None), str) and hasattr(kind, "base_model")


def _takes_labels(module: nn.Module) -> bool:
    return any(name in inspect.signature(type(module).forward).parameters for name in _LABELS)


def _is_language_model(model: Any) -> bool:
    """Whether a model maps its hidden states to its input vocabulary."""
    try:
        read, written = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    sizes = [getattr(getattr(module, "weight", None), "shape", (None,))[0] for module in (read, written)]
    return sizes[0] is not None and sizes[0] == sizes[1]


def _outermost(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """The outermost modules with nothing but these parameters, and the parameters in no such module, by name."""
    chosen = {id(own) for own in parameters.values()}
    found: list[str] = []

    def collect(module: nn.Module, prefix: str) -> None:
        for name, own in module._parameters.items():
            if own is not None and id(own) in chosen:
                found.append(f"{prefix}{name}")
        for name, child in module._modules.items():
            held = [] if child is None else [id(own) in chosen for own in child.parameters()]
            if child is None or not any(held):
                continue
            if all(held):
                found.append(f"{prefix}{name}")
            else:
                collect(child, f"{prefix}{name}.")

    if chosen:
        collect(model, "")
    return tuple(dict.fromkeys(found))
