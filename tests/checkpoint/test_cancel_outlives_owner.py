"""A cancel() that was acknowledged ends its run, whatever becomes of the process that the run was in."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.dying_helper import State, pipeline
from tests.servers import environment
from tests.shared_stores import opened

from stroma import ExecutionResult, StromaRunner


@pytest.mark.slow
@pytest.mark.parametrize("way", ["recover", "resume", "attach"])
def test_killed_before_it_knew(journal: tuple[str, str], tmp_path: Path, way: str) -> None:
    """Whoever goes on with a run that was cancelled finds it CANCELLED and calls nothing, whichever way it goes on."""
    wish = {"run_id": "r", "hang": True, "calls": str(tmp_path / "calls"), "options": {"lease_seconds": 60.0}}
    command = [sys.executable, "-m", "tests.checkpoint.dying_helper", *journal, json.dumps(wish)]

    async def outcome() -> Any:
        with opened(*journal) as store:
            runner = StromaRunner.quick(store=store)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
            assert process.stdout is not None
            with process:
                assert process.stdout.readline() == "calling\n"
                # Stopped, it looks no more; killed, it never will.
                process.send_signal(19)
                assert await store.cancel("r") is True  # As runner.cancel(), which waits for the owner.
                process.kill()
            nodes = pipeline(wish)
            if way == "recover":
                return (await runner.recover(nodes))["r"]
            if way == "resume":
                return await runner.resume(nodes, "r")
            return await runner.run(nodes, State(), run_id="r", if_running="attach", resume=True)

    result = asyncio.run(outcome())
    assert isinstance(result, ExecutionResult)
    assert result.status == "CANCELLED"
    assert (tmp_path / "calls").read_text() == "call\n"
    with opened(*journal) as store:
        assert store.get_run("r").status == "CANCELLED"
