"""The tuner: it puts RED's layers into a model, fuses them, and removes them again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ...edits.config import RedConfig
from ...edits.find import wrapper_of
from ...edits.module import SITE, RedEdit
from ...edits.named import use_edits
from ...edits.selection import DEFAULT, Selection
from ...edits.stream import STREAM, Stream, close_stream, open_stream
from ...edits.vectors import EditVectors
from ...merging.fold import biasless_kinds
from ...merging.merge import make_place, places_for_biases
from ...patching.classes import unpatch_module
from ...patching.patch import fuse
from ...patching.plan import plan_edited
from ...patching.sites import bias_flags, known_sites
from ...patching.streams import PlannedStream, plan_streams
from ...support.text import listed
from . import combining
from .config import RedPeftConfig, named_by
from .layer import RedLayer, width_of

__all__ = ["RedModel"]

_NO_ADAPTER = "__base__"  # PEFT's name for a row of a mixed batch without any


class RedModel(BaseTuner):
    """Edits a model as RED does (arXiv 2402.15179), by PEFT's rules: `peft.get_peft_model` makes one.

    The base weights are frozen and unchanged. In a layer with a known forward the edit shares a pass with the residual
    add and the norm behind it, as under `rk.patch`.
    """

    prefix = "red_edit"
    tuner_layer_cls = RedLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules, peft_config.feedforward_modules = _targets(self.model, peft_config)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        inside: list[str] = []
        shared = None
        parents: dict[str, nn.Module] = {}
        found_sites: list[str] = []
        for name, module in model.named_modules():
            parents[name] = module
            wrapper = wrapper_of(module)
            if wrapper is not None:
                where = f"in {name!r}" if name else "around it"
                raise ValueError(f"model: has a {wrapper} {where}, which would not see the vectors; add them before")
            if name.startswith(tuple(inside)):
                continue
            if isinstance(module, RedEdit):
                raise ValueError(
                    f"model: it is patched already (at {name}); call rk.unpatch before PEFT edits the same model"
                )
            if isinstance(module, RedLayer):
                inside.append(f"{name}.")
                shared = module.red_edit.selection
            if name and peft_config.target_modules != "all-linear":
                found = self._check_target_module_exists(peft_config, name)
                if found and not isinstance(found, _ExcludedModule):
                    _check_target(module, name, parents[name.rpartition(".")[0]], peft_config.edits_input(name))
                    found_sites.append(name)
        _check_inputs(found_sites, peft_config)
        self.__dict__["_streams"] = _streams(model, found_sites, peft_config.as_red_config())
        self.__dict__["_selection"] = Selection() if shared is None else shared

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        on_input = peft_config.edits_input(current_key)
        _check_target(target, current_key, parent, on_input)
        shared = self._shared(adapter_name, peft_config, target, on_input)
        if isinstance(target, RedLayer):
            target.update_layer(adapter_name, peft_config, shared)
            return
        selection = self.__dict__["_selection"]
        made = RedLayer(target, adapter_name, peft_config, selection, on_input=on_input, shared=shared)
        made.train(target.training)
        if adapter_name not in self.active_adapters:
            made.red_edit.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    def _shared(
        self, adapter_name: str, config: RedPeftConfig, target: nn.Module, on_input: bool
    ) -> EditVectors | None:
        """The vectors that a layer of this width has for the adapter, if all layers of the width share them."""
        if not config.as_red_config().edit_kind.shared:
            return None
        width = target.red_edit.width if isinstance(target, RedLayer) else width_of(target, on_input)
        there = (layer.red_edit for layer in self._layers() if layer is not target)
        return next((own.holder(adapter_name) for own in there if own.width == width and adapter_name in own), None)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would also look for a weight in both, which a saved head may lack; the vectors are on the right device
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter's layers into the model, and fuse them where possible.

        Raises:
            ValueError: a target's output has no known width, there is no target, or the model is patched
                or wrapped already. Nothing is changed then.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._note_sharing()
        for planned in self.__dict__.pop("_streams", ()):
            stream = planned.layers[0].__dict__.get(STREAM)
            if stream is None:
                stream = Stream(planned.name)
                open_stream(stream, planned.owner, planned.layers)
            for site in planned.sites:
                model.get_submodule(site).red_edit.__dict__.update({STREAM: stream, SITE: site})
        fuse(plan_edited(model))

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Make adapters the active ones; several are applied one after another."""
        super().set_adapter(adapter_name, *args, **kwargs)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.__dict__["_selection"].chosen = names[0] if names else DEFAULT

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        config: Any = self.peft_config[adapter_name]
        if autocast_adapter_dtype or config.vector_dtype != "float32":
            return
        for layer in self._layers():
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if adapter_name in layer.red_edit and dtype is not None and dtype.is_floating_point:
                for vector in layer.red_edit[adapter_name].parameters():
                    vector.data = vector.data.to(dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. Raises ValueError if it does not exist or is merged."""
        super().delete_adapter(adapter_name)
        for layer in self._layers():  # PEFT skips modules whose names contain the prefix
            if adapter_name in layer.red_edit:
                layer.delete_adapter(adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter that is a weighted combination of the changes of others, as `rk.combine_edits`.

        `scale = 1 + sum(w * (scale_i - 1))` and `bias = sum(w * bias_i)`, in fp64, rounded once. A vector that an
        adapter lacks, at a site or by its kind, is the identity. The new adapter edits all sites of the others.
        It is frozen and not active until `set_adapter`, as LoRA's.

        Args:
            adapters: names of adapters.
            weights: as many finite numbers, of any sign.
            adapter_name: of the new one.
            combination_type: `"linear"`; LoRA's other types concern its matrices.

        Raises:
            TypeError, ValueError: an adapter is unknown or of kind `"ln"`; the new name is taken or invalid;
                weights do not fit; another combination; several adapters have their own copies of the same
                `modules_to_save`. Nothing is changed then.
        """
        combining.check(self, adapters, weights, adapter_name, combination_type)
        config = combining.config_of(self, adapters)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        combining.fill(self, adapters, weights, adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, which are kept for `unmerge_adapter`.

        Raises:
            ValueError: one of the layers cannot be merged (`RedLayer.merge`). Nothing is changed then.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names)
        else:
            for layer in self._layers():
                if layer.merged:
                    layer.unmerge()
        without = [
            name for name, layer in self.model.named_modules() if isinstance(layer, RedLayer) and not layer.biased
        ]
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for module in model.modules():
            unpatch_module(module)
            close_stream(module)
        _place_biases(model, [name for name in without if getattr(model.get_submodule(name), "bias", None) is not None])
        return model

    def _note_sharing(self) -> None:
        """Tell the layers which Parameters they share with other modules, for example tied embeddings."""
        users: dict[int, list[str]] = {}
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            users.setdefault(id(parameter), []).append(path)
        for layer in self._layers():
            held = layer.get_base_layer()._parameters.values()
            shared = [path for own in held if own is not None and len(users[id(own)]) > 1 for path in users[id(own)]]
            layer.sharing = tuple(shared)

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        self._note_sharing()
        for name, layer in self.model.named_modules():
            if isinstance(layer, RedLayer):
                try:
                    layer.check_merge(adapter_names)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

    def _layers(self) -> Iterator[RedLayer]:
        return (module for module in self.model.modules() if isinstance(module, RedLayer))

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """During a batch with `adapter_names=`: each row has its own adapter, `"__base__"` for none."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_adapter_names(names, args, kwargs)
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams if isinstance(beams, int) and beams > 1 else 1)]
        handles = []
        encoder = _encoder(self.model)
        of_encoder = set() if encoder is None else {id(module) for module in encoder.modules()}
        try:
            for module in self.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's own, which need the argument
                    own = names if id(module) in of_encoder else repeated
                    hook = partial(_with_adapter_names, adapter_names=own)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            with use_edits(self.model, [None if name == _NO_ADAPTER else name for name in names]):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(names, str) or not isinstance(names, (list, tuple)):
            raise TypeError(f"adapter_names: got {type(names).__name__}, expected a list with a name for each row")
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. To train so, use rk.use_edits."
            )
        known = {name for layer in self._layers() for name in layer.red_edit} | {_NO_ADAPTER}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if any(layer.merged for layer in self._layers()):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim())
        rows = next((len(value) for value in tensors), len(names))
        if rows != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {rows} respectively."
            )


def _place_biases(model: nn.Module, names: list[str]) -> None:
    """Let plain transformers load the biases that merging has made; warn if it cannot."""
    flags = bias_flags(model)
    wanted = {flags[name] for name in names if name in flags}
    attributes, zeros, unplaced = places_for_biases(model, [f"{name}.bias" for name in names], wanted)
    make_place(model, attributes, zeros)
    if unplaced:
        warnings.warn(
            f"{type(model).__name__} has no place for the biases that merging has made ({unplaced}): plain "
            "transformers would drop them when it loads the saved model. "
            f"Adapters of kind {biasless_kinds()} need none.",
            stacklevel=4,
        )


def _with_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _encoder(model: Any) -> nn.Module | None:
    found = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if found is model else found


def _check_target(target: nn.Module, name: str, parent: nn.Module, on_input: bool) -> None:
    if isinstance(target, RedLayer):
        if target.red_edit.on_input != on_input:
            sides = ("input", "output") if on_input else ("output", "input")
            raise ValueError(
                f"target_modules: this adapter edits the {sides[0]} of {name!r}, and another one its {sides[1]}; a "
                "module has one edited side"
            )
        return
    if on_input and width_of(target, True) is None:
        raise ValueError(
            f"feedforward_modules: {name!r} is a {type(target).__name__}, but only linear layers have an edited input; "
            "name linear layers"
        )
    if width_of(target) is None:
        raise ValueError(
            f"target_modules: {name!r} is a {type(target).__name__}, whose output may not be one tensor of a fixed "
            "width; name linear layers, norms or embeddings"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"target_modules: {name!r} is inside a {type(parent).__name__}, which reads its weights without calling "
            "it, so the edit would never be applied"
        )


def _check_inputs(sites: list[str], config: RedPeftConfig) -> None:
    """Raise ValueError if `feedforward_modules` names a module that is no target."""
    chosen = config.feedforward_modules
    if config.target_modules == "all-linear" or not chosen:
        return
    for one in (chosen,) if isinstance(chosen, str) else ({name} for name in sorted(chosen)):
        if not any(named_by(one, site) for site in sites):
            what = one if isinstance(one, str) else next(iter(one))
            raise ValueError(f"feedforward_modules: got {what!r}, expected some of the modules in target_modules")


def _streams(model: nn.Module, sites: list[str], config: RedConfig) -> list[PlannedStream]:
    """The stacks whose first input these sites read, if their kind reads it. Raises ValueError like `plan_streams`."""
    if "initial" not in config.edit_kind.context:
        return []
    # As for values, which attention takes from another sequence if its name says so.
    return plan_streams(model, [(site, "value", width_of(model.get_submodule(site)) or 0) for site in sites], config)


def _targets(model: nn.Module, config: RedPeftConfig) -> tuple[set[str], set[str] | None]:
    """The modules of a position, by the shortest ends of their names that no other module's name has.

    Also those of them whose input is edited; None if the kind decides, or if there are none.
    """
    found: set[str] = set()
    inputs: set[str] = set()
    modules = {name: module for name, module in model.named_modules() if ".base_layer" not in name}
    streams = []
    for site, chosen in known_sites(model, config.as_red_config()).items():
        of_norm = f"{site}.{chosen.norm}" if chosen.norm and chosen.norm != "." else ""
        name = site if width_of(modules[site]) is not None else of_norm
        found.add(name)
        if not name:
            streams.append(site)
        elif chosen.on_input:
            inputs.add(name)
    if streams:
        raise ValueError(
            f"position: {config.position!r} edits the output of {listed(streams)}, which PEFT cannot wrap; choose "
            "another position, or use rk.patch"
        )
    if config.as_red_config().edit_kind.on_input:
        inputs = set()  # all of them
    if config.layers_to_transform is None:
        found, inputs = (
            {_short(name, [other for other in modules if other and other not in chosen]) for name in chosen}
            for chosen in (found, inputs)
        )
    return found, inputs or None


def _short(name: str, others: list[str]) -> str:
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other == end or other.endswith(f".{end}") for other in others):
            return end
    return name
