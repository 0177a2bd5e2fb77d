"""Errors of stores, of their contents, and of requests to them."""

from __future__ import annotations

__all__ = [
    "CheckpointLost",
    "CheckpointNotFound",
    "CorruptCheckpoint",
    "Fenced",
    "PipelineChanged",
    "RunBusy",
    "RunExists",
    "StoreError",
]


class StoreError(Exception):
    """A store could not do what was asked. Base of the errors of stores.

    ``transient``: whether trying the same again may help.

    Where: out of ``run()`` if the run cannot begin; ``result.failure`` of a PARTIAL run if a commit could not be kept.
    Cause: the file, disk or server of the store, or a store without a journal where one is needed.
    Mend: do what the message says, then run with ``resume=True``; nothing committed is lost.
    """

    transient: bool = True


class CheckpointNotFound(StoreError, LookupError):
    """There is no checkpoint where one is needed to go on.

    Where: out of ``run(resume_from=...)``; reading a run from a store.
    Cause: the node before the resume point never committed in that run, or the run id is not in this store.
    Mend: resume from an earlier node, check the run id and the store, or run from the beginning.
    """


class CorruptCheckpoint(StoreError, TypeError):
    """Stored data that is not a state of the schema it is read with.

    Where: out of ``run()`` on resume; reading a state from a store.
    Cause: a damaged store, data that something else wrote, or a schema that has changed since.
    Mend: ``resume_from=`` the node that is named makes its output anew; else restore the store or the schema.
    """


class CheckpointLost(StoreError):
    """Data of a run that the store acknowledged is gone.

    Where: ``result.failure`` of a PARTIAL run; out of ``run()`` on resume, before anything is called; reading a run.
    Cause: rows of the run are missing, or the store came back older: it was restored from a copy, failed over to a replica
        that lagged behind, or is a server that evicted, expired or lost what it had.
    Mend: restore the store from a newer copy, or set the server up as the message says, then resume; otherwise begin the run
        anew (``if_exists="restart"``).
    """

    transient = False


class PipelineChanged(StoreError):
    """A run cannot be resumed: the pipeline, or its input, is not what the run was recorded with.

    Where: out of ``run()`` on resume, before anything is called.
    Cause: nodes were added, removed, renamed or reordered before the resume point, an output schema has changed, or the
        input is another one.
    Mend: restore what the message names, resume before the change (``resume_from=``), or begin a new run.
    """


class RunBusy(StoreError):
    """Somebody else is at work on the run: another process, or another task of this one.

    Attributes:
        holder: who, in words.
        left_seconds: when its lease ends, unless the holder renews it.
        same_input: whether it was given the same input.

    Where: out of ``run()``, before anything is called.
    Cause: the same run id was picked up twice.
    Mend: wait for the result with ``if_running="attach"``, or use another run id. If the holder is known to be gone,
        ``if_running="take_over"`` need not wait for the end of its lease.
    """

    holder: str = ""
    left_seconds: float = 0.0
    same_input: bool = False


class RunExists(StoreError):
    """There is such a run already.

    Where: out of ``run()`` with ``if_exists="error"``.
    Cause: the run id was used before.
    Mend: use another run id, or say what is to become of the run: ``if_exists="resume"``, "return" or "restart".
    """


class Fenced(StoreError):
    """Somebody else has taken the run over; this process may not write to it any more.

    Where: ``result.failure`` of a PARTIAL run.
    Cause: the same run id was opened again while this run was going on, or the run was deleted.
    Mend: look at what the other process makes of the run; give each run an id of its own.
    """

    transient = False
