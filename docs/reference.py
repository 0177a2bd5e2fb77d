"""The pages that look things up: every public name, and every command with its options.

What is written of a name is its place; the generator of the site puts its docstring, signature and source there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

NOTE = "<!-- Written by docs/generate.py: run `./dev run python docs/generate.py` after a change. -->"

#: Pages of names: title, words, and the modules or packages below `stroma` that define them; with `stroma.` a package with names of its own.
TOPICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "running": (
        "Running", "Runners, pipelines, nodes and what governs a run.",
        ("runner.pipeline", "runner.runner", "runner.flows.flow", "runner.flows.definition", "runner.flows.errors", "runner.stream", "engine.config", "contracts.node", "engine.execution", "runner.steps", "engine.context"),
    ),
    "contracts": ("Contracts and checks", "What crosses a boundary, and what can be proved before.", ("contracts.contract", "contracts.effects", "contracts.tagged_json", "contracts.checks")),
    "failures": ("Failures and policies", "Classes, policies, and why an attempt is not begun.", ("failures",)),
    "cost": (
        "Usage, prices, budgets, limits", "What was used, what it costs, and what stops a run.",
        ("cost", "limits"),
    ),
    "hooks": ("Hooks", "Every hook with its arguments.", ("hooks",)),
    "groups": ("Groups and maps", "Several nodes at once, and one node for many items.", ("runner.groups", "runner.items")),
    "trace": ("Results and traces", "What a run came to.", ("trace",)),
    "stores": ("Stores", "Where runs are kept, and what a store of your own implements.", ("checkpoint",)),
    "telemetry": ("Telemetry", "One factory for each system.", ("stroma.telemetry",)),
    "adapters": ("Adapters", "What the adapters of frameworks share, and the guard for any of them.", ("stroma.adapters",)),
    "testing": ("Testing", "What helps to test pipelines and stores.", ("stroma.testing",)),
}  # fmt: skip


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
            public = "stroma.adapters" if package._HOMES.get(name) == path.stem else home
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
        public = "stroma" if name in stroma._HOME_OF else home
        says = (inspect.getdoc(value) or "").split("\n\n")[0] if own else ""
        yield Name(name, public, f"{where}.{name}", first_sentence(says))


def defined_in(module: str) -> list[str]:
    """Return the public names of `stroma` that a module or package below it defines."""
    import stroma

    room = importlib.import_module(f"stroma.{module.partition('.')[0]}")
    return [
        name
        for name, where in room._HOMES.items()
        if name in stroma._HOME_OF and (where == module or where.startswith(f"{module}."))
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
    return "\n".join(lines) + "\n"


def index_page() -> str:
    lines = [
        NOTE, "", "# Reference", "",
        "Every public name. Those of `stroma` are imported from there, whatever module has them. [The command line](../cli.md),",
        "[its options](commands.md), [errors](../errors.md) and [providers](../providers.md) have pages of their own.",
    ]  # fmt: skip
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
        NOTE, "", "# Commands and options", "",
        "What `stroma COMMAND --help` says, of all commands. [The command line](../cli.md) explains how to use them.",
    ]  # fmt: skip

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
