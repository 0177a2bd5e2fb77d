"""How hooks are called, to the letter: order, arguments, log lines, what is reported, and what comes out."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.kit import words

import stroma.hooks.dispatch
from stroma import NodeHooks
from stroma.hooks.dispatch import _VIEW_AT, Firing, HookNotAsync, Hooks, HookTimeout
from stroma.hooks.sets import flatten
from stroma.trace.result import HookFailure

STARTS = words("""
    on_node_start on_run_start on_node_retry on_node_skipped on_budget_warning on_map_progress on_node_wait
    on_circuit_change on_limit_cooldown
""")


class Fired:
    """Sets of hooks, and all that is to be seen of their being fired."""

    def __init__(
        self, *hooks: Callable[..., Any], event: str = "on_node_start", limit: float | None = None
    ) -> None:
        self.failures: list[HookFailure] = []
        self.event = event
        self.lookup_count = 0
        sets = tuple(NodeHooks(**{event: hook}) for hook in hooks)
        self.hooks = Hooks(sets, run_id="run", limit_seconds=limit, failures=self.failures)
        self.calls = getattr(self.hooks, event)

    @property
    def errors(self) -> list[tuple[str, str | None, BaseException]]:
        return [(failure.hook, failure.node_id, failure.exception) for failure in self.failures]

    value: Any = None

    def for_reader(self) -> int:
        """The view of a state: for each set another number."""
        self.lookup_count += 1
        return self.lookup_count

    @property
    def given(self) -> tuple[Any, ...]:
        at = _VIEW_AT.get(self.event)
        return ("argument",) if at is None else (*["argument"] * at, self)

    async def fire(self, node_id: str | None = "node") -> None:
        await self.hooks.fire(self.event, node_id, *self.given)

    def firing(self, calls: Any = None) -> Firing:
        return Firing(self.hooks, self.event, self.calls if calls is None else calls, "node", self.given)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str, str, Any]]:
    return [
        (r.levelno, r.getMessage(), r.run_id, None if r.exc_info is None else r.exc_info[1])  # type: ignore[attr-defined]
        for r in caplog.records
        if r.name == "stroma"
    ]


async def in_callback(func: Callable[[], None]) -> None:
    """Call it from the loop itself, so that no task runs."""
    done: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    def go() -> None:
        try:
            func()
        except BaseException as error:
            done.set_result(error)
        else:
            done.set_result(None)

    asyncio.get_running_loop().call_soon(go)
    error = await done
    if error is not None:
        raise error


@pytest.mark.parametrize("wrong", [7, "hooks", None, NodeHooks])
def test_what_is_no_set_is_named(wrong: Any) -> None:
    """The message shows it, and how to make one."""
    with pytest.raises(TypeError) as caught:
        flatten([NodeHooks(), [wrong]])
    assert str(caught.value) == f"{wrong!r} is not a set of hooks; make one with NodeHooks(...)"


async def quick(*_: Any) -> None:
    """Never waits."""


async def slow(*_: Any) -> None:
    for _ in range(3):
        await asyncio.sleep(0)


class Later:
    def __await__(self) -> Iterator[Any]:
        yield
        yield


class AtOnce:
    def __await__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(("hook", "waits"), [(quick, False), (slow, True), (lambda *_: Later(), True)])
@pytest.mark.parametrize("limit", [None, 3600.0])
async def test_hooks_that_never_wait_leave_nothing_to_await(
    hook: Any, waits: bool, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`advance` ends with the last hook, or where one waits; then `finish` awaits the rest."""
    clock = Clock(monkeypatch)

    def blocks(*_: Any) -> Any:
        clock.now += 3600.0  # Just at its limit.
        return hook()

    fired = Fired(blocks, limit=limit)
    firing = fired.firing()
    assert firing.advance() is not waits
    if waits:
        await firing.finish()
    assert (fired.errors, fired.lookup_count) == ([], 1)


class Rude(BaseException):
    """Not an Exception."""


async def raising(error: BaseException, suspends: bool) -> None:
    if suspends:
        await asyncio.sleep(0)
    raise error


@pytest.mark.parametrize(
    ("kind", "suspends"),
    [
        *itertools.product(
            [ValueError, TimeoutError, Rude, asyncio.CancelledError, GeneratorExit], [False, True]
        )
    ],
)
@pytest.mark.parametrize("node_id", ["node", None])
async def test_what_a_hook_raises_is_logged_and_reported(
    suspends: bool, kind: type[BaseException], node_id: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Once each, with the event, the node, the hook and the run; the hooks after it are called."""
    error, after = kind("no"), []

    def hook(*_: Any) -> Any:
        return raising(error, suspends)

    async def other(*_: Any) -> None:
        after.append(1)

    for hooks in ([hook], [hook, other]):
        caplog.clear()
        after.clear()
        fired = Fired(*hooks)
        await fired.fire(node_id)
        assert fired.errors == [("on_node_start", node_id, error)]
        text = f"hook on_node_start ({hook!r}) raised for node {node_id!r} of run 'run'; the run goes on"
        assert lines(caplog) == [(logging.ERROR, text, "run", error)]
        assert len(after) == len(hooks) - 1


async def test_a_report_is_made_though_the_log_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that raises does not keep a hook's error from being counted."""
    error = ValueError("no")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(stroma.hooks.dispatch.logger, "error", fails)
    fired = Fired(lambda *_: raising(error, False))
    with pytest.raises(OSError, match="disk full"):
        await fired.fire()
    assert fired.errors == [("on_node_start", "node", error)]


@pytest.mark.parametrize("event", ["on_node_start", "on_node_success"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("sets", [1, 3])
async def test_an_interrupt_comes_out_once_all_are_told(
    event: str, stop: type[BaseException], sets: int
) -> None:
    """The first of them, whatever else was raised; it is not reported as an error of the hook."""
    first = stop("first")
    fired = Fired(
        *[lambda *arguments: raising(first if arguments[-1] == 1 else stop("other"), False)] * sets,
        event=event,
    )
    with pytest.raises(stop) as caught:
        await fired.fire()
    assert caught.value is first
    assert (fired.lookup_count, fired.errors) == (sets, [])


@pytest.mark.parametrize(("node_id", "where"), [("node", " of node 'node'"), (None, "")])
@pytest.mark.parametrize(
    ("index", "event"), [(0, "on_node_start"), (1, "on_node_retry"), (1, "on_node_success")]
)
async def test_a_hook_that_is_not_async_is_named(
    node_id: str | None, where: str, index: int, event: str
) -> None:
    """With its event, its node, what it returned, the mend and its set; later sets see nothing of a start."""
    called: list[str] = []

    def wrong(*_: Any) -> Any:
        called.append("wrong")
        return 7

    async def right(*_: Any) -> None:
        called.append("right")

    fired = Fired(*([right] * index), wrong, right, event=event)
    with pytest.raises(HookNotAsync) as caught:
        await fired.fire(node_id)
    assert str(caught.value) == (
        f"hook {event}{where} is not async: {wrong!r} returned int, which cannot be awaited; define it with "
        f"async def"
    )
    assert (caught.value.set_index, caught.value.result) == (index, None)
    assert called == (["right"] * index + ["wrong"] if event in STARTS else ["right", "wrong", "right"])
    assert fired.errors == []


async def test_of_two_ends_that_are_not_async_the_first_is_told() -> None:
    """Both are called, and the first that was comes out."""
    fired = Fired(lambda *_: 1, lambda *_: "two", event="on_node_success")
    with pytest.raises(HookNotAsync, match="returned str"):
        await fired.fire()
    assert fired.lookup_count == 2


async def test_an_interrupt_goes_before_a_hook_that_is_not_async() -> None:
    """Whichever was first."""

    async def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for hooks in ([lambda *_: 1, interrupted], [interrupted, lambda *_: 1]):
        fired = Fired(*hooks, event="on_run_end")
        with pytest.raises(KeyboardInterrupt):
            await fired.fire()
        assert fired.lookup_count == 2


@pytest.mark.parametrize("limit", [None, 3600.0])
@pytest.mark.parametrize("reaction", ["raise", "swallow", "replace", "return"])
@pytest.mark.parametrize("waits", ["never", "before", "after", "around"])
async def test_a_hook_that_cancels_its_own_task_changes_nothing(
    limit: float | None, reaction: str, waits: str
) -> None:
    """G8: a hook that cancels its own task changes nothing: other hooks and the task go on."""
    events: list[int] = []

    async def hook(*_: Any) -> None:
        events.append(1)
        if waits in ("before", "around"):
            await asyncio.sleep(0)
        try:
            running.cancel("of the hook")
            running.cancel("of the hook")
            if waits in ("after", "around"):
                await asyncio.sleep(0)
            elif reaction != "return":
                raise asyncio.CancelledError
        except asyncio.CancelledError:
            if reaction == "raise":
                raise
            if reaction == "replace":
                raise ValueError("instead") from None

    fired = Fired(hook, hook, limit=limit)

    async def run() -> str:
        await fired.fire()
        for _time in range(3):
            await asyncio.sleep(0)
        assert running.cancelling() == 0
        async with asyncio.timeout(3600):
            return "went on"

    running = asyncio.create_task(run())
    assert await running == "went on"
    assert events == [1, 1]
    assert all(str(error) == "instead" or type(error) is asyncio.CancelledError for *_, error in fired.errors)


async def test_a_cancellation_before_is_not_the_hooks() -> None:
    """A hook that runs in a task that is being cancelled is told like any other, nothing is raised anew."""
    events: list[int] = []

    async def hook(*_: Any) -> None:
        await asyncio.sleep(0)
        events.append(1)

    async def run(hooks: list[Any]) -> list[Any]:
        asyncio.current_task().cancel()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            fired = Fired(*hooks)
            await fired.fire()
            return fired.errors
        raise AssertionError

    assert await asyncio.create_task(run([hook, hook])) == []
    assert events == [1, 1]
    assert await asyncio.create_task(run([quick])) == []
    assert await asyncio.create_task(run([lambda *_: Later()])) == []
    stray = asyncio.CancelledError("stray")
    for suspends in (False, True):
        assert await asyncio.create_task(run([lambda *_, s=suspends: raising(stray, s)])) == [
            ("on_node_start", "node", stray)
        ]


@pytest.mark.parametrize("hook", [quick, lambda *_: AtOnce()])
def test_hooks_are_told_where_no_task_runs(hook: Any) -> None:
    """A coroutine driven by hand is in no task: its hooks are called, and their errors are isolated."""
    for hooks, errors in (([hook], 0), ([hook, lambda *_: raising(asyncio.CancelledError(), False)], 1)):
        fired = Fired(*hooks)
        step = fired.fire().__await__()

        def drive(step: Any = step) -> None:
            with pytest.raises(StopIteration):
                next(step)

        asyncio.run(in_callback(drive))
        assert (fired.lookup_count, len(fired.errors)) == (len(hooks), errors)


class Clock:
    """What the hooks read the time from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(stroma.hooks.dispatch, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(("took", "warned"), [(250.0, False), (3750.0, True)])
async def test_a_hook_that_blocks_for_longer_than_its_limit_is_named(
    suspends: bool,
    sets: int,
    took: float,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A warning with the time that it took and the mend; up to the limit there is none. It is no error."""
    clock = Clock(monkeypatch)

    async def hook(*_: Any) -> None:
        if suspends:
            await asyncio.sleep(0)
        clock.now += took

    fired = Fired(*[hook] * sets, limit=250.0)
    await fired.fire()
    text = (
        f"hook on_node_start ({hook!r}) of node 'node' blocked the event loop for 3750000 ms; await in "
        f"it, or use a thread"
    )
    assert lines(caplog) == [(logging.WARNING, text, "run", None)] * (sets if warned else 0)
    assert fired.errors == []


async def test_a_patient_set_has_no_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Hooks that make a run wait by design may take as long as they like."""
    clock = Clock(monkeypatch)

    class Patient(NodeHooks):
        _has_time_limit = False

    async def hook(*_: Any) -> None:
        await asyncio.sleep(0)
        clock.now += 3600

    sets = (Patient(on_node_retry=hook),)
    hooks = Hooks(sets, run_id="run", limit_seconds=0.001, failures=[])
    await hooks.fire("on_node_retry", "node")
    assert lines(caplog) == []


@pytest.mark.parametrize("kind", ["coroutine", "awaitable", "swallows", "goes on", "will not be closed"])
@pytest.mark.parametrize(("limit", "text"), [(0.01, "10"), (0.0126, "13")])
async def test_a_hook_that_hangs_is_cut_off(
    kind: str, limit: float, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names the limit in milliseconds and the mend, has no cause and is reported once."""
    cut: list[str] = []

    async def coroutine(*_: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut.append("cut")
            if kind == "goes on":
                await asyncio.Event().wait()
            if kind == "will not be closed":
                try:
                    await asyncio.Event().wait()
                finally:
                    raise Rude
            if kind != "swallows":
                raise

    hook = (lambda *_: Wrapped(coroutine())) if kind == "awaitable" else coroutine
    fired = Fired(hook, limit=limit)
    await fired.fire()
    if kind == "swallows":
        assert fired.errors == []
    else:
        ((event, node_id, error),) = fired.errors
        assert (event, node_id, type(error)) == ("on_node_start", "node", HookTimeout)
        assert str(error) == f"did not end within {text} ms; make it quicker, or raise hook_timeout_ms"
        assert (error.__cause__, error.__suppress_context__) == (None, True)
        assert [line[0] for line in lines(caplog)] == [logging.ERROR]
    assert cut == ["cut"]
    assert asyncio.current_task().cancelling() == 0


class Wrapped:
    def __init__(self, coroutine: Any) -> None:
        self.coroutine = coroutine

    def __await__(self) -> Any:
        return self.coroutine.__await__()


class Steps:
    """An awaitable of whose iterator every step is seen."""

    def __init__(self, *steps: Any) -> None:
        self.steps = iter(steps)
        self.sent: list[Any] = []

    def __await__(self) -> Steps:
        return self

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> Any:
        self.sent.append(None)
        return next(self.steps)

    def send(self, value: Any) -> Any:
        self.sent.append(value)
        return next(self.steps)


def test_every_step_of_a_hook_is_handed_on() -> None:
    """What it waits for goes to whoever drives the run, and what is sent back goes to it."""
    steps = Steps("first", "second", "third")
    fired = Fired(lambda *_: steps)
    driven = fired.fire().__await__()
    got: list[Any] = []

    def drive() -> None:
        got.append(next(driven))
        got.append(driven.send(None))
        got.append(driven.send("value"))  # type: ignore[arg-type]
        with pytest.raises(StopIteration):
            driven.send(None)

    asyncio.run(in_callback(drive))
    assert got == ["first", "second", "third"]
    assert steps.sent == [None, None, "value", None]


def test_what_is_thrown_into_a_hook_reaches_it() -> None:
    """One that can be thrown into gets it; one that cannot is over with it."""

    class Catches(Steps):
        def throw(self, error: BaseException) -> Any:
            self.sent.append(error)
            return "caught"

    error = ValueError("thrown")
    catches, plain = Catches("first", "second"), Steps("first", "second")
    for steps, caught in ((catches, True), (plain, False)):
        fired = Fired(lambda *_, steps=steps: steps)
        driven = fired.fire().__await__()

        def drive(driven: Any = driven, caught: bool = caught) -> None:
            assert next(driven) == "first"
            if caught:
                assert driven.throw(error) == "caught"
                assert driven.send(None) == "second"
            with pytest.raises(StopIteration):
                driven.throw(error) if not caught else driven.send(None)

        asyncio.run(in_callback(drive))
        assert fired.errors == ([] if caught else [("on_node_start", "node", error)])
    assert catches.sent == [None, error, None, None]


@pytest.mark.parametrize("sets", [1, 2])
def test_a_hook_is_driven_no_faster_than_it_goes(sets: int) -> None:
    """Each time that it waits, the event loop has a turn: no step is left out, none is added."""
    seen: list[Any] = []
    fired = Fired(*[slow] * sets)
    driven = fired.fire().__await__()
    asyncio.run(in_callback(lambda: seen.extend(driven)))
    assert seen == [None] * 3 * sets


def test_the_hooks_after_one_that_is_closed_can_still_be_called() -> None:
    """GeneratorExit comes out of a waiting hook at once if the coroutine around is closed; others follow."""
    called: list[str] = []
    entries: list[Any] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(0)
        except GeneratorExit:
            called.append("closed")
            raise

    def hook(*_: Any) -> Any:
        # It has another reference, too: it is not closed by being forgotten.
        entries.append(waits())
        return entries[-1]

    async def other(*_: Any) -> None:
        called.append("other")

    fired = Fired(other, hook, other, event="on_node_success")
    firing = fired.firing()

    async def run() -> None:
        assert not firing.advance()
        driven = firing.finish().__await__()
        next(driven)
        driven.close()

    asyncio.run(run())
    firing.finish_now()
    assert called == ["other", "closed", "other"]
    assert fired.errors == []


def test_hooks_that_are_told_where_nothing_can_be_awaited(caplog: pytest.LogCaptureFixture) -> None:
    """One that waits is cut short, one that raises is reported, others end."""
    events: list[str] = []
    error = ValueError("no")

    async def ends(*arguments: Any) -> None:
        events.append(f"ends {arguments}")

    async def waits(*_: Any) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            events.append("cut short")

    async def fails(*_: Any) -> None:
        raise error

    fired = Fired(ends, waits, fails, lambda *_: 7, ends)

    async def run() -> None:
        fired.event = "on_node_cancelled"
        fired.firing().finish_now()

    asyncio.run(run())
    assert events == ["ends ('argument',)", "cut short", "ends ('argument',)"]
    assert [(event, node_id) for event, node_id, _ in fired.errors] == [("on_node_cancelled", "node")] * 2
    assert fired.errors[0][2] is error
    assert type(fired.errors[1][2]) is AttributeError
    assert lines(caplog)[:2] == [
        (
            logging.WARNING,
            f"hook on_node_cancelled ({waits!r}) was cut short: run 'run' was closed, not cancelled, so "
            f"that nothing can "
            "be awaited",
            "run",
            None,
        ),
        (
            logging.ERROR,
            f"hook on_node_cancelled ({fails!r}) raised for node 'node' of run 'run'; the run goes on",
            "run",
            error,
        ),
    ]
