"""The faults "queue" and "temporal": submitted runs of all kinds, three workers, and everything that can
befall them.

Lists with groups and a map, flows with a sleep and a question, effects on the books of a provider, and one
budget for all. A client submits the runs, answers their questions and resumes those that failed. Workers and
the client are killed, at any instant or at a point of the protocol; workers are stopped for longer than their
leases, or told to end; servers are killed and started again. Then the last client waits for every run.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.chaos import effects, worker
from tests.chaos.check import ENDED, Figures, check, check_spent
from tests.chaos.effects import Order, provider
from tests.chaos.flows import Number, Text, check_flow, make_flow
from tests.chaos.rounds import ROUND_SECONDS, Pace, Place, Processes, apart, processes
from tests.chaos.worker import CALL_TOKENS, Budget, Diary, Fuse, State, digest, hooks, pipeline, read_diary

from stroma import (
    CheckpointManager,
    ContractRegistry,
    FailureClass,
    FailurePolicy,
    Fenced,
    Pipeline,
    RunConfig,
    StoreError,
    StromaRunner,
    current_node,
    open_store,
)

WORKERS: Final = 3
AT_ONCE: Final = 8
#: Temporal gets a heartbeat every second at most. A busy machine needs time as well.
LEASE_SECONDS: Final = 2.0
#: A pipeline of each kind; those of effects by their names there.
KINDS: Final = ("steps", "f", "list", "sell")
_OF_EFFECTS: Final = {"list": "list", "sell": "flow"}
_POINTS: Final = (*worker.POINTS, *effects.POINTS)
_QUEUE: Final = "chaos"


class Job(NamedTuple):
    """What the processes of a round have in common.

    Attributes:
        runs: the kind of each run.
        address: of the Temporal server; None: workers claim runs from the store.
        reconciles: effects can ask the provider; otherwise the client states how a call ended.
    """

    url: str
    diary: str
    errors: str
    port: int
    runs: dict[str, str]
    budget: Budget
    address: str | None
    reconciles: bool

    def diary_of(self, run_id: str) -> str:
        """Return the file with the calls of a flow."""
        return f"{self.diary}-{run_id}"


def programs(
    job: Job, runner: StromaRunner, diary: Diary, fuse: Fuse, draw: random.Random
) -> dict[str, Pipeline]:
    """Return a pipeline of each kind."""

    def note(line: str) -> None:
        Diary(job.diary_of(current_node().run_id)).write(line)

    def passed(point: str) -> None:
        if point == "function":
            here = current_node()
            diary.write("effect", here.run_id, here.idempotency_key, str(time.monotonic()), str(os.getpid()))
        fuse(point)

    known = effects.programs(runner, job.port, passed, reconciles=job.reconciles)
    return {
        "steps": Pipeline("steps", pipeline(diary, fuse, draw, 0.01)),
        "f": make_flow(note, draw),
        "list": Pipeline("list", known["list"]),
        "sell": known["flow"],
    }


async def work(job: Job, seed: str, point: str | None, nth: int) -> None:
    """Serve the pipelines until SIGTERM."""
    diary, fuse, draw = Diary(job.diary), Fuse(point, nth), random.Random(seed)
    fuse.install()
    again = {kind: FailurePolicy(max_retries=3, backoff_seconds=0) for kind in FailureClass}
    loop, leaving = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, leaving.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def ended(run_id: str, outcome: Any) -> None:
        # A run whose owner was too late ends with an error, or with a result that has it.
        error = outcome.failure and outcome.failure.exception if hasattr(outcome, "failure") else outcome
        if error is outcome or isinstance(error, Fenced):
            diary.write("end", run_id, "-", type(error).__name__, str(os.getpid()), "-")

    opened: Any = open_store(job.url)
    async with opened as store:
        config = RunConfig(
            policy_map=again,
            hooks=hooks(diary, fuse),
            shared_budgets=job.budget.open(store),
            lease_seconds=LEASE_SECONDS,
            max_recoveries=1_000_000,
            inline_wait_seconds=0,
            node_timeouts={"one": 1000},
        )
        runner = StromaRunner(ContractRegistry(), CheckpointManager(store), config)
        served = programs(job, runner, diary, fuse, draw).values()
        if job.address is not None:
            from stroma.temporal import stroma_worker

            client = await _connect(job.address)
            async with stroma_worker(
                client,
                _QUEUE,
                list(served),
                store=store,
                config=config,
                max_concurrency=AT_ONCE,
                drain_seconds=10,
            ):
                await leaving.wait()
            return
        serving = asyncio.ensure_future(
            runner.serve(*served, max_concurrency=AT_ONCE, poll_seconds=0.1, on_result=ended)
        )
        told = asyncio.ensure_future(leaving.wait())
        await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.is_set():
            await runner.shutdown(drain_seconds=10)
        told.cancel()
        await serving


def _hasten(job: Job) -> None:
    """Shorten, in this process, the times after which a run of a dead process is looked for."""
    from stroma.checkpoint import entries
    from stroma.runner import worker as serving

    serving._CLAIM_SECONDS = 1.0
    entries._SETBACK_SECONDS = (0.1, 300.0)
    if job.address is not None:
        from stroma.drivers.temporal import worker as plugin
        from stroma.drivers.temporal import workflow

        workflow.RECHECK_SECONDS, plugin.REPAIR_SECONDS, plugin.MIN_AGE_SECONDS = 2.0, 1.0, 0.5


async def _connect(address: str) -> Any:
    from temporalio.client import Client

    while True:
        try:
            return await Client.connect(address)
        except RuntimeError:  # The server is being started.
            await asyncio.sleep(0.05)


class Client:
    """Submits the runs, and does for each what a person would, until all have ended."""

    def __init__(self, job: Job, store: Any, runner: Any, known: dict[str, Pipeline]) -> None:
        self.job, self.store, self.runner, self.known = job, store, runner, known
        self.left = dict.fromkeys(job.runs)
        self.data: dict[str, Any] = {"ended": {}, "decided": 0, "resumed": 0}
        self.last: dict[str, str] = {}
        self.resumed = set[str]()

    async def attend(self) -> None:
        inputs = {"steps": State(), "f": Number(), "list": Order(), "sell": Order()}
        submitted = set[str]()
        while self.left:
            with _patience():
                for run_id, kind in self.job.runs.items():
                    if run_id not in submitted:
                        await self.runner.submit(self.known[kind], inputs[kind], run_id=run_id)
                        submitted.add(run_id)
                self.last = await asyncio.to_thread(self.store.statuses, list(self.left))
                for run_id, status in self.last.items():
                    with _patience():
                        await self._treat(run_id, status)
            await asyncio.sleep(0.1)
        self.data["charges"] = await effects.ask(self.job.port, "GET", "all")

    async def _treat(self, run_id: str, status: str) -> None:
        kind = self.job.runs[run_id]
        if status in ENDED:
            result = await self.runner.handle(run_id, self.known[kind]).result()
            self._note_end(run_id, kind, result)
            del self.left[run_id]
        elif status == "SUSPENDED" and kind == "f":
            questions = await asyncio.to_thread(self.store.waiting, run_id)
            if any(one.payload is None for one in questions):
                await self.runner.signal(run_id, Text(text="yes"))
        elif status == "SUSPENDED":
            self.data["decided"] += await effects.decide(self.runner, self.store, self.job.port, run_id)
        elif status in ("FAILED", "PARTIAL") or (status == "INTERRUPTED" and run_id not in self.resumed):
            # Also one that an earlier client, or this one, began to resume.
            self.resumed.discard(run_id)
            resume = self.store.reopen if self.job.address is None else self.runner.resume
            self.data["resumed"] += await resume(run_id) and status != "INTERRUPTED"
            self.resumed.add(run_id)

    def _note_end(self, run_id: str, kind: str, result: Any) -> None:
        state = result.final_state.model_dump()
        if kind == "f":
            Diary(self.job.diary_of(run_id)).write("end", state["text"])
        elif kind == "steps":
            line = ("end", run_id, "-", str(result.status), str(os.getpid()), digest(state))
            Diary(self.job.diary).write(*line)
        else:
            self.data["ended"][run_id] = state


@contextlib.contextmanager
def _patience() -> Any:
    """Let a store or server that fails be asked again, and an answer that another client gave first."""
    try:
        yield
    except (StoreError, ValueError, OSError):
        pass
    except Exception as error:
        if type(error).__name__ != "RPCError":
            raise


@contextlib.asynccontextmanager
async def _client(job: Job) -> AsyncIterator[Client]:
    opened: Any = open_store(job.url)
    async with opened as store:
        local = StromaRunner.quick(store=store)
        known = programs(job, local, Diary(job.diary), Fuse(None, 1), random.Random(0))
        runner: Any = local
        if job.address is not None:
            from stroma.temporal import TemporalRunner

            runner = TemporalRunner(await _connect(job.address), _QUEUE, store)
        yield Client(job, store, runner, known)


async def attend(job: Job, report: Path, seconds: float) -> None:
    """Attend to the runs until all have ended; then write what is known of them."""
    async with _client(job) as client:
        stuck = asyncio.create_task(worker.report_if_stuck(job.errors, seconds, lambda: f"{client.last}"))
        await client.attend()
        stuck.cancel()
        report.write_text(json.dumps(client.data))


class Fleet:
    """The processes of a round, and what strikes them. Slots 0 to 2 are workers, 3 is the client."""

    def __init__(
        self, instance: Processes, place: Place, job: Job, name: str, draw: random.Random, temporal: Any
    ) -> None:
        self.instance, self.place, self.job, self.name, self.draw = instance, place, job, name, draw
        self.temporal = temporal
        self.seconds = 2 * ROUND_SECONDS + 0.3 * len(job.runs)
        self.report = place.folder / f"report-{name}"
        self.struck: Counter[str] = Counter()
        #: When a process was stopped last, by its id.
        self.stops: dict[str, float] = {}
        self.started = 0
        self.pids = [self.start(slot) for slot in range(WORKERS + 1)]

    def start(self, slot: int) -> int:
        self.started += 1
        seed = f"{self.name}-{slot}-{self.started}"
        point = self.draw.choice(_POINTS) if self.draw.random() < 0.3 else None
        nth = self.draw.randint(1, 12)

        def do() -> None:
            # Read if the round is broken.
            logging.basicConfig(
                filename=self.job.errors, format="%(process)d %(asctime)s %(message)s", level="INFO"
            )
            _hasten(self.job)
            if slot == WORKERS:
                asyncio.run(attend(self.job, self.report, self.seconds - 5))
            else:
                asyncio.run(work(self.job, seed, point, nth))

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # In the child, until it is handled.
        try:
            return self.instance.call(do)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def replace_dead(self) -> None:
        """Start a process for each one that was killed, or killed itself."""
        self.instance.poll()
        for slot, pid in enumerate(self.pids):
            if pid in self.instance.killed:
                self.pids[slot] = self.start(slot)

    def strike(self) -> None:
        """Strike once, wherever the processes are."""
        strikes = [self._kill, self._kill, self._stop, self._tell]
        if self.place.server is not None:
            strikes.append(self._restart_store)
        if self.temporal is not None:
            strikes.append(self._restart_temporal)
        strike = self.draw.choice(strikes)
        strike()

    def _worker(self) -> int:
        """Return a worker, mostly the one that made the last call: it is in the middle of a step."""
        calls = [int(line[4]) for line in read_diary(self.instance.diary) if line[0] == "call"]
        if calls and calls[-1] in self.pids and self.draw.random() < 0.8:
            return calls[-1]
        return self.pids[self.draw.randrange(WORKERS)]

    def _kill(self) -> None:
        self.instance.kill(self.pids[WORKERS] if self.draw.random() < 0.25 else self._worker())

    def _stop(self) -> None:
        """Stop a worker for longer than its lease, which others take the runs over from; then it wakes up."""
        pid = self._worker()
        if pid in self.instance.alive:
            os.kill(pid, signal.SIGSTOP)
            self.instance.stopped.append(pid)
            self.stops[str(pid)] = time.monotonic()
            time.sleep(LEASE_SECONDS * self.draw.uniform(1.2, 2.5))
            os.kill(pid, signal.SIGCONT)
            self.struck["stops"] += 1

    def _tell(self) -> None:
        slot = self.draw.randrange(WORKERS)
        pid = self.pids[slot]
        if pid in self.instance.alive:
            os.kill(pid, signal.SIGTERM)
            self.instance.wait_for(pid)
            if pid not in self.instance.killed:  # Its point of the protocol may have come first.
                self.pids[slot] = self.start(slot)
                self.struck["SIGTERMs"] += 1

    def _restart_store(self) -> None:
        self._restart(self.place.server)
        self.struck["restarts of the store"] += 1

    def _restart_temporal(self) -> None:
        self._restart(self.temporal)
        self.struck["restarts of Temporal"] += 1

    def _restart(self, server: Any) -> None:
        server.kill()
        time.sleep(self.draw.uniform(0, 0.3))
        server.start()

    def has_ended(self) -> bool:
        """Return True once a client has seen the end of every run."""
        self.instance.poll()
        return self.pids[WORKERS] not in self.instance.alive and self.report.exists()

    def run(self) -> None:
        """Strike for a while, and wait for the ends of all runs and processes."""
        for _ in range(self.draw.randint(4, 10) + len(self.job.runs) // 20):
            time.sleep(self.draw.uniform(0, 0.3))
            if self.has_ended():
                break
            self.strike()
            self.replace_dead()
        deadline = time.monotonic() + self.seconds
        while not self.has_ended() and not self.instance.broken and time.monotonic() < deadline:
            self.replace_dead()
            time.sleep(0.005)
        if not self.has_ended():
            self.instance.broken.append(f"I5: the runs of round {self.name} do not end: {self._errors()}")
        for pid in self.pids[:WORKERS]:
            if pid in self.instance.alive:
                os.kill(pid, signal.SIGTERM)
        self.instance.finish()

    def _errors(self) -> str:
        path = Path(self.instance.errors)
        return path.read_text()[-20_000:] if path.exists() else ""


def queue(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """Three workers claim submitted runs."""
    return _round(place, name, number, draw, None)


def temporal(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """Temporal chooses one of three workers; its server keeps its data in a file."""
    from tests.servers_temporal import TemporalServer

    server = TemporalServer(place.folder / f"temporal-{number}.db")
    try:
        return _round(place, name, number, draw, server)
    finally:
        server.kill()


def _round(place: Place, name: str, number: int, draw: random.Random, server: Any) -> Figures:
    runs = {f"{name}-{i}": KINDS[i % len(KINDS)] for i in range(place.runs)}
    with processes(place, number) as instance, provider(instance, name) as port:
        budget = Budget(f"{name}-budget", 10**9, None)
        address = None if server is None else server.address
        job = Job(instance.url, instance.diary, instance.errors, port, runs, budget, address, number % 2 == 0)
        fleet = Fleet(instance, place, job, name, draw, server)
        fleet.run()
        figures = Figures()
        if fleet.report.exists():
            figures = apart(lambda: _judge(job, json.loads(fleet.report.read_text()), instance, fleet.stops))
            fleet.report.unlink()
        figures.rounds, figures.runs, figures.kills = 1, len(runs), instance.kills
        figures.broken += instance.broken
        figures.more += fleet.struck
        if not figures.broken:
            for run_id in runs:
                Path(job.diary_of(run_id)).unlink(missing_ok=True)
        return figures


def _judge(job: Job, data: dict[str, Any], instance: Processes, stops: dict[str, float]) -> Figures:
    of_kind = {kind: [run_id for run_id, k in job.runs.items() if k == kind] for kind in KINDS}
    struck = (instance.killed, instance.stopped, instance.restless, instance.refused)
    figures = check(job.url, job.diary, of_kind["steps"], *struck)
    for run_id in of_kind["f"]:
        figures.add(check_flow(job.url, job.diary_of(run_id), run_id))
    charged = {run_id: _OF_EFFECTS[kind] for run_id, kind in job.runs.items() if kind in _OF_EFFECTS}
    # The owner has looked at its lease before the call; then it stood still in the call.
    calls = [line[2:5] for line in read_diary(job.diary) if line[0] == "effect"]
    late = {key for key, begun, pid in calls if float(begun) < stops.get(pid, 0.0)}
    effects.judge(figures, data, charged, late)
    figures.more["resumed by a person"] += data["resumed"]
    store: Any = open_store(job.url)
    with store:
        for run_id in job.runs:
            attempts = store.attempts(run_id)
            outputs = Counter((a.position, a.branch) for a in attempts if a.output is not None)
            # One that replaced another output would not be seen in the outputs.
            commits = Counter((a.position, a.branch) for a in attempts if a.outcome == "success")
            if {*outputs.values(), *commits.values()} != {1}:
                figures.duplicated += 1
                history = [replace(one, output=None) for one in attempts]
                figures.broken.append(f"I2: run {run_id}: commits {commits}, outputs {outputs}, {history}")
        # An owner that lost its run has paid for its last calls all the same: only its commits are refused.
        failed = sum(line[0] == "fail" for line in read_diary(job.diary))
        unrecorded = CALL_TOKENS * (figures.repeated + failed) if instance.stopped or figures.fenced else 0
        check_spent(figures, job.budget, store, list(job.runs), unrecorded=unrecorded)
    return figures


FAULTS: dict[str, Callable[[Place, str, int, random.Random, Pace], Figures]] = {
    "queue": queue,
    "temporal": temporal,
}
