"""Where a block holds in tasks of asyncio, asynchronous generators and compiled code."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch
from patience import HANGS
from served import HOW, Served, thread_of


def test_tasks_of_asyncio(served):
    found = {}

    async def request(name, how, waits):
        with served.block(how):
            seen = []
            for _ in range(waits):
                seen.append(served.said())
                await asyncio.sleep(0)
            found[name] = seen

    async def plain(waits):
        seen = []
        for _ in range(waits):
            seen.append(served.said())
            await asyncio.sleep(0)
        found["plain"] = seen

    async def main():
        await asyncio.gather(request("one", "a", 3), plain(4), request("two", "b", 5), request("three", "off", 4))

    asyncio.run(main())
    assert found == {"one": ["a"] * 3, "plain": ["default"] * 4, "two": ["b"] * 5, "three": ["off"] * 4}


@pytest.mark.parametrize("how", HOW)
def test_started_inside_of_a_task(served, how):
    """A child task, a thread of asyncio and one of an executor; also where they outlive the block."""

    async def child():
        seen = [served.said()]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [*seen, served.said()]

    async def main():
        with served.block(how):
            task = asyncio.create_task(child())
            seen = [await child(), await asyncio.to_thread(served.said)]
            loop = asyncio.get_running_loop()
            seen.append(await loop.run_in_executor(None, served.said))
            late = asyncio.create_task(child())
        return [*seen, await task, await late, served.said(), await asyncio.to_thread(served.said)]

    assert asyncio.run(main()) == [[how, how], how, how, [how, how], [how, how], "default", "default"]


def test_async_generators(served):
    async def stream(how):
        with served.block(how):
            while True:
                yield served.said()
                await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def managed(how):
        with served.block(how):
            yield

    async def main():
        one, two = stream("a"), stream("off")
        seen = [await anext(one), await anext(two), served.said(), await anext(one), await anext(two)]
        await one.aclose()
        seen += [await anext(two), served.said()]
        await two.aclose()
        async with managed("b"):
            seen += [served.said(), (await asyncio.gather(asyncio.to_thread(served.said)))[0]]
        return [*seen, served.said()]

    assert asyncio.run(main()) == ["a", "off", "default", "a", "off", "off", "default", "b", "b", "default"]


@pytest.mark.long
def test_compiled_models_in_generators_and_tasks():
    """Compiled code cannot ask where it is called: it leaves the graph to ask, or says that it cannot."""
    served = Served(num_hidden_layers=1)
    compiled = torch.compile(served.model, backend="eager")

    def said(call):
        with torch.no_grad():
            found = call(**served.batch).logits
        return next(name for name, wanted in served.wanted.items() if torch.allclose(found, wanted, atol=1e-5))

    def stream(how):
        with served.block(how):
            while True:
                yield said(compiled)

    one, two = stream("a"), stream("b")
    assert [next(one), next(two), next(one), said(compiled)] == ["a", "b", "a", "default"]
    torch.compiler.reset()
    whole = torch.compile(served.model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        said(whole)
    one.close()
    two.close()
    torch.compiler.reset()
    assert said(whole) == said(compiled) == "default"
    with served.block("a"):
        assert said(whole) == said(compiled) == "a"
        thread, found = thread_of(lambda: said(compiled))
        thread.join(HANGS)
        assert found == ["a"]

    async def request(how):
        with served.block(how):
            first = said(compiled)
            await asyncio.sleep(0)
            return first, said(compiled)

    async def main():
        return await asyncio.gather(request("a"), request("b"))

    assert asyncio.run(main()) == [("a", "a"), ("b", "b")]


@pytest.mark.parametrize("how", HOW)
def test_started_by_an_async_generator(served, how):
    async def work():
        await asyncio.sleep(0)
        return served.said()

    async def stream():
        with served.block(how):
            yield await asyncio.gather(work(), work())
            yield [await asyncio.create_task(work())]
            yield [await asyncio.wait_for(work(), HANGS)]
            yield [await asyncio.to_thread(served.said)]

    async def main():
        seen = []
        async for found in stream():
            seen += [*found, served.said(), await asyncio.create_task(work()), await asyncio.to_thread(served.said)]
        return seen

    outside = ["default"] * 3
    assert asyncio.run(main()) == [how, how, *outside, how, *outside, how, *outside, how, *outside]


@pytest.mark.parametrize("how", HOW)
def test_decorated_coroutines(served, how):
    @served.block(how)
    async def coroutine():
        await asyncio.sleep(0)
        return served.said()

    @served.block(how)
    async def stream():
        while True:
            yield served.said()

    async def main():
        running = stream()
        seen = [await coroutine(), served.said(), await anext(running), served.said(), await anext(running)]
        await running.aclose()
        return seen

    assert asyncio.run(main()) == [how, "default", how, "default", how]
