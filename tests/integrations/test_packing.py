"""Packing: whole examples in rows, and a packed batch that trains as its documents do one by one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import tiny_folders
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM, TrainingArguments

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.finetune import data
from red_kernels.integrations.trainer import RedTrainer
from red_kernels.patching.patch import patch

SIZES = (7, 3, 5, 4, 1, 6)


def examples(sizes: tuple[int, ...], vocabulary: int = 30) -> list[dict[str, list[int]]]:
    """Every second token of an example has no loss, nor has its first one."""
    draw = random.Random(3)
    found = []
    for size in sizes:
        ids = [draw.randrange(3, vocabulary) for _ in range(size)]
        found.append({"input_ids": ids, "labels": [own if place % 2 else -100 for place, own in enumerate(ids)]})
    return found


def test_rows_hold_whole_examples_once() -> None:
    dataset = examples((7, 3, 5, 4, 1, 6, 8, 2))
    rows = data.packed(dataset, 10)
    places = [place for row in rows.rows for place in row]
    assert sorted(places) == list(range(8))
    assert rows.tokens == 36
    assert len(rows) == 4  # fewer are impossible
    for number, row in enumerate(rows.rows):
        item = rows[number]
        assert item["seq_lengths"] == [len(dataset[place]["input_ids"]) for place in row]
        assert sum(item["seq_lengths"]) <= 10
        assert item["input_ids"] == [own for place in row for own in dataset[place]["input_ids"]]
        assert item["labels"] == [own for place in row for own in dataset[place]["labels"]]
    assert rows.said == ["8 examples packed into 4 rows of 10 tokens, 90.0% filled."]


def test_the_fullest_row_that_has_room_is_taken() -> None:
    assert data.packed(examples((6, 4, 3, 1)), 7).rows == [[0, 3], [1, 2]]
    draw = random.Random(1)
    sizes = tuple(draw.randrange(1, 50) for _ in range(300))
    rows = data.packed(examples(sizes), 64)
    assert max(sum(rows[place]["seq_lengths"]) for place in range(len(rows))) <= 64
    assert len(rows) <= 1.05 * sum(sizes) / 64 + 1


@pytest.mark.parametrize(("sizes", "message"), [((), "no examples"), ((3, 9), "3 to 9 tokens, expected 1 to 8")])
def test_what_cannot_be_packed(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.packed(examples(sizes), 8)


def gradients(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    """The loss over all tokens of the batches, and the gradients of the edits."""
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    loss: Any = 0.0
    for batch in batches:
        own = int((batch["labels"][:, 1:] != -100).sum())
        if own:
            loss = loss + model(**batch, use_cache=False).loss * own / count
    vectors = [vector for parts in edit_parameters(model).values() for vector in parts.values()]
    return loss.item(), list(torch.autograd.grad(loss, vectors))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_packed_batch_is_its_documents_one_by_one(name: str, attention: str) -> None:
    """In float64, but for the norms and softmaxes that the models themselves compute in float32."""
    model = zoo.tiny(name).double()
    model.config._attn_implementation = attention
    patch(model, RedConfig(dtype=torch.float64))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            for vector in parts.values():
                vector += 0.3 * torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    dataset = examples(SIZES)
    rows = data.packed(dataset, 10)
    assert max(len(row) for row in rows.rows) > 1
    batch = data.PackedCollator()([rows[place] for place in range(len(rows))])
    assert batch["input_ids"].shape == (1, sum(SIZES))
    assert "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() == len(SIZES)
    alone = [{key: torch.tensor([value]) for key, value in example.items()} for example in dataset]
    found, wanted = gradients(model, [batch]), gradients(model, alone)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=float(1e-5 * other.abs().max()))
        assert one.abs().max() > 0
    joined = {**batch, "position_ids": torch.arange(sum(SIZES))[None]}
    assert gradients(model, [joined])[0] != pytest.approx(wanted[0], rel=1e-4)  # else the test would say nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "mixtral"])
def test_models_that_keep_documents_apart(name: str, dtype: torch.dtype) -> None:
    model = zoo.tiny(name).to(dtype)
    model.train()
    next(iter(model.children())).eval()
    data.check_packing(model)
    assert model.training
    assert not next(iter(model.children())).training


def small_bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertLMHeadModel(BertConfig(vocab_size=50, is_decoder=True, **sizes))


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2))


class OwnPositions(nn.Module):
    """A model that keeps documents apart, and numbers their positions without regard to them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = zoo.tiny("gpt2")

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, position_ids: torch.Tensor, **inputs: Any) -> Any:
        starts = (position_ids == 0).cumsum(-1)
        inputs["position_ids"] = torch.arange(position_ids.shape[1])[None] + 20 * (starts - 1)
        return self.inner(**inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (small_bert, "BertLMHeadModel reads one packed document in the next"),
        (mamba, "MambaForCausalLM reads one packed document in the next"),
        (lambda: zoo.tiny("opt"), "OPTForCausalLM reads"),
        (lambda: zoo.tiny("t5"), "does not accept the positions"),
        (OwnPositions, "OwnPositions computes positions in its own way"),
    ],
)
def test_models_that_do_not(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"packing: .*{message}.*without packing"):
        data.check_packing(make())


@pytest.mark.parametrize("size", [1, 3])
def test_a_trainer_learns_from_packed_rows(size: int, tmp_path: Path) -> None:
    """Without TRL; rows of a step may come in batches of one, and each token counts alike."""
    dataset = examples(SIZES)
    rows = data.packed(dataset, 10)
    assert len(rows) == 3
    model = zoo.tiny("llama")
    patch(model, RedConfig())
    alone = [{key: torch.tensor([value]) for key, value in example.items()} for example in dataset]
    wanted, vectors = gradients(model, alone)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=3 // size,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
    )
    own = [vector for parts in edit_parameters(model).values() for vector in parts.values()]
    before = [vector.detach().clone() for vector in own]
    trainer = RedTrainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=data.PackedCollator(),
        optimizers=(torch.optim.SGD(own, lr=1.0), None),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, abs=1e-4)  # Trainer rounds what it logs
    for vector, start, gradient in zip(own, before, vectors, strict=True):
        torch.testing.assert_close(start - vector, gradient, rtol=0, atol=float(1e-4 * gradient.abs().max()))


def test_batches_that_are_not_packed() -> None:
    batch = data.padded_collator(tiny_folders.tokenizer())(examples((3, 2)))
    assert batch["input_ids"].shape == (2, 3)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][1, -1] == -100
