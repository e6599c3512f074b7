"""The tuner's layer: a module that edits the output of another one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...edits.kinds import PARTS, Edit, kind_named
from ...edits.module import EDITED, NAME, Edited, RedEdit, refuse_site
from ...edits.selection import OFF, Selection
from ...edits.vectors import EditVectors
from ...fusion.inputs import input_hook
from ...fusion.site import edit_hook
from ...merging.merge import is_finite, unfinite
from ...patching.module_facts import device_of, input_width, output_width
from ...support.text import listed
from .config import RedPeftConfig
from .merged import mergeable, merged_tensors

__all__ = ["RedAdapters", "RedLayer", "width_of"]


class RedAdapters(RedEdit, nn.ModuleDict):
    """A site's edits by the names of their adapters: the `red_edit` of a `RedLayer`.

    Attributes:
        active: the names of the applied adapters, one after another; names without an adapter here are skipped.
        enabled: False inside PEFT's `disable_adapter`.
        merged: whether the base layer's weights contain edits already.
    """

    def __init__(self, width: int, selection: Selection) -> None:
        super().__init__(width, None, torch.float32, None, selection, own=False)
        self.active: list[str] = []
        self.enabled = True
        self.merged = False

    def add_adapter(
        self, name: str, kind: str, dtype: torch.dtype, device: torch.device | None, shared: EditVectors | None = None
    ) -> EditVectors:
        """Add the vectors of an adapter, `shared` or new ones, or replace its former ones.

        Raises ValueError for an invalid name.
        """
        taken = name in PARTS or (hasattr(self, name) and name not in self._modules)
        if not name or "." in name or name == NAME or taken:
            raise ValueError(f"adapter_name: got {name!r}, which cannot be the name of an adapter; choose another one")
        refuse_site(kind_named(kind), self.__dict__[EDITED](), self.width, "base_layer", self.on_input)
        added = EditVectors(self.width, kind_named(kind), dtype, device) if shared is None else shared
        added.train(self.training)
        self[name] = added
        return added

    def is_active(self, name: str) -> bool:
        """Whether an adapter is applied outside all blocks."""
        return name in self.active

    def live_state(self, state: Any, in_block: bool) -> Any:
        """The adapters in force: none if PEFT has disabled them, the active ones outside blocks."""
        if not self.enabled:
            return OFF
        return state if in_block or state is OFF else tuple(name for name in self.active if name in self._modules)

    def applied(self, hidden: Tensor) -> Edit | None:
        """The edit applied to `hidden` now; None for none. Raises ValueError for edits that cannot be chained."""
        return None if self.merged else super().applied(hidden)

    def by_state(self, state: Any, again: bool) -> Edit | None:
        """The one edit equal to these adapters in sequence. RuntimeError if one was deleted since the first run."""
        gone = [name for name in state if name not in self._modules]
        if gone:
            raise RuntimeError(
                f"under activation checkpointing a forward runs again with the adapter {gone[0]!r}, which was deleted "
                "in between; delete it after the backward pass"
            )
        found = [self.holder(name).vectors(again) for name in state]
        return found[0] if len(found) == 1 else _composed(found)

    def extra_repr(self) -> str:
        return f"{self.width}"


class RedLayer(nn.Module, BaseTunerLayer):
    """Edits the output or the input of a module, `scale * h + bias` (RED, arXiv 2402.15179), for one or more adapters.

    A forward hook applies the edit, or the layer's fused forward behind it. The base layer is a black box; only merging
    reads its weights.

    Args:
        base_layer: a module with one output tensor of a fixed width: a linear layer of any type, a norm, an embedding.
        adapter_name: of the first adapter.
        config: that adapter's.
        selection: shared by all layers of a model; that of `rk.use_edits`.
        on_input: whether all adapters edit the input.
        shared: the adapter's existing vectors in another layer (`Kind.shared`).

    Raises:
        ValueError: the width of the edited tensor is unknown, or the adapter's name is invalid.
    """

    adapter_layer_names = (NAME,)
    other_param_names = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RedPeftConfig,
        selection: Selection | None = None,
        *,
        on_input: bool = False,
        shared: EditVectors | None = None,
    ) -> None:
        super().__init__()
        width = width_of(base_layer, on_input)
        if width is None:
            side = "input" if on_input else "output"
            raise ValueError(f"base_layer: got a {type(base_layer).__name__}, whose {side} has an unknown width")
        self.base_layer = base_layer
        self.in_features: int | None = _first(base_layer, "in_features", "nx", "num_embeddings") or width
        self.out_features = width_of(base_layer) or width
        # One layer may have other adapters than the next: notes are left from the start.
        self.red_edit = RedAdapters(width, Selection() if selection is None else selection)
        self.red_edit.__dict__[EDITED] = Edited(self)
        self.merged_adapters: list[str] = []
        self._base_tensors: dict[str, Tensor | None] = {}  # of the base layer, before merging
        self.sharing: tuple[str, ...] = ()  # names in the model of Parameters shared with the base layer
        self.red_edit.selection.varied = True
        self.red_edit.on_input = on_input
        if on_input:
            self.register_forward_pre_hook(input_hook, with_kwargs=True)
        else:
            self.register_forward_hook(edit_hook)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, shared)

    # PEFT sets these two by name; the edits need them, since the layer's fused forward reads them.

    @property
    def _active_adapter(self) -> list[str]:
        return self.red_edit.active

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        self.red_edit.active = [names] if isinstance(names, str) else list(names)

    @property
    def _disable_adapters(self) -> bool:
        return not self.red_edit.enabled

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self.red_edit.enabled = not disabled

    def update_layer(self, adapter_name: str, config: RedPeftConfig, shared: EditVectors | None = None) -> None:
        """Add an adapter, with vectors of another layer if they are given. Raises ValueError as the class does."""
        device = device_of(self.base_layer, self.base_layer)
        dtype: torch.dtype = getattr(torch, config.vector_dtype)
        with torch.inference_mode(False), torch.no_grad():
            added = self.red_edit.add_adapter(adapter_name, config.kind, dtype, device, shared)
            if not config.init_weights and shared is None:
                for vector in added.parameters():
                    vector.add_(torch.randn_like(vector), alpha=0.5)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and trainable unless `inference_mode`; the others are frozen.

        A backward pass through an earlier forward still gives these their gradients.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, own in self.red_edit.items():
            if isinstance(own, EditVectors):
                if inference_mode or name not in names:
                    own.freeze()
                if inference_mode or name in names:
                    own.frozen = ()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the base layer; the edit follows in the hook, or behind this layer."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.base_layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer: `scale * W` and `scale * b + bias` in fp32, rounded once.

        Several compose in the order in which they are merged, from the original weights, which are kept.

        Args:
            safe_merge: PEFT's. Values that are not finite are refused in any case.
            adapter_names: of the adapters; None for the active ones.

        Raises:
            ValueError: the base layer is quantised, of an unknown type, or shares a Parameter with another module; an
                adapter's kind is `"ln"`; a value is not finite, with or without `safe_merge`. Nothing is changed then.
        """
        chosen = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.red_edit]
        if not chosen:
            return
        base, tensors, merged = self._merged_with(chosen)
        names = [*self.merged_adapters, *chosen]
        for name, tensor in merged.items():
            self._base_tensors.setdefault(name, tensors.get(name))
            _set(base, name, tensor)
        self.merged_adapters = names
        self.red_edit.merged = True

    def unmerge(self) -> None:
        """Restore the original weights, bit for bit, and remove a bias that merging has made."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        for name, tensor in self._base_tensors.items():
            _set(base, name, tensor)
        self._base_tensors = {}
        self.merged_adapters = []
        self.red_edit.merged = False

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raises ValueError where `merge` would; changes nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        chosen = [name for name in names if name in self.red_edit and name not in self.merged_adapters]
        if chosen:
            self._merged_with(chosen)

    def _merged_with(self, chosen: list[str]) -> tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]:
        """The base layer, its present tensors, and its tensors with these adapters merged behind the merged ones."""
        base = mergeable(self.base_layer, "base_layer")
        if self.sharing:
            raise ValueError(f"base_layer: {listed(self.sharing)} share one Parameter; an edit of one would change all")
        tensors = {name: None if held is None else held.data for name, held in base._parameters.items()}
        original = {**tensors, **self._base_tensors}
        edit = self._vectors_of([*self.merged_adapters, *chosen])
        merged = merged_tensors(base, original, edit, self.red_edit.on_input)
        for name, tensor in merged.items():
            if not is_finite(tensor):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(chosen)} seems to be broken: the "
                    f"{name} would have {unfinite(tensor)} values in {tensor.dtype}"
                )
        return base, tensors, merged

    @property
    def biased(self) -> bool:
        """Whether the base layer had its own bias before the first merge, or can never have one."""
        held = self.get_base_layer()._parameters
        return "bias" not in held or self._base_tensors.get("bias", held["bias"]) is not None

    def _vectors_of(self, names: Iterable[str]) -> Edit:
        found = _composed([self.red_edit.holder(name).vectors() for name in names])
        assert found is not None
        return found

    def __repr__(self) -> str:
        return "red." + super().__repr__()


def width_of(module: nn.Module, on_input: bool = False) -> int | None:
    """The width of a module's output, or of a linear layer's input; None if it is unknown."""
    told = input_width if on_input else output_width
    if isinstance(module, nn.Embedding) and not on_input:
        return module.embedding_dim
    width = told(module)
    return told(module.get_base_layer()) if width is None and isinstance(module, BaseTunerLayer) else width


def _composed(found: list[Edit]) -> Edit | None:
    """The one edit equal to several in sequence; None for none."""
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    first, *others = found
    chain = first.kind.chain
    alone = next((one.kind.name for one in found if one.kind.chain is None or one.kind.chain is not chain), None)
    if chain is None or alone is not None:
        raise ValueError(f"adapter: got several at a time, but kind {alone!r} can only be applied alone")
    vectors = first.vectors
    for one in others:
        vectors = chain(vectors, one.vectors)
    return Edit(first.kind, vectors)


def _first(module: nn.Module, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)


def _set(base: nn.Module, name: str, tensor: Tensor | None) -> None:
    held = base._parameters[name]
    if tensor is None:
        base._parameters[name] = None
    elif held is None:
        base._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        held.data = tensor.to(held.device, held.dtype)
