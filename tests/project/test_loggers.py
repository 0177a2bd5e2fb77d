"""Loggers of the package: each writes arguments and exceptions through one way out."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.project.sources import FILES, SOURCE, parsed

METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}

#: Makes SafeLogger, whose records are single lines without secrets: see stroma._utils.logs.
WAY_OUT = {"_utils/logs.py", "engine/redaction.py"}
#: Add a handler, or write to the application's own logger what Content has let through.
OTHERS = {"cli/progress.py", "telemetry/logs.py"}
#: What an argument of any other logger goes through.
HELPERS = {"one_line"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def safe_names(tree: ast.Module) -> set[str]:
    """Names of a module that hold a SafeLogger."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets, values = node.targets, [node.value]
            if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                targets, values = targets[0].elts, node.value.elts
            for target, value in zip(targets, values, strict=False):
                text = ast.unparse(value)
                if isinstance(target, ast.Name) and (
                    text.startswith("get_logger(") or text.endswith(".run_logger")
                ):
                    names.add(target.id)
    return names


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Calls of loggers, with the text of the logger."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            logger = ast.unparse(node.func.value)
            if "log" in logger.rpartition(".")[2].lower():
                yield node, logger


def test_every_logger_is_the_safe_one() -> None:
    """Each call of a logger goes to a SafeLogger, which masks and escapes each argument and traceback; the
    arguments of another logger go through a helper, and no exception is passed to it."""
    wrong = []
    for path in FILES:
        if name_of(path) in WAY_OUT | OTHERS:
            continue
        tree = parsed(path)
        if any("getLogger" in (getattr(one, "attr", ""), getattr(one, "id", "")) for one in ast.walk(tree)):
            wrong.append(f"{name_of(path)}: use stroma._utils.logs.get_logger")
        found = list(calls(tree))
        safe = safe_names(tree) if found else set()
        for call, logger in found:
            if logger in safe or logger.endswith(".run_logger"):
                continue
            for argument in [*call.args, *(one.value for one in call.keywords)]:
                is_constant = isinstance(argument, ast.Constant)
                is_written = isinstance(argument, ast.Call) and ast.unparse(argument.func) in HELPERS
                if not is_constant and not is_written:
                    wrong.append(f"{name_of(path)}:{call.lineno}: {ast.unparse(argument)}")
    assert wrong == []
