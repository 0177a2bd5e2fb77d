"""The page about the guarantees: their sentences, what they mean, and the tests that name them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The guarantees by number.
SENTENCES = {
    1: "A node's function sees only input that passed its contract; output that failed its contract is never "
    "committed or handed on.",
    2: "Every exception gets exactly one failure class, whatever the exception or a classifier does.",
    3: "`max_retries=N` is N attempts after the first; TERMINAL is never retried; Retry-After is obeyed.",
    4: "Paid work is saved: a valid output is committed before a budget, a hook or a cancellation can lose "
    "it.",
    5: "A committed node is not executed again in that execution of the run: not after `kill -9`, not on "
    "resume.",
    6: "All usage counts, also of failed attempts and earlier processes; past a limit no further call is "
    "made.",
    7: "The trace has one event per attempt, and later changes to objects do not reach it ([large "
    "maps](map.md) trace their first thousands).",
    8: "A hook cannot change an outcome, re-run a node or lose a result, and delays it by at most its time "
    "limit.",
    9: "Every start event has exactly one end event, however the attempt ended.",
    10: "A run has one owner: a second process is refused, or takes over once the first is gone; stale writes "
    "are refused.",
    11: "Data from a store is validated by your own schema; nothing stored is executed or imported.",
    12: "Unused features cost nothing, and the cost of a node does not grow with the number of nodes.",
    13: "An [effect](concepts/effects.md) is called again only after a statement that the earlier call did "
    "not happen.",
}

#: What each guarantee means for whoever relies on it.
MEANS = {
    1: "The failure is at the node that returned the bad value, and names the field. The value is stored with the failure for debugging. "
    "No node gets it as input, and no hook or exporter as an output. The exception has it: a failure hook that reads `exc.raw` "
    "sees it (through `redact`), and so does the next attempt of the node in `last_failure`. This holds at every boundary: from node to node, into and out of groups, for single steps, "
    "for values from a store, and inside agent frameworks.",
    2: "So you can write a policy for every case. This includes exceptions whose `str()` raises, classifiers that raise, and exception "
    "groups with several members.",
    3: "A position gets at most N + 1 calls, for all classes of failures together. A delay is at least the wait that the server asks for, "
    "in a header or in the body.",
    4: "The commit follows directly after the validation of the output. Budgets, hooks, cancellations and shutdowns take effect after it.",
    5: "Holds on a journal store. Only the node that was in flight when the process died may run twice, and its effect with it: use "
    "`current_node().idempotency_key` for that. A new execution of the same run id runs everything again.",
    6: "Holds across processes on a journal store, else in one process. The call that crosses a limit is made, since its price is known "
    "only afterwards; the next one is not. The usage of a call in flight when a process is killed cannot be known.",
    7: "An event is a snapshot with the input and output at that time, and with usage, class and duration. The trace of a "
    "[map into a file](map.md) has the first thousands of items, and counts the rest.",
    8: "Hooks are awaited under a time limit (`hook_timeout_ms`), outside of the node's error handling. A hook that blocks the event "
    "loop cannot be interrupted; a warning names it. The one exception is a hook that is not async: TypeError.",
    9: "Holds within a live process: success, failure, cancelled or suspended. After a crash, the next process calls the missing hooks "
    'if `hook_delivery="at_least_once"` is set.',
    10: "Holds on a journal store. A lease names the owner of the run, and an epoch makes late writes of an earlier owner fail: Fenced.",
    11: "The format is JSON with a checksum, with a tagged encoding for values that JSON lacks. Class names in a store are compared, never "
    "imported.",
    12: "Without hooks no state is prepared for them, and without a budget nothing is added up. A node costs the same in a pipeline of "
    "5,000 as in one of 100: see the [figures](performance.md).",
    13: "Holds for nodes with `effect=True`, across processes on a journal store, else in one process. The confirmation comes from the "
    "node's `reconcile` or from a person. A refused request, or a connection that could not be made, counts as one too. A new execution "
    "is a new effect.",
}


@dataclass(frozen=True)
class Held:
    """One test that names a guarantee: its file, its name, and what its docstring says."""

    path: str
    name: str
    says: str


def held() -> dict[int, list[Held]]:
    """The tests by the number that their docstring names."""
    found: dict[int, list[Held]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith(
                "test"
            ):
                continue
            says = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            for number in re.findall(r"\bG(\d+)\b", says):
                words = re.sub(r"^(?:G\d+(?:, )?)+[.:,;]? *", "", says)
                words = (
                    words[:1].upper() + words[1:]
                    if words
                    else node.name.removeprefix("test_").replace("_", " ")
                )
                found[int(number)].append(Held(path.relative_to(ROOT).as_posix(), node.name, words))
    return found


def guarantees_page() -> str:
    tests = held()
    lines = [
        "<!-- Written by docs/generate.py: run `./dev run python docs/generate.py` after a change. -->",
        "",
        "# Guarantees",
        "",
        "This page lists what Stroma guarantees, with the limits of each guarantee and its tests, for anyone",
        "who relies on it. Most tests run on every store. [Durable runs](durability.md#figures) has the results",
        "of thousands of runs with `kill -9`, power cuts, full disks and lost connections.",
        "",
        "A guarantee holds for one *execution* of a run. Across processes, G4, G5, G6, G10 and G13 need a",
        "[journal store](stores/index.md): SQLite, Postgres or Redis. A store of the simple `save`, `load`,",
        "`delete` protocol does not provide them.",
    ]
    for number, sentence in SENTENCES.items():
        # Where several tests of one file say the same of different things, each is listed.
        lines += ["", f"## G{number}", "", f"**{sentence}**", "", MEANS[number], ""]
        lines += [f"{len(tests[number])} tests:", ""]
        lines += [f"- [{escaped(test.says)}](../{test.path}#{test.name})" for test in tests[number]]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Words as the text of a link."""
    return re.sub(r"([\[\]<>*_|])", r"\\\1", text).rstrip(".")
