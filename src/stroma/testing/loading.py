"""pipeline_in: load a pipeline from a file next to a test."""

from __future__ import annotations

import importlib.util
import re
import sys
from os import PathLike
from pathlib import Path
from types import ModuleType

from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import with_settings_of


def pipeline_in(path: str | PathLike[str], name: str = "pipeline") -> Pipeline:
    """Return the Pipeline of that name in a Python file.

    A pipeline without a config has the settings of the runner of the file, as under ``stroma run FILE:NAME``.
    The file is loaded once per process; it can import its neighbours, as under ``python FILE``. Raises
    FileNotFoundError, LookupError for an unknown name and for several runners with settings, TypeError for a
    value that is not a pipeline, and any exception of the file.
    """
    file = Path(path).resolve()
    if not file.exists():
        raise FileNotFoundError(f"no file {path}; pass the path of the file with the pipeline")
    module = load_file(file)
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise LookupError(f"no {name!r} in {path}; pass the name of a Pipeline")
        value = getattr(value, part)
    if not isinstance(value, Pipeline):
        raise TypeError(
            f"{name!r} in {path} is {type(value).__name__}, not a Pipeline; create one: Pipeline(name, nodes)"
        )
    return with_settings_of(module, value)


def load_file(file: Path) -> ModuleType:
    """Return the module of a Python file, an absolute path, which is loaded once per process.

    Raises TypeError for a file that is not one of Python, and any exception of the file.
    """
    module = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(file)), None)
    if module is not None:
        return module
    # Registered under its own name, so that another module can import it; a name in use stays what it is.
    name = file.stem if file.stem.isidentifier() else "_stroma_" + re.sub(r"\W", "_", file.stem)
    if name in sys.stdlib_module_names or name in sys.modules:
        name = f"_stroma_{name}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise TypeError(f"{file} is not a Python file; pass the file with the pipeline")
    add_to_path(str(file.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def add_to_path(directory: str) -> None:
    """Let modules of a directory be imported, as ``python x.py`` does with the neighbours of a file."""
    if directory not in sys.path:
        sys.path.insert(0, directory)
