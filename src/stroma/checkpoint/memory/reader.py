"""Reading the runs of a store in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stroma.checkpoint.decisions import MESSAGE_SENT, UNFINISHED
from stroma.checkpoint.entries import Committed, Waiting, count_items, map_not_found
from stroma.checkpoint.errors import CheckpointNotFound
from stroma.checkpoint.events import EventPage, EventPlace
from stroma.checkpoint.queue import QUEUED, QueueFigures, ServedCode
from stroma.contracts.contract import check_id

if TYPE_CHECKING:
    from stroma.checkpoint.memory.records import MemoryRecords
    from stroma.checkpoint.records import (
        AttemptPage,
        AttemptRecord,
        RunPage,
        RunQuery,
        RunRecord,
        StoreFacts,
        Tally,
    )
    from stroma.failures.tracebacks import FailureSite
    from stroma.trace.rejected import RejectedOutput

from stroma.checkpoint.memory.runs import MemoryRun, as_state, encode_state, position_of

__all__ = ["MemoryReader"]


class MemoryReader:
    """Reading runs, as every journal store offers it. Nothing here awaits."""

    _runs: dict[str, MemoryRun]

    @property
    def _records(self) -> MemoryRecords:
        from stroma.checkpoint.memory.records import MemoryRecords

        return MemoryRecords(self._runs)

    def exists(self) -> bool:
        """Return True: there is always something to read from."""
        return True

    def waiting(self, run_id: str) -> list[Waiting]:
        """Return the approvals that nodes of the last execution wait for, or waited for; [] for an unknown run."""
        run = self._runs.get(check_id(run_id, "run id"))
        return [] if run is None else list(run.waiting.values())

    def _require_run(self, run_id: str) -> MemoryRun:
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or not run.execution:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this process; check the id")
        return run

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """Return the last execution of each run, the newest first."""
        return self._records.list_runs(limit, pipeline, status)

    def run_page(
        self, query: RunQuery | None = None, *, limit: int = 50, after: str | None = None
    ) -> RunPage:
        """Return the last executions of the runs that match a query, the newest first, with the cause of failures.

        ``after``: the ``next`` of the previous page. Raises ValueError for any other text.
        """
        return self._records.run_page(query, limit, after)

    def queue_figures(self, served: Mapping[str, ServedCode], now_ms: int) -> dict[str, QueueFigures]:
        """Return the figures of the queues of these pipelines at a time."""
        figures: dict[str, QueueFigures] = {}
        for name, code in served.items():
            runs = [
                run
                for run in self._runs.values()
                if run.pipeline == name and run.execution and run.version in ("", *code.versions)
            ]
            since = [run.blocked.since_ms for run in runs if run.blocked is not None]
            runs = [run for run in runs if run.status in UNFINISHED and run.blocked is None]
            due = [ms for run in runs if MESSAGE_SENT < (ms := run.wake_ms or 0) <= now_ms]
            queued = sum(run.status == QUEUED for run in runs)
            figures[name] = QueueFigures(queued, min(due, default=None), len(since), min(since, default=None))
        return figures

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Return the statuses of these runs by id, without unknown ones."""
        runs = ((run_id, self._runs.get(run_id)) for run_id in run_ids)
        return {run_id: run.status for run_id, run in runs if run is not None and run.execution}

    def read_events(self, run_id: str, after: EventPlace, limit: int) -> EventPage | None:
        """Return the next stored events of a run after a place; None for an unknown run."""
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or not run.execution:
            return None
        batches = [batch for batch in list(run.events) if batch.last > after]
        record = None if run.status == "RUNNING" else self._records.get_run(run_id)
        return EventPage(run, run.execution, run.epoch, record, batches[:limit])

    def get_run(self, run_id: str) -> RunRecord | None:
        """Return the last execution of a run, or None. Raises ValueError for an illegal id."""
        return self._records.get_run(check_id(run_id, "run id"))

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """Return the ids with a prefix, the newest first; the newest id for "last". A complete id is returned alone."""
        runs = self.list_runs(limit=len(self._runs))
        if prefix_or_last == "last":
            return [run.run_id for run in runs[:1]]
        prefix = check_id(prefix_or_last, "run id")
        ids = [run.run_id for run in runs if run.run_id.startswith(prefix)]
        return [prefix] if prefix in ids else ids[:limit]

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Return each attempt of the last execution, by position and time; [] for an unknown run or execution."""
        return self._records.attempts(check_id(run_id, "run id"), execution)

    def attempt_page(
        self, run_id: str, *, execution: int | None = None, limit: int = 1000, after: str | None = None
    ) -> AttemptPage:
        """Return a page of the attempts, without outputs. Raises ValueError if ``after`` is not from a page."""
        return self._records.attempt_page(check_id(run_id, "run id"), execution, limit, after)

    def attempts_at(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> list[AttemptRecord]:
        """Return each attempt of the last execution at one place, without outputs; [] if unknown."""
        return self._records.attempts_at(check_id(run_id, "run id"), position, branch, execution)

    def failure_site_of(self, run_id: str, position: int, branch: str = "") -> FailureSite | None:
        """Return where the last failed attempt at a place failed; None if unknown."""
        return self._records.failure_site_of(check_id(run_id, "run id"), position, branch)

    def rejected_of(self, run_id: str, position: int, branch: str, started_ns: int) -> RejectedOutput | None:
        """Return the output that broke its contract in an attempt of the last execution; None if none is stored."""
        return self._records.rejected_of(check_id(run_id, "run id"), position, branch, started_ns)

    def output_of(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> bytes | None:
        """Return the output committed at a place in stored form (see Schema.decode); None if there is none."""
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or execution not in (None, run.execution):
            return None
        entry = run.states.get((position, branch) if branch else position)
        return None if entry is None else encode_state(as_state(entry))

    def tally(
        self, since_ms: int, bucket_ms: int, *, runs: int = 2000, attempts: int = 200_000
    ) -> list[Tally]:
        """Return sums over the attempts of runs started since, by time bucket, pipeline, node, model and failure class.

        Reads at most so many runs and attempts, the newest runs first.
        """
        return self._records.tally(since_ms, bucket_ms, runs, attempts)

    def facts(self) -> StoreFacts:
        """Return version and settings of the store."""
        return self._records.facts()

    def input_of(self, run_id: str) -> bytes:
        """Return the initial state of a run in stored form. Raises CheckpointNotFound, NotSerialisable."""
        run = self._require_run(run_id)
        assert run.schema is not None
        assert run.input is not None
        return run.schema.encode(run.schema.restore(run.input))

    def map_items(self, run_id: str, node_id: str, first: int, count: int) -> list[tuple[int, Committed]]:
        """Return committed items of a map in the last execution of a run, from index ``first``; [] after the last one.

        Raises CheckpointNotFound if there is no such completed map.
        """
        run = self._require_run(run_id)
        for key, state in run.newest_states():
            call = run.calls.get(key)
            if state.node_id == node_id and call is not None and call.input_key is not None:
                position, branch = position_of(key)
                prefix = f"{branch}." if branch else ""
                items: list[tuple[int, Committed]] = []
                for index in range(first, min(count_items(call.input_key), first + count)):
                    entry = run.states.get((position, f"{prefix}{index}"))
                    if entry is not None:
                        item = as_state(entry)
                        committed = Committed(item.node_id, item.snapshot, item.contract, None, item.schema)
                        items.append((index, committed))
                return items
        raise map_not_found(run_id, node_id)
