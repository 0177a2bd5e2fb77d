"""Write those pages under docs/ that follow from the code and the tests.

usage: ./dev run python docs/generate.py [--check]

The table in architecture.md is made of the import contract and the docstrings of the packages.
errors.md is made of the docstrings of the exception classes (their lines Where, Cause and Fix) and of every message
in the source; providers.md of the cases in tests/providers; guarantees.md of the tests that name one (promises.py);
reference/ of the public names and the commands (reference.py). With --check nothing is written, and the exit
code is 1 if a file is not up to date.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "stroma"
PARTS = ("Where", "Cause", "Fix")
ROOMS_BEGIN = "<!-- Rooms: written by docs/generate.py from the import contract. -->"
ROOMS_END = "<!-- End of rooms. -->"

#: What makes an error without being its class.
FACTORIES = {"permanent_error": "StoreError"}
BUILT_IN = (
    "AttributeError",
    "FileNotFoundError",
    "ImportError",
    "KeyError",
    "LookupError",
    "RuntimeError",
    "TimeoutError",
    "TypeError",
    "ValueError",
)
#: Part of a package, but not of what a pipeline's author meets.
NOT_SHOWN = ("demo/provider.py", "demo/provider.py")

#: What each `reason` of a failure means, and what to do.
REASONS = {
    "rate_limit": (
        "too many requests or tokens for now",
        "nothing; if it is frequent, lower `max_concurrency` or raise the limit with the provider",
    ),
    "overloaded": (
        "the provider has no capacity for now",
        "nothing; if it lasts, resume later or name a fallback model",
    ),
    "server_error": ("the provider failed", "nothing; if it lasts, look at its status page"),
    "timeout": (
        "no answer in time",
        "nothing; if it is frequent, raise the client's timeout or `node_timeouts`",
    ),
    "connection": (
        "no connection, or one that broke off",
        "nothing; if it lasts, check the address, the proxy and the network",
    ),
    "conflict": ("the provider was busy with the same thing", "nothing"),
    "changed": (
        "the code does other things than the run has recorded, see [versions](howto/change-a-flow.md)",
        "run the code that recorded it, or let a worker with fitting code take the run",
    ),
    "limit": (
        "the node's limit had no room for the call in time, or never can have",
        "resume later, raise the limit or its `max_wait_seconds`",
    ),
    "circuit_open": (
        "the provider failed too often and is left alone for a while",
        "see what the provider says of itself, then resume",
    ),
    "too_early": ("the provider is not ready to take the request", "nothing"),
    "bad_request": ("the request is wrong", "correct the node: the message says what is wrong"),
    "context_length": (
        "the request is longer than the model can read",
        "shorten it, split it (`map_over`), or use a model with a longer context",
    ),
    "content_policy": ("the provider refuses the content", "change the content, or the model"),
    "auth": ("the key is missing or wrong", "set the right key"),
    "permission": ("the key may not do this", "grant it, or use another key, model or region"),
    "not_found": ("there is no such model or address", "correct the name of the model or the URL"),
    "too_large": ("the request has too many bytes", "send less at once"),
    "quota": (
        "the account has no money or quota left",
        "pay, or raise the limit; then `resume=True`: nothing that was paid for is bought again",
    ),
    "contract": ("an input or output broke its contract", "see [ContractViolation](#contractviolation)"),
    "budget": ("a limit of the run was crossed", "see [BudgetExceeded](#budgetexceeded)"),
    "usage": ("the usage that a node reported cannot be counted", "see [UsageError](#usageerror)"),
    "not_serialisable": ("a state cannot be stored", "see [NotSerialisable](#notserialisable)"),
    "bug": (
        "the program has a mistake that another attempt would meet again",
        "correct it, then `resume=True`",
    ),
    "place": ("a node with a place cannot be called there", "see [PlaceError](#placeerror)"),
    "worker_lost": (
        "the worker of a place did not answer",
        "nothing; if it lasts, see what ends the workers of the place, and if they have the code of the run",
    ),
    "store": ("the store could not keep an attempt", "see [StoreError](#storeerror)"),
}


# ---------------------------------------------------------------------- reading the code


@dataclass(frozen=True)
class Message:
    """One text that an error is made with; ``{name}`` stands for a value."""

    error: str
    text: str
    module: str
    line: int


@dataclass(frozen=True)
class ErrorClass:
    name: str
    module: str
    bases: tuple[str, ...]
    summary: str
    parts: dict[str, str]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@functools.cache
def error_classes() -> list[ErrorClass]:
    """The public exception classes of the package: importable from `stroma`, or from a public module."""
    import stroma

    found = []
    for module, path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            summary, parts = read_docstring(ast.get_docstring(node) or "")
            if not parts:  # The docstring of an error that users meet says where, why, and what to do.
                continue
            home = "stroma" if node.name in stroma.__all__ else public(module)
            try:
                cls = getattr(importlib.import_module(module), node.name, None)
            except (
                ImportError
            ):  # The adapter of a framework, which is not in the lock; it raises the errors of others.
                continue
            if isinstance(cls, type) and issubclass(cls, BaseException) and cls.__module__ == module:
                bases = tuple(base.__name__ for base in cls.__bases__)
                found.append(ErrorClass(node.name, home, bases, summary, parts))
    return sorted(found, key=lambda error: error.name)


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the parts by name."""
    summary = " ".join(text.split("\n\n")[0].split())
    parts: dict[str, str] = {}
    for name in PARTS:
        match = re.search(rf"^{name}: (.*(?:\n(?![A-Z]\w+: |\n).*)*)", text, re.MULTILINE)
        if match:
            parts[name] = " ".join(match[1].split())
    return summary.replace("``", "`"), {name: part.replace("``", "`") for name, part in parts.items()}


@functools.cache
def messages() -> list[Message]:
    """Every text in the source that an error is made with."""
    known = {found.name for found in error_classes()} | set(BUILT_IN)
    found = []
    for module, path in modules():
        if path.relative_to(SOURCE).as_posix() in NOT_SHOWN:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        constants = dict(filter(None, map(constant, tree.body)))

        def read(node: ast.expr, constants: dict[str, str] = constants) -> str | None:
            return template(node, constants)

        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            error = FACTORIES.get(called, called)
            text = read(node.args[0])
            if text is None or (error not in known and called not in ("UsageError", "BadParameter")):
                continue
            if isinstance(node.func, ast.Attribute) and error not in BUILT_IN:
                error = ast.unparse(node.func)  # click.UsageError is not ours.
            more = "; ".join(filter(None, map(read, node.args[1:]))) if error == "Problem" else ""
            found.append(Message(error, f"{text}; {more}" if more else text, module, node.lineno))
    return found


def constant(node: ast.stmt) -> tuple[str, str] | None:
    """The name and text of a module's constant that is a string."""
    value = getattr(node, "value", None)
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    if not isinstance(targets[0], ast.Name) or not isinstance(value, ast.Constant):
        return None
    return (targets[0].id, value.value) if isinstance(value.value, str) else None


def template(node: ast.expr, constants: dict[str, str]) -> str | None:
    """The text of a string with its values by name; None for anything else, and for values alone."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if not isinstance(node, ast.JoinedStr) or not any(isinstance(part, ast.Constant) for part in node.values):
        return None
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else short(part, constants) for part in node.values
    )


def short(part: ast.expr, constants: dict[str, str]) -> str:
    """What stands for a value in a message: the last name in its expression, if that tells something."""
    value = part.value if isinstance(part, ast.FormattedValue) else part
    name = getattr(value, "attr", getattr(value, "id", ""))
    if name in constants:
        return constants[name]
    if name in ("__name__", "__qualname__"):
        name = "class"
    return "{" + (name.strip("_") or "…") + "}"


# ---------------------------------------------------------------------- writing


def public(module: str) -> str:
    """Return the package that a user knows, by the path that the docs give."""
    known = {
        "stroma.drivers.temporal": "stroma.temporal",
        "stroma.drivers": "stroma.temporal",
        "stroma.engine": "stroma",
        "stroma._utils": "stroma",
    }
    parts = module.split(".")
    return known.get(".".join(parts[:3])) or known.get(".".join(parts[:2])) or ".".join(parts[:2])


def code(text: str) -> str:
    """Text as code in Markdown, whatever quotes it has."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def shown(texts: list[str]) -> list[str]:
    return [f"- {code(text)}" for text in sorted(set(texts))]


def errors_page() -> str:
    said = defaultdict(list)
    by_module: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for message in messages():
        said[message.error].append(message.text)
        by_module[message.error][public(message.module)].append(message.text)
    classes = error_classes()
    ours = [found for found in classes if not found.module.startswith("stroma.cli")]
    lines = [
        "<!-- Written by docs/generate.py: run `./dev run python docs/generate.py` after a change. -->",
        "",
        "# Errors",
        "",
        "This page lists every error with its cause and its fix, for anyone who has just met one. A failure inside a pipeline is a",
        "result, not an exception. `result.status` is FAILED (a retry would fail again) or PARTIAL (a resume may succeed).",
        "`result.failure` has the exception with its class, reason, node and attempt, and `result.raise_for_status()` raises it.",
        "Every failed attempt is an event of `result.trace`. `run()` raises only for wrong arguments, for a run that cannot start,",
        "and for a hook that is not async. In messages, `{name}` is a placeholder for a value.",
        "",
        "| error | is a | where |",
        "| --- | --- | --- |",
    ]
    for found in ours:
        bases = ", ".join(f"`{base}`" for base in found.bases)
        lines.append(
            f"| [{found.name}](#{found.name.lower()}) | {bases} | {found.parts.get('Where', '').rstrip('.')} |"
        )
    for found in ours:
        lines += ["", f"## {found.name}", "", f"`{found.module}.{found.name}`. {found.summary}", ""]
        lines += [f"- **{name}.** {upper(found.parts[name])}" for name in PARTS if name in found.parts]
        texts = examples().get(found.name) or said[found.name]
        if texts:
            lines += ["", "Messages:", "", *shown(texts)]
    lines += [
        "",
        "## Wrong arguments and other built-in errors",
        "",
        "The call itself raises them. A wrong field of `RunConfig`, `FailurePolicy` or a contract raises pydantic's `ValidationError`,",
        "with one of these texts or one of pydantic.",
    ]
    for name in BUILT_IN:
        for module, texts in sorted(by_module.get(name, {}).items()):
            if not module.startswith(("stroma.cli", "stroma.demo")):
                whole = {"AttributeError": "`stroma`", "ImportError": "what needs an extra"}
                place = whole.get(name, "a run") if module == "stroma" else f"`{module}`"
                lines += ["", f"**{name}** from {place}:", "", *shown(texts)]
    lines += [
        "",
        "## Reasons",
        "",
        "`failure.reason` and `event.reason` are one of these words, or None for an unknown exception, which is AMBIGUOUS.",
        "[Provider errors](providers.md) lists the reason for each error of a provider.",
        "",
        "| reason | meaning | fix |",
        "| --- | --- | --- |",
        *(f"| {reason} | {means} | {do} |" for reason, (means, do) in REASONS.items()),
        "",
        "## The command line",
        "",
        "A command that fails prints one of these on stderr, and exits with one of [these codes](cli.md#exit-codes).",
        "",
        *shown([m.text for m in messages() if m.module.startswith("stroma.cli") and m.error not in BUILT_IN]),
    ]
    return "\n".join(lines) + "\n"


def examples() -> dict[str, list[str]]:
    """Texts of the errors that make their own."""
    from stroma import (
        BudgetExceeded,
        CheckFailed,
        CircuitOpen,
        ContractViolation,
        Finding,
        SharedBudgetExceeded,
    )

    midnight = datetime(2027, 1, 16, tzinfo=UTC)
    finding = Finding(
        "error",
        "missing",
        "search",
        "answer",
        "0",
        "1",
        "sources",
        "",
        "list[str]",
        "'answer' needs sources (list[str]), and Found has no such field",
        "add it to the output of 'search', or give it a default in Question",
    )
    wrong = [{"loc": ("urls",), "msg": "Input should be a valid list"}]
    return {
        "CheckFailed": [str(CheckFailed([finding])).replace("\n", " ")],
        "ContractViolation": [str(ContractViolation("search", "output", {}, wrong))],
        "CircuitOpen": [str(CircuitOpen("api.example.com", 12.0))],
        "SharedBudgetExceeded": [
            str(SharedBudgetExceeded("team-a", "cost", 50, 49.9, 0.05, 0.1, "search", midnight)),
            str(SharedBudgetExceeded("team-a", "cost", 5, 4.9, 0, 0.2, "search", midnight, capped=True)),
            str(SharedBudgetExceeded("team-a", "tokens", 1000, 900, 0, 200, "search", None)),
        ],
        "BudgetExceeded": [
            str(BudgetExceeded("tokens", 1000, 1200, "search")),
            str(BudgetExceeded("cost", 0.1, 0.12, "search")),
            str(BudgetExceeded("cost", 0.1, 0.12, "search", is_set_for_run=True)),
            str(BudgetExceeded("latency", 5000, 5100, "search")),
        ],
    }


def upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def own_module(name: str) -> ModuleType:
    """A module of the repository, by its name."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT))


def versions(packages: Iterable[str]) -> str:
    """The releases of packages that the tests were run with."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def providers_page() -> str:
    providers = own_module("tests.providers.cases"), own_module("tests.providers.cases_more")
    sdks = own_module("tests.providers.clients").SDKS
    lines = [
        "<!-- Written by docs/generate.py: run `./dev run python docs/generate.py` after a change. -->",
        "",
        "# Provider errors",
        "",
        "This page lists how errors of model providers are classified, for anyone who sets retry policies. Stroma reads data of the",
        "exception: a status, headers, codes in the body, the name of its class. It imports no SDK. It also reads the exception",
        "that it was raised `from`, one level down. RECOVERABLE failures are retried (three times by default), AMBIGUOUS ones once,",
        "TERMINAL ones never. [Reasons](errors.md#reasons) has the next step for each.",
        "",
        "An exception group of a node's TaskGroup gets the class of its worst member, and the longest wait of its members.",
        "",
        "A client without an API key fails before any request: TERMINAL, reason auth. This was tested with OpenAI, Azure, Anthropic,",
        "Google and Cohere in the tests.",
        "",
        "Turn off the retries of the client (`max_retries=0` for OpenAI and Anthropic). Stroma counts, shows and delays its retries,",
        "and both together would multiply the calls.",
        "",
        "In the tests, the SDK itself raised the error of every row, from the response of a server.",
        f"The versions were `{versions(('httpx2', *sdks, 'grpcio'))}`.",
    ]
    for name, sdk in sdks.items():
        lines += [
            "",
            f"## {sdk.title}",
            "",
            "| the server's answer | raised as | class | reason |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {case.what} | `{case.raised}` | {case.failure_class} | {case.reason or ''} |"
            for case in [*providers[0].PROVIDER_CASES, *providers[1].MORE_CASES]
            if case.sdk == name
        ]
    lines += ["", "## gRPC", "", "| the server's answer | class | reason |", "| --- | --- | --- |"]
    lines += [f"| {what} | {means} | {reason or ''} |" for what, means, reason in providers[1].GRPC_CASES]
    lines += [
        "",
        "`grpc-retry-pushback-ms` in the trailing metadata is the wait; a negative one means TERMINAL.",
        "",
        "## Any other client",
        "",
        "Errors of `httpx` and `httpx2` are read in the same way, and so is any exception with a `status_code` or a `response`. More",
        "specific codes (`insufficient_quota`, `overloaded_error`, `context_length_exceeded` ...) take precedence over the status, if",
        "the exception has the body. An exception of aiohttp does not have it.",
        "",
        "| status | class | reason |",
        "| --- | --- | --- |",
    ]
    from stroma.failures.provider_verdicts import STATUS

    for status, verdict in STATUS.items():
        lines.append(f"| {status} | {verdict.failure_class} | {verdict.reason} |")
    lines += [
        "| other 5xx | RECOVERABLE | server_error |",
        "| anything else | AMBIGUOUS | |",
        "",
        "## Retry-After",
        "",
        "The delay before the next attempt is at least the wait that the server asks for. If that is more than",
        "`FailurePolicy.max_retry_after_seconds` (120), the run stops as PARTIAL, and `result.failure.retry_after_seconds` is the wait.",
        "The wait is not stored: a process that resumes the run, after a death or a shutdown, makes the next attempt",
        "at once. A [limit](limits.md#rate-limits) with a store stays closed for all processes.",
        "",
        "Google sends it in the body (`retryDelay`), the others in headers. Examples at Fri, 15 Jan 2027 08:00:00 GMT:",
        "",
        "| headers | wait |",
        "| --- | --- |",
    ]
    for headers, seconds in own_module("tests.providers.waits").RETRY_AFTER:
        if headers and len(str(headers)) < 100:
            text = ", ".join(f"`{key}: {value.strip()}`" for key, value in headers.items())
            lines.append(f"| {text} | {'none' if seconds is None else f'{seconds:g} s'} |")
    lines += [
        "",
        "`x-should-retry: false` makes any error TERMINAL. `true` makes it RECOVERABLE, except an exhausted quota and a wrong key.",
        "",
        "## Custom classifiers",
        "",
        "Your own classifiers are called first. Return None to leave the decision to the next one.",
        "",
        "```python",
        "from stroma import FailureClass, NodeContext, StromaRunner",
        "",
        "",
        "def classifier(exc: Exception, context: NodeContext) -> FailureClass | None:",
        '    if "flaky search" in str(exc):',
        "        return FailureClass.RECOVERABLE",
        "    return None",
        "",
        "",
        "runner = StromaRunner.quick(classifiers=[classifier])",
        "```",
    ]
    return "\n".join(lines) + "\n"


def architecture_page() -> str:
    """Return the page with its picture of the rooms, drawn from the first import contract and the packages' docstrings."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    before, _, rest = text.partition(ROOMS_BEGIN)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    lines = ["", "| layer | room | content |", "| --- | --- | --- |"]
    layers = contract["layers"]
    for number, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        for room in layer.split(" | "):
            package = SOURCE / room / "__init__.py"
            code = (package if package.exists() else SOURCE / f"{room}.py").read_text("utf-8")
            doc = ast.get_docstring(ast.parse(code)) or ""
            name = f"{room}/" if package.exists() else f"{room}.py"
            lines.append(f"| {number} | `{name}` | {doc.partition(chr(10))[0].rstrip('.')} |")
    return f"{before}{ROOMS_BEGIN}\n" + "\n".join(lines) + f"\n\n{ROOMS_END}{rest.partition(ROOMS_END)[2]}"


PAGES = {
    "architecture.md": architecture_page,
    "errors.md": errors_page,
    "providers.md": providers_page,
    "guarantees.md": own_module("docs.promises").guarantees_page,
    **own_module("docs.reference").PAGES,
    **own_module("docs.defaults").PAGES,
}


def main(argv: list[str]) -> Any:
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / "docs" / name, page()
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(name)
            if "--check" not in argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, "utf-8")
    print(f"{'not up to date' if '--check' in argv else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
