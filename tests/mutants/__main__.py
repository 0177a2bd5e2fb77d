"""Apply each break to a copy of the source and see the tests fail.

usage: ./dev mutants [--only NAME ...] [--list]
       ./dev mutants --all ...  every small change of the core instead: see tests/mutants/every.py

Each worker has a copy of the tree of its own; the tree itself is never touched. First the tests that are named by the
breaks must pass on the unbroken copies. Then, for each break: the old text must stand in its file exactly once, else
the break is stale, which is an error; it is replaced, the tests run, and the file is put back. A break is killed when
a test fails, or when the tests do not end in time.

Exit code 0 if every break was killed, 1 if one survived, is stale, or could not be tried.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mutants.breaks import BREAKS, Break

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("src", "tests", "examples", "dev", "pyproject.toml")
WORKERS = 2
TEST_SECONDS = 20  # one test
BREAK_SECONDS = 90  # all tests of one break
BASELINE_SECONDS = 600
# Neither the tests' caches nor their random examples may differ from break to break.
PYTEST = (
    "-x", "-q", "-p", "no:cacheprovider", "-p", "tests.mutants", "--no-header", "--tb=line",
    f"--timeout={TEST_SECONDS}", "--hypothesis-seed=0",
)  # fmt: skip


class Stale(Exception):
    """A break that no longer fits the source or the tests."""


def broken(item: Break, source: str) -> str:
    """The source with the break in it; raises Stale if that is not one well-defined and valid change."""
    found = source.count(item.old)
    if found != 1:
        raise Stale(f"its old text is {found} times in src/stroma/{item.file}")
    text = source.replace(item.old, item.new)
    if text == source:
        raise Stale("it changes nothing")
    try:
        compile(text, item.file, "exec")
    except SyntaxError as error:
        raise Stale(f"the broken source is no Python: {error}") from None
    return text


class Copy:
    """One worker's tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, root / name)
        # Bytecode that is checked by the source's hash: by size and time, a quick change can go unnoticed.
        self._python("-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src")

    def _environ(self) -> dict[str, str]:
        path = os.pathsep.join((str(self.root / "src"), str(self.root)))
        return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}

    def _python(self, *args: str, seconds: float = BASELINE_SECONDS) -> tuple[int | None, str]:
        """(exit code, output); no exit code if it took too long."""
        with tempfile.TemporaryFile() as file:
            process = subprocess.Popen(
                [sys.executable, *args], cwd=self.root, env=self._environ(), stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code: int | None = None
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                # Children of a test that was cut short have its session.
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            file.seek(0)
            return code, file.read().decode(errors="replace")

    def test(self, tests: Iterable[str], seconds: float) -> tuple[int | None, str]:
        """Run tests in the copy: (exit code or None, output)."""
        return self._python("-m", "pytest", *PYTEST, *tests, seconds=seconds)

    @contextmanager
    def apply(self, item: Break) -> Iterator[None]:
        """The copy with the break in it."""
        path = self.root / "src" / "stroma" / item.file
        source = path.read_text(encoding="utf-8")
        path.write_text(broken(item, source), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(source, encoding="utf-8")

    def kill(self, item: Break) -> str | None:
        """What noticed the break; None if nothing did. Raises Stale."""
        with self.apply(item):
            code, output = self.test(item.tests, BREAK_SECONDS)
        if code is None:
            return f"the time limit of {BREAK_SECONDS} s"
        if code == 0:
            return None
        missing = re.search(r"^E +(?:NameError|UnboundLocalError): .*$", output, re.MULTILINE)
        if missing is not None:
            raise Stale(f"the broken source does not run: {missing[0][1:].strip()}")
        failed = re.search(r"^FAILED (.+?)(?: - .*)?$", output, re.MULTILINE)
        if failed is not None:
            return failed[1]
        if code == 2 and "KeyboardInterrupt" in output:
            return "an interrupt that came out of a test"
        if code < 0:
            return f"the signal {-code} that ended the tests"
        raise Stale(f"its tests could not be run (pytest ended with {code}):\n{output[-2000:]}")


def stale(breaks: Iterable[Break]) -> list[str]:
    """What is wrong with the breaks, seen without running a test."""
    wrong = []
    for item in breaks:
        try:
            broken(item, (ROOT / "src" / "stroma" / item.file).read_text(encoding="utf-8"))
        except (Stale, OSError) as error:
            wrong.append(f"STALE     {item.name}: {error}")
    names = [item.name for item in breaks]
    wrong += [
        f"STALE     {name}: two breaks have this name"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    return wrong


def baseline(copies: list[Copy], breaks: Iterable[Break]) -> str:
    """The output of the tests that fail without any break; empty if all pass."""
    tests = sorted({test for item in breaks for test in item.tests})
    outputs: list[str] = []

    def work(copy: Copy, share: list[str]) -> None:
        code, output = copy.test(share, BASELINE_SECONDS) if share else (0, "")
        if code != 0:
            outputs.append(output if code is not None else f"{output}\nnot done after {BASELINE_SECONDS} s")

    # Tests of one file go to one worker: they share what is expensive to set up.
    files = sorted({test.partition("::")[0] for test in tests})
    shares: list[list[str]] = [[] for _ in copies]
    for name in sorted(files, key=lambda name: -sum(test.startswith(name) for test in tests)):
        min(shares, key=len).extend(test for test in tests if test.partition("::")[0] == name)
    threads = [threading.Thread(target=work, args=pair) for pair in zip(copies, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "\n".join(outputs)


def try_all(copies: list[Copy], breaks: list[Break]) -> tuple[int, int, int]:
    """Try every break, one line each: how many were killed, survived, could not be tried."""
    waiting: queue.SimpleQueue[Break] = queue.SimpleQueue()
    for item in breaks:
        waiting.put(item)
    counts = {"killed": 0, "SURVIVED": 0, "STALE": 0}
    printing = threading.Lock()

    def work(copy: Copy) -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            begin = time.monotonic()
            try:
                killer = copy.kill(item)
                word, rest = ("killed", f"by {killer}") if killer else ("SURVIVED", item.rule)
            except (Stale, OSError) as error:
                word, rest = "STALE", str(error)
            with printing:
                counts[word] += 1
                print(f"{word:8s} {time.monotonic() - begin:5.1f} s  {item.name}: {rest}", flush=True)

    threads = [threading.Thread(target=work, args=(copy,), daemon=True) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts["killed"], counts["SURVIVED"], counts["STALE"]


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--all"]:
        from tests.mutants import every

        return every.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="./dev mutants", description="Break the source on purpose; the tests must notice."
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only this break; may be given more than once"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the breaks and whether they still fit, run nothing"
    )
    options = parser.parse_args(arguments)
    known = {item.name: item for item in BREAKS}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        parser.error(f"no such break: {', '.join(unknown)}; see --list")
    breaks = [known[name] for name in options.only] if options.only else list(BREAKS)
    if options.list:
        for item in breaks:
            print(f"{item.name}: {item.rule}")
    wrong = stale(breaks)
    if wrong:
        print("\n".join(wrong))
    if options.list or wrong:
        return 1 if wrong else 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stroma-mutants-") as folder:
        copies = [Copy(Path(folder) / str(index)) for index in range(min(WORKERS, len(breaks)))]
        failed = baseline(copies, breaks)
        if failed:
            print(f"{failed}\nthe tests fail without any break; mend them first")
            return 1
        print(f"the tests pass without a break ({time.monotonic() - begin:.0f} s)", flush=True)
        killed, survived, gone = try_all(copies, breaks)
    print(
        f"{len(breaks)} breaks, {killed} killed, {survived} survived"
        + (f", {gone} stale" if gone else "")
        + f" ({time.monotonic() - begin:.0f} s)"
    )
    return 0 if killed == len(breaks) else 1


if __name__ == "__main__":
    sys.exit(main())
