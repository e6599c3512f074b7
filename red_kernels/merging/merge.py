"""Merging edits into the weights, and undoing it.

An edit of a linear layer's output (RED, arXiv 2402.15179) is a change of its weight and bias: with `h = W x + b`,
`scale * h + bias = (scale * W) x + (scale * b + bias)`. Behind a norm it changes the norm's own vectors in the same
way. An edit of a layer's input changes the columns of its weight; a bias there adds `W bias`. The modules of a merged
model have no trace of RED, and run at the base model's speed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.wrapped_names import bare_name, former_name, inner_model, lora_around, unwrapped
from ..edits.config import RedConfig
from ..edits.find import edit_modules, merge_targets, patched_holders, wrapper_of
from ..edits.module import RedEdit
from ..edits.named import active_edit
from ..fusion.fingerprint import BASE
from ..fusion.inputs import input_hook
from ..fusion.norms import NormSpec, norm_spec
from ..fusion.site import edit_hook
from ..patching.module_facts import device_of
from ..patching.patch import edit_config, patch_with, unpatch
from ..patching.plan import make_plan
from ..support.text import listed
from .fold import biasless_kinds, folded, folded_input, why_not
from .linears import linear_columns
from .report import MergeReport, SiteMerge

__all__ = [
    "MergeRefused",
    "MergeReport",
    "SiteMerge",
    "is_finite",
    "make_place",
    "merge",
    "merged_config",
    "places_for_biases",
    "reason_against",
    "unfinite",
    "unmerge",
]

_MERGED = "_red_kernels_merged"  # the attribute of a merged model with its _Merged
_PYTHON = {  # remedies of a refusal in Python; the command has its own
    "rounding": "merge in float32 (model.float()), or pass force=True",
    "place": "to merge in this process only, pass loadable=False",
}
LOST = 0.5  # an edit is swallowed if rounding loses more than this fraction


class MergeRefused(ValueError):
    """A merge that was refused but has a remedy.

    Attributes:
        reason: the reason, without a remedy.
        cause: `"rounding"` or `"place"` (of biases).
    """

    def __init__(self, reason: str, cause: str) -> None:
        super().__init__(f"{reason}; {_PYTHON[cause]}")
        self.reason = reason
        self.cause = cause


@dataclass
class _Merged:
    """The data of `unmerge`. Names instead of modules, so that it is valid for a copy of the model too."""

    config: RedConfig
    edits: dict[str, RedEdit]
    originals: dict[str, Tensor] | None  # the former parameters, on the CPU; None if they were not to be kept
    created: list[str]  # new biases
    attributes: dict[str, Any] = field(default_factory=dict)  # former attributes of the model's config


@dataclass(frozen=True)
class _Target:
    """The target of one site's edit: a linear layer or a norm, with the layout of its weight."""

    site: str
    name: str  # of the module
    module: nn.Module
    own: RedEdit
    norm: NormSpec | None
    columns: bool  # whether the weight is (in, out) instead of (out, in)
    bias_flag: str

    @property
    def needs_bias(self) -> bool:
        kind = self.own.kind
        return kind is not None and kind.needs_bias(self.own.width)

    @property
    def created(self) -> bool:
        return self.needs_bias and self.module._parameters.get("bias") is None


def merge(model: nn.Module, *, force: bool = False, loadable: bool = True, keep_original: bool = True) -> MergeReport:
    """Merge the active edit into the weights, in place, and unpatch the model.

    `W' = scale * W` and `b' = scale * b + bias` are computed in fp32 and rounded once. A linear layer without a bias
    gets one. If an attribute of the model's config controls that bias (the family's `bias_flags`), it is set, and the
    other biases that it implies are added as zeros, so that plain transformers loads the saved model.

    Args:
        model: a patched model; its active edit is merged, and `unmerge` restores all its edits.
        force: merge even if rounding loses more than half of an edit. Values that are not finite are never merged.
        loadable: refuse to merge if plain transformers would have no place for a bias that the edit needs.
        keep_original: keep the former weights, on the CPU, for `unmerge`.

    Returns:
        A `MergeReport` with the error of each layer's effective edit; `print` shows a table.

    Raises:
        ValueError: the model is not patched, or was wrapped since; its edits cannot be merged (kind `"ln"`, residual
            streams of pre-norm layers, blocks of experts, quantised, shared, sharded or offloaded weights); a vector or
            a weight is NaN or infinite, or would be once merged; an edit would be lost in rounding (`force`); biases
            have no place (`loadable`). Nothing is changed then.
    """
    config = edit_config(model)
    name = active_edit(model)
    if name is None:
        raise ValueError("model: its edits are disabled; merge outside of rk.disable_edits")
    targets = _targets(model, name)
    for target in targets:
        _check_finite(target, name)
    reports = [_measured(target, name) for target in targets]
    swallowed = [site for site in reports if not site.error <= LOST]
    if swallowed and not force:
        shown = [f"{site.site} ({site.error:.0%} lost)" for site in swallowed]
        raise MergeRefused(
            f"model: rounding to {swallowed[0].dtype} would swallow the edit at {listed(shown)}: the weights are too "
            "coarse for it",
            "rounding",
        )
    attributes, zeros, unplaced = _places(model, targets)
    if unplaced and loadable:
        raise MergeRefused(_no_place(model, unplaced), "place")

    originals: dict[str, Tensor] | None = {} if keep_original else None
    if originals is not None:
        for target in targets:
            for part in ("weight", "bias"):
                value = target.module._parameters.get(part)
                if value is not None:
                    originals[f"{target.name}.{part}"] = value.detach().to("cpu", copy=True)
    former = {key: getattr(_config_with(model, key), key) for key in attributes}
    inner = inner_model(model)[1]
    there = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    merged = _Merged(config, edit_modules(model), originals, [], former)
    staged = [(target, _combined(target, name)) for target in targets]  # running out of memory must leave it whole
    unpatch(model)
    with torch.no_grad():
        for target, (weight, bias) in staged:
            _write(target.module, "weight", weight)
            _write(target.module, "bias", bias)
    make_place(inner, attributes, zeros)
    merged.created += [path for path, _ in model.named_parameters(remove_duplicate=False) if path not in there]
    model.__dict__[_MERGED] = merged
    return MergeReport(type(model).__name__, name, tuple(reports), attributes, tuple(sorted(zeros)), unplaced)


def reason_against(model: nn.Module) -> str:
    """Why the active edit of a patched model cannot be merged, whatever its values are; empty if it can.

    Raises:
        ValueError: the model is not patched, or its edits are disabled.
    """
    name = active_edit(model)
    if name is None:
        raise ValueError("model: its edits are disabled")
    try:
        targets = _targets(model, name)
    except ValueError as error:
        return str(error).removeprefix("model: ")
    _, _, unplaced = _places(model, targets)
    return _no_place(model, unplaced).removeprefix("model: ") if unplaced else ""


def unmerge(model: nn.Module) -> None:
    """Undo a merge: the weights are restored bit for bit, and the model is patched with the same vectors.

    Raises:
        ValueError: the model was not merged here, is patched again, its weights were not kept, or have another shape or
            dtype now, or it cannot be patched as before. Nothing is changed then.
    """
    merged = model.__dict__.get(_MERGED)
    if not isinstance(merged, _Merged):
        raise ValueError(f"model: this {type(model).__name__} was not merged by rk.merge")
    if merged.originals is None:
        raise ValueError("model: was merged with keep_original=False; its former weights are gone")
    if any(isinstance(module, RedEdit) for module in model.modules()):
        raise ValueError(f"model: this {type(model).__name__} is patched; call rk.unpatch first")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, original in merged.originals.items():
        now = parameters.get(name)
        if now is None or now.shape != original.shape or now.dtype != original.dtype:
            got = "is gone" if now is None else f"is {now.dtype} {tuple(now.shape)}"
            raise ValueError(f"model: {name} {got}, expected {original.dtype} {tuple(original.shape)} as when merged")
    sites = {site.report.site for site in make_plan(model, merged.config).sites}
    if sites != merged.edits.keys():
        changed = sorted(sites ^ merged.edits.keys())
        raise ValueError(f"model: its sites are not those that were merged: {listed(changed)} came or went since")
    with torch.no_grad():
        for name, original in merged.originals.items():
            parameters[name].copy_(original)
    for name in merged.created:
        model.get_submodule(name.rpartition(".")[0])._parameters["bias"] = None
    for key, value in merged.attributes.items():
        setattr(_config_with(model, key), key, value)
    del model.__dict__[_MERGED]
    for site, own in merged.edits.items():
        own.to(device_of(model.get_submodule(site), model))
    patch_with(model, merged.config, merged.edits)


def merged_config(model: nn.Module) -> RedConfig | None:
    """The config of the edits that are merged into a model; None if there are none."""
    merged = model.__dict__.get(_MERGED)
    return merged.config if isinstance(merged, _Merged) else None


def _targets(model: nn.Module, name: str) -> list[_Target]:
    """The targets of the edits; raises ValueError for the first edit without one."""
    users: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(path)
    for path, module in model.named_modules():
        wrapper = wrapper_of(module)
        if wrapper is not None:
            raise ValueError(f"model: has a {wrapper} at {path or 'its top'!r}; merge the model before wrapping it")
    goes_to = merge_targets(model)
    targets = []
    for site, own in edit_modules(model).items():
        if not own.has(name):
            continue
        reason = None if own.kind is None else why_not(own.kind, None)
        if reason is not None:
            raise ValueError(f"model: its edit cannot be merged: {reason}")
        inner, flag = goes_to.get(site) or _inside_of_lora(model, site, own, goes_to)
        path = site if inner in ("", ".") else f"{site}.{inner}"
        targets.append(_target(site, path, model, own, flag, users))
    return targets


def _inside_of_lora(model: nn.Module, site: str, own: RedEdit, goes_to: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """The target of an edit at a site that LoRA has wrapped since the patch. Raises ValueError if there is none."""
    former = former_name(own, site)
    holder = next(iter(patched_holders(model)), "")
    found = goes_to.get(f"{holder}.{former}" if holder else former)
    against = lora_around(model, site)
    if found is None or against:
        raise ValueError(
            f"model: {site} had another name when it was patched: {against or 'remove the wrapper around it to merge'}"
        )
    return found


def _places(model: nn.Module, targets: list[_Target]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], str]:
    """`places_for_biases` of the targets' new biases."""
    created = [target for target in targets if target.created]
    flags = {target.bias_flag for target in created if target.bias_flag}
    needed = [bare_name(model, f"{target.name}.bias") for target in created]
    return places_for_biases(inner_model(model)[1], needed, flags)


def _no_place(model: nn.Module, unplaced: str) -> str:
    return (
        f"model: {type(model).__name__} has no place for the biases that the edits need ({unplaced}): plain "
        f"transformers would drop them on loading; edits of kind {biasless_kinds()} need none"
    )


def _check_finite(target: _Target, name: str) -> None:
    """Raises ValueError, naming the vector or the weight, if one is NaN or infinite, or would be once merged."""
    vectors = target.own.named(name)
    assert vectors is not None
    for part, vector in vectors.vectors.items():
        if vector is not None and not is_finite(vector):
            raise ValueError(f"model: {target.site}.{part} of the edit {name!r} is not finite ({unfinite(vector)})")
    before = target.module._parameters
    for part, merged in zip(("weight", "bias"), _combined(target, name), strict=True):
        if merged is None or is_finite(merged):
            continue
        own = before.get(part)
        if own is not None and not is_finite(own):
            raise ValueError(f"model: {target.name}.{part} is not finite before the merge ({unfinite(own)})")
        raise ValueError(
            f"model: {target.name}.{part} would overflow {merged.dtype} once the edit at {target.site} is merged "
            f"({unfinite(merged)}); merge in a dtype of a wider range"
        )


def is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(value.detach().isfinite().all())


def unfinite(value: Tensor) -> str:
    """The numbers of NaN and of infinite elements, for a message."""
    nans, infinite = int(value.detach().isnan().sum()), int(value.detach().isinf().sum())
    return " and ".join(f"{count} {what}" for count, what in ((nans, "NaN"), (infinite, "infinite")) if count)


def _changed_before(owner: nn.Module, module: nn.Module, own: RedEdit) -> bool:
    """Whether hooks between a module's result and the edit, which is on `owner`, may change it."""
    if own.on_input:
        last = list(owner._forward_pre_hooks.values())[-1:]
        return bool(last) and last[0] is not input_hook
    hooks = list(owner._forward_hooks.values())
    before = hooks[: hooks.index(edit_hook)] if edit_hook in hooks else hooks
    return bool(before or (module is not owner and module._forward_hooks))


def _target(site: str, path: str, model: nn.Module, own: RedEdit, flag: str, users: dict[int, list[str]]) -> _Target:
    owner, module = model.get_submodule(site), model.get_submodule(path)
    kind = type(module).__name__
    of_stream = own.place in ("res", "attn_res")
    if own.inside or (of_stream and path == site and norm_spec(module) is None):
        raise ValueError(
            f"model: the edit at {site} is of the residual stream, which is no layer's output; it cannot be merged"
        )
    weight = module._parameters.get("weight")
    spec = norm_spec(module)
    if weight is None or ((spec is None or own.on_input) and weight.dim() != 2):
        raise ValueError(
            f"model: {path} is a {kind} without its own weight matrix (a block of experts, or a wrapper such as "
            "LoRA's: merge that first); its edit cannot be merged"
        )
    for part, value in module._parameters.items():
        if value is None:
            continue
        if type(value) is not nn.Parameter or type(value.data) is not Tensor or not value.dtype.is_floating_point:
            what = f"{type(value).__name__} of {value.dtype}"
            raise ValueError(
                f"model: {path}.{part} is a {what}: quantised or sharded weights cannot be scaled and rounded again "
                "without a loss; load the base model in bfloat16 or float32 to merge"
            )
        if value.dtype.itemsize < 2:
            raise ValueError(
                f"model: {path}.{part} is {value.dtype}, quantised; load the base model in bfloat16 to merge"
            )
        if value.is_meta:
            raise ValueError(
                f"model: {path}.{part} is on the meta device (offloaded?); bring the weights back to merge"
            )
        if len(users[id(value)]) > 1:
            raise ValueError(f"model: {listed(users[id(value)])} share one Parameter; an edit of one would change all")
    if "weight" in getattr(module, "parametrizations", ()):
        raise ValueError(f"model: {path} has a parametrized weight, which cannot be merged into")
    columns = linear_columns(type(module)) if spec is None else False
    if columns is None or ("forward" in module.__dict__ and not hasattr(module, "_hf_hook")):  # accelerate's may stay
        raise ValueError(
            f"model: the forward of {path}, a {kind}, may compute more than W x + b; its edit cannot be merged"
        )
    if _changed_before(owner, module, own):
        between = "behind the edit of its input" if own.on_input else "before the edit"
        raise ValueError(
            f"model: {path} has a forward hook that runs {between} and may change the edited tensor; remove it to merge"
        )
    target = _Target(site, path, module, own, spec, columns, flag)
    reason = None if own.kind is None else why_not(own.kind, spec)
    if reason is not None:
        raise ValueError(f"model: the edit of {path} cannot be merged: {reason}")
    if spec is not None and not spec.centered and target.needs_bias:
        raise ValueError(
            f"model: {path} is a {kind}, which has no bias; only edits of kind {biasless_kinds()} merge into it"
        )
    return target


def _combined(target: _Target, name: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """The merged weight and bias: in their own dtype, or unrounded in `dtype`."""
    applied = target.own.named(name)
    assert applied is not None
    weight, bias = target.module._parameters["weight"], target.module._parameters.get("bias")
    assert weight is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    new_weight, new_bias = weight.detach().to(wide), None if bias is None else bias.detach().to(wide)
    if target.own.on_input:
        new_weight, new_bias = folded_input(applied, new_weight, new_bias, target.columns)
    else:
        new_weight, new_bias = folded(applied, new_weight, new_bias, target.norm, target.columns)
    if dtype is not None:
        return new_weight.to(dtype), None if new_bias is None else new_bias.to(dtype)
    return new_weight.to(weight.dtype), None if new_bias is None else new_bias.to(
        (weight if bias is None else bias).dtype
    )


def _measured(target: _Target, name: str) -> SiteMerge:
    """The fraction of the edit lost when the merged weight and bias are rounded to their dtype."""
    weight, bias = target.module._parameters["weight"], target.module._parameters.get("bias")
    assert weight is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    (exact_weight, exact_bias), (new_weight, new_bias) = _combined(target, name, wide), _combined(target, name)

    def lost(exact: Tensor | None, rounded: Tensor | None, before: Tensor | None) -> float:
        if exact is None or rounded is None:
            return 0.0
        change = exact.double() - (0.0 if before is None else before.detach().double())
        size = float(change.norm())
        return float((rounded.double() - exact.double()).norm()) / size if size else 0.0

    return SiteMerge(
        target.site,
        target.name,
        str(weight.dtype).removeprefix("torch."),
        lost(exact_weight, new_weight, weight),
        lost(exact_bias, new_bias, bias),
        target.created,
    )


def places_for_biases(
    model: nn.Module, needed: list[str], flags: set[str]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], str]:
    """The config's attributes that give layers their biases, the other biases that these imply, and those without a
    place.

    A model of that config, built on the meta device, names the parameters that plain transformers would load.

    Args:
        model: in which these biases are made, or were made.
        needed: their names.
        flags: attributes of the config that may provide a place for them.
    """
    config = getattr(model, "config", None)
    if not needed or config is None or not hasattr(model, "save_pretrained"):
        return {}, {}, ""
    flags = {flag for flag in flags if _config_with(model, flag) is not None}
    changed = copy.deepcopy(config)
    for flag in flags:
        setattr(_holder(changed, flag), flag, True)
    kind = getattr(type(model), BASE, type(model))
    if not isinstance(config, getattr(kind, "config_class", None) or ()):  # a wrapper, for example PEFT's
        return {}, {}, listed(needed)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        expected = {path: tuple(own.shape) for path, own in kind(changed).named_parameters(remove_duplicate=False)}
    own_names = {unwrapped(path) for path, _ in model.named_parameters(remove_duplicate=False)}
    unplaced = [path for path in needed if path not in expected]
    if unplaced:
        return {}, {}, listed(unplaced)
    brought = {path: shape for path, shape in expected.items() if path not in own_names and path not in needed}
    if not all(path.endswith(".bias") and f"{path.removesuffix('bias')}weight" in own_names for path in brought):
        return {}, {}, listed([path for path in brought if not path.endswith(".bias")] or sorted(brought))
    return dict.fromkeys(sorted(flags), True), brought, ""


def make_place(model: nn.Module, attributes: dict[str, Any], zeros: dict[str, tuple[int, ...]]) -> None:
    """Set the config's attributes that give layers their biases, and add the other biases that these imply as zeros."""
    for path, shape in zeros.items():
        owner: Any = model.get_submodule(path.rpartition(".")[0])
        while callable(getattr(type(owner), "get_base_layer", None)):  # PEFT's, around the layer of that name
            owner = owner.get_base_layer()
        like = owner._parameters["weight"]
        assert like is not None
        owner.register_parameter("bias", nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad))
    for key, value in attributes.items():
        setattr(_config_with(model, key), key, value)


def _holder(config: Any, attribute: str) -> Any:
    """The part of a config with an attribute: itself, or its part for the text model; None for neither."""
    if hasattr(config, attribute):
        return config
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return text if text is not None and hasattr(text, attribute) else None


def _config_with(model: Any, attribute: str) -> Any:
    return _holder(model.config, attribute)


def _write(module: nn.Module, part: str, value: Tensor | None) -> None:
    """Write into a Parameter in place; create a missing one."""
    if value is None:
        return
    target = module._parameters.get(part)
    if target is None:
        like = module._parameters["weight"]
        assert like is not None
        module.register_parameter(part, nn.Parameter(value, requires_grad=like.requires_grad))
    else:
        target.copy_(value)
