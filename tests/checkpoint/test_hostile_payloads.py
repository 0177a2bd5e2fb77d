"""What stands in a store may come from anybody: it is data and nothing else (G11), of a bounded size."""

import contextlib
import hashlib
import json
import os
import sqlite3
import sys
import time
import traceback
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.checkpoint.damage import loose, reseal
from tests.kit import NEVER, Num, passing

from stroma import (
    CorruptCheckpoint,
    NotSerialisable,
    PipelineChanged,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    current_node,
    stroma_node,
)
from stroma.contracts.schema import schema_of


class Anything(BaseModel):
    n: int = 0
    any: Any = None


def _nodes(calls: list[str]) -> list[Any]:
    def make(node_id: str) -> Any:
        async def func(state: Anything) -> Any:
            calls.append(node_id)
            if node_id == "b" and len(calls) < 3:
                raise ValueError
            return {"n": state.n + 1}

        return stroma_node(node_id, input=Anything, output=Anything)(func)

    return [make("a"), make("b")]


def _runner(store: Any) -> StromaRunner:
    return StromaRunner.quick(store=store, run_id="r", policy_map={"AMBIGUOUS": {"max_retries": 0}})


def _tamper(path: Path, payload: bytes, **columns: Any) -> None:
    """Put a payload with a right checksum in the place of a's output."""
    with loose(path) as db:
        db.execute("UPDATE steps SET output = ? WHERE node_id = 'a'", (payload,))
        if "schema_ref" in columns:
            db.execute("UPDATE steps SET schema_ref = ? WHERE node_id = 'a'", (columns.pop("schema_ref"),))
        reseal(db)
        for name, value in columns.items():
            db.execute(f"UPDATE steps SET {name} = ? WHERE node_id = 'a'", (value,))


def _tagged(value: Any) -> bytes:
    return b'["stroma/1",' + json.dumps(value).encode() + b"]"


PAYLOADS = {
    "nothing": b"",
    "no JSON": b"not json",
    "no UTF-8": b'{"n": "\xff\xfe"}',
    "half": b'{"n": 1',
    "wrong type": b'{"n": "x"}',
    "a list": b"[1, 2]",
    "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "deep": b'{"any":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep and tagged": b'["stroma/1",{"any":' + b'{"$t":[' * 50_000 + b"]}" * 50_000 + b"}]",
    "a hundred megabytes": b'{"n": "' + b"x" * 100_000_000 + b'"}',
    "an endless number": b'{"n": 1' + b"0" * 100_000 + b"}",
    "unknown tag": _tagged({"n": {"$import": "antigravity"}}),
    "a zone that is a path": _tagged(
        {"n": 1, "any": {"$dtz": ["2026-01-01T00:00:00", "../../../etc/passwd", 0]}}
    ),
    "a zone that is absolute": _tagged({"n": 1, "any": {"$dtz": ["2026-01-01T00:00:00", "/etc/passwd", 0]}}),
    "an unhashable key": _tagged({"n": 1, "any": {"$d": [[{"$d": []}, 1]]}}),
    "an unhashable member": _tagged({"n": 1, "any": {"$s": [[1]]}}),
    "a wrong timedelta": _tagged({"n": 1, "any": {"$td": ["x", None]}}),
    "a wrong complex": _tagged({"n": 1, "any": {"$j": 5}}),
    "no base64": _tagged({"n": 1, "any": {"$b": 5}}),
    "tagged, wrong type": _tagged({"n": {"$f": "nan"}}),
    "tagged, too short": b'["stroma/1",',
    "a blob that is not there": b"stroma:b1\0" + b"x" * 32,
    "a codec that nobody has": b"stroma:c1\0" + b"x" * 32,
}


@pytest.mark.parametrize("name", PAYLOADS)
async def test_a_hostile_output_is_a_named_error(tmp_path: Path, name: str) -> None:
    """Whatever stands in an output's place is CorruptCheckpoint with a way out, without imports or calls."""
    path = tmp_path / "runs.db"
    calls: list[str] = []
    async with SQLiteStore(path) as store:
        await _runner(store).run(_nodes(calls), Anything())
    _tamper(path, PAYLOADS[name])
    before = set(sys.modules)
    async with SQLiteStore(path) as store:
        with pytest.raises(CorruptCheckpoint, match=r"node 'a'.*run 'r'"):
            await _runner(store).run(_nodes(calls), Anything(), resume=True)
        with pytest.raises(CorruptCheckpoint):
            await store.load_typed("r", "a", Anything)
        assert calls == ["a", "b"]
        assert "antigravity" not in sys.modules
        assert not {
            m for m in set(sys.modules) - before if not m.startswith(("zoneinfo", "stroma", "importlib"))
        }
        result = await _runner(store).run(_nodes(calls), Anything(), resume_from="a")
        assert result.status is RunStatus.RESUMED


@pytest.mark.core
async def test_an_error_does_not_show_what_is_stored(tmp_path: Path) -> None:
    """Neither the message nor the causes of CorruptCheckpoint hold the data that could not be read."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path) as store:
        await _runner(store).run(_nodes([]), Anything())
    _tamper(path, json.dumps({"n": "hunter2", **{f"m{i}": "hunter2" for i in range(9)}}).encode())
    async with SQLiteStore(path) as store:
        with pytest.raises(CorruptCheckpoint, match="n: Input should be a valid integer") as raised:
            await _runner(store).run(_nodes([]), Anything(), resume=True)
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.nightly
@pytest.mark.parametrize("place", ["row", "blob"])
async def test_a_gigabyte_is_a_named_error(tmp_path: Path, place: str) -> None:
    """A gigabyte in an output's place, with a right checksum, is CorruptCheckpoint with a short message."""
    path, size = tmp_path / "runs.db", 999_000_000  # SQLite takes no more than 1,000,000,000 bytes in a row.
    calls: list[str] = []
    async with SQLiteStore(path, blobs=tmp_path / "blobs") as store:
        await _runner(store).run(_nodes(calls), Anything())
    digest = hashlib.sha256()
    for _ in range(999):
        digest.update(bytes(1_000_000))
    if place == "blob":
        file = tmp_path / "blobs" / digest.hexdigest()[:2] / digest.hexdigest()
        file.parent.mkdir(parents=True)
        file.touch()
        os.truncate(file, size)
        _tamper(path, b"stroma:b1\0" + digest.digest())
    else:
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE steps SET output = zeroblob(?) WHERE node_id = 'a'", (size,))
            reseal(db)
    async with SQLiteStore(path, blobs=tmp_path / "blobs") as store:
        with pytest.raises(CorruptCheckpoint, match=r"node 'a'.*run 'r'") as raised:
            await _runner(store).run(_nodes(calls), Anything(), resume=True)
        assert len(str(raised.value)) < 2_000
        result = await _runner(store).run(_nodes(calls), Anything(), resume_from="a")
        assert (result.status, calls) == (RunStatus.RESUMED, ["a", "b", "a", "b"])


@pytest.mark.parametrize("kind", ["text", "integer", "null sha"])
async def test_columns_of_a_wrong_type(tmp_path: Path, kind: str) -> None:
    """A file from elsewhere promises no types: a column that holds something else is damage."""
    path = tmp_path / "runs.db"
    calls: list[str] = []
    async with SQLiteStore(path) as store:
        await _runner(store).run(_nodes(calls), Anything())
    if kind == "null sha":
        _tamper(path, b'{"n":1,"any":null}', sha256="x")
    else:
        _tamper(path, b"{}", output='{"n":1}' if kind == "text" else 5)
    async with SQLiteStore(path) as store:
        with pytest.raises(CorruptCheckpoint, match="damaged"):
            await _runner(store).run(_nodes(calls), Anything(), resume=True)


@pytest.mark.parametrize(
    "ref", ["antigravity:x", "os:system", "builtins:eval", "sys:modules", ":", "", "stroma:__getattr__"]
)
async def test_names_of_classes_import_nothing(tmp_path: Path, ref: str) -> None:
    """G11: The class that a stored state names is sought in imported modules; only a model is accepted."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path) as store:
        await store.save("r", "a", Anything(n=1))
        _tamper(path, b'{"n":1,"any":null}', schema_ref=ref)
        with pytest.raises(StoreError, match="load_typed"):
            await store.load("r", "a")
        assert await store.load_typed("r", "a", Anything) == Anything(n=1)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("answer", [b"not json", b'{"n":"x"}', b"[" * 200_000])
async def test_a_hostile_answer_is_not_used(tmp_path: Path, answer: bytes) -> None:
    """An answer in the store that is not one is PipelineChanged with the reason, and stays where it is."""

    async def ask(state: Anything) -> Any:
        return current_node().wait_for(Anything, reason="well?")

    nodes = [stroma_node("ask", input=Anything, output=Anything)(ask)]
    async with SQLiteStore(tmp_path / "runs.db") as store:
        await _runner(store).run(nodes, Anything())
        (waiting,) = store.waiting("r")
        await store.signal("r", waiting._replace(payload=answer))
        with pytest.raises(PipelineChanged, match="the accepted answer to question"):
            await _runner(store).run(nodes, Anything(), resume=True)
        assert store.waiting("r")[0].payload == answer


class Sum(BaseModel):
    value: Decimal = Decimal(0)


def pipeline(store: Any, *, fails: bool) -> tuple[StromaRunner, list[Any]]:
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    a = runner.node("a", input=Num, output=Num)(passing())

    @runner.node("b", input=Num, output=Num)
    async def b(state: Num) -> Num:
        if fails:
            raise ValueError("not yet")
        return state

    return runner, [a, b]


@pytest.mark.parametrize("number", ["1E10001", "1E20000", "-1E19999", "1E-20000"])
async def test_exponents_are_bounded(tmp_path: Path, number: str) -> None:
    """A stored number of a few bytes whose digits would fill the memory is CorruptCheckpoint, at once."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path) as store:
        runner, nodes = pipeline(store, fails=True)
        await runner.run(nodes, Num(), run_id="r")
    stored = b'["stroma/1",{"n":{"$n":"%s"}}]' % number.encode()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE steps SET output = ? WHERE node_id = 'a'", (stored,))
        reseal(db)
    async with SQLiteStore(path) as store:
        runner, nodes = pipeline(store, fails=False)
        begin = time.perf_counter()
        with pytest.raises(CorruptCheckpoint, match="a stored Decimal has the exponent"):
            await runner.run(nodes, Num(), run_id="r", resume=True)
        assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("value", [Decimal("1E10000"), Decimal("-1E-10000"), Decimal("1." + "3" * 30_000)])
def test_what_is_written_can_be_read(value: Decimal) -> None:
    """A Decimal within the limit, or whose digits are all written down, comes back equal."""
    schema = schema_of(Sum)
    assert schema.decode(schema.encode(Sum(value=value))) == Sum(value=value)


@pytest.mark.parametrize("number", ["1E10001", "1E999999", "1E-10001"])
def test_what_could_not_be_read_is_not_written(number: str) -> None:
    """A Decimal beyond the limit is refused with the name of its field when it is stored."""
    with pytest.raises(NotSerialisable, match=r"Sum\.value cannot be serialised: the exponent"):
        schema_of(Sum).encode(Sum(value=Decimal(number)))
