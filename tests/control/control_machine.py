"""State machine: runs that are paused, resumed, cancelled and given other budgets while many of them run."""

import asyncio
import random
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import BaseModel
from tests.shared_stores import opened, place

from stroma import (
    ExecutionBudget,
    FailureClass,
    NodeHooks,
    Pipeline,
    RunBusy,
    StromaRunner,
    current_node,
    map_over,
    parallel,
    stroma_flow,
)
from stroma.failures import FailurePolicy

#: Of one run: first, three children, two nodes for each of four items, last.
CALLS = 13
TOKENS = 10


class Num(BaseModel):
    n: int = 0
    out: list[Any] = []


class ControlMachine(RuleBasedStateMachine):
    """``runs`` runs of a list, and as many of a flow, in one store."""

    runs: ClassVar[int]
    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self._place = place(self.kind) if self.kind != "memory" else None
        where = "" if self._place is None else self._place.__enter__()
        self.store = opened(self.kind, where)
        policy = FailurePolicy(max_retries=3, backoff_seconds=0.02)
        self.runner = StromaRunner.quick(
            store=self.store,
            budget=ExecutionBudget(max_tokens_total=4 * TOKENS),
            on_budget="wait",
            policy_map=dict.fromkeys(FailureClass, policy),
            lease_seconds=60.0,
            hooks=NodeHooks(on_run_start=self._on_start),
        )
        self.random = random.Random(0)
        self.problems: list[str] = []
        self.live: dict[str, asyncio.Task[Any]] = {}
        #: Runs of which no attempt may begin.
        self.held: set[str] = set()
        #: Calls that returned, which are committed: none of them may be made again.
        self.bought: dict[str, set[str]] = {}
        self.failed: set[str] = set()
        self.opened: set[str] = set()
        self.pipelines = self._define()

    def _define(self) -> dict[str, Any]:
        node = {name: self._node(name) for name in ("first", "a", "b", "c", "item", "then", "last")}
        listed = Pipeline(
            "list",
            [
                node["first"],
                parallel(node["a"], node["b"], node["c"], max_concurrency=2),
                map_over(
                    lambda state: [{"n": n} for n in range(4)],
                    [node["item"], node["then"]],
                    into="out",
                    max_concurrency=2,
                ),
                node["last"],
            ],
        )

        @stroma_flow("flow", input=Num, output=Num)
        async def flow(flow: Any, state: Num) -> Num:
            state = await flow.step(node["first"], state)
            await asyncio.gather(*(flow.step(node[name], state) for name in "abc"))
            for name in ("item", "then"):
                await flow.map(node[name], [Num(n=n) for n in range(4)], max_concurrency=2)
            return await flow.step(node["last"], state)

        return {"list": listed, "flow": flow}

    def _node(self, name: str) -> Any:
        @self.runner.node(name, input=Num, output=Num)
        async def func(state: Num) -> Any:
            current = current_node()
            run_id, key = current.run_id, current.idempotency_key
            if run_id in self.held:
                self.problems.append(f"{name} of {run_id} began after an acknowledged pause or cancel")
            if key in self.bought[run_id]:
                self.problems.append(f"{name} of {run_id} was bought again: {key}")
            await asyncio.sleep(self.random.choice((0, 0.001, 0.01)))
            current.report_usage(input_tokens=TOKENS)
            if key not in self.failed and self.random.random() < 0.2:
                self.failed.add(key)
                raise ConnectionError("no")
            self.bought[run_id].add(key)
            return {"n": state.n, "out": []}

        return func

    async def _on_start(self, run_id: str, *_: Any) -> None:
        self.opened.add(run_id)

    async def _until_opened(self) -> None:
        """Wait until all live runs are open: a request before is of the time before they were resumed."""
        while any(run_id not in self.opened and not task.done() for run_id, task in self.live.items()):
            await asyncio.sleep(0.001)

    def _do(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def _nodes(self, run_id: str) -> Any:
        return self.pipelines[run_id.partition(" ")[0]]

    def _settled(self) -> None:
        for run_id, task in list(self.live.items()):
            if task.done():
                del self.live[run_id]
                error = task.exception()
                if error is not None and not isinstance(error, RunBusy):
                    raise error

    def _chosen(self, share: float) -> list[str]:
        return [run_id for run_id in self.bought if self.random.random() < share]

    async def _all(self, run_ids: list[str], method: Any) -> None:
        async def one(run_id: str) -> None:
            if await method(run_id):
                self.held.add(run_id)

        await asyncio.gather(*map(one, run_ids))

    @initialize(seed=st.integers(0, 1 << 16))
    def start(self, seed: int) -> None:
        self.random.seed(seed)
        for number in range(self.runs):
            for kind in self.pipelines:
                run_id = f"{kind} {number}"
                self.bought[run_id] = set()
                work = self.runner.run(self._nodes(run_id), Num(), run_id=run_id)
                self.live[run_id] = self.loop.create_task(work)
        self._do(self._until_opened())

    @rule(share=st.sampled_from((0.1, 0.5, 1.0)))
    def pause(self, share: float) -> None:
        self._do(self._all(self._chosen(share), self.runner.pause))

    @rule(share=st.sampled_from((0.1, 0.5)))
    def cancel(self, share: float) -> None:
        self._do(self._all(self._chosen(share), self.runner.cancel))

    @rule(share=st.sampled_from((0.1, 0.5, 1.0)), tokens=st.integers(1, 12))
    def set_budget(self, share: float, tokens: int) -> None:
        async def all_of(run_ids: list[str]) -> None:
            limit = tokens * TOKENS
            await asyncio.gather(*(self.runner.set_budget(run_id, tokens=limit) for run_id in run_ids))

        self._do(all_of(self._chosen(share)))

    @rule(share=st.sampled_from((0.3, 1.0)))
    def resume(self, share: float) -> None:
        self._settled()
        for run_id in self._chosen(share):
            if run_id not in self.live:
                self._resume(run_id)
        self._do(self._until_opened())

    def _resume(self, run_id: str) -> None:
        self.held.discard(run_id)
        self.opened.discard(run_id)
        self.live[run_id] = self.loop.create_task(self.runner.resume(self._nodes(run_id), run_id))

    @rule(seconds=st.sampled_from((0.0, 0.005, 0.05)))
    def wait(self, seconds: float) -> None:
        self._do(asyncio.sleep(seconds))

    @invariant()
    def holds(self) -> None:
        assert self.problems == []

    def teardown(self) -> None:
        try:
            self._end()
        finally:
            for task in self.live.values():
                task.cancel()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            close = getattr(self.store, "close", None)
            if close is not None:
                close()
            if self._place is not None:
                self._place.__exit__(None, None, None)
            self.loop.close()

    def _end(self) -> None:
        """Let all runs complete: each has all of its outputs, and each was bought once."""
        waiting = set(self.bought)
        for _ in range(20):
            if self.live:
                self._do(asyncio.wait(self.live.values()))
            self._settled()
            waiting = {
                one for one in waiting if self.store.get_run(one).status not in ("COMPLETED", "RESUMED")
            }
            if not waiting:
                break
            for run_id in waiting:
                self._do(self.runner.set_budget(run_id, tokens=100 * TOKENS))
                self._resume(run_id)
        assert not waiting
        assert self.problems == []
        assert {len(keys) for keys in self.bought.values()} <= {CALLS}
