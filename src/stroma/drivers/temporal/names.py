"""Names that client, workflow and worker share. Recorded histories contain them."""

from __future__ import annotations

from typing import Final

from temporalio.common import SearchAttributeKey

WORKFLOW: Final = "stroma.run"
#: A run with a flow in it: what its body does is compared with its history.
FLOW: Final = "stroma.flow"
#: An attempt of a node, and the two ends of a group; the two ends of a run.
NODE: Final = "stroma.node"
RUN: Final = "stroma.hooks"
#: Of the functions that a workflow may call outside of its sandbox: returns the pipelines of its worker.
PIPELINES: Final = "stroma.pipelines"
ANSWER: Final = "stroma.answer"
RESUME: Final = "stroma.resume"
REPORT: Final = "stroma.report"
ROWS: Final = "stroma.rows"
STATE: Final = "stroma.state"
SUSPENDED: Final = "stroma.suspended"
#: Of a failure that a worker reports, and of a workflow that failed: before the class, or the status.
FAILURE: Final = "stroma."

PIPELINE_KEY: Final = SearchAttributeKey.for_keyword("StromaPipeline")
STATUS_KEY: Final = SearchAttributeKey.for_keyword("StromaStatus")
