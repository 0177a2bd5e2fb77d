"""The page about the guarantees: their sentences from the README, what they mean, and the tests that name them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What each guarantee means for whoever relies on it.
MEANS = {
    1: "The failure is at the node that made the bad value, and names the field. What came is stored beside it for people, and no "
    "node, hook or exporter gets it. It is true at every boundary: from node to node, "
    "into and out of groups, for single steps, for what a store gives back, and inside agent frameworks.",
    2: "So a policy can be written for every case. An exception whose `str()` raises, a classifier that raises and an exception "
    "group of several are no way around it.",
    3: "N + 1 calls at most, counted for each position, whatever the classes of the failures were. A delay is at least what the "
    "server asked for, in whichever header or body it says so.",
    4: "The commit comes directly after the output was found valid. What a budget, a hook, a cancellation or a shutdown have to "
    "say comes after it.",
    5: "On a journal store. What may run twice is the node that was in flight when the process died, and its effect with it: that "
    "is what `current_node().idempotency_key` is for. A new execution of the same run id runs everything again.",
    6: "On a journal store across processes, else in one. The call that crosses a limit is made, since its price is known "
    "afterwards; the next one is not. Of a call in flight when a process is killed nobody can know what it used.",
    7: "An event is a snapshot. It holds what went in and what came out at that time, with usage, class and duration.",
    8: "Hooks are awaited under a time limit (`hook_timeout_ms`), outside of the node's error handling. One that blocks the event "
    "loop cannot be interrupted; it is named in a warning. The one exception is a hook that is not async: TypeError.",
    9: 'Within a living process: success, failure, cancelled or suspended. After a crash, `hook_delivery="at_least_once"` has the '
    "next process tell what was not told.",
    10: "On a journal store. A lease says who owns the run, an epoch makes late writes of an earlier owner fail: Fenced.",
    11: "JSON with a checksum, and a tagged encoding of ours for what JSON cannot say. Class names in a store are compared, never "
    "imported.",
    12: "Without hooks no state is made for them, without a budget nothing is summed, and a node costs the same in a pipeline of "
    "5,000 as in one of 100. [Figures](performance.md).",
    13: "On a journal store across processes, else in one; for nodes with `effect=True`. Somebody is the node's `reconcile`, or a person; "
    "a server that refused the request, or no connection to it, counts as such a statement. A new execution is a new effect.",
}


@dataclass(frozen=True)
class Held:
    """One test that names a guarantee: its file, its name, and what its docstring says."""

    path: str
    name: str
    says: str


def sentences() -> dict[int, str]:
    """The guarantees by number, as the README has them, with links that hold on the page."""
    readme = (ROOT / "README.md").read_text("utf-8").replace("](docs/", "](")
    return {
        int(number): said for number, said in re.findall(r"^\| G(\d+) \| (.+?) \|$", readme, re.MULTILINE)
    }


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
    said, tests = sentences(), held()
    lines = [
        "<!-- Written by docs/generate.py: run `./dev run python docs/generate.py` after a change. -->",
        "",
        "# Guarantees",
        "",
        "Each of these sentences is held by tests that name its number; they are listed below it. Most of them run on every store,",
        "and `./dev mutants` measures how many small changes of the code they notice. What `kill -9`, power cuts, full disks and",
        "lost connections did to thousands of runs is told under [durable runs](durability.md#figures).",
        "",
        "A guarantee holds for one *execution* of a run. Across processes, G4, G5, G6, G10 and G13 need a [journal store](stores/index.md):",
        "SQLite, Postgres or Redis. A store of the simple `save`, `load`, `delete` protocol cannot give them.",
    ]
    for number, sentence in said.items():
        # Where several tests of one file say the same of different things, each is listed.
        lines += ["", f"## G{number}", "", f"**{sentence}**", "", MEANS[number], ""]
        lines += [f"{len(tests[number])} tests:", ""]
        lines += [f"- [{escaped(test.says)}](../{test.path}#{test.name})" for test in tests[number]]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Words as the text of a link."""
    return re.sub(r"([\[\]<>*_|])", r"\\\1", text).rstrip(".")
