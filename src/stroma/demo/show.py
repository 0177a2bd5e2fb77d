"""``stroma demo``: the pipeline on real documents, a provider with faults, and a process that is killed.

The acts are the same commands that a user would type, in processes of their own; the provider is started here, so
that it outlives the process that is killed and its ledger can tell what was bought.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from stroma._utils.child_process import child_command, child_environment
from stroma.checkpoint import AttemptRecord
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.contracts.schema import schema_of
from stroma.demo.pipeline import BASE_URL_VARIABLE, DOCUMENTS, Documents
from stroma.demo.provider import DEFAULT_SEED, Provider, fault_plan, start_provider, text_sha

__all__ = ["main"]

_TARGET = "stroma.demo.pipeline:pipeline"
_KILL_AFTER = 9  # committed documents
_PATIENCE_SECONDS = 60.0
_TIGHT_BUDGET_USD = "0.0015"


class Demo:
    """One run of the demo: its files, and how its commands are run."""

    def __init__(self, folder: Path, work: Path, provider: Provider, seed: int) -> None:
        self.seed = seed
        self.folder = folder
        self.work = work
        self.provider = provider
        self.db = work / "runs.db"
        self.report = work / "report.md"
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def title(self, text: str) -> None:
        print(f"\n\033[1m{text}\033[0m" if self.colour else f"\n{text}", flush=True)

    def print_line(self, text: str = "") -> None:
        print(text, flush=True)

    def command(self, *words: str) -> list[str]:
        return [*words, "--db", str(self.db)]

    def start(self, words: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """Start one ``stroma`` command in a process of its own and show its progress."""
        self.print_line("$ stroma " + shlex.join(words))
        env = child_environment(**{BASE_URL_VARIABLE: self.provider.base_url, **environment})
        env.pop("OPENAI_API_KEY", None)  # The demo buys nothing, whatever the user's shell is set up for.
        return subprocess.Popen(child_command(*words), env=env, stdout=subprocess.DEVNULL)

    def run(self, words: Sequence[str], **environment: str) -> int:
        return self.start(words, **environment).wait(_PATIENCE_SECONDS)

    def input(self, name: str) -> str:
        return json.dumps({"folder": str(self.folder), "out": str(self.work / name)})

    def attempts(self, run_id: str) -> list[AttemptRecord]:
        return SQLiteStore(self.db).attempts(run_id) if self.db.exists() else []

    def texts(self, run_id: str) -> list[str]:
        return [document.text for document in self._documents(run_id).documents if document.text.strip()]

    def names(self, run_id: str) -> list[str]:
        """Return the documents of a run, in order."""
        return [document.name for document in self._documents(run_id).documents]

    def _documents(self, run_id: str) -> Documents:
        first = next(a for a in self.attempts(run_id) if a.position == 0 and a.output is not None)
        read = schema_of(Documents).decode(first.output or b"")
        assert isinstance(read, Documents)
        return read

    def calls(self, run_id: str) -> dict[str, int]:
        """Return how often the provider was asked about each document, by its own ledger."""
        ledger = self.provider.stats()["by_text"]
        return {
            d.name: ledger.get(text_sha("extract", d.text)[:12], 0) for d in self._documents(run_id).documents
        }


def main(argv: list[str]) -> int:
    """Run the demo; return 0 if everything went as announced, else 1."""
    parser = argparse.ArgumentParser(prog="stroma demo", description="A guarded pipeline on real documents.")
    parser.add_argument(
        "--folder", type=Path, default=DOCUMENTS, help="documents to read (default: those that ship)"
    )
    parser.add_argument(
        "--dir", type=Path, help="where the database and the report go (default: a new temporary one)"
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the provider's misbehaviour")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        print(f"folder {options.folder} does not exist; pass --folder", file=sys.stderr)
        return 2
    work = options.dir or Path(tempfile.mkdtemp(prefix="stroma-demo-"))
    work.mkdir(parents=True, exist_ok=True)
    if (work / "runs.db").exists():
        print(f"{work} contains an earlier demo; pass another folder with --dir", file=sys.stderr)
        return 2
    started = time.monotonic()
    with start_provider(options.seed) as provider:
        demo = Demo(options.folder.resolve(), work.resolve(), provider, options.seed)
        ok = _crash_and_resume(demo) and _on_a_budget(demo) and _without_quota(demo)
    if ok:
        _bill(demo, "inbox")
        _look_further(demo)
        demo.print_line(f"\nAll of it took {time.monotonic() - started:.0f} s.")
    return 0 if ok else 1


# ---------------------------------------------------------------------- the acts


def _crash_and_resume(demo: Demo) -> bool:
    demo.title(
        "1. Documents go through a pipeline; the model's provider misbehaves; then the process is killed."
    )
    demo.print_line("   read -> extract each document -> check -> classify and risk -> report")
    demo.print_line(
        "   Rate limits, server errors, a hang, a dropped connection and answers that break their contract are"
    )
    demo.print_line(
        "   retried, each by its class; an answer that breaks its contract goes no further than its node.\n"
    )
    process = demo.start(demo.command("run", _TARGET, demo.input("report.md"), "--run-id", "inbox"))
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline and not _is_time_to_kill(demo):
        time.sleep(0.02)
    killed = process.poll() is None
    process.kill()
    process.wait()
    if not killed:
        if process.returncode not in (0, -9):
            demo.print_line(
                f"The run ended by itself with exit code {process.returncode}; it should have been killed."
            )
            return False
        demo.print_line("\nThe folder is so small that the run was done before it could be killed.")
        return True
    names = demo.names("inbox")
    # Read after the kill, so that the list is final.
    done = {names[int(a.branch)] for a in demo.attempts("inbox") if a.branch and a.output is not None}
    before = demo.calls("inbox")
    demo.title(f"   kill -9: {len(done)} of {len(names)} documents were finished.")

    demo.title("2. The run is resumed. Finished nodes are not called again.")
    demo.print_line()
    code = demo.run(demo.command("resume", "inbox", _TARGET))
    after = demo.calls("inbox")
    again = sorted(name for name in done if after[name] != before[name])
    demo.print_line(
        f"\n   By the provider's own ledger, {len(done)} documents were finished before the kill and"
    )
    demo.print_line(f"   {len(again)} of them were sent again. The report: {demo.report}")
    return code == 0 and not again and demo.report.exists()


def _is_time_to_kill(demo: Demo) -> bool:
    """Return True if some documents are finished, some are not, and a hanging call, if any, has timed out."""
    attempts = demo.attempts("inbox")
    if not any(a.position == 0 and a.output is not None for a in attempts):
        return False
    finished, texts = sum(bool(a.branch) and a.output is not None for a in attempts), demo.texts("inbox")
    hangs = any("hang" in fault_plan(demo.seed, "extract", text) for text in texts)
    has_timed_out = not hangs or any(a.reason == "timeout" for a in attempts)
    return has_timed_out and finished >= min(_KILL_AFTER, len(texts) // 2)


def _on_a_budget(demo: Demo) -> bool:
    demo.title(
        f"3. The same folder on a budget of {_TIGHT_BUDGET_USD} US dollars: it stops before the next call."
    )
    demo.print_line()
    words = demo.command(
        "run", _TARGET, demo.input("budget.md"), "--run-id", "tight", "--budget-usd", _TIGHT_BUDGET_USD
    )
    code = demo.run(words)
    demo.print_line(
        f"\n   Exit code {code} (5: stopped by the budget). Finished nodes are stored; resume with a larger budget to continue."
    )
    return code == 5


def _without_quota(demo: Demo) -> bool:
    demo.title("4. The quota is used up: the same status 429 as a rate limit, and no retry can help.")
    demo.print_line()
    words = demo.command("run", _TARGET, demo.input("quota.md"), "--run-id", "broke")
    code = demo.run(words, STROMA_DEMO_MODEL="gpt-4o-mini-no-quota")
    demo.print_line(
        f"\n   Exit code {code} (1: failed). TERMINAL at the first attempt, so nothing was tried again."
    )
    return code == 1


# ---------------------------------------------------------------------- the bill


def _bill(demo: Demo, run_id: str) -> None:
    """Print the cost of each document, attempt by attempt."""
    demo.title("What it cost, attempt by attempt (US dollars)")
    names = demo.names(run_id)
    attempts = demo.attempts(run_id)
    by_row: dict[str, list[AttemptRecord]] = defaultdict(list)
    for attempt in attempts:
        if attempt.position == 1 and attempt.branch:
            by_row[names[int(attempt.branch)]].append(attempt)
        elif attempt.tokens or attempt.outcome == "failure":
            by_row[attempt.node_id].append(attempt)
    width = max(map(len, by_row), default=0)
    demo.print_line(f"\n   {'document or step':{width}}  {'tokens':>7}  {'cost':>9}  attempts")
    order = {name: i for i, name in enumerate(names)}
    for name in sorted(by_row, key=lambda n: order.get(n, len(order))):
        tries = by_row[name]
        attempts_text = ", ".join(_describe_attempt(attempt) for attempt in tries)
        tokens, cost = sum(a.tokens for a in tries), sum(a.cost_usd for a in tries)
        demo.print_line(f"   {name:{width}}  {tokens:>7,}  {cost:>9.6f}  {attempts_text}")
    total = sum(a.cost_usd for a in attempts)
    wasted = sum(a.cost_usd for a in attempts if a.outcome != "success")
    demo.print_line(
        f"   {'total':{width}}  {sum(a.tokens for a in attempts):>7,}  {total:>9.6f}  of which wasted {wasted:.6f}"
    )


def _describe_attempt(attempt: AttemptRecord) -> str:
    if attempt.outcome == "success":
        return f"ok {attempt.cost_usd:.6f}" if attempt.cost_usd else "ok"
    word = attempt.reason or attempt.failure_class or attempt.outcome
    return f"{word} {attempt.cost_usd:.6f}" if attempt.cost_usd else word


def _look_further(demo: Demo) -> None:
    db = shlex.quote(str(demo.db))
    demo.title("Look further")
    demo.print_line(f"""
   stroma runs --db {db}
   stroma show inbox --db {db}
   cat {shlex.quote(str(demo.report))}

   On a folder of yours (text files, mails): stroma run {_TARGET} '{{"folder": "..."}}'
   With OPENAI_API_KEY set, and OPENAI_BASE_URL for another provider, that talks to a real model.""")
