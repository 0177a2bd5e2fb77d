"""The public test kit.

Each name is loaded when it is first asked for. The suites of stores need pytest and pytest-asyncio, and
``assert_contract_holds`` needs hypothesis: ``pip install "stroma-runner[testing]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.testing.checkpoints import CheckpointStoreTests as CheckpointStoreTests
    from stroma.testing.clock import FakeClock as FakeClock
    from stroma.testing.contracts import assert_contract_holds as assert_contract_holds
    from stroma.testing.crash import POINTS as POINTS
    from stroma.testing.crash import Boundary as Boundary
    from stroma.testing.crash import Crashed as Crashed
    from stroma.testing.crash import crash_at as crash_at
    from stroma.testing.faults import FaultPlan as FaultPlan
    from stroma.testing.faults import Injected as Injected
    from stroma.testing.faults import Transient as Transient
    from stroma.testing.loading import pipeline_in as pipeline_in
    from stroma.testing.recording import RecordedRun as RecordedRun
    from stroma.testing.replay_tape import Difference as Difference
    from stroma.testing.replaying import Replay as Replay
    from stroma.testing.replaying import replay as replay
    from stroma.testing.replaying import replay_sync as replay_sync
    from stroma.testing.resumable import Resumability as Resumability
    from stroma.testing.resumable import assert_resumable as assert_resumable
    from stroma.testing.resumable import assert_resumable_sync as assert_resumable_sync
    from stroma.testing.snapshots import trace_snapshot as trace_snapshot

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


__getattr__, __dir__ = lazy(__name__, _HOMES)
