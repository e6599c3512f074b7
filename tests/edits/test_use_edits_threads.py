"""Rows with different edits where layers run twice: activation checkpointing, and where threads share a model."""

from __future__ import annotations

import threading

import pytest
import torch
from patience import HANGS
from row_cases import ROWS, eager, hold, inputs, several, weighted

import red_kernels as rk


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position", ["ffn", "res_with_attn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_checkpointed_with_backward_inside(name, position, reentrant):
    plain, model, values = several(name, position)
    checkpointing(model, reentrant)
    hold(name, position, plain, model, values, ROWS, eager(model, ROWS))


def checkpointing(model, reentrant):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", ["nothing", "inference", "another block", "a switch", "edits disabled"])
def test_checkpointed_with_backward_outside(between, reentrant):
    """The layers run again with the rows of their forward, whatever came since."""
    plain, model, values = several("llama")
    checkpointing(model, reentrant)

    def run(batch):
        with rk.use_edits(model, ROWS):
            loss = weighted(model(**batch).logits)
        if between == "inference":
            with torch.no_grad():
                model.eval()(**batch)
                model.train()
        if between == "another block":
            with rk.use_edits(model, ROWS[::-1]), torch.no_grad():
                model.eval()(**batch)
                model.train()
        if between == "a switch":
            rk.switch_edit(model, "b")
        if between == "edits disabled":
            with rk.disable_edits(model):
                loss.backward()
        else:
            loss.backward()
        return loss_free(model, batch)

    def loss_free(model, batch):
        with rk.use_edits(model, ROWS), torch.no_grad():
            return model(**batch).logits

    hold("llama", "ffn", plain, model, values, ROWS, run)


def in_thread(function):
    """Run it in another thread; what it raises is raised here."""
    result: list = []

    def run():
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=HANGS)
    value, error = result[0]
    if error is not None:
        raise error
    return value


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_with_backward_in_another_thread(reentrant):
    """As on a GPU, where autograd's own threads run layers again; and another thread is in a block of its own."""
    plain, model, values = several("llama")
    checkpointing(model, reentrant)
    entered, done = threading.Event(), threading.Event()

    def another():
        with rk.use_edits(model, ["b", "a"]):
            entered.set()
            done.wait(HANGS)

    thread = threading.Thread(target=another)
    thread.start()
    entered.wait(HANGS)

    def run(batch):
        with rk.use_edits(model, ROWS):
            logits = model(**batch).logits
        in_thread(weighted(logits).backward)
        return logits

    try:
        hold("llama", "ffn", plain, model, values, ROWS, run)
    finally:
        done.set()
        thread.join(HANGS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_without_rows_beside_a_block_in_another_thread(reentrant):
    plain, model, values = several("llama")
    checkpointing(model, reentrant)
    rk.switch_edit(model, "a")
    entered, done = threading.Event(), threading.Event()

    def another():
        with rk.use_edits(model, ["b", "default"]):
            entered.set()
            done.wait(HANGS)

    thread = threading.Thread(target=another)

    def run(batch):
        logits = model(**batch).logits
        thread.start()
        entered.wait(HANGS)
        try:
            weighted(logits).backward()
        finally:
            done.set()
            thread.join(HANGS)
        return logits

    hold("llama", "ffn", plain, model, values, ("a", "a"), run)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_threads_at_once(compiled):
    """Each serves its own rows, its forward in the middle of the other's block."""
    torch.compiler.reset()
    _, model, _ = several("llama")
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    requests = {"one": ("a", "b", None), "two": ("b", "default", "a", "a")}
    batches = {name: inputs("llama", len(rows), seed=len(rows)) for name, rows in requests.items()}
    wanted = {}
    for name, rows in requests.items():
        with torch.no_grad(), rk.use_edits(model, rows):
            wanted[name] = call(**batches[name]).logits
    barrier = threading.Barrier(2, timeout=HANGS)
    found: dict[str, list] = {name: [] for name in requests}

    def serve(name):
        try:
            for _ in range(5):
                with torch.no_grad(), rk.use_edits(model, requests[name]):
                    barrier.wait()
                    found[name].append(call(**batches[name]).logits)
                    barrier.wait()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=serve, args=(name,)) for name in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
    for name in requests:
        assert len(found[name]) == 5
        assert all(torch.equal(logits, wanted[name]) for logits in found[name])


def test_a_thread_from_outside_has_the_active_edit():
    _, model, _ = several("llama")
    batch = inputs("llama", 3)
    go = threading.Event()

    def run():
        with torch.no_grad():
            return model(**batch).logits

    found: list = []
    thread = threading.Thread(target=lambda: (go.wait(HANGS), found.append(run())))
    thread.start()
    active = run()
    with rk.use_edits(model, ["a", "b", None]):
        assert not torch.allclose(run(), active)
        go.set()
        thread.join(HANGS)
    assert torch.equal(found[0], active)
