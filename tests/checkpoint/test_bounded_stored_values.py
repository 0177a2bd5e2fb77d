"""Stored values that are small on the disk and large in memory, or slow to read."""

from __future__ import annotations

import sqlite3
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.checkpoint.damage import reseal
from tests.kit import NEVER, Num, passing

from stroma import CorruptCheckpoint, NotSerialisable, SQLiteStore, StromaRunner
from stroma.contracts.schema import schema_of


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
