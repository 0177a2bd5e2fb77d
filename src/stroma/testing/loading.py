"""pipeline_in: load a pipeline from a file next to a test."""

from __future__ import annotations

import importlib.util
import sys
from os import PathLike
from pathlib import Path

from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import with_settings_of


def pipeline_in(path: str | PathLike[str], name: str = "pipeline") -> Pipeline:
    """Return the Pipeline of that name in a Python file, or the result of the function of that name.

    A pipeline without a config has the settings of the runner of the file, as under ``stroma run FILE:NAME``.
    The file is loaded once per process; it can import its neighbours, as under ``python FILE``. Raises
    FileNotFoundError, LookupError for an unknown name and for several runners with settings, TypeError for a
    value that is not a pipeline, and any exception of the file.
    """
    file = Path(path).resolve()
    if not file.exists():
        raise FileNotFoundError(f"no file {path}; pass the path of the file with the pipeline")
    module = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(file)), None)
    if module is None:
        is_name_used = (
            file.stem in sys.modules or file.stem in sys.stdlib_module_names or not file.stem.isidentifier()
        )
        own = f"_stroma_{abs(hash(str(file)))}" if is_name_used else file.stem
        spec = importlib.util.spec_from_file_location(own, file)
        if spec is None or spec.loader is None:
            raise TypeError(f"{path} is not a Python file; pass the file with the pipeline")
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))
        module = importlib.util.module_from_spec(spec)
        sys.modules[own] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[own]
            raise
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise LookupError(f"no {name!r} in {path}; pass the name of a Pipeline")
        value = getattr(value, part)
    if callable(value) and not isinstance(value, Pipeline):  # A flow can be called, too.
        value = value()
    if not isinstance(value, Pipeline):
        raise TypeError(
            f"{name!r} in {path} is {type(value).__name__}, not a Pipeline; create one: Pipeline(name, nodes)"
        )
    return with_settings_of(module, value)
