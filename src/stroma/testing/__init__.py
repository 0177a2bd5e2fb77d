"""The public test kit.

Each name is loaded when it is first asked for. The suites of stores need pytest and pytest-asyncio, and
``assert_contract_holds`` needs hypothesis: ``pip install "stroma-runner[testing]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.testing.checkpoints import CheckpointStoreTests
    from stroma.testing.clock import FakeClock
    from stroma.testing.contracts import assert_contract_holds
    from stroma.testing.crash import POINTS, Boundary, Crashed, crash_at
    from stroma.testing.faults import FaultPlan, Injected, Transient
    from stroma.testing.loading import pipeline_in
    from stroma.testing.recording import RecordedRun
    from stroma.testing.replay_tape import Difference
    from stroma.testing.replaying import Replay, replay, replay_sync
    from stroma.testing.resumable import Resumability, assert_resumable, assert_resumable_sync
    from stroma.testing.snapshots import trace_snapshot

_HOMES = {
    "checkpoints": ("CheckpointStoreTests",),
    "clock": ("FakeClock",),
    "contracts": ("assert_contract_holds",),
    "crash": ("POINTS", "Boundary", "Crashed", "crash_at"),
    "faults": ("FaultPlan", "Injected", "Transient"),
    "loading": ("pipeline_in",),
    "recording": ("RecordedRun",),
    "replay_tape": ("Difference",),
    "replaying": ("Replay", "replay", "replay_sync"),
    "resumable": ("Resumability", "assert_resumable", "assert_resumable_sync"),
    "snapshots": ("trace_snapshot",),
}

__all__ = [
    "POINTS",
    "Boundary",
    "CheckpointStoreTests",
    "Crashed",
    "Difference",
    "FakeClock",
    "FaultPlan",
    "Injected",
    "RecordedRun",
    "Replay",
    "Resumability",
    "Transient",
    "assert_contract_holds",
    "assert_resumable",
    "assert_resumable_sync",
    "crash_at",
    "pipeline_in",
    "replay",
    "replay_sync",
    "trace_snapshot",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
