"""Held-out loss, memory, the comparison of speeds, and the eager edit that is compared with."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from red_kernels.finetune import measure
from red_kernels.patching.naive import naive_edit


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.tiny_llama(tmp_path_factory.mktemp("llama"))


def test_held_out_loss_weighs_batches_by_their_targets() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            class Output:
                loss = input_ids.float().mean()

            assert not self.training
            assert not torch.is_grad_enabled()
            return Output

    model = Model()
    batches = [
        {"input_ids": torch.full((2, 5), 1), "labels": torch.ones(2, 5, dtype=torch.long)},
        {"input_ids": torch.full((1, 5), 4), "labels": torch.tensor([[5, 5, 5, -100, -100]])},
    ]
    found = measure.held_out_loss(model, batches, False)
    assert found.targets == 10
    assert found.loss == pytest.approx((8 * 1 + 2 * 4) / 10, abs=1e-12)
    assert found.perplexity == math.exp(found.loss)
    assert math.isnan(measure.HeldOut(math.nan, 1).perplexity)
    assert measure.HeldOut(1e4, 1).perplexity == math.inf
    assert model.training
    with pytest.raises(ValueError, match="no targets"):
        measure.held_out_loss(model, [], False)


def test_padding_is_not_counted() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    assert measure.real_tokens({"input_ids": ids}) == 6
    assert measure.real_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}) == 4


def test_compare_speed_goes_in_turn() -> None:
    calls: list[str] = []

    def step(name: str) -> int:
        calls.append(name)
        return 5

    steps = {name: (lambda name=name: step(name)) for name in ("a", "b")}
    speeds = measure.compare_speed(steps, torch.device("cpu"), rounds=4)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert all(len(speed.samples) == 4 for speed in speeds.values())
    speed = measure.Speed((1.0, 9.0, 3.0))
    assert (speed.median, speed.spread) == (3.0, (1.0, 9.0))


def test_the_timed_steps_change_nothing(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    batch = {"input_ids": torch.arange(20).view(2, 10), "labels": torch.arange(20).view(2, 10)}
    plain = model.eval()(**batch).logits
    sites = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    with naive_edit(model, sites) as naive:
        with torch.no_grad():
            naive.vectors()[0].fill_(1.5)
        before = [vector.detach().clone() for vector in naive.vectors()]
        step = measure.training_step(model, batch, naive.vectors(), lambda: None)
        assert step() == 20
        assert all(torch.equal(old, new) for old, new in zip(before, naive.vectors(), strict=True))
        handles = measure.pass_gradients(model, sites)
        naive.active = False
        frozen = measure.training_step(model, batch, [], lambda: None)
        assert frozen() == 20
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(model.eval()(**batch).logits, plain)
        for handle in handles:
            handle.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


def _used(size: int) -> mmap.mmap:
    """Memory that the system gives anew: what an allocator kept is not taken."""
    block = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    return block


@pytest.mark.parametrize("earlier", [0, 400_000_000], ids=["", "after a higher peak"])
def test_peak_memory_sees_an_allocation(earlier: int) -> None:
    if earlier:
        _used(earlier).close()
    peak = measure.PeakMemory(torch.device("cpu"))
    first = peak.bytes()
    if first is None:
        pytest.skip("this system does not tell the memory of a process")
    with _used(160_000_000):
        if not peak.since_start:
            assert (peak.bytes() or 0) >= first + 150_000_000
    assert (peak.bytes() or 0) >= first


def test_a_mark_that_was_not_reset_is_said_to_be_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system takes the request and does nothing."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system has no mark to reset")
    _used(200_000_000).close()
    monkeypatch.setattr(Path, "write_text", lambda self, text: len(text))
    assert measure.PeakMemory(torch.device("cpu")).since_start
    monkeypatch.undo()
    assert not measure.PeakMemory(torch.device("cpu")).since_start


# ---- the eager peer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "scaling", "bias"])
def test_naive_edit(dtype: torch.dtype, kind: str) -> None:
    first, second = nn.Linear(3, 5, dtype=dtype), nn.Linear(5, 4, dtype=dtype)
    model = nn.Sequential(first, second)
    x = torch.randn(7, 3, dtype=dtype)
    plain = model(x)
    with naive_edit(model, ["0"], kind) as naive:
        assert [part for parts in naive.parameters.values() for part in parts] == {
            "all": ["scale", "bias"],
            "scaling": ["scale"],
            "bias": ["bias"],
        }[kind]
        assert torch.equal(model(x), plain)
        with torch.no_grad():
            for vector in naive.vectors():
                vector.copy_(torch.arange(5) - 1.5)
        scale = naive.parameters["0"].get("scale", torch.ones(5))
        bias = naive.parameters["0"].get("bias", torch.zeros(5))
        expected = second((nn.functional.linear(x, first.weight, first.bias) * scale + bias).to(dtype))
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
        assert all(vector.grad is not None and vector.grad.dtype == torch.float32 for vector in naive.vectors())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
        assert not any("scale" in name for name in model.state_dict())
    assert torch.equal(model(x), plain)
    assert all(parameter.requires_grad for parameter in model.parameters())
    naive.remove()


def test_naive_edit_refuses() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    for sites, kind, message in (
        ([], "all", "got none"),
        (["0"], "norm", "kind: got 'norm'"),
        (["0", "7"], "all", "no module '7'"),
        (["0", "1"], "all", "'1' is a ReLU"),
    ):
        with pytest.raises(ValueError, match=message):
            naive_edit(model, sites, kind)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model[0]._forward_hooks


def test_scores_of_classes():
    """Worked out by hand: of two classes, and of three of which one is never said."""
    said, meant = torch.tensor([1, 1, 0, 0, 1, 0]), torch.tensor([1, 0, 0, 0, 1, 1])
    found = measure.class_scores(said, meant, 2)  # 2 right positives, 1 wrong one, 1 missed, 2 right negatives
    assert found == pytest.approx(
        {"accuracy": 4 / 6, "f1": 4 / 6, "matthews": (2 * 2 - 1 * 1) / (3 * 3 * 3 * 3) ** 0.5}
    )
    said, meant = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 1])
    found = measure.class_scores(said, meant, 4)
    assert found["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3), "a class that is neither said nor meant does not count"
    assert found["matthews"] == pytest.approx((3 * 4 - (2 + 4)) / ((16 - 8) * (16 - 6)) ** 0.5)
    assert measure.class_scores(torch.tensor([1, 1]), torch.tensor([1, 0]), 2)["matthews"] == 0


def test_correlations():
    said, meant = torch.tensor([1.0, 2.0, 4.0, 100.0]), torch.tensor([1.0, 3.0, 4.0, 5.0])
    found = measure.correlations(said, meant)
    assert found["spearman"] == pytest.approx(1)
    one, other = said - said.mean(), meant - meant.mean()
    assert found["pearson"] == pytest.approx(float((one @ other) / (one @ one * (other @ other)).sqrt()), rel=1e-6)
    tied = measure.correlations(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert tied["spearman"] == pytest.approx(3**0.5 / 2)
    assert measure.correlations(torch.ones(3), torch.arange(3.0)) == {"pearson": 0.0, "spearman": 0.0}
