"""Stroma beside validation alone, the published library and LangGraph: a table and a chart.

    ./dev bench [--nodes 1,10,100,1000] [--rounds N]

Each library is a process of its own (benchmarks/peers/in_memory), asked in turn, round after round. A sample
is CPU time between two samples of validation alone in the same process; a ratio is the median over the rounds.
``./dev bench --write`` writes the table into docs/performance.md, one column of it into docs/comparison.md and
the README, and draws docs/images/bench-light.svg and -dark.svg.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import chart

ROOT = Path(__file__).parents[1]
_BEGIN, _END = "<!-- written by ./dev bench --write -->", "<!-- to here -->"
BASE = "validation alone"
#: By label: the module, and which Python.
PEERS = {
    BASE: ("floor", None),
    "written by hand": ("by_hand", None),
    "Stroma": ("stroma_", None),
    "stroma 0.3.2": ("stroma_", "published"),
    "LangGraph": ("langgraph_", "langgraph"),
    "LangGraph, in-memory saver": ("langgraph_saver", "langgraph"),
}


class Peer:
    def __init__(self, module: str, python: str | None) -> None:
        program = sys.executable if python is None else os.environ[f"STROMA_BENCH_{python.upper()}"]
        self.process = subprocess.Popen(
            [program, "-m", "benchmarks.peers.in_memory", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions = str(self._answer()["versions"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return answer

    def sample(self, nodes: int) -> tuple[float, float]:
        """CPU microseconds per node: its own, and that of validation alone beside it."""
        assert self.process.stdin is not None
        print(json.dumps({"nodes": nodes}), file=self.process.stdin, flush=True)
        answer = self._answer()
        return answer["cpu"], answer["floor"]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.communicate(timeout=10)


def machine() -> dict[str, str]:
    """What figures were measured on, and of what."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        commit = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        return {
            "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "commit": commit,
            "date": datetime.now(UTC).date().isoformat(),
        }
    return {"machine": platform.platform(), "python": platform.python_version()}


def measure(counts: list[int], rounds: int) -> dict[str, Any]:
    peers = {label: Peer(*how) for label, how in PEERS.items()}
    found: dict[str, dict[int, list[tuple[float, float]]]] = {
        label: {nodes: [] for nodes in counts} for label in peers
    }
    for nodes in counts:
        for round_ in range(rounds + 1):
            for label, peer in peers.items():
                pair = peer.sample(nodes)
                if round_:
                    found[label][nodes].append(pair)
    for peer in peers.values():
        peer.close()
    return {
        **machine(),
        "rounds": rounds,
        "versions": sorted({peer.versions for peer in peers.values()}),
        "cpu_us_per_node": {
            label: {str(n): round(statistics.median(cpu for cpu, _ in pairs), 2) for n, pairs in by.items()}
            for label, by in found.items()
        },
        "ratio": {
            label: {str(n): round(statistics.median(a / b for a, b in pairs), 2) for n, pairs in by.items()}
            for label, by in found.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    counts = list(results["cpu_us_per_node"][BASE])
    lines = [
        f"| CPU us per node (times validation) | {' | '.join(f'{int(n):,} nodes' if n != '1' else '1 node' for n in counts)} |",
        f"| --- {'| --- ' * len(counts)}|",
    ]
    for label, costs in results["cpu_us_per_node"].items():
        cells = []
        for n in counts:
            ratio = results["ratio"][label][n]
            cells.append(
                f"{costs[n]:.3g} ({ratio:.2g}x)" if ratio < 99.5 else f"{costs[n]:,.0f} ({ratio:.0f}x)"
            )
        name = f"**{label}**" if label == "Stroma" else label
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"{results['machine']}; Python {results['python']}; {', '.join(results['versions'])}; commit {results['commit']}, "
        f"{results['date']}; medians of {results['rounds']} rounds."
    )
    return "\n".join(lines)


def column(results: dict[str, Any], nodes: str) -> list[tuple[str, float, float]]:
    """Return the label, the microseconds and the ratio of each library in runs of so many nodes."""
    return [
        (label, results["cpu_us_per_node"][label][nodes], results["ratio"][label][nodes]) for label in PEERS
    ]


def rewrite(page: str, block: str) -> None:
    path = ROOT / page
    before, _, rest = path.read_text("utf-8").partition(_BEGIN)
    path.write_text(f"{before}{_BEGIN}\n{block}\n{_END}{rest.partition(_END)[2]}", "utf-8")


def main(counts: list[int], rounds: int, *, write: bool) -> int:
    results = measure(counts, rounds)
    print(table(results))
    if not write:
        return 0
    nodes = "100" if 100 in counts else str(counts[-1])
    rows = column(results, nodes)
    where = f"{results['date']}, {results['machine']}, Python {results['python']}"
    rewrite("docs/performance.md", table(results))
    lines = [
        f"| {'**Stroma**' if label == 'Stroma' else label} | {us:.3g} | {ratio:.3g} |"
        for label, us, ratio in rows
    ]
    head = "| | microseconds | times validation |\n| --- | --- | --- |\n"
    rewrite("docs/comparison.md", head + "\n".join(lines) + f"\n\n{where}.")
    text = ", ".join(f"{label} {us:.3g}" for label, us, _ in rows)
    image = "docs/images/bench"
    rewrite(
        "README.md",
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{image}-dark.svg">'
        f'<img alt="Microseconds of CPU time of a node: {text}" src="{image}-light.svg"></picture>\n\n'
        f"CPU time of each node of a run of {nodes}, in memory ({where}).",
    )
    for name, theme in chart.THEMES.items():
        path = ROOT / "docs" / "images" / f"bench-{name}.svg"
        path.write_text(chart.bars(f"CPU time of a node, in a run of {nodes}", rows, "Stroma", theme))
    return 0
