"""Rules of the source: what may read stored data, what is pickled, and what calls a node's function."""

import ast
import datetime as dt
import os
import pickle
import subprocess
import sys
import uuid
from collections import OrderedDict
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import Num, node
from tests.project.sources import FILES, SOURCE, parsed

from stroma import FailureClass, ReliabilityContext, RunConfig, StromaRunner, execute_step, map_over, parallel
from stroma.contracts.copying import PickledSnapshot, pickle_data
from stroma.contracts.schema import schema_of


@pytest.mark.core
def test_no_module_of_ours_can_execute_data() -> None:
    """G11: Nothing in the package unpickles, evaluates or imports by a name that could come from a store."""
    forbidden = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "runpy"}
    own_names = SOURCE / "_utils" / "lazy.py"  # Loads what packages of ours name in tables of theirs.
    for path in FILES:
        inside = path.relative_to(SOURCE).parts
        # Copies of plain data are made by way of pickle, of what the same process has just packed; see below.
        copies = {"pickle"} if path == SOURCE / "contracts" / "copying.py" else set()
        if (
            path == SOURCE / "_utils" / "secrets.py"
        ):  # Asks if values are plain by writing them, and reads nothing.
            copies = {"marshal"}
            assert "marshal.load" not in path.read_text()
        for item in ast.walk(parsed(path)):
            if isinstance(item, ast.Import):
                assert not {a.name.split(".")[0] for a in item.names} & (forbidden - copies), path
            elif isinstance(item, ast.ImportFrom):
                assert (item.module or "").split(".")[0] not in forbidden, path
            elif isinstance(item, ast.Call) and isinstance(item.func, ast.Name):
                assert item.func.id not in {"eval", "exec", "__import__", "compile"}, f"{path}:{item.lineno}"
            elif isinstance(item, ast.Attribute) and item.attr == "import_module":
                # The command line imports what its user names on the command line.
                assert path == own_names or inside[0] in ("cli", "demo", "__main__.py"), path


@pytest.mark.core
def test_only_plain_data_is_pickled() -> None:
    """G11: the pickles of copies and snapshots name only classes of plain values, and no store gets one."""
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    values = [1, 2.5, None, True, b"x", "y", (1, {2}), frozenset({3})]
    plain = {"a": values, "at": moment, "id": uuid.UUID(int=1)}
    pickled = pickle_data(plain)
    assert pickled is not None
    assert pickle.loads(pickled) == plain

    class Mine:
        def __reduce__(self) -> Any:
            return (os.system, ("false",))

    for foreign in (Mine(), Mine, os.system, OrderedDict(a=1), Num(n=1), FailureClass.TERMINAL, range(3)):
        assert pickle_data(foreign) is None
        assert pickle_data({"a": [foreign]}) is None

    class Open(BaseModel):
        held: dict[str, Any]

    schema = schema_of(Open)
    state = Open(held=plain)
    assert isinstance(schema.snapshot(state), PickledSnapshot), "bytes would be stored"
    assert schema.encode(state).startswith(b"[")
    assert schema.restore(schema.snapshot(state)) == state


def _cold(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE.parent), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_schema_reference_imports_nothing() -> None:
    """G11: Resolving a stored schema reference imports no module."""
    code = """
import sys
import concurrent.futures
from stroma.checkpoint import resolve_schema
before = set(sys.modules)
for ref in ("antigravity:x", "concurrent.futures:ProcessPoolExecutor", "concurrent.futures.process:X",
            "stroma:parallel",
            "os.path:join", "this", "", ":", "a:b:c", "xmlrpc.client:ServerProxy"):
    try:
        resolve_schema(ref)
    except (LookupError, TypeError):
        continue
    print("resolved", ref)
print(sorted(set(sys.modules) - before))
"""
    assert _cold(code) == "[]"


@pytest.mark.core
def test_only_the_engine_calls_a_nodes_function() -> None:
    """Only `engine/attempt.py` calls a node's function, but for groups called directly and places."""
    findings: set[tuple[str, str]] = set()
    # Stores and traces never see a node; a guard makes a node of its own around what it calls.
    apart = ("adapters", "checkpoint", "cli", "demo", "testing", "trace")
    core = [p for p in FILES if p.relative_to(SOURCE).parts[0] not in apart]
    for path in core:
        for outer in ast.walk(parsed(path)):
            if not isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for item in ast.walk(outer):
                if isinstance(item, ast.Attribute) and item.attr in ("func", "call"):
                    findings.add((path.relative_to(SOURCE).as_posix(), outer.name))
    callers = {(module, name) for module, name in findings if module != "engine/attempt.py"}
    assert callers == {
        ("runner/pipeline.py", "require_runnable"),  # It names a function.
        ("runner/groups.py", "_call_directly"),
        ("engine/deadlines.py", "call_in_time"),  # It puts the interceptors of tests around the call.
        ("hooks/sets.py", "_function_of"),  # It unwraps partials.
        ("contracts/contract.py", "of"),  # It unwraps partials.
        ("contracts/node.py", "call"),
        ("contracts/node.py", "gives_coroutine"),  # It unwraps partials.
        ("contracts/node.py", "find_node"),  # It asks whose function it is.
        ("runner/pipeline.py", "_parts_of"),  # It reads the code of a flow.
        ("runner/pipeline.py", "steps_of"),  # So does this.
        ("engine/placed_calls.py", "call_at_place"),  # It asks the place for the call.
        ("drivers/temporal/worker.py", "stroma_worker"),  # It registers the activity of a place.
        ("drivers/temporal/place.py", "_answer"),  # A place makes the call for the engine.
    }


async def test_at_run_time_the_engine_stands_behind_every_node() -> None:
    """In every way of running, the nearest frame of ours below a node's function is the engine's."""
    modules: list[str] = []

    def note(state: Num) -> dict[str, Any]:
        frame = sys._getframe(1)
        while frame.f_back is not None:
            module = str(frame.f_globals["__name__"])
            if module.startswith("stroma") and module != "stroma.contracts.node":
                modules.append(module)
                break
            frame = frame.f_back
        return {"n": 1}

    async def note_async(state: Num) -> dict[str, Any]:
        return note(state)

    class Items(BaseModel):
        items: list[Num]

    sync, awaited = node("sync", note), node("async", note_async)
    runner = StromaRunner.quick()
    await runner.run([sync, awaited, parallel(sync, awaited, parallel(awaited))], Num())
    await runner.run([map_over("items", awaited, into="out")], Items(items=[Num()]))
    ctx = ReliabilityContext.for_run(RunConfig(), runner.registry, runner.checkpoint_manager)
    await execute_step("step", note_async, Num(), ctx)
    await runner.with_node_timeouts({"async": 1000}).run([awaited], Num())
    # A sync node stands on a thread's own stack, which the engine began in _tasks.
    own = {"stroma.engine.attempt", "stroma.engine.deadlines", "stroma.engine.tasks"}
    assert (len(modules), set(modules)) == (8, own)
    modules.clear()
    await parallel(awaited)(Num())
    assert modules == ["stroma.runner.groups"]
