"""Write the reference pages: every public name, and every command with its options.

A page places each name; the generator of the site adds its docstring, signature and source. The parameters of the names in
PARAMETERS are written here as tables, from signatures and docstrings: models of pydantic have no signature of their own.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

NOTE = "<!-- Written by docs/generate.py: run `./dev run python docs/generate.py` after a change. -->"

#: Pages of names: title, words, and the modules or packages below `stroma` that define them; with `stroma.` a package with names of its own.
TOPICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "running": (
        "Running",
        "Runners, pipelines, nodes, flows, and the configuration of runs.",
        (
            "runner.pipeline",
            "runner.runner",
            "runner.flows.flow",
            "runner.flows.endings",
            "runner.stream",
            "runner.events",
            "engine.config",
            "contracts.node",
            "engine.execution",
            "runner.steps",
            "engine.context",
        ),
    ),
    "contracts": (
        "Contracts and checks",
        "Contracts of nodes, and the checker that compares them before a run.",
        ("contracts.contract", "contracts.tagged_json", "contracts.checks"),
    ),
    "failures": ("Failures and policies", "Failure classes, retry policies and errors.", ("failures",)),
    "cost": (
        "Usage, prices, budgets, limits",
        "Usage and cost of calls, and the limits that stop or delay a run.",
        ("cost", "limits"),
    ),
    "hooks": ("Hooks", "Every hook with its arguments.", ("hooks",)),
    "groups": (
        "Groups and maps",
        "Nodes side by side, and one node for many items.",
        ("runner.groups", "runner.items"),
    ),
    "wire": ("Wire formats", "Events of a run in the formats of web clients.", ("stroma.wire",)),
    "trace": ("Results and traces", "Result and trace of a run.", ("trace",)),
    "stores": (
        "Stores",
        "Stores of runs, and the protocols that your own store implements.",
        ("checkpoint",),
    ),
    "telemetry": ("Telemetry", "One factory for each system.", ("stroma.telemetry",)),
    "adapters": (
        "Adapters",
        "Adapters of agent frameworks, and the guard that they share.",
        ("stroma.adapters",),
    ),
    "testing": ("Testing", "Helpers to test pipelines and stores.", ("stroma.testing",)),
}


#: Names whose parameters the pages list: what users call and configure.
PARAMETERS = frozenset(
    {
        "AsyncInMemoryStore",
        "Breaker",
        "ExecutionBudget",
        "ExecutionResult",
        "FailurePolicy",
        "FallbackPolicy",
        "InMemoryStore",
        "Limit",
        "NodeContract",
        "NodeHooks",
        "NodeTimeout",
        "Pipeline",
        "PostgresStore",
        "RedisStore",
        "RunConfig",
        "SQLiteStore",
        "SharedBudget",
        "SyncRedisStore",
        "classify",
        "estimate_cost_usd",
        "map_over",
        "open_store",
        "parallel",
        "resolve_model",
        "stroma_flow",
        "stroma_node",
        "usage_from",
    }
)
#: Methods and properties of a class that users call. Of other classes the page shows all public ones.
METHODS = {
    "Breaker": ["states"],
    "CheckpointStoreTests": ["reopened"],
    "CostTracker": [
        "record",
        "total_tokens",
        "total_cost_usd",
        "total_latency_ms",
        "check_budget",
        "summary",
    ],
    "ExecutionBudget": ["unlimited"],
    "ExecutionTrace": ["append", "copy", "replay", "walk", "events_for", "failures", "to_json", "diff"],
    "FaultPlan": ["fail", "lose", "delay", "malform", "at_random", "forgive"],
    "Limit": [],
    "NodeExecution": [
        "run_id",
        "pipeline",
        "outcome",
        "duration_ms",
        "function_ms",
        "started_ns",
        "reason",
        "notes",
        "at_end",
        "idempotency_key",
        "usage",
        "model",
        "remaining_budget",
        "report_usage",
        "emit",
        "signal",
        "wait_for",
    ],
    "NodeHooks": [],
    "ReliabilityContext": [
        "for_run",
        "build_result",
        "conversation",
        "user",
        "session_id",
        "execution",
        "last_state",
        "notes",
    ],
    "RunConfig": ["with_run_id"],
    "SharedBudget": ["state"],
}
#: Classes that users get and do not create; their constructors are internal.
NOT_CREATED = {"NodeExecution", "ReliabilityContext"}
#: Units by the end of a parameter's name, and of parameters whose name does not have one.
UNITS = {
    "_ms": "ms",
    "_seconds": "s",
    "_usd": "US dollars",
    "_bytes": "bytes",
    "_pct": "share, 0 to 1",
    "tokens": "tokens",
    "_per_minute": "per minute",
    "tokens_per_minute": "tokens per minute",
    "requests_per_minute": "attempts per minute",
    "max_tokens_total": "tokens",
    "node_timeouts": "ms",
    "failure_rate": "share, 0 to 1",
    "usd_by_node": "US dollars",
}
#: Defaults that a call makes, in words.
MADE = {
    "run_id": "a new id",
    "budget": "no limits",
    "policy_map": "[default policies](../concepts/failures.md)",
    "hooks": "no hooks",
    "nodes": "required",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a public name."""

    name: str
    kind: str
    default: str
    meaning: str

    @property
    def unit(self) -> str:
        """Return the unit of the values, or an empty string."""
        ends = [end for end in UNITS if self.name.endswith(end)]
        return UNITS[max(ends, key=len)] if ends else ""

    def row(self) -> str:
        """Return the row of the table."""
        kind = self.kind.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
        meaning = as_markdown(self.meaning)
        return f"| `{self.name}` | <code>{kind}</code> | {self.default} | {self.unit} | {meaning[:1].upper()}{meaning[1:]} |"


def as_markdown(text: str) -> str:
    """Return a sentence of a docstring for a cell of a table."""
    text = " ".join(text.split()).replace("``", "`").replace("|", "&#124;")
    return re.sub(r":\w+:`~?\.?([\w.]+)`", r"`\1`", re.sub(r"<(?=\w)", "&lt;", text))


def descriptions(doc: str) -> dict[str, str]:
    """Return what a docstring says of each parameter: entries of Args and Attributes, and paragraphs like ``name``: text."""
    entries: dict[str, str] = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?:(?: +.*)?(?:\n|\Z))+)", doc, re.MULTILINE):
        for names, text in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            entries |= dict.fromkeys(names.split(", "), text)
    for paragraph in re.split(r"\n\s*\n", doc):
        parts = re.split(r"(?:^|(?<=[.;] ))``(\w+)``: ", " ".join(paragraph.split()))
        entries |= {
            name: entries.get(name, text) for name, text in zip(parts[1::2], parts[2::2], strict=True)
        }
    return {name: " ".join(text.split()) for name, text in entries.items()}


def plain_type(annotation: Any) -> str:
    """Return an annotation as users would write it, without the marks for validation."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    text = re.sub(r"^Annotated\[(.*), SkipValidation\]$", r"\1", text)
    return re.sub(r"\b(?:InstanceOf|ClassVar)\[(.*)\]$", r"\1", text).replace("'", '"')


def plain_default(name: str, value: Any) -> str:
    """Return the default of a parameter, for a cell of the table."""
    if value in (PydanticUndefined, inspect.Parameter.empty):
        return "required"
    made = {dict: "{}", list: "[]"}
    if callable(value) or "factory" in repr(value):
        return MADE.get(name, f"`{made.get(value, '[]')}`")
    return f"`{json.dumps(value)}`" if isinstance(value, str) else f"`{value!r}`"


def parameters(value: Any) -> list[Parameter]:
    """Return the parameters of a class or function, with types and defaults as the code has them."""
    doc = inspect.getdoc(value) or ""
    said = descriptions(doc)
    if inspect.isclass(value) and issubclass(value, BaseModel):
        kinds = inspect.get_annotations(value)
        return [
            Parameter(
                name,
                plain_type(kinds[name]),
                plain_default(name, field.default_factory or field.default),
                said.get(name, ""),
            )
            for name, field in value.model_fields.items()
        ]
    found = []
    for name, param in inspect.signature(value).parameters.items():
        if name.startswith("_"):
            continue
        default = (
            ""
            if param.kind in (param.VAR_POSITIONAL, param.VAR_KEYWORD)
            else plain_default(name, param.default)
        )
        found.append(Parameter(name, plain_type(param.annotation), default, said.get(name, "")))
    return found


def quick_keywords() -> list[str]:
    """Return the section with the keywords of StromaRunner.quick: the store, and the fields of RunConfig."""
    from stroma import RunConfig, StromaRunner

    own = inspect.signature(StromaRunner.quick).parameters["store"]
    store = Parameter(
        "store",
        plain_type(own.annotation),
        "`None`",
        "a store, or the URL or path of one, see [`open_store`](stores.md#stroma.checkpoint.urls.open_store). None: the memory of this process.",
    )
    link = "[parameter of `RunConfig`](#stroma.engine.config.RunConfig)"
    names = [f"- `{parameter.name}`" for parameter in parameters(RunConfig)]
    return [*table("StromaRunner.quick", [store]), "", f"Each {link} is a keyword too:", "", *names]


def table(name: str, rows: list[Parameter]) -> list[str]:
    """Return the section with the parameters of a name."""
    if not rows:
        return []
    what = "Attributes" if name == "ExecutionResult" else "Parameters"
    head = [
        "",
        f"### {what} of `{name}`",
        "",
        "| name | type | default | unit | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    return [*head, *(row.row() for row in rows)]


def options(value: Any, name: str) -> list[str]:
    """Return the options of the generator: what it omits since a table has it, or since it is internal."""
    lines = []
    if name in PARAMETERS:
        lines += ["show_docstring_attributes: false", "show_docstring_parameters: false"]
    if name in NOT_CREATED or (inspect.isclass(value) and issubclass(value, BaseModel)):
        lines += ["merge_init_into_class: false", "show_bases: false"]
    if name == "NodeHooks":  # The signature of a dataclass is not that of its __init__.
        lines.append("show_signature: false")
    if inspect.isclass(value) and (name in METHODS or name in PARAMETERS):
        fields = {*getattr(value, "model_fields", ()), *getattr(value, "__dataclass_fields__", ())}
        kinds = property | classmethod | staticmethod | FunctionType
        # The simple calls of a store, which all stores share.
        simple = [base for base in value.__mro__ if base.__name__ in ("AsyncCalls", "SyncCalls")]
        methods = [
            member
            for owner in (value, *simple)
            for member, code in vars(owner).items()
            if isinstance(code, kinds) and not member.startswith("_") and member not in fields
        ]
        lines += ["inherited_members: true"] if simple else []
        shown = METHODS.get(name, methods)
        unknown = {*shown} - {*methods}
        if unknown:
            raise ValueError(
                f"{name} has no {', '.join(sorted(unknown))}; correct METHODS in docs/reference.py"
            )
        lines.append(f"members: {json.dumps(shown) if shown else 'false'}")
    return ["    options:", *(f"      {line}" for line in lines)] if lines else []


@dataclass(frozen=True)
class Name:
    """A public name: where it is imported from, where it is defined, and the first sentence about it."""

    name: str
    module: str
    path: str
    says: str


def adapters() -> Iterator[Name]:
    """The public names of the adapters, read from their text: a framework that is missing must not change the page."""
    package = importlib.import_module("stroma.adapters")
    for path in sorted(Path(package.__path__[0]).glob("[a-z]*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        listed = next(
            n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        )
        for name in ast.literal_eval(listed):
            home = f"stroma.adapters.{path.stem}"
            public = "stroma.adapters" if name in package._HOMES.get(path.stem, ()) else home
            says = ast.get_docstring(found[name]) or "" if name in found else ""
            yield Name(name, public, f"{home}.{name}", first_sentence(says.split("\n\n")[0]))


def names(module: str) -> Iterator[Name]:
    """The public names of a module, sorted."""
    import stroma

    if module == "stroma.adapters":
        yield from adapters()
        return

    home = module if module.startswith("stroma.") else f"stroma.{module}"
    found: ModuleType = importlib.import_module(home)
    listed = found.__all__ if module == "checkpoint" or home == module else defined_in(module)
    for name in sorted(listed, key=str.lower):
        if name.startswith("_"):
            continue
        value: Any = getattr(found, name)
        own = inspect.isclass(value) or inspect.isfunction(value)
        where = value.__module__ if own and value.__module__.startswith("stroma") else home
        public = "stroma" if name in stroma.__all__ else home
        says = (inspect.getdoc(value) or "").split("\n\n")[0] if own else ""
        yield Name(name, public, f"{where}.{name}", first_sentence(says))


def defined_in(module: str) -> list[str]:
    """Return the public names of `stroma` that a module or package below it defines."""
    import stroma

    room = importlib.import_module(f"stroma.{module.partition('.')[0]}")
    return [
        name
        for where, names in room._HOMES.items()
        for name in names
        if name in stroma.__all__ and (where == module or where.startswith(f"{module}."))
    ]


def first_sentence(text: str) -> str:
    text = " ".join(text.split())
    match = re.match(r"(.+?[.:;])(?= |$)", text)
    text = (match[1] if match else text).rstrip(".:;").replace("``", "`").replace("|", r"\|")
    return re.sub(r":\w+:`~?\.?([\w.]+)`", r"`\1`", text)


def topic_page(topic: str) -> str:
    title, words, modules = TOPICS[topic]
    lines = [NOTE, "", f"# {title}", "", words]
    for module in modules:
        for found in names(module):
            lines += ["", f"::: {found.path}"]
            if topic == "adapters":  # Several have a function of the same name.
                lines += ["    options:", "      show_root_full_path: true"]
            elif "." in found.path:
                module_path, _, name = found.path.rpartition(".")
                value = getattr(importlib.import_module(module_path), name)
                lines += options(value, found.name)
                if found.name in PARAMETERS:
                    lines += table(found.name, parameters(value))
            if found.name == "StromaRunner":
                lines += quick_keywords()
    return "\n".join(lines) + "\n"


def index_page() -> str:
    lines = [
        NOTE,
        "",
        "# Reference",
        "",
        "Every public name, with the module to import it from. [The command line](../cli.md),",
        "[its options](commands.md), [errors](../errors.md) and [providers](../providers.md) have separate pages.",
        "[Defaults](defaults.md) states what each default loses.",
        "",
        "In a clone, run `./dev docs` to build the pages with signatures and docstrings into `build/site`, or call",
        "`help(NAME)` in Python.",
    ]
    for topic, (title, words, modules) in TOPICS.items():
        lines += ["", f"## [{title}]({topic}.md)", "", words, "", "| name | from | |", "| --- | --- | --- |"]
        lines += [
            f"| [{found.name}]({topic}.md#{found.path}) | `{found.module}` | {found.says} |"
            for module in modules
            for found in names(module)
        ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- the command line


def commands_page() -> str:
    import click

    from stroma.cli.app import app

    lines = [
        NOTE,
        "",
        "# Commands and options",
        "",
        "The help texts of all commands. [The command line](../cli.md) explains how to use them.",
    ]

    def tell(command: click.Command, info: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=info, parent=parent)
        if parent is not None:
            usage = command.get_usage(context).removeprefix("Usage: ")
            lines.extend(
                [
                    "",
                    f"## {context.command_path}",
                    "",
                    f"`{' '.join(usage.split())}`",
                    "",
                    *prose(command.help or ""),
                ]
            )
            rows = [row for param in command.get_params(context) if (row := option_row(param, context))]
            if rows:
                lines.extend(["", "| option | |", "| --- | --- |", *rows])
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                tell(inner, name, context)

    tell(app, "stroma", None)
    return "\n".join(lines) + "\n"


def prose(text: str) -> list[str]:
    """The paragraphs of a help text; what is set off by `\\b` keeps its lines."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            lines += ["```text", *paragraph.split("\n")[1:], "```", ""]
        else:
            lines += [re.sub(r"([<>*])", r"\\\1", " ".join(paragraph.split())), ""]
    return lines[:-1]


def option_row(param: Any, context: Any) -> str:
    record = param.get_help_record(context)
    if not record:
        return ""
    # What depends on the machine that writes the page.
    words = re.sub(r"\[default: [^\]]*/[^\]]*\]", "", record[1]).strip()
    return f"| `{record[0].replace('|', chr(92) + '|')}` | {words.replace('|', chr(92) + '|')} |"


PAGES = {f"reference/{topic}.md": (lambda topic=topic: topic_page(topic)) for topic in TOPICS} | {
    "reference/index.md": index_page,
    "reference/commands.md": commands_page,
}
