"""Runs that wait for a worker or for other code, and which of them a worker takes up next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

#: The status of a submitted run that has not started yet.
QUEUED: Final = "QUEUED"
#: Statuses of runs that completed.
COMPLETE: Final = ("COMPLETED", "RESUMED")
#: Token of a claim that keeps a run from all workers for a while, and holds no place.
POSTPONED: Final = ""
#: For how long a run is kept from code that could not continue it, in ms: at least, and at most.
_BLOCKED_MS: Final = (1_000, 300_000)
_MAX_CODES: Final = 20  # in one mark
#: A claim that ends later than this is from before a restart of the machine or a step of its clock, and does
#: not count.
MAX_CLAIM_SECONDS: Final = 60


class QueueEntry(NamedTuple):
    """Place of a submitted run in the queue.

    Attributes:
        due_ms: earliest start, in ms since the epoch.
        priority: runs with a lower number start first.
        key: runs of one key share the workers fairly with those of other keys; None: no key.
        expires_ms: latest start, in ms since the epoch; a run that starts later is FAILED. None: no limit.
    """

    due_ms: int
    priority: int = 0
    key: str | None = None
    expires_ms: int | None = None


class QueueFigures(NamedTuple):
    """The queue of one pipeline at one time: runs of the versions asked for, and without a version.

    Attributes:
        queued: QUEUED runs, due or not.
        oldest_due_ms: earliest due time among the runs that are due: queued ones, and those that stopped
            until a time, such as a sleep; in ms since the epoch. None: no run is due. A run that is due at
            once, for instance since its question was answered, has no time and does not count; nor does a
            blocked one.
        blocked: blocked runs.
        oldest_blocked_ms: since when the first of them is blocked, in ms since the epoch; None: no run is
            blocked.
    """

    queued: int
    oldest_due_ms: int | None
    blocked: int = 0
    oldest_blocked_ms: int | None = None


class QueueReading(NamedTuple):
    """Figures of a queue that a worker has just read.

    Attributes:
        queued, blocked: see QueueFigures.
        due_seconds, blocked_seconds: for how long the oldest due run is due, and the oldest blocked run is
            blocked; 0 without such a run.
    """

    queued: int
    due_seconds: float
    blocked: int
    blocked_seconds: float


class RunLimits(NamedTuple):
    """Limits of one pipeline: how many of its runs may have an owner at once; None: no limit."""

    max_runs: int | None = None
    max_runs_per_key: int | None = None


class ServedCode(NamedTuple):
    """Code of a pipeline, as far as it decides which runs a worker takes up.

    Attributes:
        versions: runs of these versions, and those without a version.
        name: identifies the code: a run that is blocked for it is taken up again after a while only. No space
            is in it.
    """

    versions: tuple[str, ...] = ()
    name: str = ""


class ClaimRequest(NamedTuple):
    """A worker that can take up runs.

    Attributes:
        token: names the claim; only an opening with it may use the claim.
        seconds: how long a claimed run is kept for this worker, if it does not open it; at most
            MAX_CLAIM_SECONDS.
        limit: maximum number of runs.
        now_ms: the time of the worker, in ms since the epoch.
        pipelines: the pipelines that it serves, by name.
        with_lost: also look for runs whose owner is gone. SQL stores read the owner of each running run for
            that.
        code: the code of the pipelines, by name; any other pipeline has no version.
    """

    token: str
    seconds: float
    limit: int
    now_ms: int
    pipelines: Mapping[str, RunLimits]
    with_lost: bool = True
    code: Mapping[str, ServedCode] = {}

    def code_of(self, pipeline: str) -> ServedCode:
        """Return the code of a pipeline."""
        return self.code.get(pipeline, NO_CODE)


NO_CODE: Final = ServedCode()


class Candidate(NamedTuple):
    """A run that is due, and has neither an owner nor a claim.

    Attributes:
        run: its key in the store.
    """

    run: Any
    run_id: str
    pipeline: str
    priority: int = 0
    due_ms: int = 0
    key: str | None = None


def choose(
    candidates: Sequence[Candidate], live: Mapping[str, Mapping[str | None, int]], request: ClaimRequest
) -> list[Candidate]:
    """Return the runs to claim, the first one first: by priority, then fair over keys, then by due time.

    The rank of a run within its priority is the number of live runs of its key and of earlier runs of its key
    among the candidates, so that a key with live runs does not delay the first run of another key.
    ``candidates``: in the order in which they were submitted, where their times are equal. ``live``: runs
    with an owner or a claim, by pipeline and key.
    """
    ahead = {
        (name, key): count for name, keys in live.items() for key, count in keys.items() if key is not None
    }
    running = {name: sum(keys.values()) for name, keys in live.items()}
    ranked: list[tuple[int, int, int, Candidate]] = []
    for one in sorted(candidates, key=lambda one: (one.priority, one.due_ms)):
        rank = 0
        if one.key is not None:
            rank = ahead.get((one.pipeline, one.key), 0)
            ahead[one.pipeline, one.key] = rank + 1
        ranked.append((one.priority, rank, one.due_ms, one))
    ranked.sort(key=lambda row: row[:3])
    chosen: list[Candidate] = []
    for _, rank, _, one in ranked:
        max_runs, max_per_key = request.pipelines[one.pipeline]
        if len(chosen) == request.limit:
            break
        if max_runs is not None and running.get(one.pipeline, 0) >= max_runs:
            continue
        if max_per_key is not None and one.key is not None and rank >= max_per_key:
            continue
        running[one.pipeline] = running.get(one.pipeline, 0) + 1
        chosen.append(one)
    return chosen


class BlockedMark(NamedTuple):
    """Mark of a run that some code could not continue.

    Attributes:
        message: what did not fit, the last time.
        since_ms: when that happened first, in ms since the epoch.
        until_ms: until then, the run is kept from the code in ``codes``.
        codes: names of the code that could not continue it, the last one last; see
            :class:`stroma.checkpoint.queue.ServedCode`.
    """

    message: str
    since_ms: int
    until_ms: int
    codes: tuple[str, ...]


def block(earlier: BlockedMark | None, message: str, code: str, now_ms: int) -> BlockedMark:
    """Return the mark of a run that code could not continue now. Each try doubles the time."""
    since_ms = now_ms if earlier is None else min(earlier.since_ms, now_ms)
    least, most = _BLOCKED_MS
    until_ms = now_ms + max(least, min(now_ms - since_ms, most))
    codes = () if earlier is None else earlier.codes
    codes = (*(one for one in codes if one != code), code)[-_MAX_CODES:]
    return BlockedMark(message, since_ms, until_ms, codes)
