"""DSPy: real programs with and without the guard, sync and async, with a fake model and no network."""

import asyncio
import copy
import json
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from dspy.adapters.base import Adapter
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel
from tests.frameworks.contract import ANSWER, CALL, FrameworkContract, weather
from tests.frameworks.kit import Seen, guard_of, holds, lines_of, result_of, spent

from stroma import BudgetExceeded, ExecutionBudget, RunStatus
from stroma.adapters import Guard
from stroma.adapters._step import causes
from stroma.adapters.dspy import attach

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
KINDS = ["call", "acall"]


class Question(BaseModel):
    question: str


class Script(dspy.BaseLM):
    """Answers what it is told to, by field; a tool call by its result; exceptions are raised."""

    def __init__(self, *answers: Any, tokens: int = 10) -> None:
        super().__init__("openai/gpt-4o", cache=False, num_retries=0)
        self.answers, self.tokens = list(answers), tokens
        self.asked = 0
        self.tool: Any = weather

    def forward(self, prompt: Any = None, messages: Any = None, **_: Any) -> Any:
        self.asked += 1
        answer = self.answers[0]
        if isinstance(answer, tuple):
            answer = self.tool(**answer[1])  # One that raises is called again.
        self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        text = (
            answer
            if isinstance(answer, str)
            else "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in answer.items())
        )
        message = ChatCompletionMessage(content=text + "\n\n[[ ## completed ## ]]", role="assistant")
        usage = CompletionUsage(prompt_tokens=self.tokens - 1, completion_tokens=1, total_tokens=self.tokens)
        if not hasattr(dspy.BaseLM, "_record_response") and dspy.settings.usage_tracker:
            # What dspy.LM does in the releases whose base class does not.
            dspy.settings.usage_tracker.add_usage(self.model, dict(usage))
        return ChatCompletion(
            id="1",
            choices=[Choice(finish_reason="stop", index=0, message=message)],
            created=0,
            model="gpt-4o",
            object="chat.completion",
            usage=usage,
        )

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return self.forward(prompt, messages, **kwargs)


class Plain(dspy.ChatAdapter):
    """Without the second call, in another format, that DSPy makes by itself after any failure."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Adapter.__call__(self, *args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return await Adapter.acall(self, *args, **kwargs)


class Writing(dspy.Module):
    """Two predictors, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.write = dspy.Predict("question -> draft")
        self.polish = dspy.Predict("draft -> text")

    def forward(self, question: str) -> Any:
        return self.polish(draft=self.write(question=question).draft)

    async def aforward(self, question: str) -> Any:
        return await self.polish.acall(draft=(await self.write.acall(question=question)).draft)


def run(program: Any, script: Script, kind: str) -> Any:
    with dspy.context(lm=script, adapter=Plain()):
        if kind == "call":
            return program(question="why?")
        return asyncio.run(program.acall(question="why?"))


GOOD = ({"draft": "rough"}, {"text": "fine"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_the_program_to_the_token(kind: str) -> None:
    """An answer that does not parse is paid for and asked for again; the limit counts it."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    script = Script({"nothing": "x"}, GOOD[0], GOOD[1])
    with pytest.raises(BudgetExceeded) as caught:
        run(attach(Writing(), guard), script, kind)
    assert (caught.value.actual, caught.value.limit, script.asked) == (20, 15, 2)
    assert (result_of(guard).total_tokens, result_of(guard).status) == (20, RunStatus.PARTIAL)
    assert lines_of(guard) == ["Writing failure", "  write failure 10", "  write failure 10"]


class Forecast(dspy.Module):
    """Two typed predictors, one behind the other; or the second one again and again."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.weather = dspy.Predict("city: str -> celsius: int")
        self.tell = dspy.Predict("celsius: int -> text: str")

    def forward(self, city: str) -> Any:
        celsius = self.weather(city=city).celsius
        return [self.tell(celsius=celsius) for _ in range(self.times)][-1]

    async def aforward(self, city: str) -> Any:
        celsius = (await self.weather.acall(city=city)).celsius
        return [await self.tell.acall(celsius=celsius) for _ in range(self.times)][-1]


@holds("sync and async")
class TestDSPy(FrameworkContract):
    """Its tools are none of its steps: the model answers for one in the step ``weather``."""

    KINDS = KINDS
    STEPS = ("Forecast success", "  weather success 10", "  tell success 10")
    MODEL = "weather"
    WEATHER_TOKENS = 10
    UNKNOWN = r"unknown predictor 'wether'; .* 'Forecast', 'tell', 'weather'"

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*({"text": answer} if isinstance(answer, str) else answer for answer in answers))

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        script.tool = tool
        return (Forecast() if guard is None else attach(Forecast(), guard, contracts)), script

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        module, script = program
        with dspy.context(lm=script, adapter=Plain()):
            instance = module(city="Oslo") if kind == "call" else asyncio.run(module.acall(city="Oslo"))
            return instance.text

    def nested(self, guard: Guard, die: Callable[[], None]) -> str:
        """A module, killed between two of its predictors."""
        drafts: list[str] = []

        class Dying(Writing):
            def forward(self, question: str) -> Any:
                drafts.append(self.write(question=question).draft)
                die()
                return self.polish(draft=drafts[0])

        text = run(attach(Dying(), guard), Script(*GOOD), "call").text
        return f"{drafts[0]} {text}"

    def endless(self, guard: Any) -> tuple[Any, Script]:
        script = self.script(CALL, *[ANSWER] * 9)
        return (attach(Forecast(9), guard), script), script

    def requests(self, script: Script) -> list[Any]:
        return [None] * script.asked

    #: Tested below, with what its releases make of a stream that breaks off.
    test_a_stream_is_not_retried_after_its_first_part = None


def test_a_model_that_the_program_calls_itself_is_counted_on_the_program() -> None:
    """And a tracker of the user's around it all sees what it saw without the guard."""

    class Direct(Writing):
        def forward(self, question: str) -> Any:
            dspy.settings.lm("x")
            return super().forward(question)

    seen = []
    for guard in (None, guard_of()):
        program = Direct() if guard is None else attach(Direct(), guard)
        with dspy.track_usage() as tracker:
            run(program, Script({"a": "b"}, *GOOD), "call")
        seen.append(tracker.get_total_tokens()["openai/gpt-4o"]["total_tokens"])
        if guard is not None:
            assert lines_of(guard) == ["Direct success 10", "  write success 10", "  polish success 10"]
    assert seen == [30, 30]


def test_predictors_inside_modules_have_the_names_that_dspy_gives_them() -> None:
    class Thinking(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.think = dspy.ChainOfThought("question -> answer")

        def forward(self, question: str) -> Any:
            return self.think(question=question)

    guard = guard_of()
    program = attach(Thinking(), guard, {"think.predict": (Question, Answered)})
    assert run(program, Script({"reasoning": "so", "answer": "42"}), "call").answer == "42"
    assert lines_of(guard) == ["Thinking success", "  think.predict success 10"]


class Answered(BaseModel):
    answer: str


class Streaming(Script):
    """Sends a part of each answer before it has the rest of it."""

    def __init__(self, *answers: Any, sends: bool = True) -> None:
        super().__init__(*answers)
        self.sends = sends

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        if self.sends:
            await dspy.settings.send_stream.send(f"part {self.asked}")
        return self.forward(prompt, messages, **kwargs)


@holds("streams")
@pytest.mark.parametrize("sends", [True, False])
def test_a_stream_is_not_retried_after_its_first_part(sends: bool) -> None:
    """Rule 9, with dspy.streamify; a step that has sent nothing yet is tried again."""
    script, guard, seen = Streaming(GOOD[0], TimeoutError("lost"), GOOD[1], sends=sends), guard_of(), []
    program = dspy.streamify(attach(Writing(), guard), is_async_program=True)

    async def main() -> None:
        with dspy.context(lm=script, adapter=Plain()):
            async for part in program(question="why?"):
                seen.append(part)

    if sends:
        with pytest.raises(BaseException) as caught:
            asyncio.run(main())
        assert any(isinstance(error, TimeoutError) for error in causes(caught.value))
        assert seen in (["part 0", "part 1"], [])  # Old releases hand on nothing of what failed.
        assert script.asked == 2
    else:
        asyncio.run(main())
        assert [part.text for part in seen] == ["fine"]
        assert script.asked == 3


@holds("control flow")
def test_dspy_makes_its_second_tries_as_ever() -> None:
    """An answer that its adapter cannot read is asked for in another format, inside the step: no failure."""
    events = []
    for guard in (None, guard_of()):
        script = Script({"nothing": "x"}, json.dumps({"draft": "rough"}), GOOD[1])
        program = Writing() if guard is None else attach(Writing(), guard)
        with dspy.context(lm=script, adapter=dspy.ChatAdapter()):
            instance = program(question="why?")
        events.append((instance.text, script.asked))
        if guard is not None:
            assert lines_of(guard) == ["Writing success", "  write success 20", "  polish success 10"]
    assert events[0] == events[1] == ("fine", 3)


@pytest.mark.parametrize("copying", [copy.deepcopy, dspy.Module.deepcopy, dspy.Module.reset_copy])
def test_a_copy_is_guarded_and_calls_itself(copying: Any) -> None:
    """Copies rebind, as optimisers make them: a copy runs its own predictors, as steps of the same guard."""
    guard = guard_of()
    program = attach(Writing(), guard)
    copied = copying(program)
    copied.write.demos = [dspy.Example(question="which?", draft="that one")]
    asked: list[Any] = []

    class Asked(Script):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            asked.append(messages)
            return super().forward(prompt, messages, **kwargs)

    assert run(copied, Asked(*GOOD), "call").text == "fine"
    assert "that one" in str(asked[0]), "the copy's own examples are used"
    assert lines_of(guard) == ["Writing success", "  write success 10", "  polish success 10"]


def test_an_optimised_program_is_guarded() -> None:
    """BootstrapFewShot copies a program and tries it on examples: each call is a run, all spend counts."""
    seen = Seen()
    script = Script(*[{"draft": "rough"}, {"text": "fine"}] * 9)
    trainset = [dspy.Example(question="why?", text="fine").with_inputs("question")] * 2
    optimiser = dspy.BootstrapFewShot(metric=lambda example, prediction, _: example.text == prediction.text)
    with dspy.context(lm=script, adapter=Plain()):
        guard = guard_of(seen)
        optimised = optimiser.compile(attach(Writing(), guard), trainset=trainset)
        assert optimised.write.demos
        optimised(question="why?")
    assert spent(seen, guard) == (3, 10 * script.asked)


def test_a_predictor_that_is_added_later_is_guarded() -> None:
    """No predictor is left out in silence."""
    guard = guard_of()
    program = attach(Writing(), guard)
    program.polish = dspy.Predict("draft -> text")
    assert run(program, Script(*GOOD), "call").text == "fine"
    assert lines_of(guard) == ["Writing success", "  write success 10", "  polish success 10"]


class Provider(dspy.BaseLM):
    """Answers each request of an agent and of its tools; writes each into a ledger of tokens."""

    def __init__(self) -> None:
        super().__init__("openai/gpt-4o", cache=False, num_retries=0)
        self.ledger: list[int] = []

    def forward(self, prompt: Any = None, messages: Any = None, **_: Any) -> Any:
        script, asked = Script(), str(messages[-1]["content"])
        script.tokens = 10 + len(self.ledger) % 7
        if "next_tool_name" in asked:
            done = "observation_0" in asked
            script.answers = [
                {
                    "next_thought": "so",
                    "next_tool_name": "finish" if done else "compare",
                    "next_tool_args": "{}" if done else '{"city": "Oslo"}',
                }
            ]
        else:
            script.answers = [{"reasoning": "so", "answer": "4 C", "draft": "cold"}]
        self.ledger.append(script.tokens)
        return script.forward(prompt, messages)

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return self.forward(prompt, messages, **kwargs)


class Agent(dspy.Module):
    """An agent whose tool asks two models in threads of DSPy's, which have no context."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = dspy.Predict("city -> draft")
        self.react = dspy.ReAct("question -> answer", tools=[self.compare])

    def compare(self, city: str) -> str:
        """Compare two cities."""
        parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        pairs = [(self.judge, dspy.Example(city=name).with_inputs("city")) for name in (city, "Bergen")]
        return " ".join(each.draft for each in parallel(pairs))

    def forward(self, question: str) -> Any:
        return self.react(question=question)

    async def aforward(self, question: str) -> Any:
        return await self.react.acall(question=question)


@pytest.mark.parametrize("kind", KINDS)
def test_many_agents_at_once_spend_what_the_provider_has_counted(kind: str) -> None:
    """All spend is counted, to the token, in its run: of an agent, its tools and their threads."""
    plain, provider, seen = Provider(), Provider(), Seen()
    program = attach(Agent(), guard := guard_of(seen))

    def ask(agent: Any, lm: Any) -> Any:
        with dspy.context(lm=lm, adapter=Plain()):
            return agent(question="why?").answer

    async def main() -> list[Any]:
        if kind == "call":
            return await asyncio.gather(*(asyncio.to_thread(ask, program, provider) for _ in range(50)))
        with dspy.context(lm=provider, adapter=Plain()):
            answers = await asyncio.gather(*(program.acall(question="why?") for _ in range(50)))
        return [answer.answer for answer in answers]

    expected = ask(Agent(), plain)
    assert set(asyncio.run(main())) == {expected}
    assert len(provider.ledger) == 50 * len(plain.ledger)
    assert spent(seen, guard) == (50, sum(provider.ledger))
    for result in seen.results:
        assert [event.node_id for event in result.trace.walk()].count("judge") == 2
