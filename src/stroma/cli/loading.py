"""Load the pipeline that FILE_OR_MODULE:NAME names, and its redaction for --redact."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from stroma._utils.text import clean
from stroma.checkpoint.errors import RunExists
from stroma.cli.errors import Code, Problem, command, describe_error, last_frame
from stroma.cli.output import err, user_code
from stroma.cli.stores import Database
from stroma.contracts.node import Group, find_node
from stroma.engine.execution import current_run
from stroma.hooks.sets import NodeHooks
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner, with_settings_of
from stroma.testing.loading import add_to_path, load_file

T = TypeVar("T")
_FORM = "name a pipeline as FILE.py:NAME or package.module:NAME"


def load_pipeline(
    target: str, database: Database | None = None, *, refuse_default: bool = False, quiet: bool = False
) -> Pipeline:
    """Import a module, with its output on stderr, and return its pipeline with settings. Raises Problem.

    ``database``: the store of the command; a warning names a runner of the module that has another one.
    ``refuse_default``: that is a Problem if no store was passed to the command. ``quiet``: without the
    warning.
    """
    return load_with_module(target, database, refuse_default=refuse_default, quiet=quiet)[0]


def load_with_module(
    target: str, database: Database | None = None, *, refuse_default: bool = False, quiet: bool = False
) -> tuple[Pipeline, ModuleType]:
    """Return the pipeline and its module, as :func:`load_pipeline` does. Raises Problem."""
    loaded = load_object(target)
    pipeline = loaded.to_pipeline()
    if database is not None:
        report_other_stores(loaded, database, refuse_default=refuse_default, quiet=quiet)
    try:
        return with_settings_of(loaded.module, pipeline), loaded.module
    except LookupError as error:
        raise Problem(*str(error).split("; ", 1)) from None


def refuse_same_names(pipelines: Sequence[Pipeline]) -> None:
    """Raise Problem for pipelines of one name: runs are found by the name."""
    names = [pipeline.name for pipeline in pipelines]
    for name in {name for name in names if names.count(name) > 1}:
        raise Problem(
            f"{names.count(name)} of these pipelines have the name {clean(name, 100)!r}",
            "use distinct names: Pipeline(name, nodes)",
        )


def report_other_stores(
    loaded: LoadedObject, database: Database, *, refuse_default: bool = False, quiet: bool
) -> None:
    """Warn of durable stores that runners of a module have, and that the command does not use."""
    for name, value in vars(loaded.module).items():
        other = isinstance(value, StromaRunner) and database.describe_other(value.checkpoint_manager.store)
        if not other:
            continue
        what = f"{name!r} in {loaded.place} has the store {other}, and this command uses {database.name}"
        if refuse_default and database.is_default:
            address = other.removeprefix("sqlite:").partition("#")[0]
            raise Problem(f"{what} by default", f"pass the store: --db {shlex.quote(address)}")
        if not quiet:
            err.line(("warning: ", "yellow"), f"{what}; to use that one, pass --db")


def load_served(target: str, database: Database, **options: bool) -> Pipeline:
    """Return a pipeline that workers can serve, as :func:`load_pipeline` does. Raises Problem."""
    pipeline = load_pipeline(target, database, **options)
    first = find_node(pipeline.nodes[0]) if pipeline.nodes else None
    if isinstance(first, Group):
        raise Problem(
            f"{target} starts with {first.node_id!r}, a group: the class of its input is not known later",
            f"start it with a node; `{command('run', target)}` runs it as it is",
        )
    return pipeline


def note_target(target: str) -> NodeHooks:
    """Return hooks that store with each run what named its pipeline, for the hints of later commands."""

    async def note(run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        run = current_run()
        if run is not None and run.session.attribution.get("target") != target:
            run.session.note_attribution({"target": target})

    return NodeHooks(on_run_start=note)


class LoadedObject(NamedTuple):
    """The object that FILE_OR_MODULE:NAME names, with its file or module and its name there."""

    value: Any
    place: str
    name: str
    module: ModuleType

    def to_pipeline(self) -> Pipeline:
        """Return the pipeline. Raises Problem for anything else."""
        if isinstance(self.value, Pipeline):
            return self.value
        raise Problem(
            f"{self.name!r} in {self.place} is not a pipeline: it is of type {type(self.value).__name__}",
            _list_pipelines(self.module, self.place),
        )


def load_object(target: str) -> LoadedObject:
    """Return the object that a target names, whatever it is. Raises Problem."""
    place, name = _split(target)
    path = Path(place)
    if place.endswith(".py") or path.exists() or "/" in place or "\\" in place:
        module = _load_file(path)
    else:
        module = _load_module(place)
    if not name:
        raise Problem(f"{target!r} names no pipeline", f"{_FORM}; {_list_pipelines(module, place)}")
    value: Any = module
    for part in name.split("."):
        try:
            value = _call_user_code(lambda: getattr(value, part), f"{part!r} of {place}")  # noqa: B023
        except AttributeError:
            raise Problem(
                f"no {name!r} in {place}", _list_pipelines(module, place), code=Code.NOT_FOUND
            ) from None
    return LoadedObject(value, place, name, module)


def _split(target: str) -> tuple[str, str]:
    place, colon, name = target.rpartition(":")
    if not colon:
        return target, ""
    if not place:
        raise Problem(f"{target!r} names no file or module", _FORM)
    if name and not all(part.isidentifier() for part in name.split(".")):
        raise Problem(f"{name!r} cannot be a pipeline in {place}: it is not a Python name", _FORM)
    return place, name


# ---------------------------------------------------------------------- importing


def _load_file(path: Path) -> ModuleType:
    if path.is_dir():
        raise Problem(f"{path} is a directory", _FORM)
    if not path.exists():
        raise Problem(f"no file {path}", "check the path", code=Code.NOT_FOUND)
    path = path.resolve()
    if importlib.util.spec_from_file_location(path.stem, path) is None:
        raise Problem(f"{path} is not a Python file", _FORM)
    return _call_user_code(lambda: load_file(path), str(path))


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise Problem(f"no file or module {name!r}", _FORM, code=Code.NOT_FOUND)
    add_to_path(str(Path.cwd()))
    try:
        return _call_user_code(lambda: importlib.import_module(name), name, absent=name)
    except _Absent:
        raise Problem(
            f"no module {name!r} here or among the installed packages",
            f"run this in the directory of {name.split('.')[0]}, or pass the path of the file: FILE.py:NAME",
            code=Code.NOT_FOUND,
        ) from None


class _Absent(Exception):
    """The requested module itself does not exist, as opposed to a module that it imports."""


def _call_user_code(call: Callable[[], T], what: str, *, absent: str = "") -> T:
    """Call user code; report an exception as a Problem with the last frame of that code."""
    try:
        with user_code():
            return call()
    except (KeyboardInterrupt, AttributeError) as error:
        if isinstance(error, AttributeError) and _is_from_user_code(error):
            raise _load_problem(error, what) from error
        raise
    except ModuleNotFoundError as error:
        if absent and error.name and (absent == error.name or absent.startswith(f"{error.name}.")):
            raise _Absent from error
        raise _load_problem(error, what) from error
    except (Exception, SystemExit) as error:
        raise _load_problem(error, what) from error


def _is_from_user_code(error: BaseException) -> bool:
    """Return True if user code raised; a missing attribute of the module is reported by the caller."""
    return any(frame.filename != __file__ for frame in traceback.extract_tb(error.__traceback__))


def _load_problem(error: BaseException, what: str) -> Problem:
    where = last_frame(error)
    unguarded = "put what runs the program under: if __name__ == '__main__':"
    if isinstance(error, SystemExit):
        return Problem(f"{what} ended the process: {describe_error(error)}", *where, unguarded)
    if isinstance(error, ModuleNotFoundError) and error.name:
        fix = f"install what provides {error.name!r} for this Python: {sys.executable} -m pip install ..."
        return Problem(
            f"{what} needs a module that is not installed: {describe_error(error)}",
            *where,
            fix,
            code=Code.ENVIRONMENT,
        )
    fix = "fix that line; set STROMA_DEBUG=1 to see the whole traceback"
    fix = unguarded if isinstance(error, RunExists) else fix
    return Problem(f"{what} cannot be loaded: {describe_error(error)}", *where, fix)


def _list_pipelines(module: ModuleType, place: str) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, Pipeline)]
    if not names:
        return f'{place} has no Pipeline; make one: pipeline = Pipeline("name", [node, ...])'
    names_text = ", ".join(f"{place}:{name}" for name in names[:10])
    return f"it has {names_text}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
