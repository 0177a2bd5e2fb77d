"""The blocks of code of a page, run as its reader would run them, and what they print beside what it shows.

Three kinds of blocks run. ```` ```python ```` is executed, all such blocks of a page in one module. A block
with a title (```` ```python title="hello.py" ````) is a file to save. ```` ```console ```` are lines for a
shell, each after ``$ ``, with what they print below them; what they share is one shell in one folder. A block
without a language right below a ```python
block is what that prints.

usage: python -m tests.docs.blocks PAGE...   writes what the blocks print into the pages, where that differs
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SECONDS = 100.0  # of one command, on a slow machine too
_DONE = "\x01done"


@dataclass(frozen=True)
class Block:
    """One fenced block: the number of its first line, its language, its title, its text and place."""

    line: int
    language: str
    title: str
    text: str
    start: int
    end: int


class Wrong(AssertionError):
    """A block does not do what its page shows."""


def of_page(text: str) -> list[Block]:
    """All fenced blocks of a page, nested ones (in lists, tabs, notes) too."""
    findings = []
    for match in re.finditer(
        r"^( *)```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL
    ):
        indent, language, title, code = match[1], match[2], match[3] or "", match[4]
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        line = text[: match.start(4)].count("\n") + 1
        findings.append(Block(line, language, title, code, match.start(4), match.end(4)))
    return findings


def blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks of a page that are executed, with the number of their first line."""
    return [(b.line, b.text) for b in of_page(text) if b.language == "python" and not b.title]


def promised(code: str) -> list[str]:
    """What the prints of a block say that they print: ``print(...)  # this``."""
    return re.findall(r"^\s*print\(.*\)  # (.+)$", code, re.MULTILINE)


def _below(text: str) -> dict[int, Block]:
    """The block of output right below each executed block, by the line of the latter."""
    result, all_of_them = {}, of_page(text)
    for block, after in itertools.pairwise(all_of_them):
        between = text[block.end : after.start]
        if block.language == "python" and not (block.title or after.language) and between == "```\n\n```\n":
            result[block.line] = after
    return result


def shown(text: str) -> dict[int, list[str]]:
    """Blocks right below a ```python block, which are what that prints, by the line of the latter."""
    return {line: block.text.splitlines() for line, block in _below(text).items()}


def run_python(text: str, name: str) -> Iterator[tuple[int, str, list[str]]]:
    """Run the blocks of a page one after the other in one module: line, code and printed lines.

    A block with its output below it runs as a program does, also what is below its ``__main__`` line.
    """
    programs = shown(text)
    module = types.ModuleType(f"page_{name}")
    sys.modules[module.__name__] = module  # Annotations are looked up there.
    try:
        for line, code in blocks(text):
            if line in programs:
                code = code.replace('if __name__ == "__main__":', "if True:")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * (line - 1) + code, f"{name}.md", "exec"), module.__dict__)
            yield line, code, out.getvalue().splitlines()
    finally:
        del sys.modules[module.__name__]


_NORMAL = [
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?"), "<moment>"),
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+)?"), "<clock>"),
    (re.compile(r"(?<![\w.])\d+(\.\d+)?(e-\d+)? ?(ms|us|s|m|h|%)(?!\w)( \d+ s)?"), "<time>"),
    (re.compile(r" \(functions <time>\)"), ""),  # Of a group with waits, unless both round to the same.
    (re.compile(r"(_s|_ms)=\d+(\.\d+)?(e-\d+)?"), r"\1=<time>"),
    (re.compile(r"\b\d+\.\d+\.\d+(\.?(dev|rc|a|b)\d+)?\b"), "<version>"),
    (re.compile(r"\b[0-9a-f]{32}\b|\b[0-9a-f]{8}(?=[ …]|$)"), "<id>"),
    (re.compile(r"\bprocess \d+"), "process <number>"),
    (re.compile(r"\b\d+(\.\d+)? [kMG]?i?B\b"), "<size>"),
    (re.compile(r"^bash: line \d+: +\d+ Killed\b.*"), "Killed"),  # As an interactive shell says it.
    (re.compile(r"\s+"), " "),
]


def normal(line: str) -> str:
    """A line without times, moments, fresh ids, sizes and the width of columns."""
    for pattern, instead in _NORMAL:
        line = pattern.sub(instead, line)
    return line.strip()


def same(printed: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether these lines are those, but for empty ones and what differs from run to run; ``...`` stands for
    any lines, and ``…`` for any rest of a line."""
    pattern = "".join(
        "(?:.*\n)*?" if line.strip() == "..." else re.escape(normal(line)).replace("…", ".*") + "\n"
        for line in expected
        if line
    )
    return re.fullmatch(pattern, "".join(normal(line) + "\n" for line in printed if line)) is not None


class Shell:
    """One bash in a folder, that is told lines as a reader would type them."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env={**env, "PYTHONUNBUFFERED": "1"},
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *args: object) -> None:
        # Also what a page starts in the background and does not end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.communicate()

    def run(self, command: str) -> tuple[int, list[str]]:
        """The exit code of a command, and its lines on either stream. It is given no input."""
        assert self._bash.stdout is not None
        line = f"{command} </dev/null" if re.match(r"(python|stroma)\b[^|&;<]*$", command) else command
        # The code stays at hand for a following `echo $?`.
        self._bash.stdin.write(f'{line}\n_code=$?; printf "{_DONE} %s\\n" $_code; (exit $_code)\n'.encode())
        printed, ends = b"", time.monotonic() + _SECONDS
        done = re.compile(rf"{_DONE} (\d+)\n".encode())
        while not (match := done.search(printed)):
            ready, _, _ = select.select([self._bash.stdout], [], [], max(0.0, ends - time.monotonic()))
            more = os.read(self._bash.stdout.fileno(), 65536) if ready else b""
            if not more:
                raise Wrong(f"{command!r} did not end; so far it printed {printed.decode()!r}")
            printed += more
        return int(match[1]), printed[: match.start()].decode().splitlines()


def commands(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a ```console block, each with the lines that it is shown to print."""
    findings: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            findings.append((line[2:], []))
        elif line.startswith("> ") and findings and not findings[-1][1]:
            findings[-1] = (f"{findings[-1][0]}\n{line[2:]}", [])
        elif findings:
            findings[-1][1].append(line)
        else:
            raise Wrong(f"a line of output without a command: {line!r}")
    return findings


def walk(text: str, name: str, shell: Shell) -> Iterator[tuple[Block, str, list[str], list[str]]]:
    """Save files and run shell lines of a page in order: block, command, lines printed, lines shown."""
    for block in of_page(text):
        if block.title:
            path = shell.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")
        elif block.language == "console":
            report = commands(block.text)
            for number, (command, expected) in enumerate(report):
                code, printed = shell.run(command)
                after = report[number + 1][0] if number + 1 < len(report) else ""
                if code and after != "echo $?" and expected[-1:] != ["Killed"]:
                    raise Wrong(f"{name}, line {block.line}: {command!r} ended with {code}: {printed}")
                yield block, command, printed, expected


def run_lines(text: str, name: str, folder: Path, env: Mapping[str, str]) -> None:
    """Save the files of a page and run its shell lines. Raises Wrong if they print something else."""
    with Shell(folder, env) as shell:
        for block, command, printed, expected in walk(text, name, shell):
            if not same(printed, expected):
                raise Wrong(f"{name}, line {block.line}: {command!r} printed {printed}")


def reader_env() -> dict[str, str]:
    """The environment of a reader who has this folder's Stroma, and whose pip needs no network."""
    ours = ("STROMA_", "OTEL_", "DD_", "SENTRY_", "PYTHON", "PIP_", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env |= {"STROMA": str(ROOT), "COLUMNS": "110", "NO_COLOR": "1"}
    # What it depends on, and what it is built with, are found in this environment.
    env["PYTHONPATH"] = sysconfig.get_path("purelib")
    return env | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}


def filled(text: str, name: str, shell: Shell) -> str:
    """The page with what its blocks print."""
    changes: list[tuple[int, int, str]] = []
    below = _below(text)
    with contextlib.chdir(shell.folder):
        for line, _, printed in run_python(text, name):
            if line in below and not same(printed, below[line].text.splitlines()):
                block = below[line]
                changes.append((block.start, block.end, "".join(f"{out}\n" for out in printed)))
    written: dict[Block, str] = {}
    for block, command, printed, expected in walk(text, name, shell):
        lines = expected if same(printed, expected) else printed
        typed = "$ " + command.replace("\n", "\n> ")
        written[block] = written.get(block, "") + "\n".join([typed, *lines]) + "\n"
    changes += [(b.start, b.end, new) for b, new in written.items()]
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def main(pages: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder, Shell(Path(folder), reader_env()) as shell:
        for page in map(Path, pages):
            text = page.read_text("utf-8")
            new = filled(text, page.stem, shell)
            if new != text:
                page.write_text(new, "utf-8")
                print(f"{page}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
