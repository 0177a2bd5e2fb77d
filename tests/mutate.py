"""Measure with mutmut how many small changes of the source the default tier of tests notices.

usage: ./dev mutants [MODULE ...] [--sample N] [--seed S] [--changed [BASE]]

Prints each change that no test notices, and a score per module. Works in a copy of the tree. Exit code 0 if
all modules together score at least 90 %, 1 if less, 2 for a wrong argument.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("src/stroma")
MUTMUT = str(Path(sys.executable).with_name("mutmut"))
MINIMUM_SCORE = 0.9
PROGRESS_SECONDS = 15
#: The results of mutmut that stand for a change which no test noticed.
UNNOTICED = ("survived", "no tests")
#: Lines of pytest's output that are shown if a run of unchanged source fails.
SHOWN_LINES = 200
#: Tests that mutmut breaks: it puts copies of each function into the source, records the calls of a test in
#: memory, is a frame in each traceback, and the program that command lines name.
UNFIT_TESTS = [
    "--deselect=tests/cli/test_mcp.py::test_no_answer_floods_an_agent",
    "--deselect=tests/failures/test_mistakes.py::test_the_keys_beside_a_fallback_model",
    "--deselect=tests/project/test_source_rules.py::test_only_the_engine_calls_a_nodes_function",
    "--deselect=tests/adapters/test_guard_resume.py::test_the_memory_of_a_guard_that_is_used_many_times_is_flat",
]
#: What is measured if no module is named: where the guarantees are decided.
CORE = (
    "engine/loop",
    "engine/context",
    "engine/commit",
    "hooks/dispatch",
    "hooks/sets",
    "failures/failure",
    "failures/policy",
    "cost/budget",
    "cost/fallback",
    "trace/events",
    "trace/plain",
    "trace/result",
    "trace/trace",
    "checkpoint/durable/session",
    "checkpoint/sqlite/connection",
    "checkpoint/sqlite/file",
)


def changed(base: str) -> list[str]:
    """Return the modules that differ from where this branch left ``base``."""
    command = ["git", "diff", "--name-only", "--diff-filter=d", "--merge-base", base, "--", f"{SOURCE}/*.py"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def copy_tree(target: Path, modules: list[str], pytest_args: list[str]) -> None:
    """Copy the tree and write mutmut's settings into the copy."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "htmlcov")
    shutil.copytree(ROOT, target, ignore=ignored)
    settings = {
        "source_paths": ["src"],
        "only_mutate": modules,
        "also_copy": sorted({path.name for path in target.iterdir()} - {"src"}),
        "process_isolation": "forkserver",  # tests leave threads, and a process with threads may not fork
        "debug": True,  # else the output of a test that fails before the first mutant is lost
        "timeout_multiplier": 10.0,  # a busy machine is no reason to call a mutant noticed
        "pytest_add_cli_args": [*pytest_args, *UNFIT_TESTS, "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": ["tests"],
    }
    with (target / "pyproject.toml").open("a") as file:
        file.write(
            "\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        )


def draw(modules: list[str], count: int, seed: int) -> list[str]:
    """Return the names of ``count`` mutants, the same ones for the same seed and source."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    names = [
        get_mutant_name(Path(module), name)
        for module in modules
        for name in mutate_file_contents(module, Path(module).read_text("utf-8")).mutant_names
    ]
    return sorted(random.Random(seed).sample(names, min(count, len(names))))


def try_mutants(names: list[str]) -> int:
    """Run mutmut on the named mutants, or on all, and return its exit code.

    Of its output, print the phases and its spinner now and then; the rest only if it fails.
    """
    process = subprocess.Popen(
        [MUTMUT, "run", *names], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    shown, last = 0.0, ""
    hidden: deque[str] = deque(maxlen=SHOWN_LINES)
    for line in process.stdout:  # a carriage return ends a line in text mode
        text = line.rstrip()
        is_spinner = line[:1] in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
        if is_spinner:
            text = text[2:]
            is_phase = text[:1].isalpha()
            if text != last and (is_phase or time.monotonic() > shown + PROGRESS_SECONDS):
                print(text, flush=True)
                shown, last = time.monotonic(), text
        elif text.startswith("    done"):
            print(text, flush=True)
        elif text:
            hidden.append(text)
    if code := process.wait():
        print(*hidden, sep="\n", flush=True)
    return code


def report() -> float:
    """Print the unnoticed changes and a score per module; return the total score."""
    findings: dict[str, Counter[str]] = defaultdict(Counter)
    for line in subprocess.check_output([MUTMUT, "results", "--all", "1"], text=True).splitlines():
        name, _, status = line.strip().rpartition(": ")
        if name and status != "not checked":
            findings[name.rpartition(".")[0]][status] += 1
            if status in UNNOTICED:
                print(subprocess.check_output([MUTMUT, "show", name], text=True))
    total = sum(findings.values(), Counter())
    score = 0.0
    for module, counts in [*sorted(findings.items()), ("all", total)]:
        noticed = counts.total() - sum(counts[status] for status in UNNOTICED)
        score = noticed / max(counts.total(), 1)
        # Not by a test that fails: by a time limit, or because the process ended.
        others = "".join(
            f", {n} {status}" for status, n in counts.items() if status not in ("killed", *UNNOTICED)
        )
        print(f"{module:32s} {noticed:5d} of {counts.total():5d} noticed{others}, {score:.1%}")
    return score


def main(argv: list[str]) -> int:
    """Run the command line; what follows ``--`` goes to pytest."""
    parser = argparse.ArgumentParser(prog="./dev mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="a file below src/stroma; without one, the core"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants of all modules together")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draw another sample (0)")
    parser.add_argument(
        "--changed", nargs="?", const="main", metavar="BASE", help="modules changed since BASE (main)"
    )
    split = argv.index("--")
    options = parser.parse_args(argv[:split])
    modules = [f"{SOURCE / name.removesuffix('.py')}.py" for name in options.modules or CORE]
    if options.changed is not None:
        modules = changed(options.changed)
    if missing := [module for module in modules if not (ROOT / module).is_file()]:
        parser.error(f"no such module: {', '.join(missing)}")
    if not modules:
        print(f"no module differs from {options.changed}")
        return 0
    # A shell lets its background jobs ignore Control-C, and with them the tests of Control-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="stroma-mutants-") as folder:
        copy_tree(Path(folder) / "tree", modules, argv[split + 1 :])
        os.chdir(Path(folder) / "tree")  # mutmut reads its settings and writes its results there
        code = try_mutants(draw(modules, options.sample, options.seed) if options.sample else [])
        return code or int(report() < MINIMUM_SCORE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
