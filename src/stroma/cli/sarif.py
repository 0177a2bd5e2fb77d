"""Write findings as SARIF 2.1.0 for code review."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from stroma.cli.errors import Code, Problem
from stroma.contracts.checks.finding import Finding
from stroma.contracts.node import Group, Node

__all__ = ["to_sarif", "write_json"]

#: Short description of each kind of finding; see docs/checks.md.
RULES: Final = {
    "missing": "A field that a node needs is not given",
    "type": "A field has a type that the next node never takes",
    "conversion": "Only some values of a field can be converted",
    "constraint": "A constraint is narrower than what is promised",
    "choices": "Not every value that is promised is taken",
    "optional": "A field may be None, and must not be",
    "union": "Not every type of a union is taken",
    "extra": "A field is given that the next node forbids",
    "unknown": "Nothing is known of what a field holds",
    "undecidable": "A function decides what is taken",
    "items": "The items of a list cannot be a node's input",
    "collision": "Two nodes of a group give the same field",
    "broken": "A contract cannot be read",
    "effect": "A call that must not be repeated cannot be looked up, or is in a group that is retried",
}


def to_sarif(findings: Sequence[Finding], nodes: Sequence[Node | Group]) -> dict[str, Any]:
    """Return the SARIF log of one check."""
    used = list(dict.fromkeys(finding.kind for finding in findings))
    try:
        version = metadata.version("stroma-runner")
    except metadata.PackageNotFoundError:
        version = "0"
    rules = [
        {"id": f"stroma/{kind}", "name": kind.capitalize(), "shortDescription": {"text": RULES[kind]}}
        for kind in used
    ]
    results = []
    for finding in findings:
        result: dict[str, Any] = {
            "ruleId": f"stroma/{finding.kind}",
            "ruleIndex": used.index(finding.kind),
            "level": finding.severity,
            "message": {"text": f"{finding.message}; {finding.fix}"},
            "properties": {
                "source": finding.source,
                "target": finding.target,
                "path": finding.path,
                "source_type": finding.source_type,
                "target_type": finding.target_type,
            },
        }
        for at, name in ((finding.target_at, "locations"), (finding.source_at, "relatedLocations")):
            place = _location(_node_at(nodes, at))
            if place is not None:
                result[name] = [place]
        results.append(result)
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "stroma",
                        "semanticVersion": _semantic_version(version),
                        "rules": rules,
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": results,
            }
        ],
    }


def _semantic_version(version: str) -> str:
    """Convert a Python version to a semantic version."""
    release, dev, number = version.partition(".dev")
    return f"{release}-dev.{number}" if dev else release


def _node_at(nodes: Sequence[Node | Group], at: str) -> Node | None:
    """Return the node at a place, for a group its first node; None for the input."""
    if at == "input":
        return None
    first, *rest = map(int, at.split("."))
    node = nodes[first]
    for index in rest:
        if isinstance(node, Group):
            node = node.children[index]
    while isinstance(node, Group):
        node = node.children[0]
    return node


def _location(node: Node | None) -> dict[str, Any] | None:
    """Return the file and line of a node's function."""
    func: Any = None if node is None else node.func
    while isinstance(func, functools.partial):
        func = func.func
    try:
        func = inspect.unwrap(func)
    except (TypeError, ValueError):
        return None
    if not hasattr(func, "__code__"):  # An object that can be called.
        func = getattr(type(func), "__call__", None)  # noqa: B004
    code = getattr(func, "__code__", None)
    if code is None or not Path(code.co_filename).is_file():
        return None
    return {
        "physicalLocation": {
            "artifactLocation": _artifact(Path(code.co_filename).resolve()),
            "region": {"startLine": code.co_firstlineno},
        }
    }


def _artifact(path: Path) -> dict[str, str]:
    """Return the path relative to the current directory, if it is below it: reviews look files up by that."""
    try:
        relative = path.relative_to(Path.cwd())
    except ValueError:
        return {"uri": path.as_uri()}
    absolute, base = path.as_uri(), Path.cwd().as_uri().rstrip("/")
    return {"uri": absolute[len(base) + 1 :] if absolute.startswith(base) else relative.as_posix()}


def write_json(path: Path, data: Any) -> None:
    """Write JSON into a file. Raises Problem."""
    try:
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        raise Problem(
            f"cannot write {path}: {error.strerror or error}",
            "give the path of a file in a directory that is there and that you may write to",
            code=Code.ENVIRONMENT,
        ) from error
