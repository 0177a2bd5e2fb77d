"""The fault "effect": processes that charge a card die at any instant, while the provider drops connections.

The provider is a real little HTTP server that counts charges and knows nothing of idempotency. It serves one
connection after the other, so that who asks it about a charge is answered after all requests that were sent
before.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final
from urllib.parse import quote, unquote

from pydantic import BaseModel
from tests.chaos.check import Figures
from tests.chaos.rounds import ROUND_SECONDS, Pace, Place, Processes, processes
from tests.chaos.worker import Fuse, guarded, report_if_stuck

from stroma import (
    FailureClass,
    FailurePolicy,
    Flow,
    NotDone,
    RunStatus,
    StoreError,
    StromaRunner,
    current_node,
    map_over,
    open_store,
    parallel,
)

#: Where a process kills itself: before the intent, before the call, in it before and after the charge, before
#: the commit.
POINTS: Final = ("before", "function", "connected", "sent", "answered")
#: What the provider does with a request.
DEEDS: Final = {
    "charged": 60,
    "charged, no answer": 8,
    "charged, slowly": 6,
    "charged, broken answer": 4,
    "charged, 500": 4,
    "no answer": 8,
    "refused": 6,
    "503": 4,
}
_CHARGES: Final = {"list": 6, "flow": 4}
_ENDED: Final = (RunStatus.COMPLETED, RunStatus.RESUMED)


class Order(BaseModel):
    cents: int = 1
    items: list[int] = [1, 2, 3]


class Item(BaseModel):
    cents: int


class Receipt(BaseModel):
    number: int


class Receipts(BaseModel):
    numbers: list[int]


class HttpError(Exception):
    """As a client raises for a status from 400 on."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status_code = status


def provide(listening: socket.socket, seed: str) -> None:
    """Serve until this process is killed."""
    draw = random.Random(seed)
    charges: defaultdict[str, list[int]] = defaultdict(list)
    run_ids: dict[str, str] = {}  # By key.
    numbers, deeds = iter(range(1, 1 << 30)), (list(DEEDS), list(DEEDS.values()))
    while True:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(2)
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                part = connection.recv(65536)
                if not part:
                    break
                request += part
            else:
                method, path, _ = request.split(b" ", 2)
                run_id, _, key = unquote(path[1:].decode()).rpartition(":")
                if method == b"GET":
                    booked = {f"{run_ids[key]}:{key}": of for key, of in charges.items() if of}
                    _answer(connection, 200, booked if key == "all" else charges[key])
                    continue
                run_ids[key] = run_id
                deed = draw.choices(*deeds)[0]
                if deed in ("refused", "503"):
                    _answer(connection, draw.choice((402, 429)) if deed == "refused" else 503, {})
                elif deed.startswith("charged"):
                    charges[key].append(next(numbers))
                    if deed == "charged, slowly":
                        time.sleep(0.01)
                    if deed == "charged, broken answer":
                        _answer(connection, 200, {"number": "?"})
                    elif deed != "charged, no answer":
                        _answer(
                            connection, 500 if deed == "charged, 500" else 200, {"number": charges[key][-1]}
                        )


def _answer(connection: socket.socket, status: int, data: Any) -> None:
    connection.sendall(f"HTTP/1.0 {status} x\r\n\r\n{json.dumps(data)}".encode())


async def ask(port: int, method: str, key: str, fuse: Callable[[str], None] = lambda point: None) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        fuse("connected")
        writer.write(f"{method} /{quote(key, safe='')} HTTP/1.0\r\n\r\n".encode())
        await writer.drain()
        fuse("sent")
        raw = await reader.read()
    finally:
        writer.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionResetError("the provider has dropped the connection")
    status = int(head.split()[1])
    if status >= 400:
        raise HttpError(status)
    return json.loads(body)


@contextlib.contextmanager
def provider(instance: Processes, seed: str) -> Iterator[int]:
    """Serve in a process of its own; the value is its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        port = listening.getsockname()[1]
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            guarded(instance.errors, lambda: provide(listening, seed))
    # Only the provider listens: if it dies, connections are refused, and nobody waits for an answer.
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            instance.broken.append(f"I5: the provider ended before the round: {status}")


def programs(
    runner: StromaRunner, port: int, fuse: Callable[[str], None], *, reconciles: bool
) -> dict[str, Any]:
    """Return a list and a flow whose effects charge the provider."""

    async def charge(order: Any) -> Any:
        fuse("function")
        here = current_node()
        answer = await ask(port, "POST", f"{here.run_id}:{here.idempotency_key}", fuse)
        fuse("answered")
        return answer

    async def look(order: Any, key: str) -> Any:
        numbers = await ask(port, "GET", key)
        return {"number": numbers[0]} if numbers else NotDone()

    def effect(node_id: str, input: Any = Order) -> Any:
        reconcile = look if reconciles else None
        return runner.node(node_id, input=input, output=Receipt, effect=True, reconcile=reconcile)(charge)

    @runner.node("before", input=Order, output=Order)
    async def before(order: Order) -> Order:
        fuse("before")
        return order

    class Merged(BaseModel):
        number: int
        cents: int

    @runner.node("split", input=Merged, output=Order)
    async def split(merged: Merged) -> Order:
        fuse("before")
        return Order()

    @runner.node("again", input=Receipt, output=Order)
    async def again(receipt: Receipt) -> Order:
        fuse("before")
        return Order()

    one, two = effect("one"), effect("two")
    items = map_over("items", effect("parcel", Item), into="receipts", max_concurrency=2)
    listed = [before, effect("charge"), again, parallel(before, parallel(one, two)), split, items]

    @runner.flow("sell", input=Order, output=Receipts)
    async def sell(flow: Flow, order: Order) -> Receipts:
        first, second = await asyncio.gather(flow.step(one, order), flow.step(two, order))
        numbers = [first.number, second.number]
        for _ in range(2):
            await flow.step(before, order)
            numbers.append((await flow.step(one, order)).number)
        return Receipts(numbers=numbers)

    return {"list": listed, "flow": sell}


async def decide(runner: StromaRunner, store: Any, port: int, run_id: str) -> int:
    """State, as somebody with the provider's books, how the unknown calls of a run ended. Return how many."""
    count = 0
    for question in await asyncio.to_thread(store.waiting, run_id):
        if question.payload is None and question.effect is not None:
            numbers = await ask(port, "GET", question.effect.key)
            stated = Receipt(number=numbers[0]) if numbers else NotDone()
            with contextlib.suppress(StoreError, ValueError):  # Another process was faster.
                await runner.signal(run_id, stated, question=question.id)
                count += 1
    return count


async def work(
    url: str,
    port: int,
    runs: dict[str, str],
    seed: str,
    point: str | None,
    nth: int,
    *,
    reconciles: bool,
    errors: str,
) -> dict[str, Any]:
    """Run everything to its end. Return the final states."""
    draw, fuse, decided = random.Random(seed), Fuse(point, nth), 0
    again = {kind: FailurePolicy(max_retries=2, backoff_seconds=0) for kind in FailureClass}
    ended: dict[str, Any] = {}
    last: dict[str, str] = {}
    stuck = asyncio.create_task(report_if_stuck(errors, ROUND_SECONDS - 5, lambda: f"{last}"))
    opened: Any = open_store(url)
    async with opened as store:
        runner = StromaRunner.quick(
            store=store, policy_map=again, resume=True, max_recoveries=1_000_000, node_timeouts={"one": 1000}
        )
        known = programs(runner, port, fuse, reconciles=reconciles)
        left = list(runs)
        while left:
            run_id = draw.choice(left)
            try:
                result: Any = await runner.run(known[runs[run_id]], Order(), run_id=run_id)
            except StoreError as error:
                last[run_id] = repr(error)
                await asyncio.sleep(draw.uniform(0.001, 0.01))
                continue
            last[run_id] = f"{result.status} {result.failure and result.failure.message}"
            if result.status is RunStatus.SUSPENDED:
                decided += await decide(runner, store, port, run_id)
            elif result.status in _ENDED:
                left.remove(run_id)
                ended[run_id] = result.final_state.model_dump()
        stuck.cancel()
        return {"ended": ended, "decided": decided, "charges": await ask(port, "GET", "all")}


def effect(place: Place, name: str, number: int, draw: random.Random, pace: Pace) -> Figures:
    """Two processes share a list and a flow with effects and die at any point; none may charge twice."""
    runs = {f"{name}-list": "list", f"{name}-flow": "flow"}
    report = place.folder / f"effects-{number}"
    with processes(place, number) as instance:
        with provider(instance, name) as port:

            def start(what: str, *, last: bool = False) -> int:
                point = None if last or draw.random() < 0.4 else draw.choice(POINTS)
                options = (instance.url, port, runs, f"{name}-{what}", point, draw.randint(1, 6))

                def do() -> None:
                    reconciles = number % 2 == 0
                    data = asyncio.run(work(*options, reconciles=reconciles, errors=instance.errors))
                    if last:
                        report.write_text(json.dumps(data))

                return instance.call(do)

            pids = [start(str(which)) for which in range(2)]
            for strike in range(draw.randint(2, 5)):
                time.sleep(draw.uniform(0, 0.6 * pace.seconds))
                instance.poll()
                which = draw.randrange(2)
                if instance.kill(pids[which]) or pids[which] in instance.killed:
                    pids[which] = start(f"{which}-{strike}")
            instance.wait(ROUND_SECONDS)
            start("last", last=True)
            instance.finish()
            pace.learn(instance)
        figures = Figures(rounds=1, kills=instance.kills, runs=len(runs), broken=list(instance.broken))
        if report.exists():
            judge(figures, json.loads(report.read_text()), runs)
            report.unlink()
        elif not figures.broken:
            figures.broken.append(f"I5: round {name} has no end")
        return figures


def judge(figures: Figures, data: dict[str, Any], runs: dict[str, str], late: Collection[str] = ()) -> None:
    """Compare the provider's books with what the runs say.

    ``late``: keys of calls whose process stood still between their begin and their end. Such a request may
    reach a provider that knows nothing of idempotency after it was asked whether it came.
    """
    for run_id, kind in runs.items():
        charges = {
            key.rpartition(":")[2]: of for key, of in data["charges"].items() if key.startswith(f"{run_id}:")
        }
        twice = {key: of for key, of in charges.items() if len(of) > 1 and key not in late}
        figures.more["charged late"] += sum(len(of) > 1 for key, of in charges.items() if key in late)
        figures.commits += len(charges)
        figures.duplicated += len(twice)
        figures.lost += max(0, _CHARGES[kind] - len(charges))
        if twice:
            figures.broken.append(f"G13: charged more than once: {twice}")
        if len(charges) != _CHARGES[kind]:
            figures.broken.append(
                f"G13: {run_id} has {len(charges)} charges in place of {_CHARGES[kind]}: {charges}"
            )
        state = data["ended"].get(run_id, {})
        numbers = state.get("numbers") or [receipt["number"] for receipt in state.get("receipts", ())]
        booked = {number for key, of in charges.items() for number in (of if key in late else of[:1])}
        if not numbers or not set(numbers) <= booked:
            figures.broken.append(f"G13: {run_id} ended with {state}, booked are {sorted(booked)}")
    figures.more["decided by a person"] += data["decided"]


FAULTS = {"effect": effect}
