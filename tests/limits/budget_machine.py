"""Any history of a shared budget and of a rate limit, in a store's cells and on plain lists."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stroma.limits import budget_state as ledger
from stroma.limits import rate_state as rates
from stroma.limits.reservations import ProcessCells, StateChange

NODES = ("a", "b")
TERMS = ledger.BudgetTerms("team", "hour", (100, 1000), {"b": 40})
LEASE_MS = 30_000
RATES = rates.RateLimits("llm", 5, 100, 3)
START = int(datetime(2027, 3, 4, 5, 58, tzinfo=UTC).timestamp() * 1000)

nodes = st.sampled_from(NODES)
amounts = st.tuples(st.integers(0, 60), st.integers(0, 500))
which = st.integers(0, 1000)


@dataclass
class Call:
    token: str
    node: str
    amounts: tuple[int, int]
    until: int
    began: int


class _Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = self.make_store()
        self.now = START
        self.tokens = 0

    def make_store(self) -> Any:
        raise NotImplementedError

    def close_store(self) -> None:
        close = getattr(self.store, "close", None)
        if close is not None:
            close()

    def teardown(self) -> None:
        self.close_store()
        self.loop.close()

    def change(self, change: Any) -> Any:
        """As the store does it, at our time."""

        async def go() -> Any:
            if isinstance(self.store, ProcessCells):
                at_our_time = StateChange(
                    change.kind, change.label, lambda state, _: change.apply(state, self.now)
                )
                return await self.store.change_cell("cell", at_our_time)
            return await self.store.change_cell("cell", lambda data, _now: change(data, self.now))

        coroutine: Coroutine[Any, Any, Any] = go()
        return self.loop.run_until_complete(coroutine)

    def token(self) -> str:
        self.tokens += 1
        return str(self.tokens)

    @rule(ms=st.sampled_from((1, 999, 5_000, 29_999, 30_000, 61_000, 600_000, 3_600_000)))
    def time_passes(self, ms: int) -> None:
        self.now += ms


class BudgetMachine(_Machine):
    """Limits of 100 pico-dollars and 1000 tokens an hour; node b may take 40."""

    def __init__(self) -> None:
        super().__init__()
        self.spends: list[tuple[int, str, tuple[int, int]]] = []  # hour, node, took
        self.calls: list[Call] = []
        self.seen: dict[str, list[tuple[int, int]]] = {node: [] for node in NODES}
        #: What calls took beyond what they had reserved.
        self.beyond = [0, 0]

    def hour(self) -> int:
        return self.now // 3_600_000

    def spent(self, i: int, node: str | None = None) -> int:
        return sum(took[i] for hour, who, took in self.spends if hour == self.hour() and node in (None, who))

    def reserved(self, i: int, node: str | None = None) -> int:
        return sum(c.amounts[i] for c in self.calls if c.until > self.now and node in (None, c.node))

    def expected(self, node: str, declared: tuple[int | None, int | None]) -> tuple[int, int] | bool:
        """What the call reserves; True if it has to wait, False if it has no room."""
        findings = []
        for i in (0, 1):
            bounds = [(TERMS.limits[i], self.spent(i), self.reserved(i))]
            if i == 0 and node in TERMS.caps:
                bounds.append((TERMS.caps[node], self.spent(i, node), self.reserved(i, node)))
            known = [took[i] for took in self.seen[node][-16:]]
            lowest = min(limit for limit, *_ in bounds)
            if known and min(known) <= lowest:
                known = [min(amount, lowest) for amount in known]
            if declared[i] is not None:
                known.append(declared[i])
            ask = max(known) if known else max(1, min(limit - s - r for limit, s, r in bounds))
            for limit, spent, reserved in bounds:
                if spent + ask + (reserved if ask else 0) > limit:
                    return spent + ask <= limit
            findings.append(ask)
        return findings[0], findings[1]

    @rule(node=nodes, declared=st.tuples(*(st.none() | st.integers(1, 30) for _ in range(2))))
    def reserve(self, node: str, declared: tuple[int | None, int | None]) -> None:
        token, wanted = self.token(), self.expected(node, declared)
        request = ledger.CallRequest(token, node, declared, LEASE_MS)
        report = self.change(ledger.reserve(TERMS, request))
        if isinstance(wanted, bool):
            assert isinstance(report, ledger.Refusal)
            assert report.waits == wanted == (report.spent + report.requested <= report.limit)
        else:
            assert report == wanted
            self.calls.append(Call(token, node, wanted, self.now + LEASE_MS, self.now))

    @rule(i=which)
    def reserve_again(self, i: int) -> None:
        """The first answer was lost."""
        if self.calls:
            call = self.calls[i % len(self.calls)]
            ask = ledger.CallRequest(call.token, call.node, (None, None), LEASE_MS)
            if call.until + 24 * 3_600_000 > self.now:
                assert self.change(ledger.reserve(TERMS, ask)) == call.amounts

    @rule(i=which, took=amounts, within=st.booleans())
    def settle(self, i: int, took: tuple[int, int], within: bool) -> None:
        if not self.calls:
            return
        call = self.calls.pop(i % len(self.calls))
        if within:
            took = (min(took[0], call.amounts[0]), min(took[1], call.amounts[1]))
        spend = ledger.CallUsage(call.token, call.node, took)
        self.change(ledger.settle(TERMS, [spend]))
        self.change(ledger.settle(TERMS, [spend]))  # Told twice, counted once.
        if call.until + 24 * 3_600_000 > self.now:
            self.spends.append((self.hour(), call.node, took))
            self.seen[call.node].append(took)
            late = call.until <= self.now
            for d in (0, 1):
                self.beyond[d] += took[d] if late else max(0, took[d] - call.amounts[d])

    @rule(i=which)
    def give_back(self, i: int) -> None:
        """A call inside it has to wait."""
        if self.calls:
            call = self.calls[i % len(self.calls)]
            self.change(ledger.give_back("team", call.token))
            call.amounts = (0, 0)

    @rule(i=which)
    def release(self, i: int) -> None:
        if self.calls:
            call = self.calls.pop(i % len(self.calls))
            self.change(ledger.release("team", [call.token]))

    @rule(i=which)
    def renew(self, i: int) -> None:
        if self.calls:
            call = self.calls[i % len(self.calls)]
            if call.until > self.now:  # Else it may take what was given to others meanwhile.
                self.change(ledger.renew_calls("team", [call.token], LEASE_MS))
                call.until = self.now + LEASE_MS

    @invariant()
    def says_what_was_told(self) -> None:
        data, _ = self.store.read_cell("cell") if self.tokens else (None, 0)
        result = ledger.read_account("team", data, self.now)
        if result is not None:
            assert result.spent == [self.spent(0), self.spent(1)]
            reserved = [result.reserved(dimension, self.now) for dimension in (0, 1)]
            assert reserved == [self.reserved(0), self.reserved(1)]
            assert {n: took[0] for n, took in result.by_node.items() if took[0]} == {
                n: self.spent(0, n) for n in NODES if self.spent(0, n)
            }

    @invariant()
    def never_more_than_the_limit(self) -> None:
        """But for what calls took beyond what they had reserved."""
        for i in (0, 1):
            assert self.spent(i) + self.reserved(i) <= TERMS.limits[i] + self.beyond[i]


class RateMachine(_Machine):
    """5 requests and 100 tokens a minute, 3 at once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.started_calls: list[int] = []
        self.counted: dict[str, list[int]] = {}  # by token: when it began, and the tokens that count of it
        self.seen: dict[str, list[int]] = {node: [] for node in NODES}
        #: What calls took beyond what was reserved for them.
        self.beyond = 0

    def expected(self, node: str, declared: int) -> int:
        lately = self.seen[node][-16:]
        if lately and min(lately) <= 100:
            lately = [min(took, 100) for took in lately]
        return max([declared, *lately])

    @rule(node=nodes, declared=st.integers(1, 60))
    def acquire(self, node: str, declared: int) -> None:
        token, wanted = self.token(), self.expected(node, declared)
        report = self.change(rates.acquire(RATES, token, node, declared, LEASE_MS))
        live = [call for call in self.calls if call.until > self.now]
        if report is None:
            assert len(live) < 3
            assert wanted <= 100
            self.calls.append(Call(token, node, (0, wanted), self.now + LEASE_MS, self.now))
            self.started_calls.append(self.now)
            self.counted[token] = [self.now, wanted]
            # Any 60 seconds: those that end now are the fullest that hold this call.
            assert sum(at > self.now - 60_000 for at in self.started_calls) <= 5
            tokens = sum(tokens for at, tokens in self.counted.values() if at > self.now - 60_000)
            assert tokens <= 100 + self.beyond
        elif isinstance(report, rates.TooLarge):
            assert wanted == report.tokens > 100
            assert min(self.seen[node][-16:]) > 100
            self.seen[node] = []
        elif report.ms is not None:
            assert 0 < report.ms <= 61_000
            # Nobody is sent away for nothing: seen over 62 seconds, there is no room.
            requests = sum(at > self.now - 62_000 for at in self.started_calls)
            tokens = sum(tokens for at, tokens in self.counted.values() if at > self.now - 62_000)
            assert requests >= 5 or tokens + wanted > 100
        else:
            assert len(live) >= 3

    @rule(i=which, took=st.integers(0, 150))
    def leave(self, i: int, took: int) -> None:
        if self.calls:
            call = self.calls.pop(i % len(self.calls))
            self.change(
                rates.release_call("llm", call.token, took, rates.CallReport(answered=True), learns=True)
            )
            if call.until + 24 * 3_600_000 > self.now:
                self.seen[call.node].append(took)
                self.beyond += max(0, took - self.counted[call.token][1])
                self.counted[call.token][1] = took

    @rule(i=which)
    def renew(self, i: int) -> None:
        if self.calls:
            call = self.calls[i % len(self.calls)]
            if call.until > self.now:
                self.change(rates.renew_calls("llm", [call.token], LEASE_MS))
                call.until = self.now + LEASE_MS

    @rule(i=which)
    def die(self, i: int) -> None:
        """A process is killed: its places are free after their leases."""
        if self.calls:
            self.calls.pop(i % len(self.calls))
            self.now += LEASE_MS
