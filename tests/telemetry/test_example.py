"""The example runs as it is, and shows what it says."""

import pathlib
import subprocess
import sys

import pytest
from tests.kit import environment

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "telemetry.py"
TREE = """\
invoke_workflow invoices, ERROR, TERMINAL auth
  stroma.node parallel(classify, extract)
    stroma.node extract
      chat gpt-4o
    stroma.node classify, 2 attempts
      chat gpt-4o-mini, ERROR, ConnectionError: overloaded, try again
      chat gpt-4o-mini
  stroma.node post, ERROR, TERMINAL auth
invoke_workflow invoices, linked to the first run
  stroma.node post
"""


@pytest.mark.slow
def test_the_example() -> None:
    """A retry, a group, a failure and a resume, told by spans, metrics and log lines, without content."""
    done = subprocess.run(
        [sys.executable, EXAMPLE], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert TREE in done.stdout
    assert 'stroma_runs_total{pipeline="invoices",status="RESUMED"} 1.0' in done.stdout
    place = 'node_id="extract",outcome="success",pipeline="invoices"'
    assert f'stroma_cost_usd_total{{agent="",model="gpt-4o",{place}}} 0.002885' in done.stdout
    assert [line.split()[0] for line in done.stderr.splitlines()].count(
        "ERROR"
    ) == 2  # Of the engine and of log_hooks.
    assert "Acme" not in done.stdout + done.stderr
