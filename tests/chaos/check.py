"""What the diary says against what the store says: the invariants I1 to I7."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.worker import (
    CALL_TOKENS,
    COMMITS,
    FIRST,
    FLAKY,
    ITEM,
    LAST,
    LEFT,
    NODES,
    RIGHT,
    Budget,
    digest,
    read_diary,
)

from stroma import RunStatus, open_store

#: Calls that two processes may have in flight when a limit is reached.
IN_FLIGHT = 8
ENDED = (RunStatus.COMPLETED, RunStatus.RESUMED)


@dataclass
class Figures:
    """What happened in some rounds of one fault."""

    rounds: int = 0
    kills: int = 0
    runs: int = 0
    commits: int = 0
    lost: int = 0
    duplicated: int = 0
    mixed: int = 0
    overspent: int = 0
    fenced: int = 0
    repeated: int = 0
    broken: list[str] = field(default_factory=list)
    #: What else a fault likes to tell, in words.
    more: Counter[str] = field(default_factory=Counter)

    def add(self, other: Figures) -> None:
        counts = ("rounds", "kills", "runs", "commits", "lost", "duplicated", "mixed", "overspent", "fenced")
        for name in (*counts, "repeated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.broken += other.broken
        self.more += other.more

    def line(self, fault: str, strikes: str = "kills") -> str:
        more = "".join(f", {count} {what}" for what, count in self.more.items())
        return (
            f"{fault}: {self.rounds} rounds, {self.kills} {strikes}, {self.runs} runs, {self.commits} "
            f"commits, "
            f"{self.lost} lost, {self.duplicated} duplicated, {self.mixed} mixed, {self.overspent} "
            f"overspent, "
            f"{self.fenced} fenced, {self.repeated} repeated in flight{more}"
        )


def check(
    url: str,
    diary: str,
    runs: list[str],
    killed: list[int],
    stopped: list[int],
    restless: list[int],
    refused: list[int],
    budget: Budget | None = None,
) -> Figures:
    """Compare. ``killed`` (or struck otherwise), ``stopped`` (for longer than their lease, then woken up),
    ``restless`` (struck more than once), ``refused`` (by a store that has no room): process ids. ``budget``:
    one that may have ended runs before their time."""
    figures = Figures(runs=len(runs))
    lines: dict[str, list[list[str]]] = defaultdict(list)
    for kind, run_id, *rest in read_diary(diary):
        lines[run_id].append([kind, *rest])
        if kind == "end" and rest[1] == "Fenced":
            figures.fenced += 1
    store = open_store(url)
    often = [pid for pid, number in Counter([*killed, *stopped]).items() if number > 1]
    try:
        for run_id in runs:
            struck = [set(map(str, pids)) for pids in (killed, stopped, [*restless, *often], refused)]
            _Run(figures, run_id, lines[run_id], *struck, spends=budget is not None).check(store)
        if budget is not None:
            # A kill between the writes of two stores loses the attempts that only the journal has.
            uncounted = 0 if budget.url is None else len(killed) * IN_FLIGHT * CALL_TOKENS
            check_spent(figures, budget, store, runs, uncounted=uncounted)
    finally:
        if hasattr(store, "close"):
            store.close()
    return figures


def check_spent(
    figures: Figures, budget: Budget, store: Any, runs: list[str], *, unrecorded: int = 0, uncounted: int = 0
) -> None:
    """Compare what a shared budget has counted with the journal of its runs, and both with its limit.

    ``unrecorded``: tokens that calls may have taken whose commits were refused. ``uncounted``: tokens of
    commits that the budget may have missed."""
    state = asyncio.run(budget.open(store).state())
    spent = 0 if state is None else state.spent_tokens
    journaled = sum(store.get_run(run_id).tokens for run_id in runs if store.get_run(run_id) is not None)
    excess = max(journaled - spent, journaled - budget.limit - IN_FLIGHT * CALL_TOKENS)
    over = max(0, excess - uncounted)
    if over or spent > journaled + unrecorded:
        figures.overspent += over
        figures.broken.append(
            f"I6: budget {budget.name}: {spent} tokens spent of {budget.limit}, {journaled} in the journal"
        )


class _Run:
    def __init__(
        self,
        figures: Figures,
        run_id: str,
        lines: list[list[str]],
        killed: set[str],
        stopped: set[str],
        restless: set[str],
        refused: set[str],
        *,
        spends: bool = False,
    ) -> None:
        self.spends = spends
        self.figures = figures
        self.run_id = run_id
        self.killed = killed
        #: One that was refused as too late stood still as well: a busy machine can do what SIGSTOP does.
        late = [rest[0] for kind, _, outcome, *rest in lines if kind == "end" and outcome == "Fenced"]
        self.stopped = stopped | set(late)
        #: Those that may have lost the run more than once.
        self.restless = restless | {pid for pid, number in Counter(late).items() if number > 1}
        #: Hooks hear of a failure also where it cannot be written down any more, or nobody may.
        self.unwritten = self.stopped | refused
        self.calls: dict[str, list[tuple[str, str]]] = defaultdict(list)  # place: (token, pid)
        self.failed = {token for kind, _, token, *_ in lines if kind == "fail"}
        self.noted: dict[str, list[str]] = defaultdict(list)  # place: pids
        self.acknowledged = {(place, token): rest[-1] for kind, place, token, *rest in lines if kind == "ack"}
        self.ends = [rest[-1] for kind, _, outcome, *rest in lines if kind == "end" and outcome in ENDED]
        for kind, place, token, *rest in lines:
            if kind == "call":
                self.calls[place].append((token, rest[0]))
            elif kind == "noted":
                self.noted[place].append(rest[0])

    def bad(self, invariant: str, what: str) -> None:
        self.figures.broken.append(f"{invariant}: run {self.run_id}: {what}")

    def check(self, store: Any) -> None:
        run, attempts = store.get_run(self.run_id), store.attempts(self.run_id)
        if run is None:
            self.bad("I5", "it is not in the store")
            return
        whole = not (self.spends and run.status == RunStatus.PARTIAL)
        if whole and (run.status not in ENDED or run.holder is not None or not self.ends):
            self.bad("I5", f"it is {run.status}, held by {run.holder}, {len(self.ends)} ends were seen")
        entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
        where: dict[str, set[tuple[int, str]]] = defaultdict(set)
        for attempt in attempts:
            if attempt.output is not None:
                place = f"{attempt.node_id.replace(' ', '')}@{attempt.branch}"
                entries[place].append(json.loads(attempt.output))
                where[place].add((attempt.position, attempt.branch))
        self._acknowledged_is_kept(entries)
        self._once(entries)
        self._one_history(entries)
        self._repeats(entries)
        self._books(run, attempts)
        self.figures.commits += sum(map(len, entries.values()))
        if sum(map(len, entries.values())) != COMMITS and run.status in ENDED:
            self.bad("I1", f"{sum(map(len, entries.values()))} commits of {COMMITS}: {sorted(entries)}")
        final = {digest(output) for output in entries.get("last@", ())}
        if set(self.ends) - final:
            self.bad("I1", "run() returned another state than the store has")

    def _acknowledged_is_kept(self, acknowledged_by_run: dict[str, list[dict[str, Any]]]) -> None:
        for (place, token), seen in self.acknowledged.items():
            if seen not in {digest(output) for output in acknowledged_by_run.get(place, ())}:
                self.figures.lost += 1
                self.bad(
                    "I1",
                    f"{place} was acknowledged with {token}, the store has {acknowledged_by_run.get(place)}",
                )

    def _once(self, acknowledged_by_run: dict[str, list[dict[str, Any]]]) -> None:
        for place, outputs in acknowledged_by_run.items():
            if len(outputs) > 1:
                self.figures.duplicated += len(outputs) - 1
                self.bad("I2", f"{place} has {len(outputs)} commits")

    def _one_history(self, acknowledged_by_run: dict[str, list[dict[str, Any]]]) -> None:
        outputs: dict[str, Any] = {
            node: [
                output["mine"]
                for place in sorted(acknowledged_by_run)
                if place.split("@")[0] == node
                for output in acknowledged_by_run[place]
            ]
            for node in (FIRST, FLAKY, LEFT, RIGHT, ITEM)
        }
        for last in acknowledged_by_run.get(f"{LAST}@", ()):
            inputs = {node: [last[node]] for node in (FIRST, FLAKY, LEFT, RIGHT)}
            inputs[ITEM] = [item["mine"] for item in last["made"]]
            if inputs != outputs:
                self.figures.mixed += 1
                self.bad("I7", f"{LAST} was given {inputs}, the journal has {outputs}")

    def _repeats(self, acknowledged_by_run: dict[str, list[dict[str, Any]]]) -> None:
        vain: dict[str, set[str]] = defaultdict(set)  # pid: the nodes it called to no avail
        for place, calls in self.calls.items():
            done = [(token, pid) for token, pid in calls if token not in self.failed]
            committed = {output["mine"] for output in acknowledged_by_run.get(place, ())}
            if not committed & {token for token, _ in done} and (
                acknowledged_by_run.get(place) or not self.spends
            ):
                self.bad("I1", f"{place}: no call made what the store has, {committed}")
            over = False
            for token, pid in done:
                if token in committed:
                    over = True
                    continue
                self.figures.repeated += 1
                vain[pid].add(place.partition("@")[0])
                if (place, token) in self.acknowledged:
                    self.bad("I1", f"{place}: {token} was acknowledged, and another call made what is kept")
                if (
                    over and pid not in self.stopped
                ):  # One that wakes up learns at its commit that it is too late.
                    self.figures.duplicated += 1
                    self.bad("I3", f"{place} ran again after its commit")
                if pid not in self.killed | self.stopped:
                    self.bad("I3", f"{place} ran again, but process {pid} was not struck")
        for pid, nodes in vain.items():
            if len(nodes) > 1 and nodes != {"left", "right"} and pid not in self.restless:
                self.bad("I3", f"process {pid} was at work on {sorted(nodes)} at once")

    def _books(self, run: Any, attempts: list[Any]) -> None:
        tokens, cost = sum(a.tokens for a in attempts), sum(a.cost_usd for a in attempts)
        if run.tokens != tokens or abs(run.cost_usd - cost) > 1e-9:
            self.bad("I4", f"{run.tokens} tokens and {run.cost_usd} USD, its attempts {tokens} and {cost}")
        for attempt in attempts:
            expected = 0 if attempt.node_id not in NODES else 15 if attempt.outcome == "success" else 5
            # A call whose output the store refused has all its tokens.
            is_whole = attempt.tokens == 15 and attempt.reason == "store"
            if attempt.tokens != expected and attempt.outcome != "cancelled" and not is_whole:
                self.bad("I4", f"an attempt of {attempt.node_id} has {attempt.tokens} tokens")
            if attempt.tokens and not attempt.cost_usd:
                self.bad("I4", f"an attempt of {attempt.node_id} has no price")
        failures = Counter(f"{a.node_id}@{a.branch}" for a in attempts if a.outcome == "failure")
        for place, pids in self.noted.items():
            needed = len(pids) - len(set(pids) & self.unwritten)
            if failures[place] < needed:
                self.bad("I4", f"{place}: {needed} failures were acknowledged, {failures[place]} are kept")
