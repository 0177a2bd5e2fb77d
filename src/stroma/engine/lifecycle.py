"""The beginning and the end of a run: in its store, and for its hooks."""

from __future__ import annotations

import asyncio
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint import Committed, RunBusy, RunExists, RunRequest, Session
from stroma.checkpoint.entries import (
    ALL_FAILED_ITEMS,
    NO_CONTROL,
    USAGE_NOTE,
    PriorUsage,
    RunControl,
    count_failed_items,
)
from stroma.checkpoint.sessions import NULL_SESSION
from stroma.contracts.schema import schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, RUN, leave
from stroma.engine.redaction import HookResult, HookState
from stroma.engine.tasks import Shield, raise_if
from stroma.hooks.dispatch import Calls, Firing, HookNotAsync
from stroma.trace.result import ExecutionResult, RunStatus

#: Seconds between queries for a run that another process owns: at first, and at most.
_ATTACH_DELAYS: Final = (0.02, 1.0)

# ---------------------------------------------------------------------- the store


async def open_run(
    ctx: ReliabilityContext,
    initial_state: BaseModel,
    *,
    discard_from: int | None = None,
    accept: Callable[[int, str, Committed], None] | None = None,
    ends: bool = True,
    apart: tuple[tuple[int, str], ...] = (),
    any_input: bool = False,
) -> Session:
    """Start the run in the store, once, by the config; with ``discard_from``, continue up to that place.

    ``ends``: :func:`end_run` will be called. ``apart``, ``any_input``: see RunRequest. Raises StoreError
        (RunBusy, PipelineChanged ...).
    """
    journal, config = ctx.journal, ctx.config
    if journal.session is not NULL_SESSION:
        return journal.session
    opening = journal.opening
    if opening is None:
        if ctx.plain_steps.has_end and journal.versions is None:
            ctx.plain_steps.at_exit = _end_plain_code
        journal.apart = apart
        dispatch, versions = journal.dispatch, journal.versions
        resumed = config.resume or discard_from is not None
        request = RunRequest(
            run_id=ctx.run_id,
            pipeline=ctx.pipeline,
            initial_state=initial_state,
            schema=schema_of(type(initial_state)),
            if_exists=dispatch.if_exists or ("resume" if resumed else config.if_exists),
            discard_from=discard_from,
            accept=accept,
            if_running=config.if_running,
            lease_seconds=config.lease_seconds,
            ends=ends,
            deliver=ctx.fire.delivers,
            lazily_loaded=apart,
            retry_failed=config.retry_failed_items and discard_from is None,
            tags=config.tags,
            max_recoveries=config.max_recoveries,
            force=config.force_resume,
            due_ms=dispatch.due_ms,
            claim=dispatch.claim,
            version=versions[0] if versions else "",
            versions=None if config.allow_changes else versions,
            any_input=any_input,
        )
        if config.if_running == "attach":
            opened: Any = _attach(ctx, request)
        else:
            opened = ctx.checkpoint_manager.open_run(request)
        if not hasattr(opened, "__await__"):  # inspect.isawaitable() takes 1 us more of the 50 of a run.
            return _begin(ctx, opened, carry=discard_from is None)
        opening = journal.opening = asyncio.ensure_future(opened)
    try:
        # Steps that begin at the same time wait for one opening, which the cancellation of one of them
        # does not end.
        session = await asyncio.shield(opening)
    except Exception:
        journal.opening = None  # The next step opens it again.
        raise
    if journal.session is NULL_SESSION:
        _begin(ctx, session, carry=discard_from is None)
    return journal.session


async def _attach(ctx: ReliabilityContext, request: RunRequest) -> Session:
    """Open the run once no other process owns it, to return its outcome."""
    journal, (delay, longest) = ctx.journal, _ATTACH_DELAYS
    while True:
        try:
            opened = ctx.checkpoint_manager.open_run(request)
            return await opened if inspect.isawaitable(opened) else opened
        except RunBusy as busy:
            # A run that is to begin anew has no use for the outcome.
            if not busy.same_input or journal.is_over or request.discard_from is not None:
                raise
            around = CURRENT.get()
            manager = None if around is None else around.ctx.checkpoint_manager
            if around is not None and around.run_id == ctx.run_id and manager is ctx.checkpoint_manager:
                raise RunBusy(
                    f"run {ctx.run_id!r} cannot wait for its own end in its node {around.node_id!r}; use "
                    "another run id"
                ) from None
        request = request._replace(if_exists="attach")
        journal.is_waiting = True
        await asyncio.sleep(delay)
        journal.is_waiting = False
        delay = min(delay * 1.5, longest)


async def _finish_opening(
    ctx: ReliabilityContext, opening: asyncio.Future[Session], shield: Shield
) -> Session | None:
    """Return the session of a run that will end; None for a run of another process. Raises StoreError."""
    ctx.journal.is_over = True
    if ctx.journal.is_waiting:
        opening.cancel()
        return None
    problem = await shield.finish(opening)
    if opening.cancelled():
        return None  # All tasks were cancelled, and the store has released what it claimed.
    if problem is not None:
        raise problem
    return opening.result()


def _begin(ctx: ReliabilityContext, session: Session, *, carry: bool) -> Session:
    journal = ctx.journal
    for interceptor in ctx.fire.interceptors:
        session = interceptor.opened(ctx, session)
    journal.session = session
    journal.restored = session.restored
    if session.control is not NO_CONTROL:
        ctx.accept(session.control)
    journal.tried = dict(session.tried)
    if journal.restored:
        journal.failed_maps = count_failed_items(journal.restored)
    if session.continued or session.finished is not None:
        journal.prior_unrecorded = unrecorded = PriorUsage.of_no_attempt(session.notes, ctx.run_id)
        if carry:
            # Only a plain resume includes earlier spend; resume_from starts a new count.
            spent = ctx.cost_tracker
            spent.prior_tokens = session.prior.tokens + unrecorded.tokens
            spent.prior_cost_usd = session.prior.cost_usd + unrecorded.cost_usd
            spent.prior_latency_ms = session.prior.latency_ms
    return session


async def end_run(
    ctx: ReliabilityContext, status: RunStatus, error: str | None
) -> asyncio.CancelledError | None:
    """Record in the store how the run ended, also while it is still being opened there.

    Return a cancellation of the task in the meantime. Never raises: the commits are safe, only this record
    may be missing.
    """
    journal, shield = ctx.journal, Shield()
    try:
        session: Session | None = journal.session
        if session is NULL_SESSION and journal.opening is not None:
            session = await _finish_opening(ctx, journal.opening, shield)
        if session is None:
            return shield.cancellation
        note_usage(ctx)
        failed_items = ctx.account.failed_items
        if failed_items or ALL_FAILED_ITEMS in session.notes:
            session.note(ALL_FAILED_ITEMS, str(failed_items).encode())
        for receiver in ctx.fire.receivers:
            receiver.flush()
        pending = session.end(status.value, error, journal.wake_ms, journal.cause)
        if pending is not None and (problem := await shield.finish(pending)) is not None:
            raise problem
    except (RunBusy, RunExists):
        pass  # Another process owns it.
    except Exception:
        ctx.run_logger.exception("the end of the run could not be recorded")
    return shield.cancellation


def note_usage(ctx: ReliabilityContext) -> None:
    """Note usage that no attempt has, for a resume. The end of the run stores it, or a flush."""
    rows, before, lost = ctx.cost_tracker.added, ctx.journal.prior_unrecorded, ctx.journal.unrecorded
    if rows or lost.tokens or lost.cost_usd:
        tokens = before.tokens + lost.tokens + sum(row[0] for row in rows.values())
        cost_usd = math.fsum([before.cost_usd, lost.cost_usd, *(row[2] for row in rows.values())])
        ctx.session.note(USAGE_NOTE, PriorUsage(tokens, cost_usd).as_note())


# ---------------------------------------------------------------------- the hooks


async def announce_start(ctx: ReliabilityContext, initial: BaseModel) -> None:
    """Call the hooks of the run's start, and record in the store which trace it belongs to."""
    if ctx.fire.on_run_start is not None:
        view = HookState(schema_of(type(initial)), initial, ctx.redactor)
        await _call_run_hooks(ctx, "on_run_start", ctx.fire.on_run_start, (ctx.run_id, ctx.pipeline, view))
    session = ctx.journal.session
    if session.finished is not None:
        return
    config, known, trace = ctx.config, session.attribution, ctx.all_traces()
    if trace or config.conversation or config.user:
        ids = {"trace": trace, "conversation": config.conversation, "user": config.user}
        new = {kind: value for kind, value in ids.items() if value and value != known.get(kind)}
        noted = session.note_attribution(new) if new else None
        if noted is not None and "trace" in new and "trace" in known:
            # Before a span is exported: where this process dies, the next one completes its trace and no
            # earlier one.
            await asyncio.wait([noted])


async def end_and_announce(
    ctx: ReliabilityContext, status: RunStatus, error: str | None, result: ExecutionResult | None
) -> asyncio.CancelledError | None:
    """Record how the run ended, and call the hooks with the result, if any. Return a cancellation meanwhile.

    Under ``hook_delivery="at_least_once"`` the hooks come first: a process that resumes a run without an end
    calls them again.
    """
    if result is None or not ctx.fire.delivers:
        cancelled = await end_run(ctx, status, error)
        if result is not None:
            await call_end_hooks(ctx, result)
        return cancelled
    try:
        await call_end_hooks(ctx, result)
    finally:
        cancelled = await end_run(ctx, status, error)
    return cancelled


async def call_end_hooks(ctx: ReliabilityContext, result: ExecutionResult) -> None:
    """Call the hooks of the run's end. Raises HookNotAsync, unless the run was cancelled."""
    calls = ctx.fire.on_run_end
    if calls is None:
        return
    try:
        await _call_run_hooks(ctx, "on_run_end", calls, (ctx.run_id, HookResult(result, ctx.redactor)))
    except HookNotAsync as error:
        error.result = result
        if result.status is not RunStatus.CANCELLED:
            raise
        ctx.run_logger.warning("%s", error)


def call_end_hooks_now(ctx: ReliabilityContext, result: ExecutionResult) -> None:
    """Call the hooks of the run's end where nothing can be awaited: its coroutine is being closed."""
    calls = ctx.fire.on_run_end
    if calls is not None:
        values = ctx.run_id, HookResult(result, ctx.redactor)
        with _as_current(ctx):
            Firing(ctx.fire, "on_run_end", calls, None, values).finish_now()


async def give_back(ctx: ReliabilityContext, result: ExecutionResult | None) -> asyncio.CancelledError | None:
    """Release the run in the state in which it was opened, since this code cannot continue it.

    No hook of its end is called; only exporters end their spans, with a result. Return the cancellation of
    the task that came meanwhile.
    """
    shield, session = Shield(), ctx.session
    pending = session.give_back()
    problem = None if pending is None else await shield.finish(pending)
    if problem is not None:  # Another process has it, or will when the lease expires.
        session.abandon()
        ctx.run_logger.warning("the run could not be given back: %s", problem)
    calls = tuple(call for call in ctx.fire.on_run_end or () if ctx.fire.unread[call[0]])
    if calls and result is not None:
        await _call_run_hooks(ctx, "on_run_end", calls, (ctx.run_id, HookResult(result, ctx.redactor)))
    return shield.cancellation


async def _call_run_hooks(ctx: ReliabilityContext, event: str, calls: Calls, values: tuple[Any, ...]) -> None:
    """Call the hooks of one event of a run, without a current node. Raises HookNotAsync."""
    firing = Firing(ctx.fire, event, calls, None, values)
    with _as_current(ctx):
        try:
            if not firing.advance():
                await firing.finish()
        except GeneratorExit:
            with _as_current(ctx):  # The code that closes it has a context of its own.
                firing.finish_now()
            raise


@contextmanager
def _as_current(ctx: ReliabilityContext) -> Iterator[None]:
    """Make this the current run, without a current node."""
    before, node = RUN.set(ctx), CURRENT.set(None)
    try:
        yield
    finally:
        leave(node)
        leave(before)


def heed_requests(ctx: ReliabilityContext) -> None:
    """Apply requests about a run of plain code. Its task is the caller's own: none of them cancels it."""
    # A weak reference: otherwise the session and the context are a reference cycle.
    reference, loop = weakref.ref(ctx), asyncio.get_running_loop()

    def apply(control: RunControl) -> None:
        ctx = reference()
        if ctx is None:
            return
        if control.cancel:
            ctx.stopping.is_cancelled = True
        else:
            ctx.accept(control)
        if control.cancel or control.pause:
            with suppress(RuntimeError):  # The loop was closed under it.
                loop.call_soon_threadsafe(ctx.stopping.end_waits)

    ctx.session.on_control = apply


async def _end_plain_code(
    ctx: ReliabilityContext, kind: type[BaseException] | None, error: BaseException | None
) -> None:
    """End the run of plain code that called steps in ``async with ctx``."""
    steps = ctx.plain_steps
    status = RunStatus.CANCELLED if ctx.stopping.is_cancelled else steps.status or RunStatus.COMPLETED
    if kind is not None and status is RunStatus.COMPLETED:
        is_cancelled = issubclass(kind, asyncio.CancelledError)
        status = RunStatus.CANCELLED if is_cancelled else RunStatus.INTERRUPTED
    result = ctx.build_result(status, ctx.last_state, steps.failure) if steps.has_begun else None
    if kind is GeneratorExit:
        ctx.journal.abandon()
        if result is not None:
            call_end_hooks_now(ctx, result)
        return
    message = ctx.account.describe_suspension() if status is RunStatus.SUSPENDED else None
    if error is not None:
        ctx.redactor.note_run()
        message = ctx.redactor.error_text(error)
    cancelled = await end_and_announce(ctx, status, message, result)
    if error is None:
        raise_if(cancelled)
