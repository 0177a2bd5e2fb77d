"""Reading what a store in memory knows of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma.checkpoint.errors import CheckpointNotFound
from stroma.checkpoint.protocols import Committed, Waiting, items_in, no_map
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
    from stroma.failures.tracebacks import Trouble

from stroma.checkpoint.memory.runs import MemoryRun, position_of, stored

__all__ = ["MemoryReading"]


class MemoryReading:
    """What every journal store tells of its runs. Nothing here awaits."""

    _runs: dict[str, MemoryRun]

    @property
    def _records(self) -> MemoryRecords:
        from stroma.checkpoint.memory.records import MemoryRecords

        return MemoryRecords(self._runs)

    def exists(self) -> bool:
        """Whether there is anything to read from."""
        return True

    def waiting(self, run_id: str) -> list[Waiting]:
        """What nodes of the last execution of a run wait for, or waited for. [] if unknown."""
        run = self._runs.get(check_id(run_id, "run id"))
        return [] if run is None else list(run.waiting.values())

    def _known(self, run_id: str) -> MemoryRun:
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or not run.execution:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this process; check the id")
        return run

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first."""
        return self._records.list_runs(limit, pipeline, status)

    def run_page(
        self, query: RunQuery | None = None, *, limit: int = 50, after: str | None = None
    ) -> RunPage:
        """The last executions of the runs that are asked for, the one begun last first, with the cause of failures.

        ``after``: the ``next`` of the page before. Raises ValueError for one that is none.
        """
        return self._records.run_page(query, limit, after)

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id."""
        return self._records.get_run(check_id(run_id, "run id"))

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """The ids that begin with a text, newest first, or the newest id for "last". A whole id stands alone."""
        runs = self.list_runs(limit=len(self._runs))
        if prefix_or_last == "last":
            return [run.run_id for run in runs[:1]]
        prefix = check_id(prefix_or_last, "run id")
        found = [run.run_id for run in runs if run.run_id.startswith(prefix)]
        return [prefix] if prefix in found else found[:limit]

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Every attempt of the last execution, by position and time; earlier ones are not kept. [] if unknown."""
        return self._records.attempts(check_id(run_id, "run id"), execution)

    def attempt_page(
        self, run_id: str, *, execution: int | None = None, limit: int = 1000, after: str | None = None
    ) -> AttemptPage:
        """The same, page by page, without outputs. Raises ValueError for an ``after`` that is none."""
        return self._records.attempt_page(check_id(run_id, "run id"), execution, limit, after)

    def attempts_at(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> list[AttemptRecord]:
        """Every attempt of the last execution at one place, without outputs. [] if unknown."""
        return self._records.attempts_at(check_id(run_id, "run id"), position, branch, execution)

    def trouble_of(self, run_id: str, position: int, branch: str = "") -> Trouble | None:
        """Where the last failed attempt at a place failed; None if nothing is known."""
        return self._records.trouble_of(check_id(run_id, "run id"), position, branch)

    def output_of(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> bytes | None:
        """What is committed at a place, in its stored form (see Schema.decode); None if nothing is, or it has none."""
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or execution not in (None, run.execution):
            return None
        entry = run.kept.get((position, branch) if branch else position)
        return None if entry is None else stored(run.entry(entry))

    def tally(
        self, since_ms: int, bucket_ms: int, *, runs: int = 2000, attempts: int = 200_000
    ) -> list[Tally]:
        """The attempts of the runs begun since, summed up by span of time, pipeline, node, model and class.

        Of so many runs and attempts at the most, the newest runs first.
        """
        return self._records.tally(since_ms, bucket_ms, runs, attempts)

    def facts(self) -> StoreFacts:
        """What the store says of itself."""
        return self._records.facts()

    def input_of(self, run_id: str) -> bytes:
        """The initial state of a run in its stored form. Raises CheckpointNotFound, NotSerialisable."""
        run = self._known(run_id)
        assert run.schema is not None
        assert run.input is not None
        return run.schema.encode(run.schema.restore(run.input))

    def map_items(self, run_id: str, node_id: str, first: int, count: int) -> list[tuple[int, Committed]]:
        """What a map committed of its items, from one on, of the last execution of a run; [] behind the last one.

        Raises CheckpointNotFound if there is no such map that is done.
        """
        run = self._known(run_id)
        for key, kept in run.entries():
            call = run.calls.get(key)
            if kept[0] == node_id and call is not None and call.given is not None:
                position, branch = position_of(key)
                prefix = f"{branch}." if branch else ""
                found: list[tuple[int, Committed]] = []
                for index in range(first, min(items_in(call.given), first + count)):
                    entry = run.kept.get((position, f"{prefix}{index}"))
                    if entry is not None:
                        node, schema, snapshot, contract, _ = run.entry(entry)
                        found.append((index, Committed(node, snapshot, contract, None, schema)))
                return found
        raise no_map(run_id, node_id)
