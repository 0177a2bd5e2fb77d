"""Rows of one run as plain data, for everything that draws it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stroma._utils.text import clean
from stroma.failures.classes import describe_class
from stroma.trace.rejected import RejectedOutput


@dataclass(slots=True)  # Not frozen: 0.6 us instead of 5 to make one, and a page of a large map makes 10,000.
class Bar:
    """One attempt. Treat it as immutable.

    Attributes:
        at: its place in the run: "2", "2.0" for a child of a group.
        began_ms, took_ms: since the first attempt began, and of the function alone; of a group, from the
            first function inside it to the last.
        outcome: "success", "failure", "cancelled", "suspended" or "forked"; of a wait of a flow "sleeping" or
            "slept", or of a question "open", "answered" or "expired", or for a message "receiving",
            "received" or "missed".
        is_committed: True if its output was committed.
        input_state, output_state: plain JSON data; None if not known.
        function_ms: for how long functions ran, of a group in which there were waits as well; None for all
            others.
        rejected: its output, if that broke its contract.
        is_damaged: its stored output cannot be read.
        idempotency_key: that of its call; None if it is not known.
    """

    node_id: str
    at: str
    attempt: int
    began_ms: float
    took_ms: float
    outcome: str
    failure_class: str | None = None
    reason: str | None = None
    message: str | None = None
    tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    model: str | None = None
    is_committed: bool = True
    input_state: Any = None
    output_state: Any = None
    function_ms: float | None = None
    rejected: RejectedOutput | None = None
    is_damaged: bool = False
    idempotency_key: str | None = None

    @property
    def key(self) -> str:
        """Names it among the attempts of its run; safe in an address."""
        digest = hashlib.sha256(f"{self.at}\0{self.attempt}\0{self.began_ms}".encode())
        return f"a{digest.hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class InProgress:
    """An attempt that is believed to run: nothing of it is recorded before it ends.

    Attributes:
        at: its place; "" if it is not known.
        since_ms: end of what was recorded last, from the first attempt on.
    """

    at: str
    label: str
    since_ms: float


@dataclass(frozen=True, slots=True)
class StopCause:
    """The cause that stopped a run.

    Attributes:
        resume_command: "" if the run cannot be resumed.
        rejected: the output that broke its contract, if it is stored.
    """

    node_id: str
    at: str
    attempt: int
    failure_class: str
    message: str
    reason: str | None = None
    resume_command: str = ""
    rejected: RejectedOutput | None = None

    @property
    def fields(self) -> list[str]:
        return fields_named(self.message)

    @property
    def why(self) -> str:
        """The class of the failure, and its reason if one is known."""
        return describe_class(self.failure_class, self.reason)


@dataclass(frozen=True, slots=True)
class Story:
    """A run.

    Attributes:
        left_out: how many attempts there are beside ``bars``.
        lost: tokens and US dollars of those that committed nothing, as far as they are known.
        facts: (label, text) of each thing that is known of it besides, times in UTC.
        waits: the sleeps of flows, their questions and their waits for messages, which are no attempts.
        resumes: (from, to, cause) of each stretch after which the run was continued, in milliseconds.
        open_waits: what attempts at a place wait for, by place.
        first_ns: time from which bars and waits are counted, in nanoseconds since the epoch.
    """

    run_id: str
    pipeline: str
    status: str
    bars: Sequence[Bar]
    tokens: int
    cost_usd: float
    began_ms: int = 0
    seconds: float = 0.0
    box: StopCause | None = None
    facts: Sequence[tuple[str, str]] = field(default=())
    left_out: int = 0
    lost: tuple[int, float] = (0, 0.0)
    waits: Sequence[Bar] = ()
    resumes: Sequence[tuple[float, float, str]] = ()
    open_waits: Mapping[str, str] = field(default_factory=dict)
    first_ns: int = 0

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """The facts, without an error that the box has."""
        message = None if self.box is None else clean(self.box.message, 2000)
        return [(label, text) for label, text in self.facts if label != "error" or text != message]

    @property
    def wasted(self) -> tuple[int, float]:
        """Tokens and US dollars of the attempts without output."""
        tokens, cost = self.lost
        bars = [bar for bar in self.bars if not bar.is_committed]
        return tokens + sum(bar.tokens for bar in bars), cost + sum(bar.cost_usd for bar in bars)


def awaited_topics(waits: Iterable[Bar]) -> list[str]:
    """Return the topics of the messages that flows wait for, each once."""
    return list(dict.fromkeys(bar.reason or "" for bar in waits if bar.outcome == "receiving"))


_VIOLATION: Final = re.compile(r"(?:\w+: )?Contract violation for .*? \((input|output)\): (.*)", re.DOTALL)
_FIELD: Final = re.compile(r"([\w$-]+(?:\.[\w$-]+)*): ")


def violated_side(message: str) -> str | None:
    """Return the side of a contract, "input" or "output", that broke; None for another message."""
    match = _VIOLATION.match(message)
    return match and match[1]


def fields_named(message: str, side: str | None = None) -> list[str]:
    """Return the paths that the message of a broken contract names: "lines.0.price".

    ``side``: only those of this side.
    """
    match = _VIOLATION.match(message)
    parts = match[2].split("; ") if match and side in (None, match[1]) else []
    return [at[1] for part in parts if (at := _FIELD.match(part))]


def without_values(message: str) -> str:
    """Return the message of a broken contract with its paths alone: an error text may quote a value."""
    match = _VIOLATION.match(message)
    if match is None:
        return message
    return message[: match.start(2)] + "; ".join(f"{path}: hidden" for path in fields_named(message))


def waits(bars: Iterable[Bar]) -> Iterator[tuple[Bar, float, float]]:
    """Yield each further attempt with the start and length of the wait before it, in milliseconds."""
    last: dict[str, Bar] = {}
    for bar in sorted(bars, key=lambda bar: (bar.began_ms, bar.attempt)):
        before = last.get(bar.at)
        if before is not None and bar.attempt > 1:
            ended = before.began_ms + before.took_ms
            if bar.began_ms > ended:
                yield bar, ended, bar.began_ms - ended
        last[bar.at] = bar
