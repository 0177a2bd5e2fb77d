"""``stroma demo``: three scenes with a pipeline on real documents and a provider that misbehaves.

The scenes are the same commands that a user would type, in processes of their own; each provider is in this
process, so that it outlives the one that is killed and its ledger can tell what was bought.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from stroma._utils.child_process import child_command, child_environment
from stroma._utils.text import break_command, clean, format_usd
from stroma.checkpoint import AttemptRecord
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.contracts.schema import schema_of
from stroma.demo.agent import BOOK_VARIABLE
from stroma.demo.pipeline import BASE_URL_VARIABLE, Documents
from stroma.demo.provider import Provider, digest_of

_TARGET = "stroma.demo.pipeline:pipeline"
_AGENT = "stroma.demo.agent:support"
_SUSPENDED: Final = 7  # exit code
_KILL_AFTER = 8  # committed documents
_PATIENCE_SECONDS = 60.0
_TIGHT_BUDGET_USD = "0.0015"
_COLUMNS: Final = 79


class Demo:
    """One run of the demo: its files, and how its commands are run."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.db = work / "runs.db"
        self.book = work / "bank.jsonl"
        #: The command as this demo was begun, which the printed commands begin with.
        self.program = os.environ.get("STROMA_PROGRAM") or "stroma"
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def title(self, text: str) -> None:
        print(f"\n\033[1m{text}\033[0m" if self.colour else f"\n{text}", flush=True)

    def print_line(self, text: str = "") -> None:
        print(text, flush=True)

    def start(self, provider: Provider | None, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start one ``stroma`` command in a process of its own and show its progress."""
        self.print_line(f"$ {break_command(f'{self.program} {shlex.join(words)}', _COLUMNS - 2)}\n")
        variables = {BOOK_VARIABLE: str(self.book), "STROMA_DB": str(self.db), "STROMA_PROGRAM": self.program}
        if provider is not None:
            variables[BASE_URL_VARIABLE] = provider.base_url
        env = child_environment(**variables)
        env.pop("OPENAI_API_KEY", None)  # The demo buys nothing, whatever the user's shell is set up for.
        return subprocess.Popen(child_command(*words), env=env, cwd=self.work, stdout=subprocess.DEVNULL)

    def run(self, provider: Provider | None, words: Sequence[str]) -> int:
        return self.start(provider, words).wait(_PATIENCE_SECONDS)

    def kill_when(
        self, is_time: Callable[[], bool], provider: Provider | None, words: Sequence[str]
    ) -> int | None:
        """Start one command and kill it (kill -9). Return its exit code if it ended by itself before."""
        process = self.start(provider, words)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while process.poll() is None and time.monotonic() < deadline and not is_time():
            time.sleep(0.02)
        code = process.poll()
        process.kill()
        process.wait()
        return code

    def attempts(self, run_id: str) -> list[AttemptRecord]:
        return SQLiteStore(self.db).attempts(run_id) if self.db.exists() else []

    def names(self, run_id: str) -> list[str]:
        """Return the documents of a run, in order."""
        return [document.name for document in self._documents(run_id).documents]

    def bookings(self) -> list[str]:
        """Return the lines of the bank's book."""
        return self.book.read_text("utf-8").splitlines() if self.book.exists() else []

    def _documents(self, run_id: str) -> Documents:
        first = next(a for a in self.attempts(run_id) if a.position == 0 and a.output is not None)
        read = schema_of(Documents).decode(first.output or b"")
        assert isinstance(read, Documents)
        return read

    def calls(self, provider: Provider, run_id: str) -> dict[str, int]:
        """Return how often a provider was asked about each document, by its own ledger."""
        ledger = provider.calls()
        return {
            d.name: ledger.get(digest_of("extract", d.text), 0) for d in self._documents(run_id).documents
        }


def main(scene: str, work: Path | None) -> int:
    """Run the demo; return 0 if everything went as announced, else 1."""
    work = work or Path(tempfile.mkdtemp(prefix="stroma-demo-"))
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    demo = Demo(work.resolve())
    if scene == "agent":
        ok = _killed_agent(demo)
        if ok:
            _look_further(demo, time.monotonic() - started, "ticket", _SHOWN_AGENT)
        return 0 if ok else 1
    with Provider() as provider:
        ok = _trouble(demo, provider)
    # Another one, which has its faults before it and an empty ledger.
    with Provider() as provider:
        ok = ok and _killed_and_resumed(demo, provider) and _on_a_budget(demo, provider)
    if ok:
        _bill(demo, "inbox")
        _look_further(demo, time.monotonic() - started, "inbox", _SHOWN)
    return 0 if ok else 1


# ---------------------------------------------------------------------- the scenes


def _trouble(demo: Demo, provider: Provider) -> bool:
    demo.title("1. Trouble and retries")
    demo.print_line("Business documents go through a pipeline whose model provider limits, fails,")
    demo.print_line("hangs and answers nonsense. Each failure is retried by its class.\n")
    return demo.run(provider, ["run", _TARGET, "--run-id", "inbox"]) == 0


def _killed_and_resumed(demo: Demo, provider: Provider) -> bool:
    demo.title("2. Killed and resumed")
    demo.print_line("The same again, but the process is killed half-way (kill -9) and resumed.")
    demo.print_line("Finished documents are stored and not bought again.\n")
    words = ["run", _TARGET, "--run-id", "killed"]
    code = demo.kill_when(lambda: _is_time_to_kill(demo), provider, words)
    if code is not None:
        demo.print_line(f"The run ended by itself with exit code {code}; it should have been killed.")
        return False
    names = demo.names("killed")
    # Read after the kill, so that the list is final.
    done = {names[int(a.branch)] for a in demo.attempts("killed") if a.branch and a.output is not None}
    before = demo.calls(provider, "killed")
    demo.title(f"kill -9: {len(done)} of {len(names)} documents were finished.")
    code = demo.run(provider, ["resume", "killed", _TARGET])
    after = demo.calls(provider, "killed")
    again = sorted(name for name in done if after[name] != before[name])
    demo.print_line(f"\nBy the provider's own ledger, {len(again)} of these {len(done)} were sent again.")
    return code == 0 and not again


def _is_time_to_kill(demo: Demo) -> bool:
    """Return True if some documents are finished and some are not."""
    return sum(bool(a.branch) and a.output is not None for a in demo.attempts("killed")) >= _KILL_AFTER


def _on_a_budget(demo: Demo, provider: Provider) -> bool:
    demo.title("3. The budget holds")
    demo.print_line(
        f"The same again with a budget of {_TIGHT_BUDGET_USD} US dollars. Once it is spent, calls in"
    )
    demo.print_line("flight end and no other begins; the run resumes with a larger budget.\n")
    code = demo.run(provider, ["run", _TARGET, "--run-id", "tight", "--budget-usd", _TIGHT_BUDGET_USD])
    demo.print_line(f"\nExit code {code} (5: stopped by the budget).")
    return code == 5


# ---------------------------------------------------------------------- the bill


def _bill(demo: Demo, run_id: str) -> None:
    demo.title("What each document has cost")
    names = demo.names(run_id)
    attempts = demo.attempts(run_id)
    by_row: dict[str, list[AttemptRecord]] = defaultdict(list)
    for attempt in attempts:
        if attempt.position == 1 and attempt.branch:
            by_row[names[int(attempt.branch)]].append(attempt)
        elif attempt.tokens or attempt.outcome == "failure":
            by_row[attempt.node_id].append(attempt)
    width = 34
    demo.print_line(f"\n{'document or step':{width}}  {'tokens':>6}  {'cost':>9}  attempts")
    order = {name: i for i, name in enumerate(names)}
    for name in sorted(by_row, key=lambda n: order.get(n, len(order))):
        tries = by_row[name]
        outcomes = ", ".join(map(_describe_attempt, tries))
        tokens, cost = sum(a.tokens for a in tries), sum(a.cost_usd for a in tries)
        room = _COLUMNS - width - 21
        line = f"{clean(name, width):{width}}  {tokens:>6,}  {format_usd(cost):>9}  {clean(outcomes, room)}"
        demo.print_line(line)
    total = sum(a.cost_usd for a in attempts)
    wasted = sum(a.cost_usd for a in attempts if a.outcome != "success")
    tokens = sum(a.tokens for a in attempts)
    demo.print_line(f"{'total':{width}}  {tokens:>6,}  {format_usd(total):>9}  wasted {format_usd(wasted)}")


def _describe_attempt(attempt: AttemptRecord) -> str:
    if attempt.outcome == "success":
        return "ok"
    return attempt.reason or attempt.failure_class or attempt.outcome


def _killed_agent(demo: Demo) -> bool:
    demo.title("1. An agent asks before it pays")
    demo.print_line("A support agent looks an order up and wants to refund it. That takes a person's")
    demo.print_line("approval: the run is suspended, and needs no process until the answer is there.\n")
    if demo.run(None, ["run", _AGENT, "--run-id", "ticket"]) != _SUSPENDED:
        return False
    demo.title("2. Approved, and killed while the bank books")
    demo.print_line("The process is killed (kill -9) after the bank has booked and before it answers.\n")
    words = ["approve", "ticket", _AGENT, '{"approved": true}', "--resume"]
    demo.kill_when(lambda: bool(demo.bookings()), None, words)
    demo.title(f"kill -9: the bank has {len(demo.bookings())} booking, and nobody has its answer.")
    code = demo.run(None, ["resume", "ticket", _AGENT])
    booked = len(demo.bookings())
    requests = sum(one.node_id == "model" for one in demo.attempts("ticket"))
    demo.print_line(f"\nThe bank was asked about the call that was cut off. Its book has {booked} booking.")
    demo.print_line(f"The model was asked {requests} times in three processes: no request was repeated.")
    return code == 0 and (booked, requests) == (1, 3)


_SHOWN: Final = """\
Failed calls were retried where a retry could help, and wrong answers were sent
back with their errors. A run that was killed resumed without paying for a
finished call again. A budget stopped a run, which kept all that it had paid."""
_SHOWN_AGENT: Final = """\
An agent waited for an approval without a process. Its process was killed after
the bank had booked, and the next one did not book again. Every request to the
model was paid for once."""


def _look_further(demo: Demo, seconds: float, run_id: str, shown: str) -> None:
    demo.title(f"What you have seen, in {seconds:.0f} s")
    demo.print_line(shown)
    demo.title("Look further")
    demo.print_line(f"""\
export STROMA_DB={shlex.quote(str(demo.db))}
{demo.program} show {run_id} --timing
{demo.program} runs
{demo.program} ui    # the same runs as pages in a browser
""")
    if run_id == "inbox":
        demo.print_line("On a folder of yours, with a real model if OPENAI_API_KEY is set:")
        demo.print_line(f"""{demo.program} run {_TARGET} '{{"folder": "."}}'""")
