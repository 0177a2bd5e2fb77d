"""Comparison of a journal store with its model, after each call of a stateful test."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from tests.store_suite.journal import State, restored, settled
from tests.store_suite.machine_model import (
    SCHEMA,
    ModelAttempt,
    ModelExecution,
    ModelRun,
    OpenArguments,
    record_of,
)

from stroma.checkpoint import AttemptRecord, CheckpointNotFound, RunBusy, StoreError

T = TypeVar("T")

#: No id begins with another one by chance: find_run() looks by their beginnings.
RUNS: Final = ("run", "run:1", "é")
NODES: Final = ("a", "b")
ENDS: Final = ("COMPLETED", "RESUMED", "PARTIAL", "FAILED", "CANCELLED", "INTERRUPTED")


class StoreComparison:
    """Store and model side by side, on one event loop.

    Attributes:
        keeps_history: whether attempts() returns earlier executions, in the order of the processes that wrote
            them.
    """

    keeps_history = True

    loop: asyncio.AbstractEventLoop
    store: Any
    runs: dict[str, ModelRun]

    def compare_all(self) -> None:
        """Compare everything that can be read with the model."""
        for run_id in RUNS:
            self._compare(run_id)
            self._compare_states(run_id)
        run_ids = sorted(
            (run_id for run_id, run in self.runs.items() if run.executions),
            key=lambda run_id: -self.runs[run_id].last.start_order,
        )
        assert [run.run_id for run in self.store.list_runs()] == run_ids, "list_runs() has another order"
        assert [run.run_id for run in self.store.list_runs(limit=1)] == run_ids[:1]
        for name in ("p", "q"):
            actual = [run.run_id for run in self.store.list_runs(pipeline=name)]
            assert actual == [r for r in run_ids if self.runs[r].last.pipeline == name]
        for status in ("RUNNING", *ENDS):
            actual = [run.run_id for run in self.store.list_runs(status=status)]
            assert actual == [r for r in run_ids if self.runs[r].last.status == status]
        assert self.store.find_run("last") == run_ids[:1]
        for prefix in ("r", "run", "run:", "é", "x"):
            actual = [prefix] if prefix in run_ids else [r for r in run_ids if r.startswith(prefix)]
            assert self.store.find_run(prefix) == actual, f"find_run({prefix!r})"
        assert self.store.find_run("r", limit=1) == [r for r in run_ids if r.startswith("r")][:1]

    def _compare(self, run_id: str) -> None:
        """Compare one run and its history with the model."""
        run, record = self.runs.get(run_id, ModelRun()), self.store.get_run(run_id)
        if not run.executions:
            assert record is None, f"get_run() returned a run that does not exist: {record}"
            self._assert_same("attempts()", self.store.attempts(run_id), [])
            return
        assert record is not None, f"run {run_id!r} is missing"
        last = run.last
        tokens, cost, _ = last.usage()
        actual = (
            record.run_id,
            record.pipeline,
            record.status,
            record.execution,
            record.error,
            record.tokens,
        )
        expected = (run_id, last.pipeline, last.status, len(run.executions), last.error, tokens)
        self._assert_same("get_run()", actual, expected)
        assert abs(record.cost_usd - cost) < 1e-9, f"cost_usd is {record.cost_usd}, not {cost}"
        assert record.nodes == sum(not branch for _, branch in last.commits()), f"nodes is {record.nodes}"
        assert (record.holder is not None) is run.has_owner, f"the holder is {record.holder!r}"
        self._assert_same("attempts()", self.store.attempts(run_id), self._history(last))
        if self.keeps_history:
            for number, execution in enumerate(run.executions, 1):
                earlier = self.store.attempts(run_id, execution=number)
                self._assert_same(f"attempts() of execution {number}", earlier, self._history(execution))

    def _compare_states(self, run_id: str) -> None:
        run = self.runs.get(run_id, ModelRun())
        if run.executions:
            self._assert_same("input_of()", SCHEMA.decode(self.store.input_of(run_id)), run.last.input)
        else:
            try:
                self.store.input_of(run_id)
            except CheckpointNotFound:
                pass
            else:
                raise AssertionError(f"input_of() returned an input of run {run_id!r}, which has none")
        for node in NODES:
            outputs = [run.saved[node]] if node in run.saved else []
            if run.executions:
                commits = run.last.commits().values()
                outputs += [(c.order, c.output) for c in commits if c.row.node_id == node and c.output]
            newest = max(outputs, key=lambda output: output[0], default=(0, None))[1]

            async def load(node: str = node) -> tuple[Any, Any]:
                loaded = await settled(self.store.load(run_id, node))
                return loaded, await settled(self.store.load_typed(run_id, node, State))

            self._assert_same(f"load({run_id!r}, {node!r})", self._wait_for(load()), (newest, newest))

    def _history(self, execution: ModelExecution) -> list[AttemptRecord]:
        def sort_key(entry: ModelAttempt) -> tuple[Any, ...]:
            return (
                entry.process,
                entry.row.position,
                entry.row.started_ns,
                entry.row.branch,
                entry.row.attempt,
            )

        return [record_of(entry) for entry in sorted(execution.attempts, key=sort_key)]

    def _assert_refused(
        self, opening: OpenArguments, expected: type[StoreError], work: Coroutine[Any, Any, Any]
    ) -> None:
        """Check that open_run() raises an error and changes nothing."""
        error = self._assert_raises(expected, work)
        if isinstance(error, RunBusy):
            run = self.runs[opening.run_id]
            assert error.same_input is run.has_input(opening.input), "RunBusy.same_input is wrong"
            assert error.holder, "RunBusy.holder is empty"
            assert error.left_seconds > 0, "the lease of a held run has expired"
        self._compare(opening.run_id)

    def _assert_prior(self, session: Any, execution: ModelExecution) -> None:
        """Check the usage that a resumed session starts with."""
        tokens, cost, latency = execution.usage()
        prior = session.prior
        assert prior.tokens == tokens, f"prior.tokens is {prior.tokens}, not {tokens}"
        assert abs(prior.cost_usd - cost) < 1e-9, f"prior.cost_usd is {prior.cost_usd}, not {cost}"
        assert abs(prior.latency_ms - latency) < 1e-6, f"prior.latency_ms is {prior.latency_ms}"

    def _assert_restored(self, session: Any, remaining: dict[tuple[int, str], ModelAttempt]) -> None:
        """Check the commits that a session starts with."""
        outputs = {at: entry.output for at, entry in remaining.items()}
        self._assert_same("restored", restored(session), outputs)
        nodes = {at: commit.node_id for at, commit in session.restored.items()}
        expected = {at: entry.row.node_id for at, entry in remaining.items()}
        self._assert_same("the nodes of restored", nodes, expected)

    @staticmethod
    def _assert_same(subject: str, actual: Any, expected: Any) -> None:
        assert actual == expected, f"{subject}: {actual!r}, expected {expected!r}"

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def _assert_raises(self, kind: Any, work: Coroutine[Any, Any, Any]) -> StoreError:
        try:
            self._wait_for(work)
        except kind as error:
            raised: StoreError = error
            return raised
        raise AssertionError(f"{kind} was not raised")
