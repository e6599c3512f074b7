"""Where a block of `use_edits` or `disable_edits` holds: generators, tasks, threads, pools; left in any order."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from patience import HANGS
from served import HOW, Served, thread_of

import red_kernels as rk


@pytest.mark.parametrize("second", HOW)
@pytest.mark.parametrize("first", HOW)
def test_generators_in_turn(served, first, second):
    one, two = served.stream(first), served.stream(second)
    for _ in range(2):
        assert next(one) == first
        assert served.said() == "default"
        assert next(two) == second
        assert next(one) == first
    one.close()
    assert next(two) == second
    assert served.said() == "default"
    two.close()
    assert served.said() == "default"
    for name in ("a", "b"):
        rk.add_edit(served.model, "extra", copy_of=name)
        rk.delete_edit(served.model, "extra")


def test_a_generator_that_is_dropped(served):
    stream = served.stream("a")
    next(stream)
    with pytest.raises(ValueError, match="rows of a running use_edits have it"):
        rk.delete_edit(served.model, "a")
    del stream
    gc.collect()
    rk.add_edit(served.model, "copy", copy_of="a")
    rk.delete_edit(served.model, "copy")


def test_generators_inside_of_each_other(served):
    def outer():
        with served.block("a"):
            for inner in served.stream("b"):
                yield inner, served.said()

    stream = outer()
    assert next(stream) == ("b", "a")
    assert served.said() == "default"
    assert next(stream) == ("b", "a")
    stream.close()

    def delegating():
        with served.block("a"):
            yield from served.stream("b")

    stream = delegating()
    assert [next(stream), served.said(), next(stream)] == ["b", "default", "b"]
    stream.close()
    with served.block("off"):  # the caller's block is around
        stream = served.stream("a")
        assert [next(stream), served.said(), next(stream)] == ["a", "off", "a"]
    assert [next(stream), served.said()] == ["a", "default"]
    stream.close()


def test_generators_in_a_pool_of_threads(served):
    """As a web server drives them: each step in whichever thread is free."""
    streams = {how: served.stream(how) for how in HOW}
    threads = [ThreadPoolExecutor(1) for _ in range(3)]
    for turn in range(6):
        for at, (how, stream) in enumerate(streams.items()):
            assert threads[(at + turn) % 3].submit(next, stream).result() == how
        for thread in threads:
            assert thread.submit(served.said).result() == "default"
        assert served.said() == "default"
    for at, stream in enumerate(streams.values()):
        threads[(at + 1) % 3].submit(stream.close).result()
    for thread in threads:
        assert thread.submit(served.said).result() == "default"
        thread.shutdown()


def test_two_threads_inside_of_two_generators_at_once(served):
    barrier = threading.Barrier(2, timeout=HANGS)
    found = {}

    def stream(how):
        with served.block(how):
            while True:
                barrier.wait()
                yield served.said()

    def drive(how):
        running = stream(how)
        found[how] = [next(running) for _ in range(3)]

    threads = [threading.Thread(target=drive, args=(how,)) for how in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
    assert found == {"a": ["a"] * 3, "b": ["b"] * 3}


class Managing:
    """A context manager that enters a block by hand."""

    def __init__(self, served, how):
        self.block = served.block(how)

    def __enter__(self):
        self.block.__enter__()

    def __exit__(self, *error):
        self.block.__exit__(*error)


@contextlib.contextmanager
def generated(served, how):
    with served.block(how):
        yield


@contextlib.contextmanager
def generated_twice(served, how):
    with generated(served, how):
        yield


@contextlib.contextmanager
def stacked(served, how):
    with contextlib.ExitStack() as stack:
        stack.enter_context(generated(served, how))
        yield


@pytest.mark.parametrize("manager", [Managing, generated, generated_twice, stacked])
@pytest.mark.parametrize("how", HOW)
def test_context_managers_around(served, how, manager):
    with manager(served, how):
        assert served.said() == how
        with manager(served, "b"):
            assert served.said() == "b"
        assert served.said() == how
    assert served.said() == "default"

    def stream():
        with manager(served, how):
            while True:
                yield served.said()

    one = stream()
    assert [next(one), served.said(), next(one)] == [how, "default", how]
    one.close()


@pytest.mark.parametrize("how", HOW)
def test_a_decorated_function(served, how):
    @served.block(how)
    def decorated():
        return served.said()

    for _ in range(2):
        assert decorated() == how
        assert served.said() == "default"


@pytest.mark.parametrize("first", [0, 1])
def test_left_in_any_order(served, first):
    blocks = [served.block("a"), served.block("b")]
    for block in blocks:
        block.__enter__()
    assert served.said() == "b"
    blocks[first].__exit__(None, None, None)
    assert served.said() == ["b", "a"][first]
    blocks[1 - first].__exit__(None, None, None)
    assert served.said() == "default"


def test_left_in_another_thread(served):
    block = served.block("a")
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert served.said() == "default"


def test_a_block_is_entered_once(served):
    block = served.block("a")
    with block:
        with pytest.raises(RuntimeError, match="this block is entered already"):
            block.__enter__()
        assert served.said() == "a"
    with block:
        assert served.said() == "a"
    block.__exit__(None, None, None)


@pytest.mark.parametrize("how", HOW)
def test_a_thread_that_is_started_inside(served, how):
    """It inherits the block, also beyond its end; so does a thread that this one starts."""
    go = threading.Event()

    def late():
        go.wait(HANGS)
        inner, found = thread_of(served.said)
        inner.join(HANGS)
        return served.said(), found[0]

    with served.block(how):
        early_thread, early = thread_of(served.said)
        early_thread.join(HANGS)
        late_thread, later = thread_of(late)
        with served.block("b"):
            pass
    outside_thread, outside = thread_of(served.said)
    outside_thread.join(HANGS)
    go.set()
    late_thread.join(HANGS)
    assert (early, later, outside) == ([how], [(how, how)], ["default"])


@pytest.mark.parametrize("how", HOW)
def test_a_thread_that_a_generator_starts(served, how):
    def stream():
        with served.block(how):
            while True:
                thread, found = thread_of(served.said)
                thread.join(HANGS)
                yield found[0]

    one = stream()
    assert [next(one), served.said(), next(one)] == [how, "default", how]
    one.close()


def test_a_subclass_of_thread(served):
    class Worker(threading.Thread):
        def run(self):
            self.found = served.said()

    with served.block("a"):
        inside = Worker()
        inside.start()
        inside.join(HANGS)
    outside = Worker()
    outside.start()
    outside.join(HANGS)
    assert (inside.found, outside.found) == ("a", "default")


def test_an_executor_serves_each_task_with_its_own(served):
    with ThreadPoolExecutor(1) as pool:
        with served.block("a"):
            inside = pool.submit(served.said)  # starts the worker
            mapped = list(pool.map(lambda _: served.said(), range(2)))
        outside = pool.submit(served.said)
        with served.block("b"):
            later = pool.submit(served.said)
        assert [inside.result(), mapped, outside.result(), later.result()] == ["a", ["a", "a"], "default", "b"]
        assert pool.submit(served.said).result() == "default"


def test_a_copied_context(served):
    """For pools of other makes: what they run in a copy of the context has the block."""
    with served.block("a"):
        context = contextvars.copy_context()
        assert context.run(served.said) == "a"
    thread, found = thread_of(lambda: context.run(served.said))
    thread.join(HANGS)
    assert found == ["a"]


def test_a_streamer_that_generates_in_a_thread(served):
    """As with `TextIteratorStreamer`: the thread is started inside of the block, and read outside."""
    ids = served.batch["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for how in HOW:
        with served.block(how):
            wanted = served.model.generate(ids, **options)
            thread, found = thread_of(lambda: served.model.generate(ids, **options))
        thread.join(HANGS)
        assert torch.equal(found[0], wanted)


def test_threads_are_left_alone_outside_of_blocks(served):
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    with served.block("a"):
        assert threading.Thread.start is not start
    assert threading.Thread.start is start
    assert ThreadPoolExecutor.submit is submit
    stream = served.stream("a")
    next(stream)

    def theirs(self):
        inner(self)

    with served.block("b"):
        inner, threading.Thread.start = threading.Thread.start, theirs  # another library puts its own around
    stream.close()
    try:
        for how in ("a", "b"):
            with served.block(how):
                thread, found = thread_of(served.said)
                thread.join(HANGS)
            assert found == [how]
        thread, found = thread_of(served.said)
        thread.join(HANGS)
        assert found == ["default"]
    finally:
        threading.Thread.start = inner
    with served.block("a"):
        pass
    assert threading.Thread.start is start


def test_two_models_at_once(served):
    other = Served()
    with served.block("a"), other.block("b"):
        assert (served.said(), other.said()) == ("a", "b")
        with served.block("off"):
            assert (served.said(), other.said()) == ("off", "b")
    with other.block("b"):
        assert served.said() == "default"


def test_switching_under_a_suspended_generator(served):
    stream = served.stream("a")
    next(stream)
    rk.switch_edit(served.model, "b")
    assert [served.said(), next(stream)] == ["b", "a"]
    rk.switch_edit(served.model, "default")
    stream.close()


def test_entered_by_an_expression(served):
    other = Served()
    with contextlib.ExitStack() as stack:
        assert len(tuple(stack.enter_context(rk.disable_edits(one.model)) for one in (served, other))) == 2
        assert (served.said(), other.said()) == ("off", "off")
    assert (served.said(), other.said()) == ("default", "default")


@pytest.mark.parametrize("how", HOW)
def test_a_decorated_generator(served, how):
    @served.block(how)
    def stream():
        while True:
            yield served.said()

    one = stream()
    assert [next(one), served.said(), next(one)] == [how, "default", how]
    one.close()


def test_an_edit_deleted_before_its_block_begins(served):
    rk.add_edit(served.model, "late", copy_of="a")
    block = rk.use_edits(served.model, ["late"])
    rk.delete_edit(served.model, "late")
    with pytest.raises(ValueError, match="ids: got 'late', expected one of the model's edits"), block:
        pytest.fail("entered")


def test_a_block_used_again_elsewhere(served):
    """Entered in one thread, left in another, and entered there: the first thread is outside, and keeps nothing."""
    with ThreadPoolExecutor(1) as pool:
        block = served.block("a")
        pool.submit(block.__enter__).result()
        block.__exit__(None, None, None)
        with block:
            assert contextvars.Context().run(lambda: pool.submit(served.said)).result() == "default"
            assert served.said() == "a"
