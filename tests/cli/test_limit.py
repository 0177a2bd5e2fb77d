"""`stroma limit`."""

import asyncio
import json
import re
from pathlib import Path

from tests.telemetry.test_cooldowns import close_limit

from stroma import SQLiteStore


def test_the_state_of_a_limit(tmp_path: Path, inside) -> None:
    """A person sees the calls of the last minute and the cooldown; a program sees the same as JSON."""
    path = str(tmp_path / "limits.db")
    with SQLiteStore(path) as store:
        asyncio.run(close_limit("llm", store=store))
    done = inside("limit", "llm", "--db", path)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "llm: 1 call and 0 tok in the last minute, 0 calls in flight"
    assert re.fullmatch(r"it is closed for another (1\d|20)\.\d s: the provider asked to wait", lines[1])
    state = json.loads(inside("limit", "llm", "--db", path, "--json").out)
    assert 10_000 < state.pop("cooldown_ms") <= 20_000
    assert state == {"schema": "stroma.limit/1", "name": "llm", "requests": 1, "tokens": 0, "calls": 0}


def test_a_limit_that_probes(tmp_path: Path, inside) -> None:
    """Of a limit whose cooldown is over and that no call has opened yet, the command says so."""
    path = str(tmp_path / "limits.db")
    with SQLiteStore(path) as store:
        asyncio.run(close_limit("llm", store=store, seconds="0.001"))
    assert "it is closed until a call succeeds" in inside("limit", "llm", "--db", path).out


def test_a_limit_that_is_not_there(tmp_path: Path, inside, fails) -> None:
    """It is an error that says where was looked, as is a name that can be none."""
    path = str(tmp_path / "limits.db")
    with SQLiteStore(path) as store:
        asyncio.run(close_limit("llm", store=store))
    fails(inside("limit", "other", "--db", path), 4, "no call was made under a limit 'other' in")
    fails(inside("limit", "", "--db", path), 2)
