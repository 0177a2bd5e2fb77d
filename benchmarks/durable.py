"""Durable runs next to peers: the same nodes on our stores, on raw sqlite3, on LangGraph and on DBOS.

    ./dev run python -m benchmarks.durable [--only REGEX] [--rounds 5] [--runs 64] [--disk-ms 1]

One run of 100 nodes alone, and 64 runs of 20 nodes at once; a node validates, changes and validates a state
of 1 KB. Each engine has a process of its own, and each peer a virtual environment of its own, made on the
first call under ``$XDG_CACHE_HOME/stroma-bench``. They are asked in turn, round after round, and stand still
in between; a ratio is the median over the rounds of two figures of the same round. PostgreSQL and Redis are
those of the tests: on this machine, over a socket in the file system, with fsync. Everything is a table on
stdout; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.servers import RedisServer
from tests.servers_postgres import PostgresServer

ROOT = Path(__file__).parents[1]
#: (runs at once, nodes of each)
ALONE, MANY = (1, 100), (64, 20)
PEERS = {
    "langgraph_": (
        "langgraph",
        "langgraph-checkpoint-sqlite",
        "langgraph-checkpoint-postgres",
        "psycopg[binary,pool]",
    ),
    "dbos_": ("dbos", "psycopg[binary]"),
    "dbos_queue": ("dbos", "psycopg[binary]"),
}


@dataclass(frozen=True)
class Engine:
    module: str
    #: With {file}, {postgres} or {redis} in it; each engine has a file and a database of its own.
    address: str
    keeps: str


_OURS = "attempt, output, totals and lease of the run: one transaction"
_LANGGRAPH = "a checkpoint of the whole state, and the node's writes: two transactions"
_DBOS = "the step's output; input and end of the run"
RAW, GROUPED, SINGLE = "raw sqlite3, FULL", "SQLiteStore, FULL", "SQLiteStore, FULL, a commit per node"
ENGINES = {
    RAW: Engine("raw", "{file}", "the node's output, a counter of the run: one transaction"),
    GROUPED: Engine("ours", "sqlite:///{file}", _OURS),
    SINGLE: Engine("ours", "alone+sqlite:///{file}", f"{_OURS} each, never shared"),
    "PostgresStore": Engine("ours", "{postgres}", _OURS),
    "RedisStore, appendfsync always": Engine("ours", "{redis}", _OURS),
    "LangGraph AsyncSqliteSaver, FULL, sync": Engine("langgraph_", "sync+{file}", _LANGGRAPH),
    "LangGraph AsyncSqliteSaver, FULL, async": Engine(
        "langgraph_", "{file}", f"{_LANGGRAPH}, behind the run"
    ),
    "LangGraph AsyncPostgresSaver, sync": Engine("langgraph_", "sync+{postgres}", _LANGGRAPH),
    "LangGraph AsyncPostgresSaver, async": Engine(
        "langgraph_", "{postgres}", f"{_LANGGRAPH}, behind the run"
    ),
    "DBOS, SQLite (WAL, FULL)": Engine("dbos_", "{file}", _DBOS),
    "DBOS, PostgreSQL": Engine("dbos_", "{postgres}", _DBOS),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def python_of(module: str) -> str:
    """The interpreter that has an engine's packages; made if need be."""
    if module not in PEERS:
        return sys.executable
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stroma-bench"
    venv = cache / f"{module.partition('_')[0]}-{platform.python_version()}"
    python = str(venv / "bin" / "python")
    if not (venv / "complete").exists():
        say(f"making {venv} ...")
        uv = str(Path(sys.executable).with_name("uv"))
        pydantic = f"pydantic=={_version('pydantic')}"  # The same contract work for everybody.
        subprocess.run(
            [uv, "venv", "-q", "--clear", "-p", os.path.realpath(sys.executable), str(venv)], check=True
        )
        subprocess.run([uv, "pip", "install", "-q", "-p", python, pydantic, *PEERS[module]], check=True)
        (venv / "complete").touch()
    return python


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


class Process:
    """An engine at work in a process of its own. It is stopped while it has nothing to do."""

    def __init__(self, engine: Engine, address: str, nodes: int, log: Path) -> None:
        env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
        env["PYTHONPATH"] = str(ROOT)
        command = [python_of(engine.module), "-m", "benchmarks.peers", engine.module, address, str(nodes)]
        with open(log, "a") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
                cwd=ROOT,
            )
        self._log = log
        self.versions: str = self._answer()["versions"]
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, runs: int, number: int) -> tuple[float, float]:
        """Seconds of the wall, and of the process's CPU."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"runs": runs, "round": number}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer["wall"], answer["cpu"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Servers:
    """What addresses stand for. The servers are started once somebody wants them."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._postgres: PostgresServer | None = None
        self._redis: RedisServer | None = None
        self._count = 0

    def address(self, pattern: str) -> str:
        self._count += 1
        if "{postgres}" in pattern:
            if self._postgres is None:
                self._postgres = PostgresServer()
                self._stack.callback(self._postgres.stop)
                say(f"PostgreSQL {self._postgres.execute('SHOW server_version')[0][0]}")
            name = f"bench{self._count}"
            self._postgres.execute(f"CREATE DATABASE {name}")
            return pattern.format(postgres=urlsplit(self._postgres.dsn)._replace(path=f"/{name}").geturl())
        if "{redis}" in pattern:
            if self._redis is None:
                self._redis = RedisServer()
                self._stack.callback(self._redis.close)
            return pattern.format(redis=self._redis.url)
        return pattern.format(file=self._folder / f"{self._count}.db")


@contextlib.contextmanager
def processes(names: list[str], nodes: int) -> Iterator[dict[str, Process]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stroma-bench-")))
        servers = Servers(folder, stack)
        found: dict[str, Process] = {}
        for name in names:
            engine = ENGINES[name]
            found[name] = Process(
                engine, servers.address(engine.address), nodes, folder / f"{len(found)}.log"
            )
            stack.callback(found[name].close)
        yield found


def measure(
    names: list[str], case: tuple[int, int], rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], set[str]]:
    """Nodes a second, and CPU seconds of a node, of each round; and the versions."""
    runs, nodes = case
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with processes(names, nodes) as found:
        for number in range(rounds):
            say(f"{runs} x {nodes}: round {number + 1} of {rounds}")
            for name, process in found.items():
                wall, cpu = process.ask(runs, number)
                figures[name].append((runs * nodes / wall, cpu / runs / nodes))
        return figures, {process.versions for process in found.values()}


def fdatasync_us() -> float:
    """What the disk itself takes to keep four pages that are written over."""
    with tempfile.TemporaryFile(prefix="stroma-bench-") as file:
        times = []
        for _ in range(200):
            os.pwrite(file.fileno(), b"x" * 16384, 0)
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def ratio(figures: dict[str, list[tuple[float, float]]], above: str, below: str) -> float | None:
    """The median of how many times more nodes a second one does than the other in the same round."""
    if above not in figures or below not in figures:
        return None
    return statistics.median(a / b for (a, _), (b, _) in zip(figures[above], figures[below], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a regular expression; engines whose name it finds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=MANY[0], help="how many at once in the second case")
    parser.add_argument(
        "--disk-ms", type=float, default=0.0, help="what a commit takes longer, on SQLite without peers"
    )
    options = parser.parse_args()
    if options.disk_ms:
        os.environ["STROMA_BENCH_DISK_MS"] = str(options.disk_ms)
        options.only = options.only or "sqlite3|SQLiteStore"
    names = [name for name in ENGINES if re.search(options.only, name)]
    alone, versions = measure(names, ALONE, options.rounds)
    many, _ = measure(names, (options.runs, MANY[1]), options.rounds)

    print(
        f"| engine | 1 run: nodes/s | time of a node to raw sqlite3 | {options.runs} runs: nodes/s "
        "| to a commit per node | CPU of a node | stored per node |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names:
        slower, faster = ratio(alone, RAW, name), ratio(many, name, SINGLE)
        cells = [
            name,
            f"{statistics.median(rate for rate, _ in alone[name]):,.0f}",
            "" if slower is None else f"{slower:.2f}x",
            f"{statistics.median(rate for rate, _ in many[name]):,.0f}",
            "" if faster is None else f"{faster:.1f}x",
            f"{statistics.median(cpu for _, cpu in many[name]) * 1e6:.0f} us",
            ENGINES[name].keeps,
        ]
        print("| " + " | ".join(cells) + " |")
    print(f"\nAn fdatasync takes {fdatasync_us():.0f} us; {'; '.join(sorted(versions))}.")


if __name__ == "__main__":
    main()
