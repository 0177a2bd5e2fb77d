"""Errors of stores, of their contents, and of requests to them."""

from __future__ import annotations


class StoreError(Exception):
    """An operation of a store failed. Base class of the errors of stores.

    ``transient``: True if a retry may succeed.

    Where: out of ``run()`` if the run cannot start; ``result.failure`` of a PARTIAL run if a commit could not
    be stored.
    Cause: the file, disk or server of the store, or a store without a journal where one is needed.
    Fix: do what the message says, then run with ``resume=True``; nothing committed is lost.
    """

    transient: bool = True


class CheckpointNotFound(StoreError, LookupError):
    """A checkpoint or run that is needed does not exist.

    Where: out of ``run(resume_from=...)``; reading a run from a store.
    Cause: the node before the resume point never committed in that run, or the run id is not in this store.
    Fix: resume from an earlier node, check the run id and the store, or run from the beginning.
    """


class CorruptCheckpoint(StoreError, TypeError):
    """Stored data is damaged, or not a state of the schema that it is read with.

    Where: out of ``run()`` on resume; reading a state from a store.
    Cause: a damaged store, data from another program, or a schema that has changed since.
    Fix: recompute the output with ``resume_from=`` the node in the message, or restore the store or the
    schema.
    """


class CheckpointLost(StoreError):
    """The store no longer has data of a run that it had acknowledged.

    Where: ``result.failure`` of a PARTIAL run; out of ``run()`` on resume, before anything is called; reading
    a run.
    Cause: the run was deleted while it was in progress. Or rows of it are missing, or the store is older than
    before: it was restored from a copy, failed over to a replica that lagged behind, or its server evicted,
    expired or lost data.
    Fix: restore the store from a newer copy, or configure the server as the message says, then resume;
    otherwise restart the run (``if_exists="restart"``).
    """

    transient = False


class PipelineChanged(StoreError):
    """A run cannot be resumed: the pipeline or its input differs from what the run was recorded with.

    Attributes:
        inputs: recorded and present input of a call that was made with another one, as stored; else None. The
            message names their fields only, since logs and stores have it.

    Where: out of ``run()`` on resume, before anything is called. The run stays as it was. Workers and
    ``drive`` mark it as blocked.
    Cause: nodes were added, removed, renamed or reordered before the resume point, the body of a flow makes
    other calls, or an output schema or the input has changed. Or the run started with a version that the
    pipeline does not accept.
    Fix: restore what the message names, serve the version (``version=``, ``accepts=``), resume before the
    change (``resume_from=``), or start a new run.
    """

    inputs: tuple[bytes, bytes] | None = None


class RequestRefused(StoreError):
    """A run does not take an answer or a message. Nothing was stored.

    Where: out of ``runner.signal()`` and ``runner.send()``.
    Cause: the question is not open, has another answer, or asks for a class that is not imported here. Or the
    run of the message has ended, or was sent another message with the same id.
    Fix: do what the message says; see the status of the run and its open questions. A web service answers
    with 409.
    """

    transient = False


class RunBusy(StoreError):
    """The run already has an owner: another process, or another task of this one.

    Attributes:
        holder: description of the owner.
        left_seconds: time until its lease ends, unless the owner renews it.
        same_input: True if it runs with the same input.

    Where: out of ``run()``, before anything is called.
    Cause: two calls use the same run id at the same time.
    Fix: wait for the result with ``if_running="attach"``, or use another run id. If the owner is known to be
    dead, ``if_running="take_over"`` does not wait for the end of its lease.
    """

    holder: str = ""
    left_seconds: float = 0.0
    same_input: bool = False


class RunExists(StoreError):
    """The run already exists.

    Where: out of ``run()`` before anything is called: always with ``if_exists="error"``, and by default if
    the run has not ended, or has called an effect.
    Cause: the run id was used before. A new execution would discard what the message lists. Plain code around
    ``execute_step`` without ``async with ctx:`` records no end.
    Fix: continue the run with ``resume=True``, discard it with ``if_exists="restart"``, or use another run
    id.
    """


class Fenced(StoreError):
    """The run has another owner now, or was cancelled; this process can no longer write to it.

    Where: ``result.failure`` of a PARTIAL run.
    Cause: the same run id was opened again while this run was in progress. Or the run was cancelled or paused
    while this process could not renew its lease. Or the lease ended before an effect was called.
    Fix: see the result of the new owner, and use a separate id for each run. Resume a cancelled run.
    """

    transient = False
