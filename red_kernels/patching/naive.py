"""The edit in eager PyTorch, by forward hooks: the peer of the fused operations.

RED (arXiv 2402.15179) is usually written like this. A module's output is multiplied and shifted, in two passes over the
whole activation, before the model's own residual addition and norm. Nothing here is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..edits.kinds import Edit, Kind, is_kind, kind_named, kind_names
from ..edits.module import CONTEXTS, refuse_site
from ..fusion.site import with_first
from .module_facts import input_width, output_width

__all__ = ["NaiveEdits", "naive_edit"]


class NaiveEdits:
    """Edits of a model by forward hooks; a context manager that removes them at its end.

    Attributes:
        parameters: site to part to Parameter, as the kind of edit defines them. They are not registered in the model:
            its `state_dict` and `parameters()` are unchanged.
        active: False lets the model run unedited until it is True again.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind,
        parameters: dict[str, dict[str, nn.Parameter]],
        inputs: frozenset[str] = frozenset(),
    ) -> None:
        self._kind = kind
        self.parameters = parameters
        self.active = True
        self._required_grad = {name: own.requires_grad for name, own in model.named_parameters()}
        self._model = model
        model.requires_grad_(False)
        self._handles: list[RemovableHandle] = [
            self._hang_in_front(model.get_submodule(site), parts)
            if site in inputs
            else model.get_submodule(site).register_forward_hook(self._hook(parts))
            for site, parts in parameters.items()
        ]

    def _hang_in_front(self, module: nn.Module, parts: dict[str, nn.Parameter]) -> RemovableHandle:
        edited = self._hook(parts, of_input=True)
        return module.register_forward_pre_hook(lambda module, args: (edited(module, args, args[0]), *args[1:]))

    def _hook(self, parts: dict[str, nn.Parameter], of_input: bool = False) -> Callable[[nn.Module, object, Any], Any]:
        kind = self._kind

        def hook(module: nn.Module, arguments: object, output: Any) -> Any:
            if not self.active:
                return output
            if isinstance(output, (tuple, list)):
                return with_first(output, hook(module, arguments, output[0]))
            given = {name: None if of_input else CONTEXTS[name](module, output.shape[-1]) for name in kind.context}
            if kind.kernel is None:  # its formula is written for fp32
                return Edit(kind, {**parts, **given}).plain(output)
            return kind.formula(output, {**parts, **given}).to(output.dtype)

        return hook

    def vectors(self) -> list[nn.Parameter]:
        """All vectors in one list, for an optimizer."""
        return list(dict.fromkeys(vector for parts in self.parameters.values() for vector in parts.values()))

    def remove(self) -> None:
        """Remove the hooks and restore `requires_grad` of the base parameters; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, own in self._model.named_parameters():
            own.requires_grad_(self._required_grad.get(name, own.requires_grad))

    def __enter__(self) -> NaiveEdits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def naive_edit(
    model: nn.Module,
    sites: Iterable[str],
    kind: str = "all",
    dtype: torch.dtype = torch.float32,
    widths: Mapping[str, int] | None = None,
    inputs: Collection[str] = (),
) -> NaiveEdits:
    """Edit outputs or inputs of modules by the formula of a kind of edit, in eager PyTorch, and freeze the base model.

    Args:
        model: the base model; it must not be patched.
        sites: names of modules whose output is one tensor `(..., width)`, or a tuple that begins with it.
        kind: as in `RedConfig`.
        dtype: of the vectors. The output keeps the dtype of `h`.
        widths: site to width, for modules other than linear layers, transformers' `Conv1D` and norms.
        inputs: the sites whose input is edited instead of their output.

    Returns:
        The `NaiveEdits`, which contains the vectors and can remove the edits.

    Raises:
        ValueError: no sites, an unknown site or kind, a kind that reads more than its site's output (`"initial"`), or
        a site of unknown width. Nothing is changed then.
    """
    if not is_kind(kind):
        raise ValueError(f"kind: got {kind!r}, expected one of {kind_names()}")
    own, names = kind_named(kind), list(sites)
    if not names:
        raise ValueError("sites: got none, expected at least one module name")
    if "initial" in own.context:
        raise ValueError(f"kind: {kind!r} reads the input of a stack's first layer, which a plain hook does not get")
    inputs = names if own.on_input else inputs
    modules = dict(model.named_modules())
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    first: dict[int, str] = {}  # width to the first site of it
    for site in names:
        if site not in modules:
            raise ValueError(f"sites: the model has no module {site!r}")
        told = input_width(modules[site]) if site in inputs else output_width(modules[site])
        width = (widths or {}).get(site, told)
        if width is None:
            what = f"{site!r} is a {type(modules[site]).__name__}"
            raise ValueError(f"sites: {what}, whose width is unknown; pass it in widths")
        parameter = next(chain(modules[site].parameters(), model.parameters()), None)
        device = "cpu" if parameter is None else parameter.device
        refuse_site(own, modules[site], width, f"sites: {site!r}", site in inputs)
        if own.shared and first.setdefault(width, site) != site:
            parameters[site] = parameters[first[width]]
            continue
        parameters[site] = {name: nn.Parameter(start) for name, start in own.start(width, dtype, device).items()}
    return NaiveEdits(model, own, parameters, frozenset(inputs))
