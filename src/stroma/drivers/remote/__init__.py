"""Protocol for drivers on other machines, such as Temporal, DBOS or a queue.

A run is a *plan* (its nodes and policies, frozen when it begins) and a *state* (where it stands). Both are plain JSON data,
and so is all that crosses the seam; states of nodes are opaque texts in it.

- ``plans``: a pipeline as a plan, and a plan's nodes as those of a worker.
- ``interpreter``: moves a run through its plan, asks for attempts, settles budgets, decides on retries. It is
  deterministic: it has no clock, no random numbers and no I/O but what its driver gives it.
- ``attempts``: does what the interpreter asks for, on a worker: exactly one attempt, by the engine's own code.
- ``results``: what a run came to, as the result that a local run gives.
"""
