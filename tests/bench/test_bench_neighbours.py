"""RED's neighbours: that each computes its paper's formula, with as many parameters as its paper says.

Figures of whole models are computed from the papers' formulas for the sizes that the tests name.
"""

from __future__ import annotations

import copy
import math

import model_zoo as zoo
import pytest
import torch
from torch import Tensor, nn

from benchmarks import methods
from benchmarks.memory import held_bytes
from benchmarks.methods.linears import QUERIES, VALUES, as_linears, block_linears, named, sizes
from benchmarks.methods.neighbours import adapters, loretta, lorta, melora, sparse
from benchmarks.step import compare, models

META = torch.device("meta")
BASE = (768, 3072, 12, 12)  # RoBERTa-base: width, FFN, layers, heads
LARGE = (1024, 4096, 24, 16)  # RoBERTa-large
LLAMA = (4096, 11008, 32, 32)  # Llama-2-7B


def made(name: str) -> nn.Module:
    return models.build(models.find(name), "fp32", META)


def one_layer() -> nn.Module:
    """RoBERTa-base with one layer and few words, with real weights: masks are chosen by them."""
    sizes = {**dict(models.find("RoBERTa-base").sizes), "num_hidden_layers": 1, "vocab_size": 99}
    return models.build(
        models.Model("classification", "RobertaConfig", tuple(sizes.items())), "fp32", torch.device("cpu")
    )


# ---- how many parameters


def test_road_has_an_angle_and_a_scale_for_each_pair_of_outputs() -> None:
    """The paper (abstract) says that fewer than 0.1% are trained."""
    width, inner, layers, _ = BASE
    assert adapters.road(made("RoBERTa-base")).trainable == layers * (4 * width + inner + width) == 82_944
    width, inner, layers, _ = LLAMA
    count = adapters.road(made("Llama-2-7B")).trainable
    assert count == layers * (4 * width + 2 * inner + width) == 1_359_872
    assert count < 1e-3 * 6_738_415_616
    assert 82_944 < 1e-3 * 124_647_170


def test_vera_has_the_width_and_the_rank_for_each_layer() -> None:
    """L_tuned (d_model + r), section 3.2; the ranks are those of the paper's experiments with RoBERTa."""
    for name, (width, _, layers, _), rank, count in (("base", BASE, 1024, 43_008), ("large", LARGE, 256, 61_440)):
        assert adapters.vera(made(f"RoBERTa-{name}"), rank).trainable == 2 * layers * (width + rank) == count


def test_hra_has_its_chain_of_vectors_for_each_layer() -> None:
    """r d for each layer, section 3.1, for all linear layers of a base model and for Llama's queries and values."""
    width, inner, layers, _ = BASE
    assert adapters.hra(made("RoBERTa-base"), 8, every=True).trainable == layers * 8 * (5 * width + inner) == 663_552
    width, inner, layers, _ = LLAMA
    assert adapters.hra(made("Llama-2-7B"), 32).trainable == layers * 2 * 32 * width == 8_388_608


@pytest.mark.parametrize("method", ["sara", "spt"])
def test_sparse_ones_have_as_many_as_lora(method: str) -> None:
    width, inner, _, _ = BASE
    model = one_layer()
    batch = models.batch_of(model, "classification", 2, 4, torch.device("cpu"))
    prepared = methods.prepare(method, model, batches=[batch])
    count = 8 * (4 * 2 * width + 2 * (width + inner))
    assert prepared.trainable == methods.prepare("lora-all", one_layer()).trainable == count == 110_592


def test_lorta_has_one_tensor_for_all_layers() -> None:
    """r (d + d / H + H + L + 4): the rows of the tensor's five factors."""
    for name, (width, _, layers, heads), rank, count in (
        ("RoBERTa-base", BASE, 4, 3_440),
        ("RoBERTa-large", LARGE, 8, 9_056),
        ("Llama-2-7B", LLAMA, 4, 17_168),
    ):
        assert lorta.lorta(made(name), rank).trainable == rank * (width + width // heads + heads + layers + 4) == count


def test_melora_has_a_lora_s_count_over_its_parts() -> None:
    """The paper (abstract) says 8 times fewer than LoRA on natural language understanding, at the same rank."""
    width, _, layers, _ = BASE
    lora = methods.prepare("lora-qv", made("RoBERTa-base")).trainable
    assert lora == 2 * layers * 8 * 2 * width == 294_912
    for parts, rank in ((8, 1), (4, 2), (2, 4)):
        count = melora.melora(made("RoBERTa-base"), parts, rank).trainable
        assert count == 2 * layers * rank * 2 * width
        assert count * parts == lora


def test_loretta_has_the_cores_of_its_trains() -> None:
    """Sum of r k r' over the cores, with the modes 8 x 8 x 12 for 768 and 8 x 8 for a bottleneck of 64.

    The paper compares with 98K parameters for an adapter and 12K for a LoRA, which are these sizes. Its own figure for
    a LoRA is 1K, as here; for an adapter it is 1.2K, and the modes behind that are not known.
    """
    width, _, layers, _ = BASE
    adapter = loretta.TrainAdapter(width, 64, 5, META)
    trains, biases = 2 * (5 * (8 + 12) + 25 * (8 + 8 + 8)), 64 + width
    assert trains == 1_400
    assert sum(own.numel() for own in adapter.parameters()) == trains + biases
    assert sum(own.numel() for train in (adapter.down, adapter.up) for own in train.parameters()) == trains
    assert 2 * 64 * width == 98_304
    assert 2 * 8 * width == 12_288
    factors = loretta.Reparametrised(width, width, 8, 5, 1.0, META)
    both = 2 * (5 * (8 + 12) + 25 * (8 + 8))
    assert sum(own.numel() for own in factors.parameters()) == both == 1_000
    assert loretta.loretta_adp(made("RoBERTa-base")).trainable == 2 * layers * (trains + biases)
    assert loretta.loretta_rep(made("RoBERTa-base")).trainable == 2 * layers * both


def test_the_modes_of_trains() -> None:
    found = {768: (8, 8, 12), 576: (8, 8, 9), 1024: (8, 8, 16), 4096: (16, 16, 16), 384: (6, 8, 8), 7: (1, 1, 7)}
    assert {size: loretta.factors(size, 3) for size in found} == found
    assert loretta.factors(64, 2) == (8, 8)
    assert loretta.factors(125, 3) == (5, 5, 5)  # whose root in floating point lies below it


# ---- what they compute: the frozen model with other weights


def changed(base: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    """A copy in fp64 with these added to its weights, of the shape `(out, in)`."""
    model = copy.deepcopy(base).double()
    as_linears(model, updates)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight.add_(update.double())
    return model


def filled(prepared: methods.Prepared) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for own in prepared.trained:
            own.add_(0.3 * torch.randn(own.shape, generator=generator))


def assert_computes(kind: str, prepared: methods.Prepared, base: nn.Module, updates: dict[str, Tensor]) -> None:
    batch = zoo.inputs(kind)
    with torch.no_grad():
        found, before = prepared.model(**batch).logits, base(**batch).logits
        right = changed(base, updates)(**batch).logits
    assert (right - before).norm() > 1e-2 * before.norm()
    assert (found - right).norm() <= 1e-4 * right.norm()


@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2", "t5", "phi3", "distilbert"])
def test_lorta_adds_slices_of_its_tensor(kind: str) -> None:
    base = zoo.tiny(kind)
    model = methods.sister(base)
    found = lorta.attentions(model)
    prepared = lorta.lorta(model, 3)
    filled(prepared)
    first = model.get_submodule(found[0].out)
    own = first.neighbour.tensor
    tensor = torch.einsum("is,js,hs,ls,ms->lmhij", own.width, own.inner, own.heads, own.layers, own.kinds).detach()
    updates = {}
    for layer, attention in enumerate(found):
        for name, kinds in attention.into:
            rows = sizes(block_linears(base)[name])[1]
            fewer = 2 if kind in ("llama", "phi3") else zoo.HEADS  # of keys and values
            heads = [zoo.HEADS if matrix == lorta.QUERY else fewer for matrix in kinds]
            parts = [tensor[layer, matrix, :count] for matrix, count in zip(kinds, heads, strict=True)]
            updates[name] = 2 * torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
            assert updates[name].shape[0] == rows
        updates[attention.out] = 2 * torch.cat([*tensor[layer, lorta.OUTPUT]], 1)
    assert_computes(kind, prepared, base, updates)


def test_lorta_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="its names identify the queries, keys and values of 0 of its 3 attentions"):
        lorta.lorta(zoo.tiny("neox"))


@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2"])
def test_melora_adds_blocks_on_the_diagonal(kind: str) -> None:
    base = zoo.tiny(kind)
    model = methods.sister(base)
    prepared = melora.melora(model, 4, 2)
    filled(prepared)
    updates = {}
    for name in named(block_linears(base), QUERIES, VALUES):
        own = model.get_submodule(name).neighbour
        blocks = [(first @ second).T for first, second in zip(own.first.detach(), own.second.detach(), strict=True)]
        updates[name] = 2 * torch.block_diag(*blocks)
        assert torch.linalg.matrix_rank(updates[name]) == 8
    assert_computes(kind, prepared, base, updates)
    with pytest.raises(ValueError, match=r"parts: got 5, expected a divisor of 32 and of"):
        melora.melora(methods.sister(base), 5, 1)


def entry(train: loretta.TensorTrain, row: int, column: int, modes: tuple[int, ...]) -> float:
    """One entry of a train's matrix by its definition."""
    product = torch.ones(1, 1)
    for core, index in zip(
        train.cores, torch.unravel_index(torch.tensor(row * train.shape[1] + column), modes), strict=True
    ):
        product = product @ core[:, index]
    return float(product.detach())


def test_a_train_s_entries_are_products_of_its_cores() -> None:
    torch.manual_seed(0)
    train = loretta.TensorTrain((2, 3), (4, 5), 3, zero=False, device=torch.device("cpu"))
    matrix = train.matrix().detach()
    assert matrix.shape == (6, 20)
    for row, column in ((0, 0), (1, 19), (4, 7), (5, 19)):
        assert float(matrix[row, column]) == pytest.approx(entry(train, row, column, (2, 3, 4, 5)), rel=1e-5)
    assert not loretta.TensorTrain((6,), (4, 5), 3, zero=True, device=torch.device("cpu")).matrix().any()
    large = loretta.TensorTrain((64,), (8, 8, 12), 5, zero=False, device=torch.device("cpu")).matrix()
    assert 0.3 < float(large.square().mean()) * 768 < 3  # as LoRA's A: entries of variance about 1 / columns


def test_loretta_rep_adds_the_product_of_two_trains() -> None:
    base = zoo.tiny("llama")
    model = methods.sister(base)
    prepared = loretta.loretta_rep(model, 4, 2)
    filled(prepared)
    updates = {}
    for name in named(block_linears(base), QUERIES, VALUES):
        own = model.get_submodule(name).neighbour
        updates[name] = 2 * own.second.matrix().detach() @ own.first.matrix().detach()
    assert_computes("llama", prepared, base, updates)


def test_loretta_adp_stands_behind_attention_and_ffn() -> None:
    model = zoo.tiny("roberta")
    sites = methods.edited_sites(model, "ffn_attn")
    assert len(sites) == 2 * zoo.LAYERS
    prepared = loretta.loretta_adp(model, 16, 2)
    filled(prepared)
    for name in sites:
        module = model.get_submodule(name)
        x = torch.randn(2, 5, module.in_features)
        with torch.no_grad():
            y = nn.functional.linear(x, module.weight, module.bias)
            own = module.neighbour
            low = nn.functional.gelu(y @ own.down.matrix().T + own.down_bias)
            torch.testing.assert_close(module(x), y + low @ own.up.matrix().T + own.up_bias)


def test_hra_begins_as_pairs_that_take_each_other_back() -> None:
    prepared = adapters.hra(zoo.tiny("roberta"), 4)
    own = prepared.trained[0].detach()
    assert torch.equal(own[:, 0], own[:, 1])
    assert not torch.equal(own[:, 1], own[:, 2])
    with pytest.raises(ValueError, match="rank: got 3, expected an even number"):
        adapters.hra(zoo.tiny("roberta"), 3)


def test_conv1d_becomes_linear_over_the_same_memory() -> None:
    base, batch = zoo.tiny("gpt2"), zoo.inputs("gpt2")
    model = methods.sister(base)
    names = list(block_linears(model))
    as_linears(model, names)
    for name in names:
        own, theirs = model.get_submodule(name), base.get_submodule(name)
        assert isinstance(own, nn.Linear)
        assert sizes(own) == sizes(theirs)
        assert own.weight.data_ptr() == theirs.weight.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits)


# ---- the sparse ones


def places(prepared: methods.Prepared, name: str) -> Tensor:
    """Which entries of a layer's weight are trained: a mask of the weight's shape."""
    layer = prepared.model.base_model.model.get_submodule(name)
    mask = torch.zeros(layer.base_layer.weight.shape, dtype=torch.bool)
    mask[tuple(layer.shira_indices["default"].long())] = True
    return mask


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_sara_trains_the_entries_of_least_magnitude(kind: str) -> None:
    base = zoo.tiny(kind)
    linears = {name: own.weight.detach() for name, own in block_linears(base).items()}
    prepared = sparse.sara(methods.sister(base), 3)
    for name, weight in linears.items():
        weight = weight.T if kind == "gpt2" else weight
        chosen = places(prepared, name)
        assert int(chosen.sum()) == 3 * sum(weight.shape)
        assert weight[chosen].abs().max() <= weight[~chosen].abs().min()


def test_spt_trains_the_entries_of_the_greatest_squared_gradient() -> None:
    base = zoo.tiny("llama")
    batches = [zoo.inputs("llama", seed=seed) for seed in (2, 3)]
    whole = zoo.tiny("llama")
    right = {name: torch.zeros_like(own.weight) for name, own in block_linears(whole).items()}
    for batch in batches:
        whole.zero_grad()
        whole(**batch).loss.backward()
        for name, own in block_linears(whole).items():
            right[name] += own.weight.grad.square()
    model = methods.sister(base)
    model.train()
    needed = [own.requires_grad_(number % 2 == 0).requires_grad for number, own in enumerate(model.parameters())]
    found = sparse.sensitivities(model, batches)
    assert model.training
    assert [own.requires_grad for own in model.parameters()] == needed
    assert all(own.grad is None for own in model.parameters())
    for name, own in block_linears(model).items():
        torch.testing.assert_close(found[own], right[name])
    prepared = sparse.spt(methods.sister(base), batches, 2)
    for name, values in right.items():
        chosen = places(prepared, name)
        assert int(chosen.sum()) == 2 * sum(values.shape)
        assert values[chosen].min() >= values[~chosen].max() * (1 - 1e-4)


def test_sparse_ones_need_enough_entries() -> None:
    with pytest.raises(ValueError, match=r"rank: got 17, but '.*' of 32 x 32 entries has fewer than a LoRA"):
        sparse.sara(zoo.tiny("roberta"), 17)


def test_what_is_fixed_counts_as_memory() -> None:
    base = zoo.tiny("roberta")
    for name in ("vera", "sara", "road"):
        prepared = methods.prepare(name, methods.sister(base))
        held = held_bytes(compare.Step(prepared, zoo.inputs("roberta")).added(), base.parameters())
        fixed = {"vera": 2 * 256 * zoo.HIDDEN * 4, "sara": 2 * 4 * prepared.trainable, "road": 0}[name]
        assert held == 4 * prepared.trainable + fixed


def test_neighbours_are_in_the_tables() -> None:
    from benchmarks.methods import neighbours
    from benchmarks.quality.settings import GRIDS
    from benchmarks.report import figures, plots

    names = {method.name for method in neighbours.METHODS}
    assert names == set(figures.NEIGHBOURS) <= set(methods.STEP_METHODS) & set(methods.QUALITY_METHODS)
    assert set(methods.STEP_KNOWN) <= set(figures.METHODS)
    assert set(methods.KIND_METHODS) == set(figures.KINDS)
    assert {"base", *methods.QUALITY_METHODS} == set(figures.QUALITY_METHODS)
    assert set(methods.QUALITY_DEFAULT) < set(methods.QUALITY_METHODS)
    assert set(methods.METHODS) <= set(plots.LOOKS)
    for grids in GRIDS.values():
        assert set(grids) == set(methods.QUALITY_METHODS)
    assert all(math.isfinite(rate) for grids in GRIDS.values() for grid in grids.values() for rate in grid)
