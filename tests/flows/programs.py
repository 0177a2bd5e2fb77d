"""Random programs of flows: generated bodies of steps, tasks, races, timeouts, waits, messages, effects and
flows inside.

A program is data, drawn by a seed: a block is a list of instructions, and some have blocks inside. The calls
of a program may depend on time and on who wins a race; its result does not, so that a run that was killed
equals one that was not.
"""

import asyncio
import contextlib
import random
import sys
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from tests.kit import words

from stroma import Flow, FlowFunction, Pipeline, StepFailed, parallel, stroma_flow

__all__ = ["Answer", "Life", "Note", "Program", "Value", "flow_of", "mixed", "program_of"]

Program = list[Any]

_LEAVES = words("""
    step step step key plain both bad map map value sleep nap ask expire pay pay wire wire refused retry
    leave gone receive share patient steer quiet misfit queue lock
""")
_COMPOUNDS = words("""
    loop gather group failing race completed limit wait clean fallback fallback child pipeline event
    generator
""")


class Value(BaseModel):
    """What steps take and return. ``at``: the place in the program, in all lives the same; ``seen``: what no
    output depends on."""

    n: int = 0
    at: str = ""
    seen: str = ""


class Answer(BaseModel):
    text: str = ""


class Note(BaseModel):
    """A message: its number among those of its topic."""

    text: str


@dataclass(slots=True)
class Life:
    """What one execution of a program has done.

    Attributes:
        paid: the places of the effects that have returned.
        wanted: how many messages of a topic it may receive.
        received: the texts of the messages that it has received, by topic.
    """

    paid: list[str] = field(default_factory=list)
    wanted: dict[str, int] = field(default_factory=dict)
    received: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def program_of(seed: int) -> Program:
    """Return the program of a seed. The last instruction of some fails."""
    chance = random.Random(seed)
    left = [chance.choice([6, 10, 16])]

    def block(depth: int) -> Program:
        return [instruction(depth) for _ in range(chance.randint(1, 3))]

    def instruction(depth: int) -> Any:
        left[0] -= 1
        if depth > 3 or left[0] < 0 or chance.random() < 0.4:
            return (chance.choice(_LEAVES), chance.randint(1, 3))
        count = chance.randint(2, 3)
        return (chance.choice(_COMPOUNDS), count, *(block(depth + 1) for _ in range(count)))

    program = [instruction(0) for _ in range(chance.randint(2, 4))]
    return [*program, ("fall", 2, block(2), block(2))] if chance.random() < 0.2 else program


def flow_of(
    program: Program, nodes: dict[str, Any], life: Life, name: str = "f"
) -> FlowFunction[Value, Value]:
    """Return a program as a flow over the nodes of a world. ``life``: gets what its body does."""

    @stroma_flow(name, input=Value, output=Value)
    async def f(flow: Flow, state: Value) -> Value:
        body = _Body(flow, nodes, life)
        return Value(n=await body.block(program, state.n, state.at or name), at=state.at)

    return f


class _Body:
    """One execution of a program. Its instructions are methods, which return a number made of ``n``."""

    def __init__(self, flow: Flow, nodes: dict[str, Any], life: Life) -> None:
        self.flow, self.nodes, self.life = flow, nodes, life
        self.left: list[asyncio.Task[Any]] = []

    async def block(self, program: Program, n: int, at: str) -> int:
        for index, (kind, count, *blocks) in enumerate(program):
            do: Callable[..., Coroutine[Any, Any, int]] = getattr(self, kind)
            n = await do(n, f"{at}/{index}{kind}", count, *blocks)
        return n

    def call(self, name: str, n: int, at: str, **options: Any) -> Coroutine[Any, Any, Value]:
        return self.flow.step(self.nodes[name], Value(n=n, at=at), **options)

    async def step(self, n: int, at: str, count: int) -> int:
        return (await self.call("add", n, at)).n

    async def key(self, n: int, at: str, count: int) -> int:
        return (await self.call("add", n, at, key=at)).n

    async def plain(self, n: int, at: str, count: int) -> int:
        return (await self.call("plain", n, at)).n

    async def both(self, n: int, at: str, count: int) -> int:
        group = parallel(self.nodes["left"], self.nodes["right"])
        return int((await self.flow.step(group, Value(n=n, at=at))).n)

    async def bad(self, n: int, at: str, count: int) -> int:
        try:
            return (await self.call("bad", n, at)).n
        except StepFailed as error:
            return (await self.call("add", len(error.failure.message), f"{at}/clean")).n

    async def map(self, n: int, at: str, count: int) -> int:
        items = [Value(n=n, at=f"{at}.{index}") for index in range(count + 1)]
        found = await self.flow.map(self.nodes["add"], items, max_concurrency=count)
        return sum(one.n for one in found) % 1000

    async def value(self, n: int, at: str, count: int) -> int:
        seen = (self.flow.now(), self.flow.random(), self.flow.uuid())[count - 1]
        return (await self.flow.step(self.nodes["add"], Value(n=n, at=at, seen=str(seen)))).n

    async def sleep(self, n: int, at: str, count: int) -> int:
        await self.flow.sleep(0.001 * count)
        return n

    async def nap(self, n: int, at: str, count: int) -> int:
        await asyncio.sleep(0.001 * (count - 1))
        return n

    async def ask(self, n: int, at: str, count: int) -> int:
        timeout = None if count == 1 else 3600
        answer = await self.flow.wait_for(Answer, reason=f"answer {at}", key=at, timeout=timeout)
        return mixed(n, answer.text)

    async def expire(self, n: int, at: str, count: int) -> int:
        with contextlib.suppress(TimeoutError):
            await self.flow.wait_for(Answer, reason=f"ignore {at}", key=at, timeout=0.001 * count)
        return n

    async def pay(self, n: int, at: str, count: int) -> int:
        return await self.done("pay", n, at)

    async def wire(self, n: int, at: str, count: int) -> int:
        """An effect whose unknown outcome only a person can find out."""
        return await self.done("wire", n, at)

    async def done(self, name: str, n: int, at: str) -> int:
        done = await self.call(name, n, at)
        self.life.paid.append(at)
        return done.n

    async def refused(self, n: int, at: str, count: int) -> int:
        try:
            await self.call("refused", n, at)
        except StepFailed:
            return mixed(n, "refused")
        raise AssertionError(at)

    async def retry(self, n: int, at: str, count: int) -> int:
        """Try an effect again, with the same input, which a timeout cuts off."""
        for _ in range(count):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001 * count):
                    await self.pay(n, at, count)
                    break
        return mixed(n, "retry")

    async def gone(self, n: int, at: str, count: int) -> int:
        """Give up an effect that has not begun, and call it again."""
        task = asyncio.create_task(self.pay(n, at, count))
        for _ in range(count - 1):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return await self.pay(n, at, count)

    async def leave(self, n: int, at: str, count: int) -> int:
        """Leave an effect behind, which the end of the flow, or of what is around it, cuts off."""
        self.left.append(asyncio.create_task(self.done("pay" if count == 1 else "wire", n, at)))
        return n

    async def next(self, topic: str, **options: Any) -> str:
        text = (await self.flow.receive(Note, topic=topic, **options)).text
        self.life.received[topic].append(text)
        return text

    async def receive(self, n: int, at: str, count: int) -> int:
        self.life.wanted[at] = count
        return mixed(n, "".join([await self.next(at, key=f"{at}.{index}") for index in range(count)]))

    async def share(self, n: int, at: str, count: int) -> int:
        """Several tasks wait for messages of one topic: the first to wait gets the first one."""
        self.life.wanted[at] = count + 1
        return mixed(n, "".join(await asyncio.gather(*(self.next(at) for _ in range(count + 1)))))

    async def patient(self, n: int, at: str, count: int) -> int:
        """Wait for a time, again and again, until all messages are there."""
        self.life.wanted[at], texts = count, list[str]()
        while len(texts) < count:
            with contextlib.suppress(TimeoutError):
                texts.append(await self.next(at, timeout=0.001 * count))
        return mixed(n, "".join(texts))

    async def steer(self, n: int, at: str, count: int) -> int:
        """Work, and give up the first of two waits whenever a step ends: what then comes is the second's."""
        self.life.wanted[at], texts, index = count, list[str](), 0
        waits: list[asyncio.Task[str]] = []
        while len(texts) < count:
            waits += [asyncio.create_task(self.next(at)) for _ in range(2 - len(waits))]
            work = asyncio.create_task(self.call("add", n, f"{at}.{index}"))
            await asyncio.wait([work, *waits], return_when=asyncio.FIRST_COMPLETED)
            waits[0].cancel()
            await asyncio.wait([waits[0]])
            texts += [one.result() for one in waits if one.done() and not one.cancelled()]
            waits = [one for one in waits if not one.done()]
            await work
            index += 1
        for one in waits:
            one.cancel()
        return mixed(n, "".join(texts))

    async def quiet(self, n: int, at: str, count: int) -> int:
        with contextlib.suppress(TimeoutError):
            await self.next(at, timeout=0.001 * count)
        return n

    async def misfit(self, n: int, at: str, count: int) -> int:
        """The first message is no Note."""
        self.life.wanted[at] = 2
        try:
            await self.next(at)
        except StepFailed as error:
            self.life.received[at].append("0")
            return mixed(n, error.failure.message + await self.next(at))
        raise AssertionError(at)

    async def loop(self, n: int, at: str, count: int, *blocks: Program) -> int:
        for index in range(count):
            n = await self.block(blocks[0], n, f"{at}.{index}")
        return n

    def parts(self, n: int, at: str, blocks: tuple[Program, ...]) -> list[Coroutine[Any, Any, int]]:
        return [self.block(one, n, f"{at}.{index}") for index, one in enumerate(blocks)]

    async def gather(self, n: int, at: str, count: int, *blocks: Program) -> int:
        return sum(await asyncio.gather(*self.parts(n, at, blocks))) % 1000

    async def group(self, n: int, at: str, count: int, *blocks: Program) -> int:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in self.parts(n, at, blocks)]
        return sum(task.result() for task in tasks) % 1000

    async def failing(self, n: int, at: str, count: int, *blocks: Program) -> int:
        """A failure cancels its siblings, each of which cleans up with a step."""

        async def cleaning(index: int, block: Program) -> None:
            try:
                await self.block(block, n, f"{at}.{index}")
            finally:
                await self.call("add", n, f"{at}.{index}/clean")

        async def group_of_them() -> None:
            async with asyncio.TaskGroup() as group:
                for index, one in enumerate(blocks):
                    group.create_task(cleaning(index, one))
                group.create_task(self.call("bad", n, f"{at}/bad"))

        # In a task of its own: before Python 3.13 a group that is aborting loses the cancellation by a
        # timeout around it.
        task = asyncio.create_task(group_of_them())
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return (await self.call("add", n, f"{at}/after")).n

    async def fall(self, n: int, at: str, count: int, *blocks: Program) -> int:
        """A failure that nobody catches leaves its siblings behind."""
        await asyncio.gather(*self.parts(n, at, blocks), self.call("bad", n, f"{at}/bad"))
        raise AssertionError(at)

    async def race(self, n: int, at: str, count: int, *blocks: Program) -> int:
        tasks = [asyncio.create_task(one) for one in self.parts(n, at, blocks)]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        winner = next(index for index, task in enumerate(tasks) if task in done)
        if count == 2:
            await asyncio.gather(*tasks, return_exceptions=True)
        return mixed(n, str((await self.call("add", 0, f"{at}/won{winner}")).n >= 0))

    async def completed(self, n: int, at: str, count: int, *blocks: Program) -> int:
        tasks = [asyncio.create_task(one) for one in self.parts(n, at, blocks)]
        total = 0
        for number, first in enumerate(asyncio.as_completed(tasks)):
            found = await first
            await self.call("add", found, f"{at}/{number}of{found}")
            total += found
        return total % 1000

    async def limit(self, n: int, at: str, count: int, *blocks: Program) -> int:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.002 * count):
                await self.block(blocks[0], n, f"{at}.0")
        return await self.block(blocks[1], n, f"{at}.1")

    async def wait(self, n: int, at: str, count: int, *blocks: Program) -> int:
        with contextlib.suppress(TimeoutError):
            if sys.version_info >= (3, 12):  # Before, it may lose a cancellation.
                await asyncio.wait_for(self.block(blocks[0], n, f"{at}.0"), 0.001 * count)
            else:
                async with asyncio.timeout(0.001 * count):
                    await self.block(blocks[0], n, f"{at}.0")
        return mixed(n, "wait")

    async def clean(self, n: int, at: str, count: int, *blocks: Program) -> int:
        try:
            n = await self.block(blocks[0], n, f"{at}.0")
            if count == 2:
                n = (await self.call("bad", n, f"{at}/bad")).n
        except StepFailed as error:
            if error.failure.node_id != "bad":
                raise
            n = await self.block(blocks[1], n, f"{at}.1")
        finally:
            await self.call("add", n, f"{at}/clean")
        return n

    async def fallback(self, n: int, at: str, count: int, *blocks: Program) -> int:
        """Take one of two paths to the same steps, and end the run on one: a resume takes the other."""

        async def either() -> int:
            paid = await self.done("pay" if count == 2 else "wire", n, f"{at}/either")
            return (await self.call("add", paid, f"{at}/after")).n

        try:
            await self.call("flaky", n, f"{at}/first")
            await self.block(blocks[0], n, f"{at}.0")
        except StepFailed:
            await either()
            raise
        n = await either()
        return (await self.call("flaky", n, f"{at}/last")).n

    async def child(self, n: int, at: str, count: int, *blocks: Program) -> int:
        inside = flow_of(blocks[0], self.nodes, self.life, f"child{count}")
        return (await self.flow.run(inside, Value(n=n, at=at))).n

    async def pipeline(self, n: int, at: str, count: int, *blocks: Program) -> int:
        inside = flow_of(blocks[0], self.nodes, self.life, "inside")
        parts: list[Any] = [self.nodes["first"], inside, self.nodes["add"]][: count + 1]
        return int((await self.flow.run(Pipeline("p", parts), Value(n=n, at=at))).n)

    async def event(self, n: int, at: str, count: int, *blocks: Program) -> int:
        event, found = asyncio.Event(), [0] * len(blocks)

        async def part(index: int, block: Program) -> None:
            if index:
                await event.wait()
            found[index] = await self.block(block, n + sum(found[:1]), f"{at}.{index}")
            event.set()

        async with asyncio.TaskGroup() as group:
            for index, one in enumerate(blocks):
                group.create_task(part(index, one))
        return sum(found) % 1000

    async def queue(self, n: int, at: str, count: int) -> int:
        queue: asyncio.Queue[int] = asyncio.PriorityQueue(1)
        total = 0

        async def produce() -> None:
            for index in range(4):
                await queue.put((await self.call("add", n, f"{at}.{index}")).n)

        async def consume(worker: int) -> None:
            nonlocal total
            while True:
                item = await queue.get()
                # Which item it is depends on the order; the sum does not.
                await self.call("add", item, f"{at}/got{item}.{worker}.{total}")
                total += item
                queue.task_done()

        workers = [asyncio.create_task(consume(worker)) for worker in range(count)]
        await produce()
        await queue.join()
        for one in workers:
            one.cancel()
        return total % 1000

    async def lock(self, n: int, at: str, count: int) -> int:
        gate: Any = [asyncio.Lock(), asyncio.Semaphore(2), asyncio.Condition()][count - 1]

        async def part(index: int) -> int:
            async with gate:
                return (await self.call("add", n, f"{at}.{index}")).n

        return sum(await asyncio.gather(*(part(index) for index in range(4)))) % 1000

    async def generator(self, n: int, at: str, count: int, *blocks: Program) -> int:
        async def items() -> AsyncIterator[int]:
            for index, one in enumerate(blocks):
                yield await self.block(one, n, f"{at}.{index}")

        return sum([one async for one in items()]) % 1000


def mixed(n: int, text: str) -> int:
    return (n + zlib.crc32(text.encode())) % 1000
