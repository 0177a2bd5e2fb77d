"""The world of a random program: its nodes, its ledger of effects, its messages, and its lives."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from tests.flows.programs import Answer, Life, Program, Value, flow_of, mixed
from tests.kit import node, retry_policies

from stroma import NodeContract, NotDone, StromaRunner, current_node, stroma_node
from stroma.checkpoint import CheckpointNotFound, StoreError
from stroma.testing.crash import Boundary, Deaths


class Refused(Exception):
    status_code = 400


class Kills(Deaths):
    """Ends a life at a random boundary: the process dies, or the task of the run is cancelled."""

    def __init__(self, chance: random.Random, *, kill: bool = False) -> None:
        self.left = chance.randint(1, chance.choice([2, 5, 10, 20, 40, 10**9]))
        self.cancels = not kill and chance.random() < 0.3
        self.task: asyncio.Task[Any] | None = None
        super().__init__(self._is_due, kill=kill)

    def _is_due(self, boundary: Boundary) -> bool:
        self.left -= 1
        if self.left == 0 and self.cancels and self.task is not None:
            self.task.cancel()
            return False
        return self.left == 0

    def opened(self, ctx: Any, session: Any) -> Any:
        mortal: Any = super().opened(ctx, session)

        def dying(name: str) -> Any:
            method = getattr(mortal, name)

            def before(*args: Any) -> Any:
                if self.reach(ctx, Boundary("before_node", name)):
                    raise self.refuse()
                return method(*args)

            return before

        mortal.flush, mortal.ask = dying("flush"), dying("ask")
        return mortal


def runner_of(store: Any, **config: Any) -> StromaRunner:
    return StromaRunner.quick(
        store=store,
        run_id="r",
        resume=True,
        max_recoveries=1000,
        if_running="take_over",
        policy_map=retry_policies(30),
        **config,
    )


class ProgramWorld:
    """What was called in all lives of a program.

    Attributes:
        keys: idempotency keys by node and place; ``charged``: branches of the effects that were made.
        ledger: the places of effects by their key, with the number of the receipt.
        has_paths: a step has failed in one life that need not fail in the next one.
        life: what the body has done in the last life.
        side: a file that has all but ``life`` of lives in other processes.
    """

    def __init__(self, chance: random.Random, *, has_faults: bool = False, side: Path | None = None) -> None:
        self.chance, self.has_faults = chance, has_faults
        self.keys: dict[str, set[str]] = {}
        self.ledger: dict[str, tuple[str, int]] = {}
        self.charged: set[str] = set()
        self.life = Life()
        self.sent: dict[str, int] = {}
        self.committed: set[str] = set()
        self.inputs: dict[str, str] = {}
        self.has_paths = False
        self.result: Any = None
        names = ("add", "left", "right", "first")
        self.nodes: dict[str, Any] = {name: node(name, self._step, Value, Value) for name in names}
        self.nodes["plain"] = node("plain", self._plain, Value, Value)
        self.nodes["bad"] = node("bad", self._bad, Value, Value)
        self.nodes["flaky"] = node("flaky", self._flaky, Value, Value)
        for name, func in (("pay", self._pay), ("refused", self._refused)):
            contract = NodeContract(
                node_id=name, input_schema=Value, output_schema=Value, effect=True, reconcile=self._look
            )
            self.nodes[name] = stroma_node(name, contract)(func)
        unknown = NodeContract(node_id="wire", input_schema=Value, output_schema=Value, effect=True)
        self.nodes["wire"] = stroma_node("wire", unknown)(self._wire)
        self.side = None
        if side is not None and side.exists():
            for line in side.read_text().splitlines():
                self._record(*json.loads(line))
        self.side = side

    def _record(self, kind: str, place: str, key: str, branch: str, n: int = 0) -> None:
        """Record a call, or an effect's payment with its receipt's number, also for other processes."""
        if kind == "call":
            self.keys.setdefault(place, set()).add(key)
        elif kind == "failed":
            self.has_paths = True
        else:
            assert key not in self.ledger, f"paid twice: {place}"
            self.ledger[key] = place, n
            self.charged.add(branch)
        if self.side is not None:
            with self.side.open("a") as file:
                file.write(json.dumps([kind, place, key, branch, n]) + "\n")

    def outcome(self) -> str | int:
        """Return the number that the program has returned, or the node that it failed with."""
        result = self.result
        assert result is not None
        assert result.status in ("COMPLETED", "RESUMED", "FAILED"), result.suspended
        if result.failure is None:
            return int(result.output.n)
        assert result.failure.node_id == "bad", result.failure
        return "bad"

    def _note(self, state: Value) -> Any:
        here = current_node()
        assert here.branch not in self.committed, here.branch
        what = f"{here.node_id} {state!r}"
        if here.node_id in ("add", "plain", "flaky"):  # A group that has no output calls its children again.
            assert what not in {self.inputs.get(branch) for branch in self.committed}, what
        self.inputs[here.branch] = what
        self._record("call", f"{here.node_id} {state.at}", here.idempotency_key, here.branch)
        return here

    async def _take_time(self) -> None:
        for _ in range(self.chance.choice([0, 0, 1, 2, 5])):
            await asyncio.sleep(0)
        if self.chance.random() < 0.3:
            await asyncio.sleep(self.chance.random() * 0.004)

    def _fail(self, share: float) -> None:
        if self.has_faults and self.chance.random() < share:
            raise ConnectionError("a fault, which a retry heals")

    async def _step(self, state: Value) -> Any:
        self._note(state)
        await self._take_time()
        self._fail(0.05)
        return Value(n=mixed(state.n, state.at), at=state.at), 10

    def _plain(self, state: Value) -> Any:
        self._note(state)
        return Value(n=mixed(state.n, state.at), at=state.at), 10

    async def _bad(self, state: Value) -> Value:
        self._note(state)
        await self._take_time()
        raise NotImplementedError("bad")

    async def _flaky(self, state: Value) -> Value:
        self._note(state)
        await self._take_time()
        if self.has_faults and self.chance.random() < 0.3:
            self._record("failed", state.at, "", "")
            raise NotImplementedError("flaky")
        return Value(n=mixed(state.n, state.at), at=state.at)

    async def _pay(self, state: Value) -> Any:
        here = self._note(state)
        self._fail(0.1)
        await self._take_time()
        receipt = self._receipt(state)
        self._record("paid", state.at, here.idempotency_key, here.branch, receipt.n)
        await self._take_time()
        self._fail(0.1)
        return receipt, 10

    async def _wire(self, state: Value) -> Any:
        """Pay, and lose the connection now and then, before or after that."""
        try:
            return await self._pay(state)
        except ConnectionError as error:
            raise ConnectionResetError("connection reset by peer") from error

    async def _refused(self, state: Value) -> Value:
        self._note(state)
        await self._take_time()
        raise Refused("bad card")

    async def _look(self, state: Value, key: str) -> Value | NotDone:
        return self._receipt(state) if key in self.ledger else NotDone()

    def _receipt(self, state: Value) -> Value:
        return Value(n=mixed(state.n, f"paid {state.at}"), at=state.at)

    async def live_on(self, store: Any, program: Program, kills: Kills | None = None) -> Any:
        """Run the program with answers to its end. Return its result, or raise the death of the life."""
        while True:
            self.life = Life()
            if self.keys:  # There is a run to look at.
                self.committed = {at.branch for at in store.attempts("r") if at.outcome == "success"}
            config = {"inline_wait_seconds": 0} if self.chance.random() < 0.1 else {}
            work = runner_of(store, **config).run(flow_of(program, self.nodes, self.life), Value())
            life = asyncio.ensure_future(work)
            if kills is not None:
                kills.task = life
            sender = asyncio.ensure_future(self._send_often(store))
            try:
                self.result = result = await life
            finally:
                sender.cancel()
                await asyncio.wait([sender])
            if result.status == "INTERRUPTED":
                return None
            if result.failure is not None and result.failure.node_id == "flaky":
                continue
            if result.status != "SUSPENDED":
                return result
            for question in result.questions:
                await self._answer(store, question)
            await self._send(store)

    async def _answer(self, store: Any, question: Any) -> None:
        """Answer a question; of an effect by the ledger."""
        if question.kind == "effect":
            (asked,) = [one for one in store.waiting("r") if one.id == question.id]
            paid = self.ledger.get(asked.effect.key)
            statement = NotDone() if paid is None else Value(n=paid[1], at=paid[0])
            await runner_of(store).signal("r", statement, question=question.id)
        elif question.reason.startswith("answer "):
            await runner_of(store).signal("r", Answer(text="yes"), question=question.id)

    async def _send_often(self, store: Any) -> None:
        pace = self.chance.choice([0.0, 0.002, 0.01])
        while True:
            await asyncio.sleep(self.chance.random() * pace)
            await self._send(store)

    async def _send(self, store: Any) -> None:
        """Send the next message of a topic, or one again."""
        topics = [one for one, count in self.life.wanted.items() if self.sent.get(one, 0) < count]
        if not topics:
            return
        topic = self.chance.choice(topics)
        number = self.sent.get(topic, 0)
        if number and self.chance.random() < 0.2:
            number -= 1
        text: Any = [] if topic.endswith("misfit") and not number else str(number)
        try:
            await runner_of(store).send("r", {"text": text}, topic=topic, id=f"{topic} {number}")
        except CheckpointNotFound:
            return
        except StoreError as error:
            if "has ended" not in str(error):
                raise
            return
        self.sent[topic] = max(number + 1, self.sent.get(topic, 0))
