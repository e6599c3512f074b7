"""One of several processes that share a model's weights or rows, started by test_tensor_parallel.py.

Arguments: the rank, the port, the case, and a folder. Prints nothing if all is well. Everything is computed in float64,
so that the order of sums leaves errors far below what a wrong gradient makes.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from two_processes import in_group

import red_kernels as rk
from red_kernels.checkpoints import checkpoint

NEAR = {"rtol": 1e-10, "atol": 1e-12}
EXPERTS = "eager"  # torch multiplies groups in float32 at most
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


def llama(**changes: Any) -> nn.Module:
    return drawn(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SIZES, "attention_bias": True, **changes})
    )


def qwen() -> nn.Module:
    return drawn(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES))


def phi() -> nn.Module:
    return drawn(transformers.Phi3ForCausalLM, transformers.Phi3Config(**SIZES, bos_token_id=1, eos_token_id=2))


def mixtral() -> nn.Module:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": EXPERTS}
    return drawn(transformers.MixtralForCausalLM, transformers.MixtralConfig(**SIZES, **changes))


def drawn(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model in float64 whose parameters are all random, the same in each process."""
    torch.manual_seed(0)
    model = kind(config).double()
    with torch.no_grad():
        for own in model.parameters():
            own.add_(0.1 * torch.randn_like(own))
    return model.eval()


def loaded(model: nn.Module, folder: Path, **config: Any) -> nn.Module:
    """The same model, split by transformers over all processes as it is loaded."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return type(model).from_pretrained(
        folder,
        dtype=torch.float64,
        experts_implementation=EXPERTS,
        distributed_config=DistributedConfig(tp_size=dist.get_world_size(), **config),
    )


def config(position: str = "more", kind: str = "all", **changes: Any) -> rk.RedConfig:
    return rk.RedConfig(position, kind, dtype=torch.float64, **changes)


def batch(seed: int = 0, rows: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (rows, 8), generator=torch.Generator().manual_seed(seed))}


def loss_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The mean over all tokens, in float64, which the model's own loss is not."""
    return nn.functional.cross_entropy(model(**given).logits.flatten(0, 1), given["input_ids"].flatten())


def values(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The whole vectors of a model."""
    return {
        f"{site}.{part}": (own.full_tensor() if isinstance(own, DTensor) else own).detach().clone()
        for site, parts in rk.edit_parameters(model, name).items()
        for part, own in parts.items()
    }


def shake(model: nn.Module, folder: Path) -> None:
    """Give a model of one process vectors that are no identity, and save them."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parts in rk.edit_parameters(model).values():
            for own in parts.values():
                own.add_(0.1 * torch.randn_like(own))
    if dist.get_rank() == 0:
        rk.save_edits(model, folder)
    dist.barrier()


def train(model: nn.Module, batches: Iterable[Any], computed: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The losses of a few steps, on each batch."""
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.5)
    losses = []
    for given in batches:
        loss = loss_of(model, given) if computed is None else computed(given)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def hold(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **NEAR, msg=lambda text, name=name: f"{what}: {name}: {text}")


def hold_training(one: nn.Module, split: nn.Module, what: str) -> None:
    """Three steps of a split model and of one process, from the same vectors, which have to change."""
    before = values(one)
    hold(values(split), before, f"{what}, before")
    batches = [batch(seed) for seed in range(3)]
    torch.testing.assert_close(train(split, batches), train(one, batches), **NEAR, msg=lambda text: f"{what}: {text}")
    after = values(one)
    hold(values(split), after, what)
    same = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert not same, (what, same)
    for own in split.parameters():  # replicas stay equal to the bit
        if own.requires_grad and getattr(own, "placements", (Replicate(),)) == (Replicate(),):
            mine = own.to_local() if isinstance(own, DTensor) else own
            first = mine.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, mine), what


def pair_of(model: nn.Module, split: nn.Module, wanted: rk.RedConfig, folder: Path) -> tuple[nn.Module, nn.Module, Any]:
    """Both patched, with the same vectors, and the report of the split one."""
    one = copy.deepcopy(model)
    rk.patch(one, wanted)
    shake(one, folder)
    report = rk.patch(split, wanted)
    rk.load_edits(split, folder)
    return one, split, report


def kinds(folder: Path) -> None:
    """Every kind at split and whole sites: trained, saved, and loaded by one process."""
    wide = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
    for changes, cases in (
        ({}, [("more", "all"), ("more", "scaling"), ("more", "bias"), ("more", "ssf"), ("more", "reflection"),
              ("more", "reflections:2"), ("more", "reflection_pair"), ("ia3", "scaling"), ("value", "all"),
              ("ffn", "all"), ("attn", "lowrank"), ("res", "all"), ("ffn", "direct"), ("ffn", "ln")]),
        (wide, [("more", "rotation"), ("more", "rotation:4")]),
    ):  # fmt: skip
        model = llama(**changes)
        split = loaded(model, folder / f"model-{len(cases)}")
        for position, kind in cases:
            what = f"{position}, {kind}"
            one, split, report = pair_of(model, split, config(position, kind), folder / what)
            told = {site.site: "columns split over 2 processes" in str(site.reason) for site in report.planned}
            expected = ("q_proj", "k_proj", "v_proj") + (("down_proj",) if position == "ia3" else ())
            assert told == {site: site.endswith(expected) for site in told}, what
            hold_training(one, split, what)
            if kind == "all" and position in ("more", "ffn"):
                fused = {site.site: site.fused for site in report.sites}
                assert all(fused[site] for site in fused if site.endswith("down_proj")), fused
            rk.save_edits(split, folder / "split")  # in all processes: the first one writes
            fresh = copy.deepcopy(model)
            rk.patch(fresh, rk.saved_config(folder / "split"))
            rk.load_edits(fresh, folder / "split")
            for name, value in values(split).items():
                assert torch.equal(value, values(fresh)[name]), (what, name)
            rk.unpatch(split)


def refusals(folder: Path) -> None:
    """Kinds that take all columns together, at split sites: refused before anything is changed."""
    split = loaded(llama(), folder / "model")
    before = {name: id(own) for name, own in split.named_parameters()}
    for position, kind, match in (
        ("more", "ln", "output of model.layers.0.self_attn.q_proj .* 'ln' needs all columns of a row together"),
        ("more", "lowrank", "'lowrank' needs all columns"),
        ("value", "direct", "'direct' needs all columns"),
        ("value", "generated", "'generated' needs all columns"),
        ("ffn", "gift", "input of model.layers.0.mlp.down_proj over 2 processes, .* 'gift' needs all columns"),
        ("more", "reflection:1", "'reflection:1' reflects 1 block of columns, which 2 processes cannot share evenly"),
    ):
        with pytest.raises(ValueError, match=match):
            rk.patch(split, config(position, kind, layers=None if kind == "gift" else [0]))
    wide = loaded(llama(num_key_value_heads=4), folder / "wide")
    with pytest.raises(
        ValueError, match="'rotation' turns groups of 64 columns, which 2 processes cannot share evenly"
    ):
        rk.patch(wide, config("more", "rotation"))
    assert {name: id(own) for name, own in split.named_parameters()} == before
    assert all(own.requires_grad for own in split.parameters())


def random_starts(folder: Path) -> None:
    """What a kind draws is the same in all processes, though their random states differ."""
    split = loaded(llama(), folder / "model")
    for kind in ("ssf", "reflection", "lowrank"):
        torch.manual_seed(dist.get_rank())
        rk.patch(split, config("more" if kind != "lowrank" else "ffn", kind))
        rk.add_edit(split, "other")
        for name in ("default", "other"):
            for parts in rk.edit_parameters(split, name).values():
                for own in parts.values():
                    assert isinstance(own, DTensor)
                    every = [torch.empty_like(own.full_tensor()) for _ in range(2)]
                    dist.all_gather(every, own.full_tensor().detach())
                    assert torch.equal(*every)
        rk.unpatch(split)


def several(folder: Path) -> None:
    """Several edits of a split model: added, copied, combined, one for each row, switched off."""
    model = llama()
    one, split, _ = pair_of(model, loaded(model, folder / "model"), config(), folder / "edits")
    for each in (one, split):
        rk.add_edit(each, "copied", copy_of="default")
        rk.combine_edits(each, {"default": 0.5, "copied": 0.25}, "weaker")
        rk.add_edit(each, "fresh")
    hold(values(split, "weaker"), values(one, "weaker"), "combined")
    given = batch()
    with rk.use_edits(one, ["weaker", "default"]), rk.use_edits(split, ["weaker", "default"]):
        losses = [loss_of(each, given) for each in (one, split)]
        torch.testing.assert_close(*losses, **NEAR)
        for loss in losses:
            loss.backward()
    for name in ("weaker", "default"):
        pairs = zip(rk.edit_parameters(one, name).values(), rk.edit_parameters(split, name).values(), strict=True)
        for whole, parts in pairs:
            for part, own in whole.items():
                torch.testing.assert_close(parts[part].grad.full_tensor(), own.grad, **NEAR)
    rk.save_edits(split, folder / "weaker", "weaker")
    rk.load_edits(one, folder / "weaker", "loaded")
    rk.load_edits(split, folder / "weaker", "loaded")
    hold(values(split, "loaded"), values(one, "loaded"), "loaded")
    with rk.disable_edits(split):
        torch.testing.assert_close(loss_of(split, given), loss_of(model, given), **NEAR)


def sites(folder: Path) -> None:
    """What a layer returns, and not the side along which its weight is split, says whether a site is split."""
    for make, pattern, columns in (
        (qwen, ["*.q_norm", "*.k_norm"], False),  # each process has heads of its own: gradients are summed
        (qwen, ["*.gate_proj"], True),
        (phi, ["*.qkv_proj", "*.o_proj"], False),  # split by columns, and gathered
    ):
        model = make()
        one, split, report = pair_of(
            model,
            loaded(model, folder / f"{make.__name__}-{pattern[0][2:]}"),
            rk.RedConfig(sites=pattern, dtype=torch.float64),
            folder / "edits",
        )
        assert all(("columns split" in site.reason) == columns for site in report.planned)
        hold_training(one, split, f"{make.__name__} {pattern}")


def trainer(folder: Path) -> None:
    """RedTrainer and SaveEdits: all processes give their parts, one writes; accelerate trains so on GPUs only."""
    from accelerate import ParallelismConfig
    from transformers import TrainerState

    from red_kernels.integrations.trainer import RedTrainer, load_trained
    from red_kernels.integrations.trainer_callback import SaveEdits

    model = llama()
    one, split, _ = pair_of(model, loaded(model, folder / "model"), config(), folder / "edits")
    arguments = transformers.TrainingArguments(str(folder), report_to="none", save_strategy="no", use_cpu=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ParallelismConfig, "_validate_accelerator", lambda *given: None)
        made = RedTrainer(model=split, args=arguments)
    writes: list[Path] = []
    write = checkpoint.write_saved
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "write_saved", lambda target, *own: (writes.append(target), write(target, *own)))
        made.save_model(str(folder / "checkpoint-7"))
        state = TrainerState(global_step=8, is_world_process_zero=dist.get_rank() == 0)
        SaveEdits().on_save(arguments, state, made.control, model=split)
    assert len(writes) == 2 * (dist.get_rank() == 0)
    for name in ("checkpoint-7", "checkpoint-8"):
        for each in (one, split):
            with torch.no_grad():
                for own in each.parameters():
                    if own.requires_grad:
                        own.zero_()
            load_trained(each, folder / name)
        whole = copy.deepcopy(model)
        rk.patch(whole, config())
        rk.load_edits(whole, folder / "edits")
        hold(values(split), values(whole), name)
        hold(values(one), values(whole), name)


def rows(folder: Path) -> None:
    """Each process has some rows of one batch, as under context parallelism."""
    model = llama()
    one, mine = copy.deepcopy(model), copy.deepcopy(model)
    for each in (one, mine):
        rk.patch(each, config())
    shake(one, folder / "edits")
    rk.load_edits(mine, folder / "edits")
    with pytest.raises(TypeError, match="group: got str"):
        rk.sum_gradients_over(mine, "world")
    rk.sum_gradients_over(mine, dist.group.WORLD)
    with pytest.raises(ValueError, match=r"group: .* summed over it already"):
        rk.sum_gradients_over(mine, init_device_mesh("cpu", (2,)))
    rk.add_edit(mine, "later")
    rank = dist.get_rank()

    def share(each: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return loss_of(each, {name: value[rank::2] for name, value in given.items()}) / 2

    batches = [batch(seed, rows=4) for seed in range(3)]
    expected, found = train(one, batches), train(mine, batches, lambda given: share(mine, given))
    dist.all_reduce(found)
    torch.testing.assert_close(found, expected, **NEAR)
    hold(values(mine), values(one), "rows")
    copied = copy.deepcopy(mine)
    share(mine, batch(1, 4)).backward()
    share(copied, batch(2, 4)).backward()  # a copy sums too
    share(mine, batch(2, 4)).backward()  # so do passes that accumulate
    own, once, twice = (dict(each.named_parameters()) for each in (one, copied, mine))
    trained = [name for name, vector in own.items() if vector.requires_grad]
    loss_of(one, batch(2, 4)).backward()
    for name in trained:
        torch.testing.assert_close(once[name].grad, own[name].grad, **NEAR)
    loss_of(one, batch(1, 4)).backward()
    for name in trained:
        torch.testing.assert_close(twice[name].grad, own[name].grad, **NEAR)
    for each in (one, mine):
        if each is one:
            rk.add_edit(one, "later")
        rk.switch_edit(each, "later")
    share(mine, batch(4, 4)).backward()
    loss_of(one, batch(4, 4)).backward()
    for site, parts in rk.edit_parameters(one).items():
        for part, vector in parts.items():
            torch.testing.assert_close(rk.edit_parameters(mine)[site][part].grad, vector.grad, **NEAR)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sequence(folder: Path) -> None:
    """torch's own styles, with and without sequence parallelism: between the linear layers each process has rows."""
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    target = torch.randn(2, 6, 32, dtype=torch.float64)
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for by_rows in (False, True):
        split = copy.deepcopy(model)
        plan = {
            "layers.*.up": ColwiseParallel(input_layouts=Shard(1)) if by_rows else ColwiseParallel(),
            "layers.*.down": RowwiseParallel(output_layouts=Shard(1)) if by_rows else RowwiseParallel(),
        }
        parallelize_module(split, mesh, plan)
        wanted = rk.RedConfig(sites=["*.up", "*.down"], dtype=torch.float64)
        one, split, report = pair_of(model, split, wanted, folder / f"edits-{by_rows}")
        told = {site.site: site.reason for site in report.planned}
        assert all("columns split" in told[site] for site in told if site.endswith("up")), told
        assert all(("rows split" in told[site]) == by_rows for site in told if site.endswith("down")), told
        part = slice(3 * rank, 3 * rank + 3) if by_rows else slice(None)

        def error(each: nn.Module, part: slice) -> Callable[[Any], Tensor]:
            return lambda step: (each(x[:, part]) - target[:, part]).square().sum() / 100

        expected = train(one, range(3), error(one, slice(None)))
        found = train(split, range(3), error(split, part))
        if by_rows:
            dist.all_reduce(found)
        torch.testing.assert_close(found, expected, **NEAR)
        hold(values(split), values(one), f"by rows: {by_rows}")


def experts(folder: Path) -> None:
    """Experts in different processes: the block's output is edited, with the rest whole, and split as well."""
    model = mixtral()
    alone = copy.deepcopy(model)
    group = init_device_mesh("cpu", (2,))
    apply_expert_parallelism(alone, group, group, expanded(alone, alone.ep_plan))
    for what, split in (("alone", alone), ("with the rest", loaded(model, folder / "model", ep_size=2))):
        for position in ("ffn", "more"):
            one, split, report = pair_of(model, split, config(position), folder / f"{position}, {what}")
            assert any("whole block of experts" in site.remark for site in report.planned)
            hold_training(one, split, f"experts {what}, {position}")
            rk.unpatch(split)


def expanded(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """A plan of transformers, by the names of the model's parameters and modules."""
    found = {}
    for pattern, style in plan.items():
        name = re.compile(re.escape(pattern).replace(r"\*", "[0-9]+") + r"(\.weight|\.bias)?")
        for one in (*dict(model.named_parameters()), *dict(model.named_modules())):
            if name.fullmatch(one):
                found[one] = style
    parameters = dict(model.named_parameters())
    return dict(sorted(found.items(), key=lambda item: item[0] not in parameters))


def mesh(folder: Path) -> None:
    """FSDP2 over two groups of processes that share the weights by tensor parallelism."""
    model = llama()
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    split = copy.deepcopy(model)
    apply_tensor_parallelism(split, both["tensor"], expanded(split, split.tp_plan))
    one, split, _ = pair_of(model, split, config(), folder / "edits")
    # The other one is wrapped alike, by itself: a wrapped layer does not hand its norm on, which rounds to fp32 then.
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("others", "alone"))["alone"]
    for each, over in ((one, alone), (split, both["data"])):
        for layer in each.model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(each, mesh=over)
    mine = both["data"].get_local_rank()
    steps = [[batch(2 * step), batch(2 * step + 1)] for step in range(3)]
    expected = train(one, steps, lambda pair: sum(loss_of(one, given) for given in pair) / 2)
    found = train(split, [pair[mine] for pair in steps])
    dist.all_reduce(found, group=both["data"].get_group())
    torch.testing.assert_close(found / 2, expected, **NEAR)
    hold(values(split), values(one), "2 x 2")
    rk.save_edits(split, folder / "saved")
    rk.load_edits(one, folder / "edits")
    rk.load_edits(split, folder / "edits")
    hold(values(split), values(one), "loaded into 2 x 2")
    rk.load_edits(one, folder / "saved")
    rk.load_edits(split, folder / "saved")
    hold(values(split), values(one), "saved by 2 x 2")


CASES = {
    case.__name__: case
    for case in (kinds, refusals, random_starts, several, sites, trainer, rows, sequence, experts, mesh)
}

if __name__ == "__main__":
    with in_group():
        for name in sys.argv[3].split(","):
            place = Path(sys.argv[4]) / name
            place.mkdir(exist_ok=True)
            CASES[name](place)
            dist.barrier()
