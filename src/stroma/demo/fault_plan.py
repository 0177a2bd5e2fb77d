"""Fault plan of the demo's provider: the faults of each text, and the ledger of served requests."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, TypedDict

from stroma.demo import rules

__all__ = [
    "DEFAULT_SEED",
    "FAULTS",
    "TASKS",
    "TRANSPORT_FAULTS",
    "Decision",
    "Ledger",
    "Served",
    "Stats",
    "draws",
    "fault_plan",
    "text_sha",
]

# Chosen so that the documents that ship with the demo meet every fault of `FAULTS` but the quota, with one
# hang, the slow fault, among them. A changed document changes its own faults: `tests/demo/test_provider.py`
# says when another seed is needed.
DEFAULT_SEED: Final = 6637

TASKS: Final = ("extract", "classify", "risk")

# Share of the faults, by kind. A hang costs a client its whole timeout, so it is the rarest.
_WEIGHTS: Final = {"429": 6, "500": 4, "503": 4, "hang": 2, "drop": 3, "malformed": 3, "wrong_type": 3}
FAULTS: Final = (*_WEIGHTS, "quota")
TRANSPORT_FAULTS: Final = ("429", "500", "503", "hang", "drop")
_FIRST_FAULT_RATE: Final = 0.35
_SECOND_FAULT_RATE: Final = 0.30  # after a transport fault; the third call is always right


class Served(TypedDict):
    """One answered request. `call` counts the requests with that task and text, 1-based."""

    task: str
    sha12: str
    call: int
    outcome: str


class Stats(TypedDict):
    """Requests served so far. `by_outcome` has "ok" and the names of `FAULTS`."""

    calls: int
    by_outcome: dict[str, int]
    by_text: dict[str, int]
    served: list[Served]


def text_sha(task: str, text: str) -> str:
    """Return the SHA-256 (hex) of a task and the text of its user message; `by_text` has its first 12 digits.

    Line ends, white space around a document and the layout of JSON do not count, what they say does.
    """
    if task == "extract":
        text = rules.unwrap(text)
    else:
        try:
            text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        except ValueError:
            text = text.strip()
    return hashlib.sha256(f"{task}\n{text}".encode("utf-8", "replace")).hexdigest()


def draws(*key: object) -> list[float]:
    """Return eight numbers in 0..1 that depend on the key only."""
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in range(0, 32, 4)]


def _pick(draw: float) -> str:
    point = draw * sum(_WEIGHTS.values())
    for kind, weight in _WEIGHTS.items():
        point -= weight
        if point < 0:
            return kind
    return next(reversed(_WEIGHTS))


def fault_plan(seed: int, task: str, text: str) -> tuple[str, ...]:
    """Return the faults of the first calls with this task and text, at most two; later calls succeed.

    A wrong answer (`malformed`, `wrong_type`) is always the last fault: the call after it is answered
    rightly.
    """
    return _plan(seed, text_sha(task, text))


def _plan(seed: int, sha: str) -> tuple[str, ...]:
    first, first_kind, second, second_kind, *_ = draws(seed, sha, "plan")
    if first >= _FIRST_FAULT_RATE:
        return ()
    kind = _pick(first_kind)
    if kind not in TRANSPORT_FAULTS or second >= _SECOND_FAULT_RATE:
        return (kind,)
    return (kind, _pick(second_kind))


@dataclass(frozen=True, slots=True)
class Decision:
    """The provider's decision about one request: an outcome and its latency."""

    outcome: str
    call: int  # 1-based, of this text
    sha: str
    latency: float  # seconds
    retry_after_ms: int


@dataclass(slots=True)
class Ledger:
    """Decisions and counts of requests, shared by the threads that serve connections."""

    seed: int
    calm: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _planned: Counter[str] = field(default_factory=Counter)
    _calls: Counter[str] = field(default_factory=Counter)
    _outcomes: Counter[str] = field(default_factory=Counter)
    _served: list[Served] = field(default_factory=list)

    def decide(self, task: str, text: str, forced: str | None) -> Decision:
        sha = text_sha(task, text)
        with self._lock:
            self._calls[sha] += 1
            call = self._calls[sha]
            if forced is not None:
                # Shown on purpose: it leaves the faults that the text has coming as they are.
                outcome = forced
            else:
                plan = () if self.calm else _plan(self.seed, sha)
                planned = self._planned[sha]
                outcome = plan[planned] if planned < len(plan) else "ok"
                self._planned[sha] += 1
            # Counted before it is answered: a client that dies in between has bought this answer all the
            # same.
            self._outcomes[outcome] += 1
            self._served.append({"task": task, "sha12": sha[:12], "call": call, "outcome": outcome})
        latency, header, *_ = draws(self.seed, sha, call, "answer")
        return Decision(outcome, call, sha, 0.02 + 0.04 * latency, 1000 if header < 0.5 else 300)

    def stats(self) -> Stats:
        with self._lock:
            return {
                "calls": len(self._served),
                "by_outcome": dict(self._outcomes),
                "by_text": {sha[:12]: count for sha, count in self._calls.items()},
                "served": list(self._served),
            }
