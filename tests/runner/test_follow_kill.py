"""kill -9 of workers in the middle of an answer: a follower that reconnects has the right text, per store."""

import asyncio
import multiprocessing
import random
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import pytest
from tests.runner.follow_kill_helper import PARTS, sentence_of, work
from tests.runner.page import Page
from tests.shared_stores import SHARED, opened, place

from stroma import StromaRunner
from stroma.checkpoint import CheckpointNotFound, StoreError

#: How long the run is killed at most; a worker speaks for 0.4 s.
SECONDS = 0.5


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Workers start from a process that has imported everything."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.runner.follow_kill_helper", "redis", "psycopg"])
    return made


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize(
    "rounds", [pytest.param(3, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.nightly)]
)
async def test_killed_in_the_middle_of_a_sentence(context: ForkServerContext, kind: str, rounds: int) -> None:
    """After SIGKILL and a resume elsewhere, half a sentence is discarded and no event comes twice."""
    kills = halves = 0
    with place(kind) as where, opened(kind, where) as store:
        for number in range(rounds):
            rng = random.Random(f"{kind} {number}")
            page, killed = await one_round(context, store, (kind, where, f"run {number}"), rng)
            kills += killed
            halves += len({text[1:].partition(" ")[0] for text in page.seen}) - 2
    assert kills >= rounds
    print(f"{kind}: {rounds} rounds, {kills} kills, {halves} sentences that were begun and discarded")
    assert halves >= rounds // 4


async def one_round(
    context: ForkServerContext, store: Any, where: tuple[str, str, str], rng: random.Random
) -> tuple[Page, int]:
    run_id, page = where[2], Page()
    watching = asyncio.create_task(watch(store, run_id, page, rng))
    worker = start(context, where)
    kills = rng.choice((1, 1, 2))
    try:
        for _ in range(kills):
            await asyncio.sleep(rng.uniform(0.02, SECONDS))
            worker.kill()
            await asyncio.to_thread(worker.join)
            worker = start(context, where)
        await asyncio.to_thread(worker.join, 60)
        assert worker.exitcode == 0
        async with asyncio.timeout(30):
            await watching
    finally:
        worker.kill()
    check(page, store, run_id)
    later = Page()
    await later.read(StromaRunner.quick(store=store).follow(run_id))
    check(later, store, run_id)
    return page, kills


def start(context: ForkServerContext, where: tuple[str, str, str]) -> ForkServerProcess:
    worker = context.Process(target=work, args=where, daemon=True)
    worker.start()
    return worker


async def watch(store: Any, run_id: str, page: Page, rng: random.Random) -> None:
    """Follow a run from its start to its end, and reconnect after every few events."""
    until = time.monotonic() + 60
    while page.end is None:
        assert time.monotonic() < until
        try:
            await page.read(StromaRunner.quick(store=store).follow(run_id, page.cursor), rng.randrange(1, 8))
        except (CheckpointNotFound, StoreError):
            assert page.cursor is None  # It has not started.
            await asyncio.sleep(0.01)


def check(page: Page, store: Any, run_id: str) -> None:
    assert page.status in ("COMPLETED", "RESUMED")
    assert page.texts == {}
    outputs = {(at, ""): store.output_of(run_id, at) for at in (0, 1)}
    for at, data in outputs.items():
        assert page.truths[at]["text"].encode() in data
        assert page.truths[at]["text"].count("<") == PARTS
    for text in page.seen:
        assert "".join(sentence_of(text[1:].partition(" ")[0])).startswith(text)
    assert "events_dropped" not in page.kinds
