"""What must be true of every history, whatever struck."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from tests.simulation.world import CALL_TOKENS, PROCESSES, REPAIRS

from stroma.limits.budget_state import read_account

if TYPE_CHECKING:
    from tests.simulation.world import World

_ENDED = ("COMPLETED", "RESUMED")
_OF_STORE = ("begun", "taken", "kept", "finished", "cancel asked")
_AT_REST = (*_ENDED, "CANCELLED", "FAILED", "PARTIAL", "SUSPENDED")


def check(world: World) -> list[str]:
    """Return what is wrong with a history; [] if nothing is."""
    problems: list[str] = []
    by_run: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for event in world.history:
        for run_id in world.runs if event[2] in ("copied", "restored") else (event[3],):
            by_run[run_id].append(event)
    for process in world.pids.values():
        problems += [f"process {process.name}: {what}" for what in process.unhandled]
        task = process.main
        if task is not None and task.done() and (task.cancelled() or task.exception() is not None):
            problems.append(f"process {process.name} ended: {task!r}")
    journaled = 0
    for run_id in world.runs:
        run = _Run(world, run_id, by_run[run_id])
        journaled += run.journaled
        problems += [f"run {run_id}: {what}" for what in run.problems]
    return problems + _budget(world, journaled)


def _budget(world: World, journaled: int) -> list[str]:
    rows: Any = world.database.rows()
    account = read_account("team", *rows.read_cell("budget:team"))
    calls = sum(event[2] == "call" and not event[6].startswith("p") for event in world.history)
    spent = 0 if account is None else account.spent[1]
    problems = []
    if spent < journaled:
        problems.append(f"the shared budget has {spent} tokens spent, the journal has {journaled}")
    if spent > calls * CALL_TOKENS:
        problems.append(
            f"the shared budget has {spent} tokens spent, {calls} calls took {calls * CALL_TOKENS}"
        )
    in_flight = PROCESSES * 2 * len(world.runs) * CALL_TOKENS
    if journaled > world.limit + in_flight:
        problems.append(f"{journaled} tokens in the journal, the limit of the shared budget is {world.limit}")
    return problems


class _Run:
    """The history of one run against what the store has of it."""

    def __init__(self, world: World, run_id: str, events: list[tuple[Any, ...]]) -> None:
        self.world = world
        self.run_id = run_id
        self.problems: list[str] = []
        self.events, self.rewound = self.effective(events)
        self.journaled = 0
        rows: Any = world.database.rows()
        result = rows.find(run_id)
        if result is None or not result.execution:
            if any(event[2] == "ack" for event in self.events):
                self.problems.append("it is not in the store, and had an acknowledged commit")
            return
        self.found = result
        attempts, _ = rows.attempt_page(result.run, result.execution, limit=10_000, after=None)
        self.outputs = {
            f"{row.position}:{row.branch}": json.loads(row.step.output)
            for row in rows.steps(result.run, result.execution)
        }
        self.journaled = sum(attempt.tokens for attempt in attempts)
        if result.tokens != self.journaled:
            self.problems.append(f"its row has {result.tokens} tokens, its attempts {self.journaled}")
        self.one_history()
        self.items_in_turn()
        self.comes_to_an_end()
        self.nothing_lost()
        if not self.rewound:  # Else epochs were used twice.
            self.one_owner()
            self.nothing_twice()
            self.bad_outputs_are_told()
            self.one_answer()
            self.cancels_hold()

    def effective(self, events: list[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], bool]:
        """Return the events without those that a restored copy has undone, and whether there are any.

        Whoever had heard of one of these must not write to the run again.
        """
        marks = [index for index, event in enumerate(events) if event[2] in ("copied", "restored")]
        if len(marks) < 2:
            return events, False
        copied, restored = marks
        undone = {index for index in range(copied, restored) if events[index][2] in _OF_STORE}
        if not undone:
            return events, False
        entries = [(index, event) for index, event in enumerate(events) if event[2] == "kept"]
        reports: dict[tuple[str, int], str] = {}
        late: list[tuple[Any, ...]] = []
        for index, event in enumerate(events):
            _, who, what, _, *more = event
            if what == "ack":
                of = [(i, it) for i, it in entries if i < index and it[1] == who and it[5] == more[0]]
                if of and of[-1][0] in undone:
                    undone.add(index)
                    if index < restored:
                        reports[who, of[-1][1][4]] = more[0]
            elif what == "returned":
                undone.add(index)
            elif what in ("begun", "taken") and index > restored:
                reports.pop((who, more[0]), None)  # It has read what is left.
            elif what == "kept" and index > restored and (who, more[0]) in reports:
                late.append(event)
        for when, who, _, _, epoch, place, *_ in late:
            self.problems.append(
                f"{who} wrote {place} at {when}, though its commit of {reports[who, epoch]} was undone by "
                f"then"
            )
        return [event for index, event in enumerate(events) if index not in undone], True

    def one_owner(self) -> None:
        """Only the last one that opened the run writes to it; nobody opens it while another holds it."""
        epoch = 0
        for event in self.events:
            when, who, what, _, *more = event
            if what in ("begun", "taken"):
                epoch, before = more[0], more[2]
                held = before is not None and before.status == "RUNNING" and before.left_seconds > 0
                if held and self.held_at(event, before.pid):
                    self.problems.append(
                        f"{who} took it at {when} from process {before.pid}, which was alive"
                    )
            elif what in ("kept", "finished") and more[0] != epoch:
                self.problems.append(f"{who} wrote at {when} in epoch {more[0]}, when it was {epoch}")

    def held_at(self, taken: tuple[Any, ...], pid: int) -> bool:
        """Return whether a process was alive when its run was taken, and had not given it up."""
        name = self.world.pids[pid].name
        started = False
        for event in self.world.history:
            if event is taken:
                break
            if event[2] == "starts" and event[4] == pid:
                started = True
            elif started and event[1] == name and event[2] == "dies":
                return False
        # One that lives on may have given up: it was refused by the store, say.
        return taken[1] != name and not any(
            event[1] == name and event[2] in ("returned", "refused") and event[0] <= taken[0]
            for event in self.events
        )

    def nothing_lost(self) -> None:
        """Every acknowledged output is in the journal."""
        for when, who, what, _, *more in self.events:
            if what == "ack" and self.outputs.get(more[0]) != more[1]:
                self.problems.append(
                    f"{who} was acknowledged {more[1]} at {more[0]} at {when}, the journal has "
                    f"{self.outputs.get(more[0])}"
                )
            if what == "returned" and more[0] in _ENDED:
                last = max(self.outputs, key=lambda place: int(place.partition(":")[0]), default="")
                if self.outputs.get(last) != more[1]:
                    self.problems.append(
                        f"{who} returned {more[1]} at {when}, the journal ends with {self.outputs.get(last)}"
                    )

    def nothing_twice(self) -> None:
        """No place is committed twice, nor called after its commit by one that knows of it."""
        entries: dict[str, str] = {}
        epoch = 0
        for when, who, what, _, *more in self.events:
            if what in ("begun", "taken"):
                epoch = more[0]
            elif what == "kept" and more[3] is not None:
                if entries.setdefault(more[1], more[3]) != more[3]:
                    self.problems.append(f"{more[1]} was committed again by {who} at {when}")
            elif what == "call" and more[1] in entries and more[0] == epoch:
                self.problems.append(f"{who} called {more[1]} at {when}, which was committed")

    def bad_outputs_are_told(self) -> None:
        """The call after a recorded bad output is told of it in whatever process, so often and no oftener."""
        made: dict[tuple[str, str], str] = {}
        recorded: dict[str, str | None] = {}
        repairs: Counter[str] = Counter()
        epoch, has_ended = 0, False
        for when, who, what, _, *more in self.events:
            if what in ("begun", "taken"):
                epoch = more[0]
                if (
                    what == "begun" or has_ended
                ):  # A resume of a run that has ended begins with fresh retries.
                    recorded.clear()
                    repairs.clear()
                has_ended = False
            elif what == "finished":  # Perhaps by another process, while its owner stood still.
                has_ended = True
            elif what == "bad":
                made[who, more[1]] = more[2]
            elif what == "kept" and more[2] == "failure":
                recorded[more[1]] = made.pop((who, more[1]), None)
                repairs[more[1]] += recorded[more[1]] is not None
                if repairs[more[1]] > REPAIRS + 1:
                    self.problems.append(f"{more[1]} was repaired {repairs[more[1]] - 1} times by {when}")
            elif what == "call":
                made.pop((who, more[1]), None)
                told, expected = more[3], recorded.get(more[1])
                if more[0] == epoch and told != expected:
                    self.problems.append(
                        f"{who} called {more[1]} at {when}: told of {told}, and not of {expected}"
                    )

    def one_history(self) -> None:
        """What each node was given is what the one before it made."""
        instance: list[str] | None = None
        for place in sorted(self.outputs, key=lambda place: (int(place.partition(":")[0]), place)):
            output = self.outputs[place].get("made")
            of_items = self.world.kind == "items" and place.startswith("1:")
            if output is None or of_items or place.endswith((":0", ":1")):
                instance = None
                continue
            if instance is not None and output[:-1] != instance:
                self.problems.append(f"{place} has {output}, which is not made of {instance}")
            instance = output
        places = [int(place.partition(":")[0]) for place in self.outputs]
        if places and sorted(set(places)) != list(range(max(places) + 1)):
            self.problems.append(f"its journal has holes: {sorted(self.outputs)}")

    def items_in_turn(self) -> None:
        """Each node of an item got what the one before it made; the item has the last one's output."""
        if self.world.kind != "items":
            return
        made = {place: output.get("made") for place, output in self.outputs.items()}
        for number, item in enumerate(("x", "y")):
            whole, first, second = (made.get(f"1:{number}{part}") for part in ("", ".0", ".1"))
            if first is not None and first[:-1] != [*made["0:"], item]:
                self.problems.append(f"item {item} begins with {first}, after {made['0:']}")
            if second is not None and second[:-1] != first:
                self.problems.append(f"item {item} has {second}, which is not made of {first}")
            if whole is not None and whole != second:
                self.problems.append(f"item {item} has {whole}, its last node made {second}")
        done = self.outputs.get("1:", {}).get("done")
        if done is not None and done != [self.outputs["1:0"], self.outputs["1:1"]]:
            self.problems.append(f"the map has {done}, its items are others")

    def one_answer(self) -> None:
        """Of two answers one is taken, and the node gets it. A restored store lacks those of later."""
        taken, copied = set[str](), set[str]()
        for _, _, what, _, *more in self.events:
            if what == "copied":
                copied = set(taken)
            elif what == "restored":
                taken = copied
            elif what == "answer taken":
                taken.add(more[0])
            if len(taken) > 1:
                self.problems.append(f"contradictory answers were taken: {sorted(taken)}")
                break
        answered = self.outputs.get("1:") if self.world.kind == "asks" else None
        if taken and answered is not None and answered["made"][-1] not in taken:
            self.problems.append(f"the answer of {taken} was taken, the node got {answered['made'][-1]}")

    def cancels_hold(self) -> None:
        """After an acknowledged cancel the next owner calls nothing and the last one stores nothing."""
        cancelled = ended = False
        late: set[int] = set()
        epoch = 0
        for event in self.events:
            when, who, what, _, *more = event
            if what == "cancel asked":
                cancelled = cancelled or self.is_acknowledged(event)
            elif what in ("begun", "taken"):
                epoch, ended = more[0], False
                before = more[2]
                if what == "begun" or (before is not None and before.status == "CANCELLED"):
                    cancelled = False  # Somebody begins it again.
                if cancelled:
                    late.add(epoch)
            elif what in ("kept", "finished") and ended and more[1] != "CANCELLED":
                self.problems.append(f"{who} wrote {more[1]} at {when}, after the run had ended as cancelled")
            elif what == "finished":
                ended = more[1] == "CANCELLED"
                if cancelled and more[0] in late and not ended:
                    self.problems.append(
                        f"{who} ended it as {more[1]} at {when}, after an acknowledged cancel"
                    )
                if more[1] in (*_ENDED, "FAILED", "CANCELLED"):
                    cancelled = False  # One that held it at the time may have been at its end.
            elif what == "call" and more[0] in late:
                self.problems.append(f"{who} called {more[1]} at {when}, after an acknowledged cancel")

    def is_acknowledged(self, asked: tuple[Any, ...]) -> bool:
        """Return whether cancel() returned True for what was asked: the next word of that process says so."""
        following = iter(self.events)
        for event in following:
            if event is asked:
                break
        for event in following:
            if event[1] == asked[1] and event[2] in ("cancel returned", "refused"):
                return event[2] == "cancel returned" and event[4] is True
        return False

    def comes_to_an_end(self) -> None:
        """Once all is calm, every run is brought to its end."""
        if self.found.status not in _AT_REST:
            self.problems.append(f"it is left {self.found.status}")
        if self.found.status in _ENDED:
            places = {int(place.partition(":")[0]) for place in self.outputs}
            if len(places) != 3:
                self.problems.append(f"it is {self.found.status} with the commits {sorted(self.outputs)}")
