"""What the adapter of every framework guarantees, as tests to inherit.

A subclass says how its framework is called and how a program is made of a scripted model and one function,
``weather``. What only one framework has (interrupts, handoffs, routers ...) is tested beside its subclass.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from pydantic import BaseModel
from tests.frameworks.kit import (
    PAID,
    Seen,
    emitted_by,
    guard_of,
    holds,
    killed_and_resumed,
    pay,
    result_of,
    tree,
)

from stroma import BudgetExceeded, ContractViolation, ExecutionBudget, FailureClass, RunStatus, SQLiteStore
from stroma.adapters import Guard, UnknownNode
from stroma.adapters._step import causes

F = TypeVar("F", bound=Callable[..., Any])


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


class Narrow(BaseModel):
    """An input contract that the name of a city breaks."""

    city: int


class Strict(BaseModel):
    """An output contract that a number breaks."""

    celsius: str


#: A model's call of its tool.
CALL = ("weather", {"city": "Oslo"})
ANSWER = "It is 4 C"


def weather(city: str) -> dict[str, int]:
    """Return the weather of a city."""
    return {"celsius": len(city)}


def as_weather(func: F) -> F:
    """Name a function as the tool that it stands for."""
    func.__name__ = func.__qualname__ = weather.__name__
    func.__doc__ = weather.__doc__
    return func


def terminal(error: Exception, context: Any) -> FailureClass:
    """Classify every failure as one that is never retried."""
    return FailureClass.TERMINAL


def hook_lines(steps: Sequence[str], fails: str | None = None) -> list[str]:
    """Return what the hooks of a run see whose trace has ``steps``; the first attempt of ``fails`` fails."""
    lines, around = ["run start"], list[str]()

    def end(depth: int) -> None:
        while len(around) > depth:
            lines.append(f"success {' < '.join(reversed(around))}")
            around.pop()

    for step in steps:
        end((len(step) - len(step.lstrip())) // 2)
        around.append(step.split()[0])
        place = " < ".join(reversed(around))
        lines.append(f"start {place}")
        if around[-1] == fails:
            lines += [f"failure {place}", f"retry {place}", f"start {place}"]
            fails = None
    end(0)
    return [*lines, "run end COMPLETED"]


class EmitsDeltas:
    """What holds for frameworks whose streamed answers are emitted. For subclasses of FrameworkContract."""

    def test_the_text_of_a_streamed_answer_is_emitted(self: Any) -> None:
        """The node that calls the program emits each streamed part of the answer once, and nothing else."""
        seen: list[str] = []
        emitted = emitted_by(lambda: self.stream(self.script("one two three"), guard_of(), seen))
        assert [(name, text.strip()) for name, text in emitted] == [("delta", word) for word in seen]
        assert seen == ["one", "two", "three"]
        guard = guard_of()
        program = self.program(self.script(*self.GOOD), guard)
        assert emitted_by(lambda: self.call(program, self.KINDS[0], guard)) == []


class FrameworkContract:
    """The eight sentences that hold for every framework.

    A sentence that a framework cannot have is set to None in its subclass, with the reason in ``NOT_THERE``
    of tests/adapters/test_releases.py.
    """

    #: The ways to call a program.
    KINDS: ClassVar[Sequence[str]]
    #: Those of them in which the scripted model reports its usage; None: all.
    METERED: ClassVar[Sequence[str] | None] = None
    #: What the model answers in one call of the program.
    GOOD: ClassVar[tuple[Any, ...]] = (CALL, ANSWER)
    #: The trace of one call.
    STEPS: ClassVar[Sequence[str]]
    #: The step in which the model is called.
    MODEL: ClassVar[str | None] = "model"
    #: The tokens of one call, and those of the step ``weather``.
    TOKENS: ClassVar[int] = 20
    WEATHER_TOKENS: ClassVar[int] = 0
    #: The message about a contract for a step that is not there.
    UNKNOWN: ClassVar[str] = r"unknown tool 'wether'; .* 'weather'"
    #: The exceptions that the framework wraps around those of steps.
    WRAPPERS: ClassVar[tuple[type[BaseException], ...]] = ()

    def script(self, *answers: Any, break_after: int | None = None) -> Any:
        """Return a model that gives these answers; it raises exceptions, and breaks off a stream."""
        raise NotImplementedError

    def program(
        self,
        script: Any,
        guard: Guard | None = None,
        contracts: Any = None,
        tool: Callable[..., Any] = weather,
    ) -> Any:
        """Return a program that calls ``tool`` in a step ``weather``, and the model."""
        raise NotImplementedError

    def call(self, program: Any, kind: str, guard: Guard | None = None) -> Any:
        """Call a program in one of its ways and return its answer."""
        raise NotImplementedError

    def stream(self, script: Any, guard: Guard, seen: list[str]) -> None:
        """Call a program whose model streams, and append each word to ``seen``."""
        raise NotImplementedError

    def endless(self, guard: Guard) -> tuple[Any, Any]:
        """Return a program whose model is called again and again, and its script."""
        script = self.script(*[CALL] * 9)
        return self.program(script, guard), script

    def nested(self, guard: Guard, die: Callable[[], None]) -> str:
        """Call a program that dies in a step, after another finished beside it or inside the outer one."""

        @as_weather
        def dies(city: str) -> dict[str, int]:
            die()
            return weather(city)

        program = self.program(self.script(*self.GOOD), guard, tool=dies)
        return str(self.call(program, self.KINDS[0], guard))

    def requests(self, script: Any) -> list[Any]:
        """Return what the model was asked, in a form that can be compared."""
        return list(script.asked)

    def steps(self, kind: str) -> Sequence[str]:
        return self.STEPS

    def own(self, lines: Sequence[str]) -> list[str]:
        """Return the lines that are about steps of the program, and not of what the framework adds to it."""
        return list(lines)

    def stopped(self, program: Any, kind: str, guard: Guard) -> BaseException:
        """Call a program that is stopped, and return by what: as itself, or in the framework's wrapper."""
        with pytest.raises(Exception) as caught:
            self.call(program, kind, guard)
        result = guard.stopped.exception
        assert caught.value is result or isinstance(caught.value, self.WRAPPERS)
        assert any(error is result for error in causes(caught.value))
        return result

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", self.KINDS)
        if "metered" in metafunc.fixturenames:
            metafunc.parametrize("metered", self.METERED or self.KINDS)

    @holds("same answer")
    def test_the_answer_is_the_same_with_and_without_the_guard(self, kind: str) -> None:
        """The model gets the same, each part is a step of one completed run, and each token counts once."""
        plain, guarded, guard = self.script(*self.GOOD), self.script(*self.GOOD), guard_of()
        expected = self.call(self.program(plain), kind)
        got = self.call(self.program(guarded, guard, {"weather": (City, Weather)}), kind, guard)
        assert got == expected == ANSWER
        assert self.requests(guarded) == self.requests(plain)
        result, steps = result_of(guard), list(self.steps(kind))
        assert result.status is RunStatus.COMPLETED
        if kind in (self.METERED or self.KINDS):
            assert self.own(tree(result)) == steps
            assert result.total_tokens == self.TOKENS
            assert result.total_cost_usd > 0
        else:
            assert [line.split()[0] for line in self.own(tree(result))] == [line.split()[0] for line in steps]
            assert result.total_tokens > 0

    @holds("violations")
    @pytest.mark.parametrize(
        ("contract", "direction"),
        [((Narrow, Weather), "input"), ((City, Strict), "output")],
        ids=["in", "out"],
    )
    def test_a_violation_is_caught_at_its_step(self, kind: str, contract: Any, direction: str) -> None:
        """G1: In each framework a violation ends the run there, and invalid input reaches no function."""
        calls: list[str] = []

        @as_weather
        def counted(city: str) -> dict[str, int]:
            calls.append(city)
            return weather(city)

        guard, script = guard_of(), self.script(*self.GOOD)
        program = self.program(script, guard, {"weather": contract}, counted)
        error = self.stopped(program, kind, guard)
        assert isinstance(error, ContractViolation)
        assert (error.node_id, error.direction) == ("weather", direction)
        assert len(calls) == (direction == "output")
        assert result_of(guard).status is RunStatus.FAILED

    @holds("retries", "failed attempts")
    def test_a_transient_failure_is_retried(self, kind: str) -> None:
        """G3, G6: in each framework the failed step alone is called again, and its failed attempts count."""
        errors: list[Exception] = [TimeoutError("slow"), ConnectionError("gone")]

        @as_weather
        def flaky(city: str) -> dict[str, int]:
            pay()
            if errors:
                raise errors.pop()
            return weather(city)

        guard, script = guard_of(), self.script(*self.GOOD)
        assert self.call(self.program(script, guard, tool=flaky), kind, guard) == ANSWER
        result = result_of(guard)
        used = [event.usage.tokens for event in result.trace.walk() if event.node_id == "weather"]
        assert (len(used), sum(used)) == (3, 3 * PAID + self.WEATHER_TOKENS)
        if kind in (self.METERED or self.KINDS):
            assert result.total_tokens == self.TOKENS + 3 * PAID

    @holds("retries")
    def test_a_transient_failure_of_the_model_is_retried(self, kind: str) -> None:
        """G3: in each framework whose requests are steps, a failed request alone is made again."""
        script = self.script(TimeoutError("slow"), ConnectionError("gone"), *self.GOOD)
        guard = guard_of()
        assert self.call(self.program(script, guard), kind, guard) == ANSWER
        assert len(self.requests(script)) == len(self.GOOD) + 2

    @holds("retries")
    def test_a_terminal_failure_is_not_retried(self, kind: str) -> None:
        """G3: In each framework a terminal failure is not retried."""
        calls: list[str] = []

        @as_weather
        def broken(city: str) -> dict[str, int]:
            calls.append(city)
            raise PermissionError("no")

        guard = guard_of(classifiers=[terminal])
        with contextlib.suppress(Exception):
            self.call(self.program(self.script(*self.GOOD), guard, tool=broken), kind, guard)
        assert len(calls) == 1
        (event,) = [event for event in result_of(guard).trace.walk() if event.node_id == "weather"]
        assert event.failure is FailureClass.TERMINAL

    @holds("retries")
    def test_a_terminal_failure_of_the_model_is_not_retried(self, kind: str) -> None:
        """G3: in each framework a terminal failure of the model ends the run with itself."""
        script, guard = self.script(PermissionError("no"), *self.GOOD), guard_of(classifiers=[terminal])
        assert isinstance(self.stopped(self.program(script, guard), kind, guard), PermissionError)
        assert len(self.requests(script)) == 1
        assert guard.stopped.node_id == self.MODEL
        assert result_of(guard).status is RunStatus.FAILED

    @holds("budget")
    def test_the_budget_stops_the_program_to_the_token(self, metered: str) -> None:
        """G6: In each framework the request that crosses the limit is the last one."""
        guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
        program, script = self.endless(guard)
        error = self.stopped(program, metered, guard)
        assert isinstance(error, BudgetExceeded)
        assert (error.actual, error.limit, len(self.requests(script))) == (30, 25, 3)
        result = result_of(guard)
        assert (result.total_tokens, result.status) == (30, RunStatus.PARTIAL)

    @holds("hooks")
    def test_hooks_are_called_in_order_with_the_right_parents(self, kind: str) -> None:
        """A failed attempt of the model among them."""
        seen = Seen()
        guard = guard_of(seen)
        failing = () if self.MODEL is None else (TimeoutError("slow"),)
        self.call(self.program(self.script(*failing, *self.GOOD), guard), kind, guard)
        assert self.own(seen.lines) == hook_lines(self.steps(kind), self.MODEL)

    @holds("streams")
    def test_a_stream_is_not_retried_after_its_first_part(self) -> None:
        """What somebody has seen is not made a second time; a stream that did not begin is."""
        seen: list[str] = []
        script, guard = self.script("one two three", "again", break_after=2), guard_of()
        with pytest.raises(Exception) as caught:
            self.stream(script, guard, seen)
        assert any("lost" in str(error) for error in causes(caught.value))
        assert (seen, len(self.requests(script))) == (["one", "two"], 1)
        seen.clear()
        script = self.script(TimeoutError("slow"), "one two")
        self.stream(script, guard_of(), seen)
        assert (seen, len(self.requests(script))) == (["one", "two"], 2)

    @holds("unknown")
    def test_a_contract_for_an_unknown_step_is_an_error(self) -> None:
        """It would never be checked; the message names the steps that there are."""
        with pytest.raises(UnknownNode, match=self.UNKNOWN):
            guard = guard_of()
            program = self.program(self.script(*self.GOOD), guard, {"wether": (City, Weather)})
            self.call(program, self.KINDS[0], guard)

    @holds("journal")
    def test_a_call_is_a_run_in_the_journal(self, metered: str, tmp_path: Path) -> None:
        """With its status, its usage and its steps."""
        with SQLiteStore(tmp_path / "runs.db") as store:
            guard = guard_of(store=store, pipeline="forecast")
            self.call(self.program(self.script(*self.GOOD), guard), metered, guard)
            (run,) = store.list_runs()
            assert (run.status, run.pipeline, run.tokens) == ("COMPLETED", "forecast", self.TOKENS)
            nodes = self.own([attempt.node_id for attempt in store.attempts(run.run_id)])
            assert nodes == [line.split()[0] for line in self.steps(metered)]

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @holds("killed")
    def test_killed_inside_of_a_step(self, tmp_path: Path) -> None:
        """After SIGKILL, a resume gives what an undisturbed run gives: no finished step is None or lost."""
        expected = self.nested(guard_of(), lambda: None)
        assert expected
        assert killed_and_resumed(type(self), tmp_path) == expected
