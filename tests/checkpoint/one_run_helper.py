"""A process of tests/checkpoint/test_one_run.py: random operations on one run, each written to a diary.

usage: python -m tests.checkpoint.one_run_helper KIND PLACE SEED NUMBER STEPS DIARY DELETES
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from tests.shared_stores import opened
from tests.store_suite.helpers import State, row, settled

from stroma.checkpoint import RunRequest, StoreError
from stroma.checkpoint.entries import SentMessage, Waiting
from stroma.checkpoint.queue import ClaimRequest, QueueEntry, RunLimits, ServedCode
from stroma.checkpoint.records import RunQuery
from stroma.contracts.schema import schema_of
from stroma.engine.restore import read_output
from stroma.failures import FailureClass

RUN = "run:1/é\n*"
LONG_LEASE = 60.0
SCHEMA = schema_of(State)
#: How often each operation is drawn.
WEIGHTS = {
    "open": 6,
    "commit": 12,
    "fail": 3,
    "suspend": 1,
    "ask": 1,
    "messages": 1,
    "end": 3,
    "abandon": 1,
    "give_back": 1,
    "claim": 1,
    "cancel": 2,
    "pause": 1,
    "unpause": 1,
    "reopen": 1,
    "set_budget": 1,
    "signal": 2,
    "send": 2,
    "fork": 1,
    "submit": 1,
    "block": 1,
    "postpone": 1,
    "save": 1,
    "read": 2,
}
DELETING = {"delete": 1, "gc": 1}


class Owned:
    """A session that this process has open."""

    def __init__(self, session: Any) -> None:
        self.session, fence = session, session.fence
        #: The run, until it is deleted; its execution; and the session.
        self.at = [str(getattr(fence.run, "token", fence.run)), fence.execution, fence.epoch]
        self.next = 1 + max((position for position, _ in session.restored), default=-1)


class Operator:
    """Does operations on the run. Each of its methods is one."""

    def __init__(self, store: Any, seed: str, number: int, diary: str) -> None:
        self.store, self.number = store, number
        self.draw = random.Random(f"{seed} {number}")
        self.diary = open(diary, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.owned: list[Owned] = []
        self.names = itertools.count()
        self.starts = itertools.count(1_700_000_000_000_000_000 + number * 10**15, 1_000_000)

    def name(self) -> str:
        return f"{self.number}-{next(self.names)}"

    def write(self, operation: str, since: int, **facts: Any) -> None:
        line = {"number": self.number, "operation": operation, "since": since, **facts}
        self.diary.write(json.dumps({**line, "until": time.monotonic_ns()}, default=repr) + "\n")

    async def perform(self, operation: str, call: Awaitable[Any], **facts: Any) -> tuple[bool, Any]:
        """Return True and the result, or False if the store refused it."""
        since = time.monotonic_ns()
        try:
            result = await call
        except StoreError as error:
            self.write(operation, since, error=type(error).__name__, text=str(error), **facts)
            return False, None
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            self.write(operation, since, error="unexpected", text=text, **facts)
            return False, None
        self.write(operation, since, done=True, **facts)
        return True, result

    async def step(self, operation: str) -> None:
        of_session: Callable[[Owned], Awaitable[bool]] | None = getattr(self, f"_{operation}", None)
        if of_session is None:
            await getattr(self, operation)()
        elif self.owned:
            one = self.draw.choice(self.owned)
            if not await of_session(one):
                self.owned.remove(one)
                one.session.abandon()

    # ---- sessions

    async def open(self, claim: str | None = None) -> None:
        lease = LONG_LEASE if claim else self.draw.choice([0.05, 0.3, LONG_LEASE, LONG_LEASE])
        how = self.draw.choice(["resume"] * 6 + ["restart", "return", "error", "new"])
        request = RunRequest(
            RUN,
            "pipeline",
            State(),
            SCHEMA,
            if_exists="resume" if claim else how,
            if_running="error" if claim else self.draw.choice(["error"] * 5 + ["take_over"]),
            lease_seconds=lease,
            deliver=self.draw.random() < 0.3,
            max_recoveries=self.draw.choice([None, None, 1]),
            force=self.draw.random() < 0.3,
            tags=self.draw.choice([(), ("t",), ("u", "v")]),
            claim=claim,
            any_input=claim is not None,
            due_ms=_now_ms() if claim else None,
        )
        since = time.monotonic_ns()
        is_open, session = await self.perform("try to open", settled(self.store.open_run(request)))
        if not is_open:
            return
        one, is_owner = Owned(session), bool(session.fence.owner)
        commits = {
            f"{at}:{branch}": read_output(SCHEMA, committed, None).text  # type: ignore[attr-defined]
            for (at, branch), committed in session.restored.items()
        }
        self.write(
            "open",
            since,
            at=one.at,
            is_owner=is_owner,
            takes_over=request.if_running == "take_over",
            is_long=lease == LONG_LEASE and session.finished is None,
            commits=commits,
        )
        if session.finished is not None:
            await self.perform("end a returned run", settled(session.end("FAILED", "")), at=one.at)
        elif is_owner:
            self.owned.append(one)

    async def _commit(self, one: Owned) -> bool:
        position, schemas = one.next, SCHEMA
        one.next += 1
        for branch in [""] if self.draw.random() < 0.7 else map(str, range(self.draw.randint(2, 4))):
            state = State(text=self.name())
            attempt = row(position, branch=branch, tokens=3, output=schemas.snapshot(state), schema=schemas)
            attempt = attempt._replace(started_ns=next(self.starts))
            facts = {"at": one.at, "place": f"{position}:{branch}", "output": state.text}
            call = settled(one.session.record(attempt, schemas, state))
            if not (await self.perform("commit", call, start=attempt.started_ns, **facts))[0]:
                return False
        return True

    async def _fail(self, one: Owned) -> bool:
        attempt = row(one.next, tokens=2, failure=FailureClass.RECOVERABLE, message="no")
        attempt = attempt._replace(started_ns=next(self.starts))
        call = settled(one.session.record(attempt, None, None))
        return (await self.perform("fail", call, at=one.at, start=attempt.started_ns))[0]

    async def _suspend(self, one: Owned) -> bool:
        attempt = row(one.next)._replace(outcome="suspended", started_ns=next(self.starts))
        call = settled(one.session.suspend(attempt, Waiting(one.next, "", "node", "may I?", "")))
        return (await self.perform("suspend", call, at=one.at, start=attempt.started_ns))[0]

    async def _ask(self, one: Owned) -> bool:
        call = settled(one.session.ask(Waiting(one.next, "q", "node", "why?", "")))
        return (await self.perform("ask", call, at=one.at))[0]

    async def _messages(self, one: Owned) -> bool:
        is_done, sent = await self.perform("messages", settled(one.session.messages(0)), at=one.at)
        if is_done:
            self.write("read messages", 0, numbers=[message.number for message in sent])
        return is_done

    async def _end(self, one: Owned) -> bool:
        status = self.draw.choice(["COMPLETED", "SUSPENDED", "FAILED", "INTERRUPTED", "PARTIAL"])
        wake_ms = self.draw.choice([None, 0, _now_ms() + 50])
        self.write("begin to end", time.monotonic_ns(), at=one.at)
        await self.perform("end", settled(one.session.end(status, "why", wake_ms)), at=one.at)
        return False

    async def _give_back(self, one: Owned) -> bool:
        self.write("begin to end", time.monotonic_ns(), at=one.at)
        await self.perform("give back", settled(one.session.give_back()), at=one.at)
        return False

    async def _abandon(self, one: Owned) -> bool:
        self.write("begin to end", time.monotonic_ns(), at=one.at)
        return False

    # ---- the queue

    async def submit(self) -> None:
        entry = QueueEntry(_now_ms(), self.draw.randint(0, 3), self.draw.choice([None, "k"]))
        await self.perform("submit", self.store.submit(RunRequest(RUN, "pipeline", State(), SCHEMA), entry))

    async def claim(self) -> None:
        token = self.name()
        limits = RunLimits(max_runs_per_key=self.draw.choice([None, 1]))
        request = ClaimRequest(token, 0.3, 5, _now_ms(), {"pipeline": limits})
        _, claimed = await self.perform("claim", self.store.claim(request))
        for one in claimed or ():
            what = self.draw.choice(["open", "open", "block", "postpone"])
            if one.run_id != RUN or what == "postpone":
                await self.perform("postpone", self.store.postpone(one.run_id, token, _now_ms()))
            elif what == "block":
                await self.perform("block", self.store.block(RUN, "no", "code", token, _now_ms()))
            else:
                await self.open(token)

    async def block(self) -> None:
        await self.perform("block", self.store.block(RUN, "no", "code", None, _now_ms()))

    async def postpone(self) -> None:
        await self.perform("postpone", self.store.postpone(RUN, "nobody", 0))

    # ---- requests

    async def cancel(self) -> None:
        await self.perform("cancel", self.store.cancel(RUN))

    async def pause(self) -> None:
        await self.perform("pause", self.store.pause(RUN))

    async def unpause(self) -> None:
        await self.perform("unpause", self.store.unpause(RUN))

    async def reopen(self) -> None:
        await self.perform("reopen", self.store.reopen(RUN))

    async def set_budget(self) -> None:
        await self.perform("set_budget", self.store.set_budget(RUN, {"max_tokens_total": 10**6}))

    async def signal(self) -> None:
        _, questions = await self.perform("waiting", asyncio.to_thread(self.store.waiting, RUN))
        if questions:
            answer = self.draw.choice(questions)._replace(payload=json.dumps(self.name()).encode())
            await self.perform("signal", self.store.signal(RUN, answer))

    async def send(self) -> None:
        message = SentMessage(0, self.draw.choice("ab"), self.name(), b'"x"')
        await self.perform("send", self.store.send(RUN, message))

    async def fork(self) -> None:
        forked = f"fork {self.name()}"
        is_done, _ = await self.perform("fork", self.store.fork(RUN, forked, self.draw.randint(0, 4)))
        if is_done:
            await self.perform("read a fork", asyncio.to_thread(self.store.attempts, forked))

    async def save(self) -> None:
        await self.perform("save", settled(self.store.save(RUN, "other", State(text="saved"))))

    async def delete(self) -> None:
        if self.draw.random() < 0.3:
            await self.perform("delete", settled(self.store.delete(RUN)))

    async def gc(self) -> None:
        unfinished = self.draw.random() < 0.3
        await self.perform("gc", self.store.gc(keep_for=timedelta(0), unfinished=unfinished))

    # ---- reading

    async def read(self) -> None:
        await self.perform("read", asyncio.to_thread(self._read_all))

    def _read_all(self) -> None:
        store = self.store
        store.run_page(RunQuery(), limit=5)
        store.find_run("run")
        store.tally(0, 10**12)
        store.queue_figures({"pipeline": ServedCode()}, _now_ms())
        for of_run in (store.get_run, store.attempts, store.attempt_page, store.flow_notes, store.control):
            of_run(RUN)


def _now_ms() -> int:
    return int(time.time() * 1000)


async def main(kind: str, where: str, seed: str, number: str, steps: str, diary: str, deletes: str) -> None:
    store = opened(kind, where)
    operator = Operator(store, seed, int(number), diary)
    weights = WEIGHTS | (DELETING if deletes == "yes" else {})
    for operation in operator.draw.choices(list(weights), weights.values(), k=int(steps)):
        await operator.step(operation)
        if operator.draw.random() < 0.15:
            await asyncio.sleep(operator.draw.choice([0, 0.001, 0.06]))
    for one in operator.owned:
        await operator._abandon(one)
        one.session.abandon()
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
