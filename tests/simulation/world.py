"""What is simulated: three processes that begin, answer, cancel and recover runs of one pipeline under a
shared budget.

They are killed, started anew and stopped for longer than their leases while their store misbehaves. Then a
last process brings all runs to their end without further faults, and :mod:`tests.simulation.model` judges
what happened.
"""

import asyncio
import contextlib
import gc
import os
import random
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel
from tests.simulation.scheduler import Clock, Process, Scheduler
from tests.simulation.store import Database, SimulatedRenewals, SimulatedStore

from stroma import (
    ContractViolation,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    Pipeline,
    RunBusy,
    SharedBudget,
    StoreError,
    StromaRunner,
    current_node,
    map_over,
    parallel,
    stroma_node,
)
from stroma.checkpoint.durable import rows as _rows
from stroma.checkpoint.durable import store as _durable
from stroma.checkpoint.durable.owner import LIVE_SESSIONS, Owner
from stroma.checkpoint.sqlite import connection as _sqlite_connection
from stroma.checkpoint.sqlite import connection as _sqlite_rows
from stroma.engine.admission import Permit
from stroma.limits import gate as _gate
from stroma.limits import reservations as _renewals

#: What can be put in on purpose: operations that read first and write later; cancels that only the owner of
#: the time knows of; cancels that leave a run to the owner whose lease ran out; calls that are settled with a
#: shared budget after their commit, by the process that made them; a store that comes back as it was a moment
#: ago, which is no fault of ours, but must be noticed.
FAULTS = ("check-then-write", "cancel-forgotten", "cancel-unfenced", "settled-apart", "comes-back-older")
_ENDED = ("COMPLETED", "RESUMED", "CANCELLED", "FAILED", "PARTIAL")

PROCESSES = 3
RUNS = 3
CALL_TOKENS = 100
#: Attempts to correct a bad output.
REPAIRS = 2
LEASE_SECONDS = 2.0
#: For how long faults strike, in simulated seconds.
STORM_SECONDS = 9.0
#: Between the moments at which a process may be killed or stopped wherever it is.
LOOK_SECONDS = 0.3


class State(BaseModel):
    made: list[str] = []


class Left(BaseModel):
    left: str


class Right(BaseModel):
    right: str


class Both(BaseModel):
    left: str
    right: str


class Done(BaseModel):
    done: list[State]

    def all_made(self) -> list[str]:
        return [token for one in self.done for token in one.made]


class Answer(BaseModel):
    by: str


class Flaky(Exception):
    pass


class World:
    """One simulation.

    Attributes:
        history: (seconds, process, what, run, more ...) of everything that the model goes by.
        faults: how often each fault struck.
        calm: whether no further fault strikes.
    """

    def __init__(self, seed: int, put_in: tuple[str, ...] = ()) -> None:
        self.seed = seed
        self.put_in = put_in
        self.draw = random.Random(seed)
        self.clock = Clock()
        self.scheduler = Scheduler(self.draw, self.clock)
        self.history: list[tuple[Any, ...]] = []
        self.faults: Counter[str] = Counter()
        self.calm = False
        self.database = Database(self)
        self.pids: dict[int, Process] = {}
        self.buried: list[Process] = []
        self.problems: list[str] = []
        self.tokens = 0
        self.limit = self.draw.choice((6, 12, 100)) * CALL_TOKENS
        self.kind = self.draw.choice(("plain", "asks", "group", "items", "repairs"))
        self.runs = [f"r{n}" for n in range(self.draw.randint(1, RUNS))]
        self.deadly = self.draw.choice((0.0, 1.0, 1.0, 3.0))  # how often processes die, beside the usual
        self.scripts = {
            "answers": self.kind == "asks",
            "cancels": self.draw.random() < 0.5,
            "pauses": self.draw.random() < 0.4,
        }

    def places(self) -> str:
        """Return which process is on which machine, for people."""
        return ", ".join(f"{process.name} ({pid}) on {process.place}" for pid, process in self.pids.items())

    def note(self, process: Process | None, what: str, run: str, *more: Any) -> None:
        who = "-" if process is None else process.name
        self.history.append((round(self.scheduler.now, 4), who, what, run, *more))

    def strikes(self, fault: str, probability: float) -> bool:
        """Draw whether a fault strikes now."""
        if self.calm or self.draw.random() >= probability * (self.deadly if "dies" in fault else 1):
            return False
        self.faults[fault] += 1
        self.note(self.scheduler.current, fault, "-")
        return True

    def latency(self) -> float:
        """Draw how long a store takes for half of a call, in seconds."""
        chance = self.draw.random()
        if self.calm or chance < 0.93:
            return self.draw.uniform(0.0002, 0.004)
        if chance < 0.99:
            return self.draw.uniform(0.01, 0.2)
        self.faults["the store stops"] += 1
        return self.draw.uniform(0.5, 2 * LEASE_SECONDS)

    def start(self, name: str, main: Callable[[Process], Any]) -> Process:
        pid = 100 + len(self.pids)
        process = Process(self.scheduler, pid, self.draw.randrange(2), name)
        self.pids[pid] = process
        self.note(process, "starts", "-", pid)

        def begin() -> None:
            process.main = process.create_task(main(process))

        self.scheduler.enter(process, begin)
        return process

    def kill(self, process: Process) -> None:
        if not process.dead:
            process.die()
            self.buried.append(process)
            self.note(process, "dies", "-")

    def new_owner(self, session: object, *, ends: bool = True) -> Owner:
        """Stand in for the function of this name: the process is a simulated one."""
        process = self.scheduler.current
        self.tokens += 1
        owner = Owner(
            f"host{process.place}",
            _sqlite_rows._BOOT,
            process.place,
            process.pid,
            1,
            f"{self.seed}.{self.tokens}",
        )
        if ends:
            LIVE_SESSIONS[owner.token] = session
        return owner

    def is_gone(self, owner: Owner) -> bool:
        """Stand in for the function of this name: only on one machine can others tell."""
        me, process = self.scheduler.current, self.pids[owner.pid]
        if me is process:
            return owner.token not in LIVE_SESSIONS
        return me is not None and me.place == process.place and process.dead

    def pipeline(self, process: Process) -> Pipeline:
        draw = self.draw

        def node(node_id: str, input_model: type[BaseModel], output_model: type[BaseModel], work: Any) -> Any:
            @stroma_node(node_id, input=input_model, output=output_model)
            async def call(state: Any) -> Any:
                here = current_node()
                self.tokens += 1
                token = f"{node_id}{self.tokens}"
                fence: Any = getattr(here.ctx.session, "fence", None)
                place = f"{here.position}:{here.branch}"
                self.note(
                    process, "call", here.run_id, fence.epoch, place, token, _rejected(here.last_failure)
                )
                await asyncio.sleep(draw.choice((0.001, 0.01, draw.uniform(0, 0.5))))
                if not self.calm and draw.random() < 0.1:
                    here.report_usage(output_tokens=CALL_TOKENS)
                    raise Flaky(token)
                if self.kind == "repairs" and not self.calm and draw.random() < 0.4:
                    self.note(process, "bad", here.run_id, fence.epoch, place, token)
                    return {"made": token}, CALL_TOKENS
                return work(state, token), CALL_TOKENS

            return call

        def step(state: State, token: str) -> State:
            return State(made=[*state.made, token])

        @stroma_node("ask", input=State, output=State)
        async def ask(state: State) -> State:
            here = current_node()
            answer = here.wait_for(Answer, reason="go on?")
            fence: Any = getattr(here.ctx.session, "fence", None)
            self.note(
                process, "call", here.run_id, fence.epoch, f"{here.position}:{here.branch}", answer.by, None
            )
            return State(made=[*state.made, answer.by])

        nodes = [node("a", State, State, step), node("b", State, State, step)]
        if self.kind == "asks":
            nodes.insert(1, ask)
        elif self.kind == "group":
            left = node("left", State, Left, lambda state, token: Left(left=token))
            right = node("right", State, Right, lambda state, token: Right(right=token))
            last = node("last", Both, State, lambda both, token: State(made=[both.left, both.right, token]))
            nodes = [nodes[0], parallel(left, right), last]
        elif self.kind == "items":
            steps = [node("c", State, State, step), node("d", State, State, step)]
            last = node("last", Done, State, lambda state, token: State(made=[*state.all_made(), token]))
            nodes = [nodes[0], map_over(_items_of, steps, into="done"), last]
        else:
            nodes.append(node("c", State, State, step))
        return Pipeline("simulated", nodes)

    def runner(self, process: Process) -> StromaRunner:
        async def success(run_id: str, _node: str, state: dict[str, Any], _tokens: int) -> None:
            here = current_node()
            self.note(process, "ack", run_id, f"{here.position}:{here.branch}", state)

        store = SimulatedStore(process, self.database)
        budget = SharedBudget(
            "team",
            max_tokens=self.limit,
            store=store,
            reserve_tokens=CALL_TOKENS,
            lease_seconds=LEASE_SECONDS,
            max_wait_seconds=3,
        )
        policies = {kind: FailurePolicy(max_retries=2, backoff_seconds=0.1) for kind in FailureClass}
        return StromaRunner.quick(
            store=store,
            shared_budgets=budget,
            policy_map=policies,
            hooks=NodeHooks(on_node_success=success),
            lease_seconds=LEASE_SECONDS,
            contract_retries={} if self.kind != "repairs" else dict.fromkeys("abc", REPAIRS),
        )

    async def worker(self, process: Process) -> None:
        """Begin runs, recover those of others, answer and cancel, until the process dies."""
        draw, runner, pipeline = self.draw, self.runner(process), self.pipeline(process)
        store: Any = runner.checkpoint_manager.store
        others = ["recover", "recover", *(["answers"] * 4 if self.scripts["answers"] else [])]
        others += ["cancels"] if self.scripts["cancels"] else []
        while True:
            new = [run_id for run_id in self.runs if run_id not in self.database.ids.values()]
            action = "begin" if new and draw.random() < 0.7 else draw.choice(others)
            run_id = draw.choice(new if action == "begin" else self.runs)
            try:
                if action == "begin":
                    result = await runner.run(pipeline, State(), run_id=run_id, if_exists="error")
                    self.returned(process, run_id, result)
                elif action == "recover":
                    await self.recover(process, runner, pipeline)
                elif action == "answers":
                    await self.answer(process, runner, pipeline, store)
                elif draw.random() < 0.3:
                    cancelled = await runner.cancel(run_id)
                    self.note(process, "cancel returned", run_id, cancelled)
            except StoreError as refused:
                self.note(process, "refused", run_id, action, f"{type(refused).__name__}: {refused}")
            # People and processes often do things at the same time.
            together = 0.5 - self.scheduler.now % 0.5 + draw.uniform(0, 0.005)
            await asyncio.sleep(draw.choice((together, draw.uniform(0.05, 1.2))))

    async def recover(self, process: Process, runner: StromaRunner, pipeline: Pipeline) -> None:
        for run_id, outcome in (await runner.recover(pipeline)).items():
            if isinstance(outcome, Exception):
                if not isinstance(outcome, StoreError):
                    raise outcome
                self.note(process, "refused", run_id, "recover", f"{type(outcome).__name__}: {outcome}")
            else:
                self.returned(process, run_id, outcome)

    def returned(self, process: Process, run_id: str, result: Any) -> None:
        instance = None if result.final_state is None else result.final_state.model_dump()
        why = None if result.failure is None else result.failure.message
        self.note(process, "returned", run_id, str(result.status), instance, why)

    async def answer(self, process: Process, runner: StromaRunner, pipeline: Pipeline, store: Any) -> None:
        suspended = await asyncio.to_thread(store.list_runs, limit=100, status="SUSPENDED")
        for run in suspended:
            if await asyncio.to_thread(self._asks, store, run.run_id):
                await runner.signal(run.run_id, {"by": process.name}, schema=Answer)
                self.note(process, "answer taken", run.run_id, process.name)
            with contextlib.suppress(RunBusy):
                self.returned(process, run.run_id, await runner.resume(pipeline, run.run_id))

    @staticmethod
    def _asks(store: Any, run_id: str) -> bool:
        return any(waiting.payload is None for waiting in store.waiting(run_id))

    def storm(self) -> None:
        """Have processes work, die and start again."""
        draw, scheduler = self.draw, self.scheduler
        alive: dict[int, Process] = {}
        starts = Counter[int]()
        lingers = draw.random() < 0.3  # Whoever was stopped meanwhile may come late.
        ended = [False]

        def start(number: int) -> None:
            if not self.calm:
                name = f"p{number}" + "bcdefghijklmnopqrstuvwxyz"[starts[number] - 1 : starts[number]]
                starts[number] += 1
                alive[number] = self.start(name, self.worker)

        def look() -> None:
            for number in range(PROCESSES):
                process = alive.get(number)
                if process is not None and process.dead:
                    del alive[number]
                    scheduler.after(draw.uniform(0, 2), None, lambda number=number: start(number))  # type: ignore[misc]
                elif process is not None and self.scripts["pauses"] and draw.random() < 0.03:
                    process.paused_until = scheduler.now + draw.uniform(0.5, 2.5 * LEASE_SECONDS)
                    self.faults["a process is stopped for a while"] += 1
                    self.note(process, "stopped until", "-", round(process.paused_until, 2))
                elif process is not None and self.strikes("a process dies", 0.006):
                    self.kill(process)
            ended[0] = not lingers and self.all_ended()
            scheduler.after(LOOK_SECONDS, None, look)

        if "comes-back-older" in self.put_in:
            scheduler.after(draw.uniform(0.3, 4), None, self.copy)
        for number in range(PROCESSES):
            scheduler.after(draw.uniform(0, 0.3), None, lambda number=number: start(number))  # type: ignore[misc]
        look()
        scheduler.run(lambda: ended[0], STORM_SECONDS)

    def copy(self) -> None:
        """Take a copy of the store, and bring it back later."""
        copy = sqlite3.connect(":memory:")
        self.database.db.backup(copy)
        self.note(None, "copied", "-")

        def bring_back() -> None:
            self.note(None, "restored", "-")
            copy.backup(self.database.db)

        self.scheduler.after(self.draw.choice((0.05, self.draw.uniform(0, 2))), None, bring_back)

    def all_ended(self) -> bool:
        """Return whether every run was begun and has ended."""
        marks = ", ".join("?" * len(_ENDED))
        result = self.database.db.execute(f"SELECT count(*) FROM runs WHERE status IN ({marks})", _ENDED)
        return bool(result.fetchone() == (len(self.runs),))

    def settle(self) -> None:
        """Bring everything to its end: without faults, and once all leases of dead processes have expired."""
        self.calm = True
        for process in list(self.scheduler.processes):
            self.kill(process)
        self.scheduler.run(lambda: False, 2 * LEASE_SECONDS + 1)
        ended = asyncio.Event()

        async def last(process: Process) -> None:
            runner, pipeline = self.runner(process), self.pipeline(process)
            store: Any = runner.checkpoint_manager.store
            for _ in range(4):
                await self.recover(process, runner, pipeline)
                if self.scripts["answers"]:
                    await self.answer(process, runner, pipeline, store)
            ended.set()

        process = self.start("last", last)
        if not self.scheduler.run(ended.is_set, 300):
            self.problems.append("the last process did not come to its end")
        self.scheduler.run(lambda: False, 2 * LEASE_SECONDS)
        self.scheduler.current = process  # Who asks whether owners are gone.

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have Stroma go by the clock, the chance and the processes of this world."""
        state, lost = random.getstate(), sys.unraisablehook
        random.seed(self.seed)
        bits = random.Random(~self.seed)
        with self.clock as clock:
            shim = sys.modules["stroma.checkpoint.memory.rows"].time
            patches: list[tuple[Any, str, Any]] = [
                (_sqlite_rows, "_clock_ms", clock.milliseconds),
                (_renewals, "time", shim),
                (_gate, "RENEWER", SimulatedRenewals(self)),
                (_durable, "new_owner", self.new_owner),
                (_rows, "is_gone", self.is_gone),
                (_sqlite_connection, "SqliteRows", self.database.rows),
                (os, "urandom", bits.randbytes),
            ]
            if "settled-apart" in self.put_in:
                apart = [(Permit, "changes", _no_changes), (SharedBudget, "_settle_left", _nothing_left)]
                patches += [patch for patch in apart if hasattr(patch[0], patch[1])]
            before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
            try:
                for owner, name, value in patches:
                    setattr(owner, name, value)
                yield
            finally:
                sys.unraisablehook = lambda _: None  # Of coroutines that will not close.
                for process in [*self.buried, *self.scheduler.processes]:
                    process.dead = True
                for process in [*self.buried, *self.scheduler.processes]:
                    process.bury()
                for owner, name, value in before:
                    setattr(owner, name, value)
                sys.unraisablehook = lost
                random.setstate(state)


def _rejected(failure: Any) -> str | None:
    """Return the token of the bad output that a call is told to correct; None for any other call."""
    error = None if failure is None else failure.exception
    return error.raw["made"] if isinstance(error, ContractViolation) else None


def _items_of(state: State) -> list[State]:
    return [State(made=[*state.made, item]) for item in ("x", "y")]


def _no_changes(_permit: Any, *_: Any, **__: Any) -> list[Any]:
    return []


async def _nothing_left(_budget: Any, *_: Any) -> None:
    return None


def simulate(seed: int, *faults: str) -> World:
    """Run one seed and judge it; what is wrong is in ``problems``. ``faults``: those to put in, of FAULTS."""
    from tests.simulation.model import check

    collecting = gc.isenabled()
    gc.disable()  # When it runs would be another source of chance.
    world = World(seed, faults)
    try:
        with world.in_place():
            world.storm()
            world.settle()
            world.problems += check(world)
    finally:
        if collecting:
            gc.enable()
    return world
