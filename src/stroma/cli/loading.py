"""FILE_OR_MODULE:NAME: from what the user typed to the Pipeline."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from stroma.cli.errors import Code, Problem
from stroma.cli.user_errors import last_frame, said
from stroma.contracts.node import find_node
from stroma.runner.runner import Pipeline, StromaRunner

__all__ = ["load_pipeline", "load_with_module"]

T = TypeVar("T")
_FORM = "name a pipeline as FILE.py:NAME or package.module:NAME"


def load_pipeline(target: str) -> Pipeline:
    """Import a module and take its pipeline. What the module prints goes to stderr. Raises Problem."""
    return load_with_module(target)[0]


def load_with_module(target: str) -> tuple[Pipeline, ModuleType]:
    """The same, with the module."""
    place, name = _split(target)
    path = Path(place)
    if place.endswith(".py") or path.exists() or "/" in place or "\\" in place:
        module = _load_file(path)
    else:
        module = _load_module(place)
    if not name:
        raise Problem(
            f"{target!r} names no pipeline", f"{_FORM}; {_what_there_is(module, place)}", code=Code.USAGE
        )
    found: Any = module
    for part in name.split("."):
        try:
            found = _users(lambda: getattr(found, part), f"{part!r} of {place}")  # noqa: B023
        except AttributeError:
            raise Problem(
                f"there is no {name!r} in {place}", _what_there_is(module, place), code=Code.NOT_FOUND
            ) from None
    return _as_pipeline(found, place, name), module


def _split(target: str) -> tuple[str, str]:
    place, colon, name = target.rpartition(":")
    if not colon:
        return target, ""
    if not place:
        raise Problem(f"{target!r} names no file or module", _FORM, code=Code.USAGE)
    if name and not all(part.isidentifier() for part in name.split(".")):
        if re.fullmatch(r"[A-Za-z]:[\\/].*", target):  # A drive of Windows.
            return target, ""
        raise Problem(
            f"{name!r} cannot be the name of a pipeline in {place}: it is no Python name",
            _FORM,
            code=Code.USAGE,
        )
    return place, name


# ---------------------------------------------------------------------- importing


def _load_file(path: Path) -> ModuleType:
    if path.is_dir():
        raise Problem(f"{path} is a directory", _FORM, code=Code.USAGE)
    if not path.exists():
        raise Problem(f"there is no file {path}", _nearby(path), code=Code.NOT_FOUND)
    path = path.resolve()
    # The module is found again under its own name if another one imports it; a name that means something else
    # already must not be taken from it.
    name = path.stem if path.stem.isidentifier() else "_stroma_" + re.sub(r"\W", "_", path.stem)
    if name in sys.stdlib_module_names or name in sys.modules:
        name = f"_stroma_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Problem(f"{path} is not a Python file", _FORM, code=Code.USAGE)
    _look_first(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    execute = spec.loader.exec_module
    _users(lambda: execute(module), str(path))
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise Problem(f"there is no file or module {name!r}", _FORM, code=Code.NOT_FOUND)
    _look_first(str(Path.cwd()))
    try:
        return _users(lambda: importlib.import_module(name), name, absent=name)
    except _Absent:
        raise Problem(
            f"there is no module {name!r}, here or among the installed packages",
            f"call this where {name.split('.')[0]} is, or give the path of the file: FILE.py:NAME",
            code=Code.NOT_FOUND,
        ) from None


def _look_first(directory: str) -> None:
    # As `python x.py` does: the file's neighbours can be imported.
    if directory not in sys.path:
        sys.path.insert(0, directory)


class _Absent(Exception):
    """The module that was asked for is not there; not one that it imports."""


def _users(call: Callable[[], T], what: str, *, absent: str = "") -> T:
    """Call something of the user's, and put what it raises in one message with the last line of their own."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return call()
    except (KeyboardInterrupt, AttributeError) as error:
        if isinstance(error, AttributeError) and _ran_code(error):
            raise _broken(error, what) from error
        raise
    except ModuleNotFoundError as error:
        if absent and error.name and (absent == error.name or absent.startswith(f"{error.name}.")):
            raise _Absent from error
        raise _broken(error, what) from error
    except (Exception, SystemExit) as error:
        raise _broken(error, what) from error


def _ran_code(error: BaseException) -> bool:
    """Whether code of the user's was running: a missing attribute itself is reported elsewhere."""
    return any(frame.filename != __file__ for frame in traceback.extract_tb(error.__traceback__))


def _broken(error: BaseException, what: str) -> Problem:
    where = last_frame(error)
    if isinstance(error, SystemExit):
        mend = "put what runs the program under: if __name__ == '__main__':"
        return Problem(f"{what} ended the process: {said(error)}", *where, mend, code=Code.USAGE)
    if isinstance(error, ModuleNotFoundError) and error.name:
        mend = f"install what provides {error.name!r} for this Python: {sys.executable} -m pip install ..."
        return Problem(
            f"{what} needs a module that is not installed: {said(error)}", *where, mend, code=Code.ENVIRONMENT
        )
    see = "mend that line; with STROMA_DEBUG=1 set, the whole traceback is shown"
    return Problem(f"{what} cannot be loaded: {said(error)}", *where, see, code=Code.USAGE)


# ---------------------------------------------------------------------- what was found


def _as_pipeline(found: Any, place: str, name: str) -> Pipeline:
    if isinstance(found, Pipeline):
        return found
    label = f"{name!r} in {place}"
    if _is_factory(found):
        needed = _required(found)
        if needed:
            raise Problem(
                f"{label} is a function that needs arguments ({', '.join(needed)}), not a pipeline",
                f"give them defaults, or make it at the top level: {name}_pipeline = {name}(...)",
                code=Code.USAGE,
            )
        made = _users(found, f"{name}() in {place}")
        if isinstance(made, Pipeline):
            return made
        if inspect.iscoroutine(made):
            made.close()
            raise Problem(
                f"{label} is an async function",
                "make it a plain def that returns a Pipeline",
                code=Code.USAGE,
            )
        raise Problem(
            f"{name}() in {place} returned {_kind(made)}, not a pipeline", _how(name, made), code=Code.USAGE
        )
    raise Problem(f"{label} is {_kind(found)}, not a pipeline", _how(name, found), code=Code.USAGE)


def _is_factory(found: Any) -> bool:
    return inspect.isroutine(found) and not _is_node(found)


def _required(func: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):
        return []
    varied = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in varied]


def _is_node(found: Any) -> bool:
    try:
        find_node(found)
    except Exception:
        return False
    return True


def _kind(found: Any) -> str:
    if isinstance(found, (list, tuple)) and found and all(map(_is_node, found)):
        return f"a {type(found).__name__} of nodes"
    if _is_node(found):
        return "a single node"
    if isinstance(found, type):
        return "a class"
    kind = type(found).__name__
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def _how(name: str, found: Any) -> str:
    """How to make a pipeline of what was found."""
    if isinstance(found, (list, tuple)) and found and all(map(_is_node, found)):
        nodes = name
    elif _is_node(found):
        nodes = f"[{name}]"
    elif isinstance(found, StromaRunner):
        return f'a runner runs a pipeline; make one of its nodes: pipeline = Pipeline("{name}", [node, ...])'
    else:
        nodes = "[node, ...]"
    return f'make one with: from stroma import Pipeline; pipeline = Pipeline("{name}", {nodes})'


def _what_there_is(module: ModuleType, place: str) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, Pipeline)]
    names += [name for name, value in vars(module).items() if _says_pipeline(value)]
    if not names:
        return f'{place} has no Pipeline; make one: pipeline = Pipeline("name", [node, ...])'
    shown = ", ".join(f"{place}:{name}" for name in names[:10])
    return f"it has {shown}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _says_pipeline(value: Any) -> bool:
    annotation = getattr(value, "__annotations__", {}).get("return") if inspect.isfunction(value) else None
    return annotation in (Pipeline, "Pipeline") and not _required(value)


def _nearby(path: Path) -> str:
    try:
        files = [p.name for p in path.parent.iterdir() if p.suffix == ".py"]
    except OSError:
        return "check the path: its directory is not there either, or cannot be read"
    if not files:
        return f"check the path: there is no Python file in {path.parent.resolve()}"
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    likest = difflib.get_close_matches(path.name, files, 8, cutoff=0.0)
    return f"check the path; Python files in {path.parent.resolve()}: {', '.join(likest)}{more}"
