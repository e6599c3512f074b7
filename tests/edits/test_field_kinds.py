"""The edits of RED's neighbours: each by its paper's formula, by PEFT's own layers, fused, merged, saved and by row."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import tiny_folders
import torch
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.cli import main
from red_kernels.edits.find import edit_modules, edit_parameters
from red_kernels.edits.kinds import KINDS, Edit, kind_fitting, kind_named
from red_kernels.edits.kinds.lowrank import orthonormal
from red_kernels.edits.kinds.reflection import units
from red_kernels.patching.naive import naive_edit

ROTATIONS = ("rotation", "rotation:2", "rotation:4")
REFLECTIONS = ("reflection", "reflection:1", "reflections", "reflections:16")
PAIRS = ("reflection_pair", "reflection_pair:2")
MIXES = (*ROTATIONS, *REFLECTIONS)
LOW = ("lowrank", "lowrank:2", "direct", "direct:3")
EVERY = (*MIXES, *PAIRS, *LOW, "generated", "generated:5", "ssf")
# One of each family, and of some one with an option: for what takes a model's time.
FEW = (
    *("rotation", "rotation:4", "reflection", "reflections:16", "reflection_pair", "lowrank", "direct:3"),
    "generated",
    "ssf",
)
WIDTH = 64
_WIDTH = {"llama": "hidden_size", "bert": "hidden_size", "gpt2": "n_embd", "t5": "d_model"}


def wide(name: str, **options: Any) -> nn.Module:
    """A tiny model of a width that has whole groups of pairs."""
    return zoo.tiny(name, **{_WIDTH[name]: WIDTH}, **options)


def trained(kind: str, name: str = "bert", **options: Any) -> nn.Module:
    """A patched model whose edits are not as they started."""
    model = wide(name)
    torch.manual_seed(5)
    rk.patch(model, rk.RedConfig(kind=kind, **options))
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            for vector in parts.values():
                vector += 0.1 * torch.randn_like(vector)
    return model


def logits(model: nn.Module, name: str = "bert", **options: Any) -> Tensor:
    found: Tensor = model(**zoo.inputs(name, **options)).logits
    return found


def random_parts(kind: str, width: int = WIDTH, *, edits: int | None = None) -> dict[str, Tensor]:
    """Vectors in fp64, far from the start."""
    made = []
    for seed in range(edits or 1):
        torch.manual_seed(seed)
        start = kind_named(kind).start(width, torch.float64, "cpu")
        made.append({part: value + 0.5 * torch.randn_like(value) for part, value in start.items()})
    return made[0] if edits is None else {part: torch.stack([one[part] for one in made]) for part in made[0]}


def by_matrix(kind: str, parts: dict[str, Tensor], h: Tensor, bias: Tensor) -> Tensor:
    """The edited rows of `h`, the output of a layer with this bias, by the papers' matrices."""
    family, _, option = kind.partition(":")
    d, eye = h.shape[-1], torch.eye(h.shape[-1], dtype=h.dtype)
    if family in ("reflection", "reflections", "reflection_pair"):
        width = d // int(option or 4)
        blocks = []
        for at in range(0, d, width):

            def unit(name: str, at: int = at) -> Tensor:
                u = parts[name][at : at + width]
                return u / u.norm()

            one = torch.eye(width, dtype=h.dtype)
            if family == "reflection":  # ETHER: I - 2 u u^T
                blocks.append(one - 2 * torch.outer(unit("normal"), unit("normal")))
            elif family == "reflection_pair":
                inner, outer = (one - 2 * torch.outer(unit(name), unit(name)) for name in ("inner", "outer"))
                blocks.append(outer @ inner)
            else:  # ETHER+: I - u u^T + v v^T
                blocks.append(
                    one - torch.outer(unit("away"), unit("away")) + torch.outer(unit("toward"), unit("toward"))
                )
        return (h - bias) @ torch.block_diag(*blocks).T + bias
    if family == "rotation":
        variant = int(option or 1)
        theta, alpha = parts["theta"], parts["alpha"]
        matrix = torch.zeros_like(eye)
        for low in range(d):
            group, place = divmod(low, 64)
            if place >= 32:
                continue
            for row in (low, low + 32):
                if variant == 1:  # a parameter for each pair
                    cosine = sine = 32 * group + place
                elif variant == 2:  # for each column of the result
                    cosine = sine = row
                else:  # for each column, of cosines first and of sines behind them
                    cosine, sine = 128 * group + row % 64, 128 * group + 64 + row % 64
                sign = -1.0 if row == low else 1.0
                matrix[row, row] = alpha[cosine] * theta[cosine].cos()
                matrix[row, low + 32 if row == low else low] = sign * alpha[sine] * theta[sine].sin()
        return h @ matrix.T
    if family == "lowrank":  # LoReFT
        q, r = torch.linalg.qr(parts["basis"].T)
        rotate = (q * r.diagonal().sign()).T
        return h + (h @ parts["target"].T + parts["shift"] - h @ rotate.T) @ rotate
    if family == "direct":  # DiReFT
        return h + (h @ parts["down"].T + parts["offset"]) @ parts["up"]
    if family == "generated":  # HiWi
        return h + torch.relu(bias @ parts["inward"]) @ parts["outward"]
    return h * parts["scale"] + parts["bias"]


@pytest.mark.parametrize("kind", EVERY)
def test_the_papers_formula_in_fp64(kind: str) -> None:
    parts = random_parts(kind)
    h, bias = torch.randn(5, WIDTH, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    leaves = {part: value.clone().requires_grad_() for part, value in parts.items()}
    h.requires_grad_()
    ours = kind_named(kind).formula(h, {**leaves, "linear_bias": bias})
    theirs = by_matrix(kind, leaves, h, bias)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(h)
    wanted = [h, *leaves.values()]
    for found, expected in zip(
        torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", EVERY)
def test_several_edits_by_row(kind: str) -> None:
    """`Edit.plain` with ids is the formula of each row's own edit."""
    stacked, bias = random_parts(kind, edits=3), torch.randn(WIDTH, dtype=torch.float64)
    h, ids = torch.randn(4, 5, WIDTH, dtype=torch.float64), torch.randint(0, 3, (4, 5))
    found = Edit(kind_named(kind), {**stacked, "linear_bias": bias}, ids).plain(h)
    for edit in range(3):
        own = {part: value[edit] for part, value in stacked.items()}
        expected = kind_named(kind).formula(h, {**own, "linear_bias": bias})
        torch.testing.assert_close(found[ids == edit], expected[ids == edit])


@pytest.mark.parametrize("kind", EVERY)
def test_a_linear_layer_with_the_edit_merged_in(kind: str) -> None:
    parts, fold = random_parts(kind), kind_named(kind).fold
    assert fold is not None
    torch.manual_seed(1)
    weight, x = torch.randn(WIDTH, 40, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    for bias in (torch.randn(WIDTH, dtype=torch.float64), None):
        if bias is None and kind.startswith("generated"):
            continue
        h = nn.functional.linear(x, weight, bias)
        expected = kind_named(kind).formula(h, {**parts, "linear_bias": bias})
        torch.testing.assert_close(nn.functional.linear(x, *fold(weight, bias, parts)), expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.parametrize("kind", EVERY)
def test_as_the_formula_by_hooks(kind: str, name: str) -> None:
    """Fused, twice as records are learnt: outputs and gradients."""
    if kind.startswith("generated") and name in ("llama", "t5"):
        with pytest.raises(ValueError, match="has no linear bias, of which an edit of kind 'generated"):
            trained(kind, name)
        return
    model, plain = trained(kind, name), wide(name)
    found = edit_parameters(model)
    with naive_edit(plain, found, kind) as naive:
        for site, parts in naive.parameters.items():
            for part, vector in parts.items():
                vector.data.copy_(found[site][part])
        theirs = plain(**zoo.inputs(name))
        theirs.loss.backward()
        for _ in range(3):
            model.zero_grad()
            ours = model(**zoo.inputs(name))
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
            ours.loss.backward()
            for site, parts in naive.parameters.items():
                for part, vector in parts.items():
                    torch.testing.assert_close(found[site][part].grad, vector.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", FEW)
def test_the_start_is_the_identity_or_the_kind_says_so(kind: str) -> None:
    model = wide("bert")
    before = logits(model)
    rk.patch(model, rk.RedConfig(kind=kind))
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5) == kind_named(kind).starts_as_identity


@pytest.mark.parametrize("kind", ["reflection", "lowrank", "ssf"])
def test_what_starts_at_random_follows_torchs_seed(kind: str) -> None:
    found = []
    for seed in (1, 1, 2):
        model = wide("bert")
        torch.manual_seed(seed)
        rk.patch(model, rk.RedConfig(kind=kind))
        found.append(torch.cat([v.flatten() for parts in edit_parameters(model).values() for v in parts.values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", MIXES)
def test_the_report_says_what_is_fused(kind: str) -> None:
    assert rk.patch(wide("bert"), rk.RedConfig(kind=kind)).sites[0].fused == "residual add + LayerNorm"


@pytest.mark.parametrize("kind", [*LOW, *PAIRS])
def test_what_follows_an_edit_by_itself_is_fused(kind: str) -> None:
    report = rk.patch(wide("llama"), rk.RedConfig(kind=kind))
    assert report.sites[0].fused is None
    reason = "run by themselves" if kind in PAIRS else "have no fused kernel"
    assert report.sites[0].reason.endswith(f"{reason}; behind it residual add + next layer's RMSNorm")


@pytest.mark.parametrize("kind", FEW)
def test_merged_and_unmerged(kind: str) -> None:
    model = trained(kind)
    before, edited = {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    rk.merge(model)
    assert not edit_modules_of(model)
    torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-5)
    rk.unmerge(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits(model), edited)


def edit_modules_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("red_edit")]


def test_only_what_needs_a_bias_makes_one() -> None:
    """Rotations and reflections of a layer without a bias leave it without one."""
    for kind in (*MIXES, *PAIRS, *LOW):
        model = trained(kind, "llama")
        edited = logits(model, "llama")
        rk.merge(model, loadable=False)
        made = model.model.layers[0].mlp.down_proj.bias is not None
        assert made == (kind in LOW), kind
        torch.testing.assert_close(logits(model, "llama"), edited, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FEW)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    rk.save_edits(model, tmp_path)
    assert rk.saved_config(tmp_path).kind == kind
    other = wide("bert")
    rk.patch(other, rk.saved_config(tmp_path))
    rk.load_edits(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    if kind != "ssf":  # whose parts have the names that the authors' files have
        with pytest.raises(ValueError, match="the authors' form has no name for"):
            rk.export_authors(model, tmp_path / "theirs")


@pytest.mark.parametrize("kind", FEW)
def test_copied_and_pickled(kind: str) -> None:
    model = trained(kind)
    own = next(iter(edit_modules(model).values()))
    assert pickle.loads(pickle.dumps(own.kind)) is own.kind is kind_named(kind)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # A copy has its first call before it, which computes the sum and its norm one after the other.
        assert torch.equal(logits(other), logits(model))
        # A copy has the bias of its own layer.
        with torch.no_grad():
            for site in edit_modules(other):
                other.get_submodule(site).bias += 1.0
        if kind.startswith(("reflection", "generated")):
            plain = copy.deepcopy(other)
            assert torch.equal(logits(plain), logits(other))


@pytest.mark.parametrize("kind", FEW)
def test_rows_of_several_edits(kind: str) -> None:
    model = trained(kind)
    rk.add_edit(model, "b")
    with torch.no_grad():
        for parts in edit_parameters(model, "b").values():
            for vector in parts.values():
                vector += 0.2 * torch.randn_like(vector)
    batch = zoo.inputs("bert", batch=3)
    with rk.use_edits(model, ids=["b", None, "default"]):
        mixed = model(**batch)
        mixed.loss.backward()
    assert all(v.grad.abs().sum() > 0 for v in edit_parameters(model, "b")[next(iter(edit_modules(model)))].values())
    with rk.disable_edits(model):
        torch.testing.assert_close(mixed.logits[1], model(**batch).logits[1], rtol=1e-4, atol=1e-5)
    for row, name in ((0, "b"), (2, "default")):
        rk.switch_edit(model, name)
        torch.testing.assert_close(mixed.logits[row], model(**batch).logits[row], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_combined_by_weights_says_so() -> None:
    rk.combine_edits(trained("rotation"), {"default": 0.5}, "weak")
    for kind in ("reflection", "reflections", "reflection_pair", "lowrank", "direct", "generated"):
        with pytest.raises(ValueError, match=f"kind '{kind}', which cannot be combined by weights"):
            rk.combine_edits(trained(kind), {"default": 0.5}, "weak")


@pytest.mark.parametrize("kind", FEW)
def test_compiled(kind: str) -> None:
    model = trained(kind)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**zoo.inputs("bert")).logits, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["rotation", "reflections", "lowrank"])
def test_under_checkpointing(kind: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = trained(kind, "llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**zoo.inputs("llama"), use_cache=False).loss.backward()
        return [v.grad for parts in edit_parameters(model).values() for v in parts.values()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["rotation", "reflection"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_with_dropout(kind: str, dtype: torch.dtype) -> None:
    model = trained(kind, "llama").to(dtype)
    assert all(v.dtype == torch.float32 for parts in edit_parameters(model).values() for v in parts.values())
    found = model(**zoo.inputs("llama"))
    assert found.logits.dtype == dtype
    found.loss.backward()
    rounding = 0.05 if dtype == torch.bfloat16 else 0.006  # the edits move the logits by 1.7
    torch.testing.assert_close(found.logits.float(), logits(trained(kind, "llama"), "llama"), rtol=0, atol=rounding)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("place", ["attn", "ffn_attn", "res", "res_with_attn", "more"])
@pytest.mark.parametrize("kind", ["rotation", "reflections", "lowrank"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_at_every_position(name: str, kind: str, place: str) -> None:
    model = trained(kind, name, position=place)
    with torch.no_grad(), rk.backend("reference"):
        expected = logits(model, name)
    for _ in range(2):
        torch.testing.assert_close(logits(model, name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FEW)
def test_as_an_adapter_of_peft(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel, get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    patched = trained(kind)
    model = get_peft_model(wide("bert"), RedPeftConfig(kind=kind)).eval()
    own = edit_parameters(model.base_model.model)
    with torch.no_grad():
        for ours, theirs in zip(own.values(), edit_parameters(patched).values(), strict=True):
            for part, vector in ours.items():
                vector.copy_(theirs[part])
    edited = logits(patched)
    torch.testing.assert_close(logits(model), edited, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(wide("bert"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), edited, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_rotations_are_those_of_pefts_road(variant: int) -> None:
    """The same outputs and gradients from the same parameters, which have the same layout."""
    pytest.importorskip("peft")
    from peft import RoadConfig, get_peft_model

    kind = "rotation" if variant == 1 else f"rotation:{variant}"
    ours, base = trained(kind, "llama"), wide("llama")
    sites = list(edit_modules(ours))
    theirs = get_peft_model(base, RoadConfig(variant=f"road_{variant}", group_size=64, target_modules=sites)).eval()
    layers = {site: theirs.base_model.model.get_submodule(site) for site in sites}
    with torch.no_grad():
        for site, layer in layers.items():
            for part in ("theta", "alpha"):
                getattr(layer, f"road_{part}")["default"].copy_(edit_parameters(ours)[site][part])
    found, expected = ours(**zoo.inputs("llama")), theirs(**zoo.inputs("llama"))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for site, layer in layers.items():
        for part in ("theta", "alpha"):
            gradient = getattr(layer, f"road_{part}")["default"].grad
            torch.testing.assert_close(edit_parameters(ours)[site][part].grad, gradient, rtol=1e-3, atol=1e-6)


def test_scales_and_biases_are_those_of_peft() -> None:
    """IA3 on a layer's output is kind "scaling", BEFT is kind "bias"."""
    pytest.importorskip("peft")
    from peft import BeftConfig, IA3Config, get_peft_model

    for kind, part, config in (
        ("scaling", "scale", lambda sites: IA3Config(target_modules=sites, feedforward_modules=[])),
        ("bias", "bias", lambda sites: BeftConfig(target_modules=sites)),
    ):
        ours = trained(kind, "llama")
        sites = list(edit_modules(ours))
        theirs = get_peft_model(wide("llama"), config(sites)).eval()
        name = "ia3_l" if kind == "scaling" else "beft_bias"
        vectors = {site: getattr(theirs.base_model.model.get_submodule(site), name)["default"] for site in sites}
        with torch.no_grad():
            for site, vector in vectors.items():
                vector.copy_(edit_parameters(ours)[site][part].view_as(vector))
        found, expected = ours(**zoo.inputs("llama")), theirs(**zoo.inputs("llama"))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        found.loss.backward()
        expected.loss.backward()
        for site, vector in vectors.items():
            gradient = vector.grad.view(-1)
            torch.testing.assert_close(edit_parameters(ours)[site][part].grad, gradient, rtol=1e-3, atol=1e-6)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folders.tiny_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(100)))
    arguments = ["finetune", "--model", str(model), "--data", str(text), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2", "--length", "16", "--batch-size", "2", "--kind", "reflections:2"]) == 0
    assert rk.saved_config(tmp_path / "out" / "edits").kind == "reflections:2"
    capsys.readouterr()
    arguments[-1] += "-more"
    assert main([*arguments, "--steps", "2", "--length", "16", "--kind", "rotation"]) != 0
    assert "an edit of kind 'rotation' needs a multiple of 64" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    assert "rotation:N: alpha cos(theta) h" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rotation:3", "supported: "),
        ("rotation:", "supported: "),
        ("rotation:x", "supported: "),
        ("reflection:0", "supported: "),
        ("all:2", "supported: "),
        ("lowrank:-1", "supported: "),
    ],
)
def test_options_that_are_none(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"kind: got '{kind}', {message}"):
        rk.RedConfig(kind=kind)


def test_an_option_that_is_the_default_is_left_out() -> None:
    for name, same in (("rotation", "rotation:1"), ("reflection", "reflection:4"), ("lowrank", "lowrank:04")):
        assert rk.RedConfig(kind=same) == rk.RedConfig(kind=name)
        assert kind_named(same) is KINDS[name]


def test_widths_that_have_no_such_edit() -> None:
    for kind, message in (
        ("rotation", "needs a multiple of 64"),
        ("reflection:5", "needs a multiple of 5, its number of blocks"),
        ("lowrank:33", "needs at least 33, its rank"),
    ):
        model = zoo.tiny("llama")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(
            ValueError, match=f"down_proj has outputs of width 32, and an edit of kind '{kind}' {message}"
        ):
            rk.patch(model, rk.RedConfig(kind=kind))
        assert before.keys() == model.state_dict().keys()
        rk.patch(model)  # nothing was changed


@pytest.mark.parametrize("kind", EVERY)
def test_a_kind_is_told_from_its_tensors(kind: str) -> None:
    """Of rotations and reflections, whose option no shape tells, the default."""
    found = kind_fitting(kind_named(kind).start(WIDTH, torch.float32, "cpu"))
    told = kind.partition(":")[0] if kind in (*MIXES, *PAIRS) else kind
    assert found is kind_named("all" if kind == "ssf" else told)


def test_orthonormal_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 4, 10, dtype=torch.float64)
    rows[1, 2] = 0.0
    found = orthonormal(rows)
    expected = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    expected[1, 2, 2] = 0.0
    torch.testing.assert_close(found @ found.mT, expected)
    torch.testing.assert_close(orthonormal(found), found)
    leaf = torch.randn(4, 10, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(orthonormal, leaf)


def test_units_of_zeros() -> None:
    """A block of zeros is no reflection, and its gradient is no NaN."""
    u = torch.randn(8, dtype=torch.float64)
    u[:4] = 0.0
    leaf = u.clone().requires_grad_()
    found = units(leaf, 2)
    assert torch.equal(found[:4], torch.zeros(4).double())
    torch.testing.assert_close(found[4:].norm(), torch.ones(()).double())
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert bool(gradient.isfinite().all())
