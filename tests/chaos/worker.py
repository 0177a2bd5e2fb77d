"""The processes that are struck: a pipeline, a diary of what it did, and places to be killed at.

The diary is a file that many processes append to, a line in one write, so that it survives them:

    call RUN PLACE TOKEN PID          before a node does anything
    fail RUN PLACE TOKEN PID          the call is about to raise
    noted RUN PLACE TOKEN PID         the hook heard that it did: the attempt is acknowledged
    ack RUN PLACE TOKEN PID DIGEST    the hook heard of the success: the commit is acknowledged
    restored - - - -                  the store is about to come back older
    end RUN - OUTCOME PID DETAIL      what a process made of a run

A place is "node@branch". Every output carries the token of the call that made it.
"""

import asyncio
import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from stroma import (
    CheckpointLost,
    FailureClass,
    FailurePolicy,
    Fenced,
    NodeHooks,
    RunBusy,
    RunFailed,
    SharedBudget,
    SharedBudgetExceeded,
    StoreError,
    StromaRunner,
    current_node,
    open_store,
    stroma_node,
)
from stroma.checkpoint.durable.operations import Commit, Transaction
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.durable.worker import Worker
from stroma.cost.prices import find_pricer
from stroma.engine.admission import Permit
from stroma.runner import map_over, parallel

MODEL = "gpt-4o-mini"
FIRST, FLAKY, LEFT, RIGHT, ITEM, LAST = "first", "flaky", "left", "right", "item", "last"
NODES = (FIRST, FLAKY, LEFT, RIGHT, ITEM, LAST)
IN_GROUPS = (LEFT, RIGHT, ITEM)
ITEMS = 3
#: What one run of the pipeline commits: six nodes, of them one over three items, and two groups.
COMMITS = 6 + ITEMS - 1 + 2

#: What a call of a node takes; one that fails takes less.
CALL_TOKENS = 15

#: Where a process can be told to kill itself, in the order of the protocol.
POINTS = (
    "opened",  # the store has begun the run, nobody knows yet
    "start",  # the hook before a node
    "node",  # inside a node
    "record",  # after a node, before its commit
    "transaction",  # the commit is written, its transaction is open
    "applied",  # the commit is kept, the acknowledgement is not on its way yet
    "acknowledged",  # the loop has heard of it, the engine has not
    "hook",  # the hook after a commit begins
    "hook end",  # ... and ends
    "ended",  # the end of the run is kept, nobody knows yet
    "return",  # run() has returned
)


class State(BaseModel):
    mine: str = ""
    items: list[int] = list(range(ITEMS))
    first: str = ""
    flaky: str = ""
    left: str = ""
    right: str = ""


class Left(BaseModel):
    mine: str
    items: list[int]
    first: str
    flaky: str
    left: str


class Right(BaseModel):
    mine: str
    right: str


class Item(BaseModel):
    n: int


class Made(BaseModel):
    mine: str


class Gathered(BaseModel):
    mine: str
    items: list[int]
    first: str
    flaky: str
    left: str
    right: str
    made: list[Made] = []


class Flaky(Exception):
    pass


class Diary:
    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: str) -> None:
        os.write(self._descriptor, (" ".join(words) + "\n").encode())


def digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def token_of(state: dict[str, Any]) -> str:
    """The token in an output; a group of items has only those of its items."""
    return state.get("mine") or "-"


def prepare() -> None:
    """What a process does once and its forks need not: prices take a quarter of a second to read."""
    assert find_pricer(MODEL) is not None


class Fuse:
    """Kills this process when a point is passed for the nth time."""

    def __init__(self, point: str | None, nth: int) -> None:
        self.point = point
        self._left = nth

    def __call__(self, point: str) -> None:
        if point == self.point:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # The signal may take a moment; nothing else may happen in it.

    def install(self) -> None:
        """Put the points into the store's session and thread. Only for a process that is about to die."""
        fuse, acknowledge, record, write = self, Worker._acknowledge, DurableSession.record, Commit.__call__
        leave = Permit.leave

        def acknowledging(worker: Worker) -> None:
            for job in worker._batch:
                if job.error is None:
                    kind: Any = job.operation
                    if isinstance(kind, Transaction):
                        kind = kind.do
                    if isinstance(kind, functools.partial):
                        kind = getattr(kind.func, "__func__", kind.func)
                    if kind is DurableSession.open:
                        fuse("opened")
                    elif kind is DurableSession._finish:
                        fuse("ended")
                    elif isinstance(kind, Commit) or "DurableSession._" in getattr(kind, "__qualname__", ""):
                        fuse("applied")
            acknowledge(worker)

        def recording(session: DurableSession, *args: Any) -> Any:
            fuse("record")
            pending: Any = record(session, *args)
            pending.add_done_callback(lambda _: fuse("acknowledged"))
            return pending

        def writing(commit: Commit, rows: Any) -> None:
            write(commit, rows)
            fuse("transaction")

        def leaving(permit: Permit, outcome: Any) -> Any:
            fuse("settle")
            return leave(permit, outcome)

        if self.point is not None:
            Worker._acknowledge = acknowledging
            DurableSession.record = recording
            Commit.__call__ = writing
            Permit.leave = leaving


def pipeline(diary: Diary, fuse: Fuse, draw: random.Random, pause: float) -> list[Any]:
    def node(
        node_id: str, input_model: type[BaseModel], output_model: type[BaseModel]
    ) -> Callable[[Any], Any]:
        @stroma_node(node_id, input=input_model, output=output_model)
        async def call(state: Any) -> Any:
            here = current_node()
            token = os.urandom(6).hex()
            what = (here.run_id, f"{node_id}@{here.branch}", token, str(os.getpid()))
            diary.write("call", *what)
            if node_id in IN_GROUPS:
                fuse("branch")
            await asyncio.sleep(draw.uniform(0, pause))
            fuse("node")
            if node_id == FLAKY and here.attempt <= 2 and token < "60":
                diary.write("fail", *what)
                here.report_usage(input_tokens=3, output_tokens=2, model=MODEL)
                raise Flaky(token)
            whole = {**state.model_dump(), "mine": token, node_id: token}
            return {name: whole[name] for name in output_model.model_fields}, 10, 5, MODEL

        return call

    return [
        node(FIRST, State, State),
        node(FLAKY, State, State),
        parallel(node(LEFT, State, Left), node(RIGHT, State, Right)),
        map_over("items", node(ITEM, Item, Made), into="made", max_concurrency=2),
        node(LAST, Gathered, Gathered),
    ]


def hooks(diary: Diary, fuse: Fuse) -> NodeHooks:
    def place() -> str:
        here = current_node()
        return f"{here.node_id.replace(' ', '')}@{here.branch}"

    async def start(*_: Any) -> None:
        fuse("start")

    async def success(run_id: str, _node: str, state: dict[str, Any], _tokens: int) -> None:
        fuse("hook")
        diary.write("ack", run_id, place(), token_of(state), str(os.getpid()), digest(state))
        fuse("hook end")
        if place().split("@")[0] in IN_GROUPS:
            fuse("branch end")

    async def failure(run_id: str, _node: str, error: Exception, _class: Any) -> None:
        if isinstance(error, Flaky):
            diary.write("noted", run_id, place(), str(error), str(os.getpid()))

    return NodeHooks(on_node_start=start, on_node_success=success, on_node_failure=failure)


class Budget(NamedTuple):
    """A shared budget of all processes. ``url``: of its store; None: the store of the runs."""

    name: str
    limit: int
    url: str | None

    def open(self, store: Any) -> SharedBudget:
        return SharedBudget(
            self.name,
            max_tokens=self.limit,
            store=store if self.url is None else self.url,
            reserve_tokens=CALL_TOKENS,
            lease_seconds=BUDGET_LEASE_SECONDS,
            max_wait_seconds=10,
        )


#: For how long what a dead process has reserved is in the way of others.
BUDGET_LEASE_SECONDS = 1.0

#: What a process may meet and try again: it says so, and nothing is lost by it.
_AGAIN = (RunBusy, Fenced)


async def work(
    url: str,
    diary_path: str,
    runs: list[str],
    *,
    seed: str,
    point: str | None = None,
    nth: int = 1,
    pause: float = 0.006,
    once: bool = False,
    at_once: int = 2,
    patient: bool = False,
    clock: bool = False,
    cancels: int = 0,
    drain: float | None = None,
    file_bytes: int | None = None,
    budget: Budget | None = None,
    may_get_lost: bool = False,
    **config: Any,
) -> None:
    """Bring all runs to their end, however many processes do the same. ``once``: look at each run only once.

    ``patient``: a store that cannot be reached or is locked is tried again for as long as it takes.
    ``clock``: the wall clock jumps. ``cancels``: how often a run is cancelled. ``drain``: seconds that nodes
    have after a SIGTERM.
    ``file_bytes``: beyond that no file may grow. ``budget``: what all calls spend from; a run for which it
    has no room has ended. ``may_get_lost``: so has one whose commits the store has lost.
    """
    diary, fuse, draw = Diary(diary_path), Fuse(point, nth), random.Random(seed)
    fuse.install()
    nodes = pipeline(diary, fuse, draw, pause)
    pid = str(os.getpid())
    policies = {kind: FailurePolicy(max_retries=3, backoff_seconds=0) for kind in FailureClass}
    met: Counter[str] = Counter()
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    jumping = asyncio.create_task(jump(draw)) if clock else None

    opened: Any = open_store(url)
    async with opened as store:
        # It is struck more often than a run that kills its process.
        config.setdefault("max_recoveries", 1_000_000)
        if budget is not None:
            config["shared_budgets"] = budget.open(store)
        runner = StromaRunner.quick(
            store=store, policy_map=policies, hooks=hooks(diary, fuse), resume=True, **config
        )

        async def one(run_id: str) -> bool:
            """Whether the run has ended well."""
            nonlocal cancels
            error: BaseException | None
            running = asyncio.create_task(runner.run(nodes, State(), run_id=run_id))
            if cancels > 0:
                for _ in range(draw.choice((0, draw.randrange(60)))):
                    await asyncio.sleep(0)
                await asyncio.sleep(draw.choice((0, draw.uniform(0, 0.1))))
                cancels -= 1
                if running.cancel():
                    diary.write("cancel", run_id, "-", "-", pid)
            try:
                result = await running
            except asyncio.CancelledError:
                return False
            except StoreError as refused:
                error, outcome = refused, type(refused).__name__
            else:
                error = None if result.failure is None else result.failure.exception
                outcome = str(result.status) if error is None else type(error).__name__
                if error is None:
                    state = result.final_state.model_dump()
                    diary.write("end", run_id, "-", outcome, pid, digest(state))
                    fuse("return")
                    return True
            # Recorded by a process that died before it could end the run.
            of_budget = isinstance(error, RunFailed) and str(error).startswith("shared budget")
            if (
                of_budget
                or isinstance(error, SharedBudgetExceeded)
                or (may_get_lost and isinstance(error, CheckpointLost))
            ):
                diary.write("end", run_id, "-", outcome, pid, "-")
                return True
            if isinstance(error, _AGAIN) or (patient and isinstance(error, StoreError) and error.transient):
                if not isinstance(error, RunBusy) or once:
                    diary.write("end", run_id, "-", outcome, pid, "-")
                met[outcome] += 1
                return False
            raise error

        stopping: list[asyncio.Task[None]] = []
        if drain is not None:
            loop = asyncio.get_running_loop()

            def end() -> None:
                stopping.append(asyncio.create_task(runner.shutdown(drain_seconds=drain)))

            def arrived(*_: Any) -> None:
                with contextlib.suppress(RuntimeError):  # The loop has just ended.
                    loop.call_soon_threadsafe(end)

            signal.signal(signal.SIGTERM, arrived)
        left = list(runs)
        draw.shuffle(left)
        while left and not stopping:
            some = left[:at_once]
            ended = await asyncio.gather(*map(one, some))
            back = [run_id for run_id, done in zip(some, ended, strict=True) if not done and not once]
            left = left[at_once:] + back
            if not any(ended):
                await asyncio.sleep(draw.uniform(0.001, 0.01))
        await asyncio.gather(*stopping)
    if jumping is not None:
        jumping.cancel()


async def jump(draw: random.Random) -> None:
    """Move the wall clock of this process to and fro, by up to an hour."""
    offset, now, now_ns = 0, time.time, time.time_ns
    time.time = lambda: now() + offset
    time.time_ns = lambda: now_ns() + offset * 10**9
    while True:
        offset = draw.randint(-3600, 3600)
        await asyncio.sleep(draw.uniform(0, 0.02))


def main(errors: str, gate: int | None, **options: Any) -> None:
    """What a fork does; it never returns. ``gate``: a descriptor to read from before anything is done."""

    def do() -> None:
        if gate is not None:
            os.read(gate, 1)
        asyncio.run(work(**options))

    guarded(errors, do)


def guarded(errors: str, do: Callable[[], None]) -> None:
    """Do something, and end this process, with 3 if it failed."""
    code = 3
    try:
        do()
        code = 0
    except BaseException:
        with open(errors, "a") as file:
            traceback.print_exc(file=file)
    finally:
        sys.stdout.flush()
        os._exit(code)


async def report_if_stuck(errors: str, seconds: float, describe: Callable[[], str]) -> None:
    """Write later what this process is doing: what ``describe`` says, and all stacks."""
    await asyncio.sleep(seconds)
    with open(errors, "a") as file:
        print(f"process {os.getpid()} is still here after {seconds:g} s: {describe()}", file=file)
        for task in asyncio.all_tasks():
            task.print_stack(file=file)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def read_diary(path: str) -> Iterator[list[str]]:
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                yield line.split()
