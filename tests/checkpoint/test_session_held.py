"""One execution of a run in a durable store: what its session knows when it begins, and each row that it leaves."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from stroma.checkpoint import (
    CheckpointNotFound,
    CorruptCheckpoint,
    Fenced,
    PipelineChanged,
    RunBusy,
    RunExists,
    RunRequest,
    StepCall,
    StoreError,
    _sqlite_rows,
)
from stroma.checkpoint._beside import keep_due, keep_waiting
from stroma.checkpoint._owner import LIVE, Owner, new_owner
from stroma.checkpoint._rows import (
    CANCEL,
    DUE,
    PARENT,
    SAVED,
    TRACE,
    TROUBLE,
    WAITING,
    Attempt,
    Fence,
    Opening,
    RunRow,
    Step,
    StepRow,
    checksum,
)
from stroma.checkpoint._session import DurableSession, fork
from stroma.checkpoint._sqlite_file import DatabaseFile, connect
from stroma.checkpoint._sqlite_rows import SqliteRows
from stroma.checkpoint.journal import OF_MAP, Committed, Finished, PriorUsage, Waiting
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import CODED, Payloads
from stroma.failures import FailureClass
from stroma.schemas import NotSerialisable, schema_of
from stroma.trace import AttemptUsage, Row, RunStatus


class State(BaseModel):
    n: int = 0


class Hidden(BaseModel):
    key: SecretStr = SecretStr("k")


SCHEMA = schema_of(State)
REF = schema_ref(State)
TABLES = ("runs", "inputs", "tags", "attempts", "steps")
EMPTY = Step("", "", b"", checksum(b""))


def stored(n: int) -> bytes:
    return b'{"n":%d}' % n


class Counting:
    """A codec that gives other bytes each time; ``opened``: how often it was asked for the way back."""

    def __init__(self) -> None:
        self.sealed = self.opened = 0

    def encode(self, data: bytes) -> bytes:
        self.sealed += 1
        return b"%d|" % self.sealed + data[::-1]

    def decode(self, data: bytes) -> bytes:
        self.opened += 1
        return data.partition(b"|")[2][::-1]


class LockedRows(SqliteRows):
    """Rows that see to it that nobody changes an execution that another one could change at the same time."""

    def __init__(self, db: Any) -> None:
        super().__init__(db)
        self.locked: set[str] = set()

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        if lock:
            self.locked.add(run_id)
        return super().find(run_id, lock=lock)

    def begin(self, found: RunRow | None, opening: Opening) -> Fence:
        assert opening.run_id in self.locked
        return super().begin(found, opening)

    def go_on(self, found: RunRow, opening: Opening) -> Fence:
        assert found.run_id in self.locked
        return super().go_on(found, opening)


class Store:
    """A store that does each operation at once, in a transaction; ``fails``: what it raises in place of that."""

    def __init__(self, path: Path) -> None:
        self.db = DatabaseFile(str(path), "normal", connect, 15.0).open()
        self.rows = LockedRows(self.db)
        self.fails: BaseException | None = None
        self.operations = 0

    def submit(self, operation: Any, /) -> asyncio.Future[Any]:
        done = asyncio.get_running_loop().create_future()
        self.operations += 1
        try:
            if self.fails is not None:
                raise self.fails
            done.set_result(self.do(operation))
        except asyncio.CancelledError:
            done.cancel()
        except Exception as error:
            done.set_exception(error)
        return done

    def do(self, operation: Callable[[LockedRows], Any]) -> Any:
        self.db.execute("BEGIN")
        self.rows.locked.clear()
        try:
            value = operation(self.rows)
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")
        return value

    def open(
        self,
        run_id: str = "r",
        n: int = 0,
        *,
        payloads: Payloads | None = None,
        opened: dict[bytes, bytes] | None = None,
        **request: Any,
    ) -> DurableSession:
        payloads = payloads or Payloads()
        asked = RunRequest(run_id, "pipeline", State(n=n), SCHEMA, **request)
        session = DurableSession(run_id, self.submit, payloads, opened)
        sealed = payloads._seal(stored(n))
        opening = Opening(
            run_id, "pipeline", str(new_owner(session)), asked.lease_seconds, SCHEMA.fingerprint, sealed, checksum(sealed),
            asked.discard_from, asked.tags,
        )  # fmt: skip
        found: DurableSession = self.do(lambda rows: session.open(asked, opening, stored(n), rows))
        return found

    def table(self, name: str) -> list[tuple[Any, ...]]:
        return self.db.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3").fetchall()

    def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        return {name: self.table(name) for name in TABLES}

    def beside(self) -> list[tuple[int, str, str]]:
        return [
            (one.position, one.branch, one.node_id)
            for place in range(-9, 0)
            for one in self.rows.kept(1, place)
        ]

    def keep_beside(self, run_id: str = "r") -> None:
        """Something of each kind; two nodes wait, one of them has its answer."""
        for position in (SAVED, CANCEL, PARENT, TRACE, TROUBLE):
            self.rows.keep(run_id, position, "", f"at {position}", EMPTY)
        keep_due(self.rows, run_id, attempt(1, 50))
        keep_due(self.rows, run_id, attempt(0, 20))
        keep_waiting(self.rows, run_id, Waiting(0, "", "first", "why", "m:Q"))
        keep_waiting(self.rows, run_id, Waiting(2, "0", "second", "what", "", b"7"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(_sqlite_rows, "_now_ms", lambda: 1000)
    made = Store(tmp_path / "runs.db")
    yield made
    made.db.close()


def row(
    position: int = 0,
    started: int = 10,
    branch: str = "",
    number: int = 1,
    *,
    node: str = "node",
    failed: Any = None,
    usage: AttemptUsage | None = AttemptUsage(5, 3, 0.25, "m"),  # noqa: B008
    group: str | None = None,
) -> Row:
    outcome: Any = "success" if failed is None else "failure"
    return (node, number, started, 7, (), None, outcome, failed, usage, position, branch, group, None)


def attempt(position: int = 0, started: int = 10, branch: str = "", number: int = 1, **facts: Any) -> Attempt:
    """What is kept of row()."""
    given: dict[str, Any] = {
        "node_id": "node", "duration_ns": 7, "outcome": "success", "failure_class": None, "message": None, "reason": None,
        "tokens": 5, "output_tokens": 3, "cost_pico": 250_000_000_000, "model": "m",
    }  # fmt: skip
    return Attempt(position, started, branch, number, **{**given, **facts})


def committed(
    n: int, node: str = "node", call: StepCall | None = None, contract: str | None = None
) -> Committed:
    return Committed(node, stored(n), SCHEMA.fingerprint if contract is None else contract, call)


def lose(session: DurableSession) -> None:
    """Its process has died."""
    session.abandon()


async def begun(store: Store, **request: Any) -> DurableSession:
    """A run with commits at 0, 1 (a group with two children) and 2, whose process has died."""
    session = store.open(**request)
    await session.record(row(0), SCHEMA, State(n=10), StepCall(4, b"given"))
    await session.record(row(1, 20, "0", group="group"), SCHEMA, State(n=11))
    await session.record(row(1, 21, "1", group="group"), SCHEMA, State(n=12))
    await session.record(row(1, 19), SCHEMA, State(n=13))
    await session.record(row(2, 30, failed=(FailureClass.AMBIGUOUS, "no", "why")), None, None)
    await session.record(row(2, 31, number=2), SCHEMA, State(n=14))
    lose(session)
    return session


GROUPED = f"{SCHEMA.fingerprint}:group"
COMMITS = {
    (0, ""): committed(10, call=StepCall(4, b"given")),
    (1, "0"): committed(11, contract=GROUPED),
    (1, "1"): committed(12, contract=GROUPED),
    (1, ""): committed(13),
    (2, ""): committed(14),
}
PRIOR = PriorUsage(30, 1.5, 28 / 1e6)


# ---------------------------------------------------------------------- how it begins


async def test_a_session_of_a_new_run(store: Store) -> None:
    """It knows of nothing that was before it."""
    session = store.open(tags=("t",))
    assert (session.run_id, session.execution, session.continued, session.ended) == ("r", 1, False, False)
    assert (session.restored, session.prior, session.waiting) == ({}, PriorUsage(0, 0.0, 0.0), {})
    assert (session.finished, session.traceparent, session.undelivered, session.on_cancel) == (
        None,
        None,
        [],
        None,
    )
    assert session.fence == Fence(1, 1, 1, session.fence.owner, 30.0)
    assert LIVE[Owner.read(session.fence.owner).token] is session  # type: ignore[union-attr]
    assert store.table("inputs") == [(1, 1, SCHEMA.fingerprint, stored(0), checksum(stored(0)))]


@pytest.mark.parametrize("if_exists", ["resume", "return", "attach"])
async def test_a_session_that_goes_on(store: Store, if_exists: Any) -> None:
    """It knows what was committed, used, waited for, and under which trace; a wish that the run should end is forgotten."""
    first = await begun(store)
    store.keep_beside()
    history = store.table("attempts")
    session = store.open(if_exists=if_exists, if_running="take_over")
    assert (session.execution, session.continued, session.finished) == (1, True, None)
    assert session.fence == first.fence._replace(epoch=2, owner=session.fence.owner)
    assert session.restored == COMMITS
    assert session.prior == PRIOR
    assert session.traceparent == "at -5"
    assert session.waiting == {
        (0, ""): Waiting(0, "", "first", "why", "m:Q", None),
        (2, "0"): Waiting(2, "0", "second", "what", "", b"7"),
    }
    assert session.undelivered == []  # Nobody asked for them.
    assert store.beside() == [
        (-7, "", "at -7"), (-6, "0:20:1:", "node"), (-6, "1:50:1:", "node"), (-5, "", "at -5"), (-4, "", "at -4"),
        (-2, "0:", "first"), (-2, "2:0", "second"), (-1, "", "at -1"),
    ]  # fmt: skip
    assert store.table("attempts") == history


async def test_end_hooks_that_may_not_have_been_told(store: Store) -> None:
    """Who wants to deliver them is given them, the oldest first; what is damaged of them is left out."""
    await begun(store)
    for number, started in enumerate((70, 50, 90)):
        keep_due(
            store.rows,
            "r",
            attempt(number, started, "2", 3, outcome="failure", failure_class="TERMINAL", message="m"),
        )
    store.rows.keep("r", DUE, "damaged", "node", Step("", "", b"{}", b"wrong"))
    session = store.open(if_exists="resume", deliver=True)
    failed = (FailureClass.TERMINAL, "m", None)
    usage = AttemptUsage(5, 3, 0.25, "m")
    assert session.undelivered == [
        ("node", 3, started, 7, {}, None, "failure", failed, usage, position, "2", None, None)
        for position, started in ((1, 50), (0, 70), (2, 90))
    ]
    assert len(store.rows.kept(1, DUE)) == 4  # Until they were told.


async def test_a_session_that_begins_anew(store: Store) -> None:
    """What was kept for the execution before goes; what was saved, and the run's parent, stay."""
    await begun(store)
    store.keep_beside()
    for request in ({}, {"deliver": True}):
        session = store.open(n=1, if_exists="restart", if_running="take_over", **request)
        assert (session.continued, session.finished, session.traceparent) == (False, None, None)
        assert (session.restored, session.prior, session.waiting, session.undelivered) == (
            {},
            PriorUsage(),
            {},
            [],
        )
        assert store.beside() == [(-4, "", "at -4"), (-1, "", "at -1")]
    assert session.execution == 3
    assert session.fence.epoch == 3
    assert [one[1] for one in store.table("inputs")] == [1, 2, 3]


@pytest.mark.parametrize("if_exists", ["resume", "restart"])
async def test_a_run_of_which_only_states_were_saved_begins(store: Store, if_exists: Any) -> None:
    store.rows.keep("r", SAVED, "n", "n", EMPTY)
    session = store.open(if_exists=if_exists)
    assert (session.execution, session.continued, session.restored) == (1, False, {})
    assert store.beside() == [(-1, "n", "n")]


@pytest.mark.parametrize("status", ["COMPLETED", "RESUMED"])
async def test_a_run_that_has_finished_is_returned_as_it_is(store: Store, status: str) -> None:
    """Nothing of it changes; its session holds nothing and ends nothing."""
    await begun(store)
    fence = store.rows.find("r")
    assert fence is not None
    store.rows.finish(Fence(1, 1, 1, str(fence.owner), 30.0), status, "said")
    store.keep_beside()
    before = store.tables()
    session = store.open(if_exists="return", deliver=True)
    assert store.tables() == before
    assert session.finished == Finished(status, "said")
    assert session.fence == Fence(1, 1, 1, "", 0.0)
    assert (session.execution, session.continued) == (1, False)
    assert session.restored == COMMITS
    assert session.prior == PRIOR
    assert session.traceparent == "at -5"
    assert list(session.waiting) == [(0, ""), (2, "0")]
    assert session.undelivered == []
    assert session.end("COMPLETED", None) is None
    assert not session.ended
    assert store.tables() == before


@pytest.mark.parametrize(
    ("discard_from", "left", "waits"),
    [
        (0, [], []),
        (1, [(0, "")], [(0, "")]),
        (2, [(0, ""), (1, "0"), (1, "1"), (1, "")], [(0, "")]),
        (3, list(COMMITS), [(0, ""), (2, "0")]),
    ],
)
async def test_a_session_that_goes_on_from_an_earlier_position(
    store: Store, discard_from: int, left: list[Any], waits: list[Any]
) -> None:
    """What was committed or waited for from there on is forgotten; what was used counts all the same."""
    await begun(store)
    store.keep_beside()
    # It goes on with another input, and with damage to what is forgotten.
    store.db.execute("UPDATE steps SET output = x'00' WHERE position >= ? AND position >= 0", (discard_from,))
    session = store.open(n=7, if_exists="resume", discard_from=discard_from)
    assert session.restored == {at: COMMITS[at] for at in left}
    assert session.prior == PRIOR
    assert session.continued
    assert list(session.waiting) == waits
    assert {(one.position, one.branch) for one in store.rows.steps(1, 1)} == set(left)
    assert [one.branch for one in store.rows.kept(1, WAITING)] == [f"{at}:{branch}" for at, branch in waits]


async def test_what_was_waited_for_and_is_damaged_is_forgotten(store: Store) -> None:
    """It alone: the others of the run stay, and so do those of other runs."""
    await begun(store)
    store.keep_beside()
    store.open("s")
    store.rows.keep("s", WAITING, "0:", "n", Step("", "", b"7", b"wrong", 1))
    store.rows.keep("r", WAITING, "1:", "n", Step("", "", b"7", b"wrong", 1))
    store.rows.keep("r", WAITING, "x:", "n", EMPTY)
    session = store.open(if_exists="resume")
    assert list(session.waiting) == [(0, ""), (2, "0")]
    assert [one.branch for one in store.rows.kept(1, WAITING)] == ["0:", "2:0"]
    assert len(store.rows.kept(2, WAITING)) == 1


async def test_commits_that_are_apart_are_not_restored(store: Store) -> None:
    """They stay where they are, and committed() gives them."""
    await begun(store)
    session = store.open(if_exists="resume", apart=((1, ""),))
    assert session.restored == {at: COMMITS[at] for at in ((0, ""), (1, ""), (2, ""))}
    assert await session.committed(1, ["0", "1", "2"]) == {"0": COMMITS[1, "0"], "1": COMMITS[1, "1"]}
    assert await session.committed(1, ["1"]) == {"1": COMMITS[1, "1"]}
    assert await session.committed(2, ["0"]) == {}


async def test_items_that_failed_are_made_again(store: Store) -> None:
    """With them goes the group around them, and all that was made of it."""
    session = store.open()
    await session.record(row(0), SCHEMA, State(n=1))
    await session.record(row(1, 20, "0"), SCHEMA, State(n=2))
    await session.record(row(1, 19), SCHEMA, State(n=3), StepCall(1, OF_MAP + b"2"))
    await session.record(row(2, 30), SCHEMA, State(n=4))
    lose(session)
    seen: list[Any] = []
    again = store.open(if_exists="resume", retry_failed=True, accept=lambda *told: seen.append(told))
    assert set(again.restored) == {(0, ""), (1, "0")}
    assert [told[:2] for told in seen] == [(0, ""), (1, "0")]
    assert {(one.position, one.branch) for one in store.rows.steps(1, 1)} == {(0, ""), (1, "0"), (1, "")}


async def test_who_refuses_what_would_be_restored_changes_nothing(store: Store) -> None:
    await begun(store)
    store.keep_beside()
    before = store.tables()
    seen: list[Any] = []

    def accept(position: int, branch: str, commit: Committed) -> None:
        seen.append((position, branch, commit))
        if len(seen) == len(COMMITS):
            raise PipelineChanged("no")

    with pytest.raises(PipelineChanged):
        store.open(if_exists="resume", accept=accept)
    assert {told[:2]: told[2] for told in seen} == COMMITS
    assert store.tables() == before


@pytest.mark.parametrize(("n", "what"), [(0, ""), (1, " with another input")])
async def test_a_run_that_is_held(store: Store, n: int, what: str) -> None:
    """The refusal tells who holds it and for how long, and changes nothing."""
    session = store.open(lease_seconds=3600.0)
    before = store.tables()
    with pytest.raises(RunBusy) as caught:
        store.open(n=n, if_exists="resume")
    place = Owner.read(session.fence.owner).place  # type: ignore[union-attr]
    error = caught.value
    left = f"{error.left_seconds:.1f}"
    assert str(error) == (
        f"run 'r' is being run{what} by {place}, whose lease is good for another {left} s; wait for its result with "
        'if_running="attach", or use another run id'
    )
    assert error.holder == place
    assert 0 < error.left_seconds <= 3600.0
    assert error.same_input is (n == 0)
    assert store.tables() == before


async def test_a_run_that_must_not_be_there(store: Store) -> None:
    await begun(store)
    with pytest.raises(RunExists) as caught:
        store.open(if_exists="error")
    assert str(caught.value) == (
        "run 'r' exists already (execution 1, RUNNING); use another run id, or say what is to become of it: "
        'if_exists="resume", "return" or "restart"'
    )


async def test_another_input_is_refused(store: Store) -> None:
    await begun(store)
    with pytest.raises(PipelineChanged) as caught:
        store.open(n=1, if_exists="resume")
    assert str(caught.value) == (
        "run 'r' was started with another input (or State has changed); give it the same one, or another run id"
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "position = 0",
            "the output of node 'node' at position 0 of run 'r' is damaged; resume from that node "
            "(resume_from='node') to make it anew",
        ),
        (
            "position = 1 AND branch = '1'",
            "the output of node 'node' at position 1 of run 'r' is damaged; resume from the outermost group around it "
            "(resume_from='group') to make it anew",
        ),
    ],
)
async def test_a_damaged_commit_is_told_with_its_place(store: Store, place: str, message: str) -> None:
    """By who goes on, and by who asks for it."""
    session = await begun(store)
    store.db.execute(f"UPDATE steps SET output = x'00' WHERE {place}")
    position, branch = store.db.execute(f"SELECT position, branch FROM steps WHERE {place}").fetchone()
    with pytest.raises(CorruptCheckpoint) as caught:
        store.open(if_exists="resume")
    assert str(caught.value) == message
    with pytest.raises(CorruptCheckpoint) as caught:
        await session.committed(position, [branch])
    assert str(caught.value) == message


# ---------------------------------------------------------------------- through a codec


async def test_the_same_input_through_a_codec(store: Store) -> None:
    """Its bytes are others each time, and it is the same input all the same; another one is another one."""
    payloads = Payloads(Counting())
    lose(store.open(payloads=payloads))
    assert store.table("inputs")[0][3] == CODED + b"1|" + stored(0)[::-1]
    session = store.open(payloads=payloads, if_exists="resume")
    assert session.continued
    lose(session)
    with pytest.raises(PipelineChanged):
        store.open(n=1, payloads=payloads, if_exists="resume")
    # A store that has a codec now still knows what it wrote without one, and the other way round.
    lose(store.open("plain"))
    assert store.open("plain", payloads=payloads, if_exists="resume").continued


async def test_an_input_that_is_damaged_is_not_the_same(store: Store) -> None:
    """The codec is not even asked for what it was."""
    codec = Counting()
    lose(store.open(payloads=Payloads(codec)))
    store.db.execute("UPDATE inputs SET input = input || x'00'")
    with pytest.raises(PipelineChanged):
        store.open(payloads=Payloads(codec), if_exists="resume")
    assert codec.opened == 0


@pytest.mark.parametrize(
    ("request_", "continued"),
    [
        ({"if_exists": "restart"}, False),
        ({"if_exists": "resume", "discard_from": 0}, True),
        ({"if_exists": "resume", "discard_from": 5}, True),
        ({"if_exists": "error"}, RunExists),
        ({"if_exists": "resume"}, CorruptCheckpoint),
        ({"if_exists": "return"}, CorruptCheckpoint),
        ({"if_exists": "attach"}, CorruptCheckpoint),
    ],
)
async def test_an_input_whose_codec_is_lost(store: Store, request_: dict[str, Any], continued: Any) -> None:
    """Who does not go on with it need not know it; who does is told that it cannot be read."""
    lose(store.open(payloads=Payloads(Counting())))
    if isinstance(continued, bool):
        assert store.open(**request_).continued is continued
        return
    with pytest.raises(continued) as caught:
        store.open(**request_)
    if continued is CorruptCheckpoint:
        said = "the input of run 'r' was written through a codec; open the store with codec="
        assert str(caught.value) == said


async def test_commits_through_a_codec(store: Store) -> None:
    """Outputs and what steps were given are sealed; what was opened ahead is not opened once more."""
    codec = Counting()
    payloads = Payloads(codec)
    session = store.open(payloads=payloads)
    await session.record(row(0), SCHEMA, State(n=1), StepCall(2, b"given"))
    await session.record(row(1, 20), SCHEMA, State(n=2), StepCall(3, None))
    await session.record(row(2, 30), SCHEMA, State(n=3))
    await session.record(row(3, 40), None, None)
    first, second, third = store.rows.steps(1, 1)
    assert (first.step.output, first.step.given) == (CODED + b"2|" + stored(1)[::-1], CODED + b"3|nevig")
    assert (second.step.output, second.step.number, second.step.given) == (
        CODED + b"4|" + stored(2)[::-1],
        3,
        None,
    )
    assert (third.step.output, third.step.number, third.step.given) == (
        CODED + b"5|" + stored(3)[::-1],
        None,
        None,
    )
    assert all(one.step.sha256 == checksum(one.step.output) for one in (first, second, third))
    found = {
        0: committed(1, call=StepCall(2, b"given")),
        1: committed(2, call=StepCall(3, None)),
        2: committed(3),
    }
    assert await session.committed(0, [""]) == {"": found[0]}
    assert codec.opened == 2
    lose(session)
    again = store.open(
        payloads=payloads, if_exists="resume", opened={first.step.sha256: stored(1), b"another": b"another"}
    )
    assert again.restored == {(at, ""): commit for at, commit in found.items()}
    assert codec.opened == 6  # The input, what the first was given, and the outputs of the two others.
    assert await again.committed(0, [""]) == {"": found[0]}
    assert codec.opened == 8  # What was opened ahead is not kept for ever.


async def test_what_cannot_be_opened_is_named(store: Store) -> None:
    """The output of which node, at which place, of which run; and so for what a step was given."""
    payloads = Payloads(Counting())
    session = store.open(payloads=payloads)
    await session.record(row(3), SCHEMA, State(n=1))
    await session.record(row(4, 20), SCHEMA, State(n=1), StepCall(2, b"given"))
    session = DurableSession("r", store.submit, Payloads())
    session.fence = Fence(1, 1, 1, "", 0.0)
    for position, what in ((3, ""), (4, "what was given for ")):
        with pytest.raises(CorruptCheckpoint) as caught:
            await session.committed(position, [""])
        assert str(caught.value) == (
            f"{what}the output of node 'node' at position {position} of run 'r' was written through a codec; open the store "
            "with codec="
        )


async def test_secrets_are_kept_under_a_codec_only(store: Store) -> None:
    schema = schema_of(Hidden)
    with pytest.raises(NotSerialisable):
        store.open().record(row(0), schema, Hidden(key=SecretStr("s")))
    session = store.open("s", payloads=Payloads(Counting()))
    await session.record(row(0), schema, Hidden(key=SecretStr("s")))
    assert schema.restore((await session.committed(0, [""]))[""].output) == Hidden(key=SecretStr("s"))


# ---------------------------------------------------------------------- what it keeps


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (row(), attempt()),
        (row(3, 12, "1.0", 4, node="n"), attempt(3, 12, "1.0", 4, node_id="n")),
        (row(usage=None), attempt(tokens=0, output_tokens=0, cost_pico=0, model=None)),
        (row(usage=AttemptUsage(9, 4, 1e-12 * 2.6, None)), attempt(tokens=9, output_tokens=4, cost_pico=3, model=None)),
        (row(usage=AttemptUsage(0, 0, 2.0, "\0\ud800")), attempt(tokens=0, output_tokens=0, cost_pico=2 * 10**12, model="\\x00\\ud800")),
        (
            row(failed=(FailureClass.TERMINAL, "m\0", "r\ud800")),
            attempt(outcome="failure", failure_class="TERMINAL", message="m\\x00", reason="r\\ud800"),
        ),
        (
            row(failed=(FailureClass.AMBIGUOUS, "m", None)),
            attempt(outcome="failure", failure_class="AMBIGUOUS", message="m", reason=None),
        ),
    ],
)  # fmt: skip
async def test_an_attempt_is_kept_with_all_that_is_told_of_it(
    store: Store, given: Row, kept: Attempt
) -> None:
    """Costs are whole pico-dollars; text that no store can keep is written out."""
    session = store.open()
    await session.record(given, None, None)
    assert list(store.rows.attempts(1, 1)) == [(kept, None)]
    assert store.beside() == []


async def test_an_output_is_kept_with_its_schema(store: Store) -> None:
    """And with the group that it belongs to, and what a resumed run knows its step by; without a schema it is not kept."""
    session = store.open()
    await session.record(row(0), SCHEMA, State(n=1))
    await session.record(row(1, 20, group="g"), SCHEMA, State(n=2), StepCall(0, None))
    await session.record(row(2, 30), SCHEMA, State(n=3), StepCall(7, b"given"))
    await session.record(row(3, 40), SCHEMA, None)
    await session.record(row(4, 50), None, State(n=4))
    plain = SCHEMA.fingerprint

    def step(contract: str, n: int, *call: Any) -> Step:
        return Step(contract, REF, stored(n), checksum(stored(n)), *call)

    assert store.rows.steps(1, 1) == [
        StepRow(0, "", "node", step(plain, 1)),
        StepRow(1, "", "node", step(f"{plain}:g", 2, 0, None)),
        StepRow(2, "", "node", step(plain, 3, 7, b"given")),
    ]
    assert len(store.table("attempts")) == 5
    assert await session.committed(1, [""]) == {
        "": committed(2, call=StepCall(0, None), contract=f"{plain}:g")
    }


async def test_end_hooks_are_due_with_each_attempt(store: Store) -> None:
    """Where they are asked for, until they were told, each by itself; that nobody waits for."""
    session = store.open(deliver=True)
    await session.record(row(0), SCHEMA, State(n=1))
    await session.record(row(1, 20, "0", 3), None, None)
    due = store.rows.kept(1, DUE)
    assert [(one.branch, one.node_id, json.loads(one.step.output)) for one in due] == [
        ("0:10:1:", "node", attempt()._asdict()),
        ("1:20:3:0", "node", attempt(1, 20, "0", 3)._asdict()),
    ]
    assert [one.step for one in due] == [
        Step("", "", one.step.output, checksum(one.step.output)) for one in due
    ]
    assert len(store.rows.steps(1, 1)) == 1
    session.delivered(row(0))
    await asyncio.sleep(0)
    assert [one.branch for one in store.rows.kept(1, DUE)] == ["1:20:3:0"]
    session.delivered(row(1, 20, "0", 3))
    await asyncio.sleep(0)
    assert store.rows.kept(1, DUE) == []


@pytest.mark.parametrize("deliver", [False, True])
async def test_where_an_attempt_failed_is_kept_with_it(store: Store, deliver: bool) -> None:
    """Once, at its place, in place of what failed there before; of another attempt's trouble nothing is kept."""
    session = store.open(deliver=deliver)
    failed = (FailureClass.AMBIGUOUS, "no", None)
    session.note_trouble(1, "0", 3, 20, lambda: b"frames")
    assert store.rows.kept(1, TROUBLE) == []
    await session.record(row(1, 10, "1"), None, None)
    assert store.rows.kept(1, TROUBLE) == []
    await session.record(row(1, 20, "0", 3, failed=failed), None, None)
    first = StepRow(TROUBLE, "1:0", "node", Step("20", "", b"frames", checksum(b"frames"), 3))
    assert store.rows.kept(1, TROUBLE) == [first]
    await session.record(row(1, 30, "0", 4, failed=failed), None, None)
    assert store.rows.kept(1, TROUBLE) == [first]
    session.note_trouble(1, "0", 5, 40, lambda: b"others")
    await session.record(row(1, 41, "0", 5, failed=failed), None, None)
    await session.record(row(1, 40, "0", 6, failed=failed), None, None)
    assert store.rows.kept(1, TROUBLE) == [first]
    session.note_trouble(1, "0", 7, 50, lambda: b"")
    await session.record(row(1, 50, "0", 7, failed=failed), None, None)
    assert store.rows.kept(1, TROUBLE) == [first]
    session.note_trouble(1, "0", 8, 60, lambda: b"later")
    await session.record(row(1, 60, "0", 8, failed=failed), None, None)
    assert store.rows.kept(1, TROUBLE) == [
        StepRow(TROUBLE, "1:0", "node", Step("60", "", b"later", checksum(b"later"), 8))
    ]
    assert len(store.rows.kept(1, DUE)) == (7 if deliver else 0)
    assert len(store.table("attempts")) == 7


async def test_lines_of_source_do_not_stand_beside_what_a_codec_hides(store: Store) -> None:
    """They are not even read."""
    session = store.open(payloads=Payloads(Counting()))
    read: list[int] = []

    def write() -> bytes:
        read.append(1)
        return b"frames"

    session.note_trouble(0, "", 1, 10, write)
    await session.record(row(0, 10), None, None)
    assert store.rows.kept(1, TROUBLE) == []
    assert read == []


async def test_the_trace_context_is_kept(store: Store) -> None:
    session = store.open()
    session.note_traceparent("00-a-b-01")
    await asyncio.sleep(0)
    assert store.rows.kept(1, TRACE) == [StepRow(TRACE, "", "00-a-b-01", EMPTY)]
    session.note_traceparent("00-c-d-01")
    await asyncio.sleep(0)
    assert [one.node_id for one in store.rows.kept(1, TRACE)] == ["00-c-d-01"]
    lose(session)
    assert store.open(if_exists="resume").traceparent == "00-c-d-01"


@pytest.mark.parametrize("fails", [StoreError("no"), asyncio.CancelledError()])
async def test_what_nobody_waits_for_may_fail(store: Store, fails: BaseException) -> None:
    """Without a word of the event loop."""
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    session = store.open()
    store.fails = fails
    session.note_traceparent("00-a-b-01")
    session.delivered(row())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert store.operations == 2
    assert said == []


@pytest.mark.parametrize("deliver", [False, True])
async def test_an_attempt_that_waits_is_kept_with_what_for(store: Store, deliver: bool) -> None:
    """The reason is its message, in text that every store can keep; nothing is committed."""
    session = store.open(deliver=deliver)
    waiting = Waiting(2, "0", "node", "wh\0y", "m:Q")
    await session.suspend(row(2, 20, "0"), waiting)
    kept = attempt(2, 20, "0", message="wh\\x00y")
    assert list(store.rows.attempts(1, 1)) == [(kept, None)]
    assert store.rows.kept(1, WAITING) == [
        StepRow(WAITING, "2:0", "node", Step("wh\\x00y", "m:Q", b"", checksum(b"")))
    ]
    due = [(one.branch, json.loads(one.step.output)) for one in store.rows.kept(1, DUE)]
    assert due == ([("2:20:1:0", kept._asdict())] if deliver else [])


# ---------------------------------------------------------------------- its end


@pytest.mark.parametrize(
    ("status", "error", "kept"),
    [
        (RunStatus.COMPLETED, None, ("COMPLETED", None)),
        ("PARTIAL", "why\0", ("PARTIAL", "why\\x00")),
    ],
)
async def test_the_end_is_kept(store: Store, status: Any, error: str | None, kept: tuple[str, Any]) -> None:
    """And nobody holds the run any more, once it is."""
    session = store.open()
    token = Owner.read(session.fence.owner).token  # type: ignore[union-attr]
    pending = session.end(status, error)
    assert pending is not None
    assert session.ended
    assert token in LIVE
    await pending
    await asyncio.sleep(0)
    assert token not in LIVE
    found = store.rows.find("r")
    assert found is not None
    assert (found.status, found.error, found.holder) == (*kept, None)


async def test_a_session_that_is_abandoned_holds_nothing(store: Store) -> None:
    """Others go on with the run at once; nothing of it was written."""
    session = store.open()
    other = store.open("s")
    before = store.tables()
    session.abandon()
    session.abandon()
    assert session.ended
    assert not other.ended
    assert store.operations == 0
    assert store.tables() == before
    assert store.rows.find("r").holder is None  # type: ignore[union-attr]
    assert store.rows.find("s").holder is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("deliver", [False, True])
async def test_who_was_taken_over_keeps_nothing_more(store: Store, deliver: bool) -> None:
    """Neither an attempt nor what is beside it, nor the end; the refusal says who it was."""
    session = store.open(deliver=deliver)
    other = store.open(if_exists="resume", if_running="take_over")
    before = store.tables()
    place = Owner.read(other.fence.owner).place  # type: ignore[union-attr]
    session.note_trouble(0, "", 1, 10, lambda: b"frames")
    for pending in (
        session.record(row(), SCHEMA, State()),
        session.record(row(), None, None),
        session.suspend(row(), Waiting(0, "", "node", "why", "")),
        session.end("COMPLETED", None),
    ):
        assert pending is not None
        with pytest.raises(Fenced) as caught:
            await pending
        assert str(caught.value) == (
            f"run 'r' was taken over meanwhile, by {place}; nothing more of this execution is kept, see what the other one "
            "makes of it"
        )
    assert store.tables() == before


async def test_whose_run_was_deleted_keeps_nothing_more(store: Store) -> None:
    session = store.open()
    store.rows.delete("r")
    for pending in (session.record(row(), None, None), session.end("COMPLETED", None)):
        assert pending is not None
        with pytest.raises(Fenced) as caught:
            await pending
        assert str(caught.value) == (
            "run 'r' is no longer in the store: it was deleted; nothing more of this execution is kept, see what the other one "
            "makes of it"
        )
    assert store.table("runs") == []


# ---------------------------------------------------------------------- forks


def forked(
    store: Store, before: int, *, to: str = "f", source: str = "r", n: int | None = None, edited: Any = None
) -> None:
    sha = b"" if n is None else checksum(stored(n))
    given = (("", b"") if n is None else ("another", stored(n)))  # fmt: skip
    opening = Opening(to, "", str(new_owner(None, ends=False)), 0.0, *given, sha, None)
    store.do(lambda rows: fork(rows, source, opening, before, edited))


def of_fork(store: Store, run: int = 2) -> Any:
    return store.rows.steps(run, 1), [tried for tried, _ in store.rows.attempts(run, 1)]


async def test_a_fork_has_what_was_committed_before(store: Store) -> None:
    """Each with an attempt that cost nothing; its parent and its input are those of the run, which stays as it is."""
    await begun(store)
    before = store.tables()
    forked(store, 2)
    steps, attempts = of_fork(store)
    assert sorted(steps) == sorted(one for one in store.rows.steps(1, 1) if one.position < 2)
    assert {(one.position, one.branch) for one in steps} == {(0, ""), (1, "0"), (1, "1"), (1, "")}
    assert sorted(one._replace(started_ns=0) for one in attempts) == sorted(
        Attempt(one.position, 0, one.branch, 1, "node", 0, "forked", None, None, None, 0, 0, 0, None)
        for one in steps
    )
    assert sorted(one.started_ns for one in attempts) == [0, 1, 2, 3]
    assert store.table("inputs")[1] == (2, 1, *before["inputs"][0][2:])
    found = store.rows.find("f")
    assert found is not None
    assert found[1:11] == (
        "f", "pipeline", 1, "INTERRUPTED", "forked from run 'r' before position 2", 1000, 1000, 0, 0, 0
    )  # fmt: skip
    assert (found.epoch, found.left_seconds, found.nodes) == (1, -1.0, 2)
    assert store.rows.kept(2, PARENT) == [StepRow(PARENT, "", "r", Step("", "", b"", checksum(b""), 2))]
    for name in TABLES:
        assert store.table(name)[: len(before[name])] == before[name] or name == "steps"
    assert [one for one in store.table("steps") if one[1] == 1] == before["steps"]


@pytest.mark.parametrize(("before", "places"), [(0, []), (1, [(0, "")]), (3, list(COMMITS))])
async def test_where_a_run_is_forked(store: Store, before: int, places: list[Any]) -> None:
    await begun(store)
    forked(store, before)
    assert {(one.position, one.branch) for one in store.rows.steps(2, 1)} == set(places)
    session = store.open("f", if_exists="resume")
    assert session.restored == {at: COMMITS[at] for at in places}
    assert session.prior == PriorUsage()


async def test_a_fork_with_an_output_of_its_own(store: Store) -> None:
    """It stands in for the last of what was before, and for nothing else; it is filed where that was."""
    await begun(store)
    edited = Step("its own", "m:Q", b"[]", checksum(b"[]"), 1, b"g")
    forked(store, 2, edited=edited)
    kept = {(one.position, one.branch): one.step for one in store.rows.steps(1, 1)}
    made = {(one.position, one.branch): one.step for one in store.rows.steps(2, 1)}
    last = (1, "")
    assert made[last] == edited._replace(contract=kept[last].contract)
    assert {at: one for at, one in made.items() if at != last} == {
        at: one for at, one in kept.items() if at[0] < 2 and at != last
    }


async def test_a_fork_with_an_input_of_its_own(store: Store) -> None:
    await begun(store)
    forked(store, 1, n=9)
    assert store.table("inputs")[1] == (2, 1, "another", stored(9), checksum(stored(9)))


async def test_what_cannot_be_forked(store: Store) -> None:
    """No run that is not there or has nothing, at no place before which nothing is committed, and not into another run."""
    await begun(store)
    store.rows.keep("saved", SAVED, "n", "n", EMPTY)
    before = store.tables()
    for source in ("nobody", "saved"):
        with pytest.raises(CheckpointNotFound) as caught:
            forked(store, 0, source=source)
        assert str(caught.value) == f"there is no run {source!r} to fork; check the id and the store"
    with pytest.raises(CheckpointNotFound) as caught:
        forked(store, 4)
    assert str(caught.value) == (
        "run 'r' has no output at position 3, before which it is forked; fork at an earlier node"
    )
    with pytest.raises(RunExists) as exists:
        forked(store, 1, to="r")
    assert str(exists.value) == "run 'r' exists already; give the fork another id"
    assert store.tables() == before
    # A group of which only children are committed has no output.
    store.db.execute("DELETE FROM steps WHERE position = 1 AND branch = ''")
    with pytest.raises(CheckpointNotFound):
        forked(store, 2)


async def test_a_damaged_output_is_not_forked(store: Store) -> None:
    """Unless it is behind the place of the fork."""
    await begun(store)
    store.db.execute("UPDATE steps SET output = x'00' WHERE position = 1 AND branch = '0'")
    with pytest.raises(CorruptCheckpoint) as caught:
        forked(store, 2)
    assert str(caught.value) == (
        "the output of node 'node' at position 1 of run 'r' is damaged; resume from the outermost group around it "
        "(resume_from='group') to make it anew"
    )
    assert store.rows.find("f") is None
    forked(store, 1)
    assert len(store.rows.steps(2, 1)) == 1


async def test_a_fork_takes_an_id_under_which_states_were_saved(store: Store) -> None:
    await begun(store)
    store.rows.keep("f", SAVED, "n", "n", EMPTY)
    forked(store, 1)
    found = store.rows.find("f")
    assert found is not None
    assert (found.run, found.execution, found.nodes) == (2, 1, 1)
    assert len(store.rows.kept(2, SAVED)) == 1


async def test_the_last_execution_is_forked(store: Store) -> None:
    await begun(store)
    session = store.open(n=5, if_exists="restart")
    await session.record(row(0, 99), SCHEMA, State(n=50))
    with pytest.raises(CheckpointNotFound):
        forked(store, 2)
    forked(store, 1)
    assert [one.step.output for one in store.rows.steps(2, 1)] == [stored(50)]
    assert store.table("inputs")[2][3] == stored(5)
