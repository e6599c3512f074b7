"""Training an adapter on the scoreboard's questions, and measuring learning and forgetting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .answers import accuracy
from .data import Data, Pair, batches
from .settings import WARM_UP, Settings

_FREE_EVERY = 10  # steps after which a GPU's unused memory is freed, as on the scoreboard
_IGNORED = -100


@dataclass
class Trained:
    """The measurements of a training, finished or not.

    Attributes:
        metrics: an entry for each evaluation, and a last one for the test part.
        seconds: of the training, without the evaluations.
        reserved: bytes in the device's allocator after each step; [] on a CPU.
    """

    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    reserved: list[int] = field(default_factory=list)


def train(model: Any, tokenizer: Any, data: Data, settings: Settings, into: Trained) -> None:
    """Train, and evaluate on the way and at the end.

    Args:
        model: of PEFT, in training mode or not; it is left in evaluation mode.
        tokenizer: its end-of-text token is its padding, so that the first padded token teaches the model to end.
        data: the parts.
        settings: the settings.
        into: gets the measurements as they are made.
    """
    from transformers import get_cosine_schedule_with_warmup

    device = next(model.parameters()).device
    with model.disable_adapter():
        before = _text_loss(model.eval(), tokenizer, data.wiki, settings)
    optimizer = torch.optim.AdamW(
        [own for own in model.parameters() if own.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARM_UP * settings.max_steps), settings.max_steps)
    items = [_tokenised(tokenizer, settings, query, response) for query, response in data.train]
    begun, judging = time.perf_counter(), 0.0
    losses, seconds, tokens, samples = [], [], [], 0
    since = settings.eval_steps
    model.train()
    for step, chosen in zip(range(1, settings.max_steps + 1), batches(items, settings.batch_size), strict=False):
        started = time.perf_counter()
        lengths = [len(item["input_ids"]) for item in chosen]
        loss = _loss(model, _padded(tokenizer, chosen, "right", device), lengths)
        loss.backward()
        if settings.grad_norm_clip:
            nn.utils.clip_grad_norm_(model.parameters(), settings.grad_norm_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if hasattr(model.base_model, "update_and_allocate"):  # methods that reallocate their budget
            model.base_model.update_and_allocate(step)
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(lengths) + len(lengths))  # each with the end of its text
        samples += len(chosen)
        if device.type != "cpu":
            into.reserved.append(torch.cuda.memory_reserved(device))
            if step % _FREE_EVERY == 0:
                torch.cuda.empty_cache()
        into.seconds = time.perf_counter() - begun - judging
        if step % settings.eval_steps == 0:
            started = time.perf_counter()
            found = _answered(model, tokenizer, data.valid, settings)
            took = time.perf_counter() - started
            judging += took
            into.metrics.append(
                {
                    "step": step,
                    "valid accuracy": found,
                    "train loss": statistics.fmean(losses[-since:]),
                    "train samples": samples,
                    "train time": sum(seconds[-since:]),
                    "eval time": took,
                    "tokens / sec": sum(tokens[-since:]) / sum(seconds[-since:]),
                    "mem reserved avg": statistics.fmean(into.reserved[-since:]) if into.reserved else None,
                    "elapsed time": time.perf_counter() - begun,
                }
            )
    found = _answered(model, tokenizer, data.test, settings)
    into.metrics.append(
        {
            "step": settings.max_steps,
            "test accuracy": found,
            "train loss": statistics.fmean(losses[-since:]),
            "train samples": samples,
            "train total tokens": sum(tokens),
            "forgetting": _text_loss(model.eval(), tokenizer, data.wiki, settings) - before,
        }
    )


def _tokenised(tokenizer: Any, settings: Settings, query: str, response: str = "") -> dict[str, list[int]]:
    text = settings.query_template.format(query=query) + response
    return {name: own[: settings.max_seq_length] for name, own in tokenizer(text).items() if name in _INPUTS}


_INPUTS = ("input_ids", "attention_mask")


def _padded(tokenizer: Any, items: Sequence[Any], side: str, device: torch.device) -> dict[str, Tensor]:
    return dict(tokenizer.pad(list(items), return_tensors="pt", padding_side=side).to(device))


def _loss(model: Any, batch: dict[str, Tensor], lengths: Sequence[int]) -> Tensor:
    """The loss on whole texts and on the first token of their padding, over the number of tokens of the texts."""
    labels = batch["input_ids"].clone()
    for row, length in enumerate(lengths):
        labels[row, length + 1 :] = _IGNORED
    loss: Tensor = model(**batch, labels=labels, num_items_in_batch=int(batch["attention_mask"].sum())).loss
    return loss


@torch.inference_mode()
def _answered(model: Any, tokenizer: Any, pairs: Sequence[Pair], settings: Settings) -> float:
    """The share of right answers; the model is left in training mode."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    model.eval()
    generated: list[str] = []
    for start in range(0, len(pairs), settings.batch_size_eval):
        asked = [_tokenised(tokenizer, settings, query) for query, _ in pairs[start : start + settings.batch_size_eval]]
        batch = _padded(tokenizer, asked, "left", device)
        longest = min(batch["input_ids"].shape[1] + settings.max_new_tokens, settings.max_length)
        config = GenerationConfig(max_length=longest, pad_token_id=tokenizer.pad_token_id)
        generated += tokenizer.batch_decode(model.generate(**batch, generation_config=config), skip_special_tokens=True)
    model.train()
    return accuracy(generated, [response for _, response in pairs])


@torch.inference_mode()
def _text_loss(model: Any, tokenizer: Any, texts: Iterable[str], settings: Settings) -> float:
    """The mean loss of a token of some texts, each cut like a question."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for text in texts:  # one at a time: a larger batch's memory would count as the training's
        ids = tokenizer(text, truncation=True, max_length=settings.max_seq_length, return_tensors="pt").to(device)
        logits = model(**{name: ids[name] for name in _INPUTS}).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids["input_ids"][0, 1:], reduction="sum"))
        count += logits.shape[0]
    return total / max(1, count)
