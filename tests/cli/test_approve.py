"""Runs that wait for a person or a message, as the command line shows and answers them."""

import asyncio
import json
import re
import runpy
import shlex
import sqlite3
from typing import Any

import pytest

from stroma import StromaRunner

DESK = """
    import asyncio, sys
    from pydantic import BaseModel
    from sums import Sum, node
    from stroma import *

    class Approval(BaseModel):
        approved: bool
        by: str = "nobody"

    async def plus(state):
        return {"n": state.n + 1}, 10

    async def asks(state):
        answer = current_node().wait_for(Approval, reason="is this right?")
        return {"n": state.n + (100 if answer.approved else 1000)}

    async def anything(state):
        if current_node().signal is None:
            raise Suspend("what?")
        return {"said": current_node().signal}

    def hidden(state):
        class Local(BaseModel):
            ok: bool
        raise Suspend("how?", schema=Local)

    first, ask, last = node("first", plus), node("ask", asks), node("last", plus)
    pipeline = Pipeline("desk", [first, ask, last])
    free = Pipeline("free", [first, stroma_node("free", None)(anything)])
    both = Pipeline("both", [parallel(node("x", asks), node("y", asks))])
    local = Pipeline("local", [node("local", hidden)])

    if __name__ == "__main__":
        runner = StromaRunner.quick(store=SQLiteStore("own.db"), run_id="own")
        asyncio.run(runner.run(pipeline, Sum(n=1)))
"""


@pytest.fixture
def desk(stroma):
    stroma.file("desk.py", DESK)
    return stroma


def test_a_run_that_waits_is_no_failure(desk, inside):
    """A suspended run ends with 7, what it waits for, and the commands that answer and go on, to copy."""
    done = inside("run", "desk.py:pipeline", '{"n": 1}', "--run-id", "x")
    assert (done.code, done.out) == (7, "")
    assert re.search(
        r"\nsuspended: run x is waiting for an answer\n  node 'ask' \(at 1\): is this right\?  \(asks for "
        r"Approval\)\n",
        done.err,
    )
    answer = re.search(r"  answer: stroma (approve .*)\n", done.err)
    go_on = re.search(r"continues the run; or continue it here: stroma (resume .*)\n", done.err)
    assert inside(*shlex.split(answer[1])).code == 0
    resumed = inside(*shlex.split(go_on[1]), "-q")
    assert (resumed.code, json.loads(resumed.out)) == (0, {"n": 1003})


def test_what_is_told_of_an_answer(desk, golden):
    """run, show and approve name each waiting node, its reason, what it asks and whether it is answered."""
    run = """run desk.py:pipeline '{"n": 1}' -q --run-id"""
    golden("asked", f"{run} y --json", f"{run} x", "show x --json", columns=(120,))
    approve = """approve x desk.py:pipeline '{"approved": true}' --json"""
    golden("answered", approve, "show x", "show x --json", "resume x desk.py:pipeline -q", columns=(120,))
    golden("went-on", "show x", columns=(120,))


@pytest.mark.parametrize(
    "words", ["paused", "budget", "effect", "sleeping until 2030", "waiting for a message"]
)
def test_the_words_of_a_question_decide_nothing(desk, inside, words):
    """A question whose text is like the engine's about a pause or an effect is shown as a question."""
    text = f"""
        from desk import *
        async def asks(state):
            return {{"n": current_node().wait_for(Sum, reason={words!r}).n}}
        question = Pipeline("question", [node("ask", asks)])
    """
    desk.file("words.py", text)
    done = inside("run", "words.py:question", '{"n": 1}', "--run-id", "x")
    shown = inside("show", "x").out + inside("show", "x").err
    for output in (done.err, shown):
        assert "stroma approve x words.py:question" in output
        assert not re.search("stroma (budget|send) x|a paused run|--not-done|when it is due", output)
    assert f"waiting for an answer: {words}" in inside("runs").out


def test_answers_that_do_not_fit(desk, inside, fails):
    """An answer that is no JSON, or not what the node asks for, is a usage error; the run waits on."""
    inside("run", "desk.py:pipeline", '{"n": 1}', "--run-id", "x")
    desk.file("answer.json", '{"approved": 3}')
    fits = """for example: '{"approved": false}'"""
    for answer, words in {
        '{"approved": "perhaps"}': ["ANSWER does not fit", "node 'ask'", "approved: Input should be", fits],
        "{}": ["approved: Field required", fits],
        "@answer.json": ["answer.json does not fit", "approved: Input should be"],
        "yes": ["ANSWER is not JSON"],
    }.items():
        fails(inside("approve", "x", "desk.py:pipeline", answer), 2, *words)
    fails(inside("approve", "x", "desk.py:pipeline", "@no.json"), 4, "input file no.json does not exist")
    done = inside("approve", "x", "desk.py:pipeline", "-", "--resume", "-h")
    assert "must satisfy the class" in " ".join(done.out.split())
    done = inside("approve", "x", "desk.py:pipeline", "-", "--resume", "-q", stdin=b'{"approved": true}')
    assert (done.code, json.loads(done.out)) == (0, {"n": 103})
    assert done.err == ""


def test_any_json_is_an_answer_where_no_schema_was_asked_for(desk, inside):
    """A node that asks for no schema is given the JSON as it is."""
    for number, answer in enumerate(('"yes"', "[1, null]", '{"a": {}}', "0", "false")):
        assert inside("run", "desk.py:free", '{"n": 1}', "--run-id", f"r{number}", "-q").code == 7
        done = inside("approve", f"r{number}", "desk.py:free", answer, "--resume")
        assert (done.code, json.loads(done.out)) == (0, {"said": json.loads(answer)}), done


def test_several_nodes_that_wait(desk, inside, fails):
    """Several open questions are listed with the commands that answer them, and --question selects one."""
    done = inside("run", "desk.py:both", '{"n": 1}', "--run-id", "x", "-q")
    assert done.err.count("  answer: stroma approve x desk.py:both ") == 2
    yes = '{"approved": true}'
    words = [
        "run x has 2 open questions; pass --question",
        "node 'x' (at 0.0): is this right?",
        "node 'y' (at 0.1)",
        "--question 0.0:1",
    ]
    fails(inside("approve", "x", "desk.py:both", yes), 2, *words)
    stale = inside("approve", "x", "desk.py:both", yes, "--question", "0.0:0")
    fails(stale, 4, "question '0.0:0' of run x is not open", "--question 0.1:1")
    done = inside("approve", "x", "desk.py:both", yes, "--question", "0.0:1")
    assert (done.code, "still waiting: node 'y' (at 0.1)" in done.err) == (0, True)
    assert inside("resume", "x", "desk.py:both", "-q").code == 7
    assert inside("cancel", "x").code == 0
    done = inside("approve", "x", "desk.py:both", yes, "--question", "0.1:1")
    no_worker = "is answered; the run is CANCELLED; resume it: stroma resume x desk.py:both"
    assert (done.code, no_worker in done.err) == (0, True)
    assert inside("resume", "x", "desk.py:both", "-q").code == 0


def test_what_waits_for_nothing(desk, inside, fails):
    """An unknown run, one that has its answer and one that is done are 4."""
    fails(inside("approve", "x", "desk.py:pipeline", "{}"), 4, "no run whose id begins with 'x'")
    inside("run", "desk.py:pipeline", '{"n": 1}', "--run-id", "x")
    yes = '{"approved": true}'
    inside("approve", "x", "desk.py:pipeline", yes)
    done = inside("approve", "x", "desk.py:pipeline", '{"by": "nobody", "approved": true}')
    assert (done.code, "node 'ask' (at 1) of run x already has this answer" in done.err) == (0, True)
    stored = 'already has the answer {"approved": true, "by": "nobody"}; an accepted answer cannot be changed'
    for answer in ('{"approved": false}', '{"approved": "perhaps"}'):
        done = inside("approve", "x", "desk.py:pipeline", answer)
        fails(done, 2, "node 'ask' (at 1)", stored, "stroma show x")
    inside("resume", "x", "desk.py:pipeline")
    done = inside("approve", "x", "desk.py:pipeline", yes)
    assert (done.code, "already has this answer; the run is RESUMED" in done.err) == (0, True)
    inside("run", "sums.py:pipeline", '{"start": 1}', "--run-id", "y")
    is_done = "is not waiting for an answer: it is COMPLETED"
    fails(inside("approve", "y", "desk.py:pipeline", yes), 2, is_done, "stroma show y")


def test_the_pipeline_of_an_answer(desk, inside, fails):
    """An answer for an object that is not a pipeline, or for another flow, is refused before it is stored."""
    desk.file(
        "flows.py",
        """
        from desk import *

        @stroma_flow("ours", input=Sum, output=Sum)
        async def ours(flow, state):
            await flow.wait_for(Approval, reason="Send it?")
            return state

        @stroma_flow("other", input=Sum, output=Sum)
        async def other(flow, state):
            return state
        """,
    )
    inside("run", "flows.py:ours", '{"n": 1}', "--run-id", "x")
    planned = inside("resume", "x", "flows.py:ours", "--dry-run").err
    assert "a flow were not compared; compare them with: stroma replay x flows.py:ours" in planned
    yes = '{"approved": true}'
    for name, what in {
        "Approval": "'Approval' in flows.py is not a pipeline: it is of type",
        "first": "'first' in flows.py is not a pipeline: it is of type function",
        "other": "run 'x' was started by the pipeline 'ours'; this one is 'other'",
    }.items():
        fails(inside("approve", "x", f"flows.py:{name}", yes), 2, what)
        fails(inside("approve", "x", f"flows.py:{name}", yes, "--resume"), 2, what)
    assert not json.loads(inside("show", "x", "--json").out)["suspended"][0]["answered"]
    assert inside("approve", "x", "flows.py:ours", yes).code == 0


def test_the_program_of_an_answer(desk, inside, monkeypatch):
    """A run of plain code has no pipeline: its question takes an answer for any object of its program."""
    monkeypatch.syspath_prepend(desk.home)
    text = """
        from desk import *

        async def main(text):
            config, manager = RunConfig(run_id="own"), CheckpointManager(SQLiteStore("own.db"))
            async with ReliabilityContext.for_run(config, ContractRegistry(), manager) as ctx:
                return await execute_step("ask", ask, Sum(n=1), ctx)
    """
    desk.file("app.py", text)
    result = asyncio.run(runpy.run_path(str(desk.home / "app.py"))["main"]("go"))
    assert result.status == "SUSPENDED"
    done = inside("approve", "own", "app.py:main", '{"approved": true}', "--db", "own.db")
    assert (done.code, "under run_id='own' and resume=True" in done.err) == (0, True), done


def test_the_schema_is_found_in_the_target(desk, inside, fails, monkeypatch):
    """A run begun by `python file.py` recorded its classes under __main__, found by name in the file."""
    monkeypatch.syspath_prepend(desk.home)
    runpy.run_path(str(desk.home / "desk.py"), run_name="__main__")
    with sqlite3.connect(desk.home / "own.db") as db:
        assert ("__main__:Approval",) in db.execute("SELECT schema_ref FROM steps").fetchall()
    words = ("approve", "own", "desk.py:pipeline")
    fails(inside(*words, "{}", "--db", "own.db"), 2, "approved: Field required")
    done = inside(*words, '{"approved": true}', "--db", "own.db", "--resume")
    assert (done.code, json.loads(done.out)) == (0, {"n": 103}), done
    inside("run", "desk.py:local", '{"n": 1}', "--run-id", "local")
    missing = inside("approve", "local", "desk.py:local", "{}")
    fails(missing, 4, "hidden.<locals>.Local", "neither defines nor")


def test_nothing_is_kept_in_memory(desk, inside):
    """A run that waits in a store that keeps nothing says so, and names no command that could not work."""
    done = inside("run", "desk.py:pipeline", '{"n": 1}', "--db", "memory://")
    assert done.code == 7
    assert "is not durable" in done.err
    assert "stroma approve" not in done.err


GUARDED = """
    from stroma import *
    from stroma.adapters import Control, Guard

    class Agent:
        "What a framework has in place of a pipeline."

    agent = Agent()

    def body(text):
        raise LookupError("may I?")

    def call(how):
        store = SQLiteStore("own.db")
        guard = Guard(StromaRunner.quick(store=store, run_id=how, resume=True))
        with store, guard.run("q") as run:
            if how == "asks":
                try:
                    guard.wrap("agent", body, control=lambda error: Control("suspended", str(error)))("q")
                except LookupError:
                    pass
            else:
                run.ctx.account.note_suspended("before 'count'")
"""


def test_an_answer_can_be_read(desk, inside, monkeypatch):
    """show, its JSON, both exports and `runs` have the answer of a person, and a redact removes it."""
    monkeypatch.setenv("STROMA_DB", "runs.db")
    text = """
        from desk import *
        def redact(state):
            return {**state, "by": "***"} if "by" in state else state
        hides = Pipeline("desk", [first, ask, last], config=RunConfig(redact=redact))
    """
    desk.file("hides.py", text)
    inside("run", "desk.py:pipeline", '{"n": 1}', "--run-id", "x")
    assert "waiting for an answer: is this right?" in inside("runs").out
    answer = {"approved": True, "by": "Ada Lovelace"}
    assert inside("approve", "x", "desk.py:pipeline", json.dumps(answer)).code == 0
    assert "due for a worker; no longer waiting for an answer: is this right?" in inside("runs").out
    assert inside("resume", "x", "desk.py:pipeline", "-q").code == 0
    assert f'answered  ask asked "is this right?": {json.dumps(answer)}' in inside("show", "x").out
    (question,) = json.loads(inside("show", "x", "--json").out)["suspended"]
    assert (question["answer"], question["answered_at"][:2]) == (answer, "20")
    assert json.loads(inside("export", "x").out)["questions"][0]["answer"] == answer
    for words in (["export", "x", "--format", "html"], ["export", "x"], ["show", "x"]):
        assert "Ada Lovelace" in inside(*words).out
        assert "Ada Lovelace" not in inside(*words, "--redact", "hides.py:hides").out
    for form in ("html", "json"):
        assert "Ada Lovelace" not in inside("export", "x", "--format", form, "--no-states").out


def test_a_guarded_run_is_answered_in_its_framework(stroma, inside, fails):
    """A guard stores no question: approve refuses, and names the framework's own call."""
    stroma.file("app.py", GUARDED)
    for how in ("asks", "silent"):
        runpy.run_path(str(stroma.home / "app.py"))["call"](how)
        fails(
            inside("approve", how, "app.py:agent", "true", "--db", "own.db"),
            2,
            f"run {how} is suspended without a question",
            f"continue it with the framework's own call, under run_id='{how}' and resume=True",
        )


def test_a_run_that_sleeps_after_its_answer(stroma, inside, fails):
    """`stroma show` says what a run waits for and until when, what was answered, and what was closed."""
    (stroma.home / "later.py").write_text(
        "from stroma import Flow, stroma_flow\nfrom pydantic import BaseModel\n\n\nclass Yes(BaseModel):\n"
        "    ok: bool = True\n\n\n@stroma_flow('later', input=Yes, output=Yes)\n"
        "async def later(flow: Flow, state: Yes) -> Yes:\n"
        "    try:\n        await flow.wait_for(Yes, reason='Now?', timeout=0.05)\n"
        "    except TimeoutError:\n        pass\n"
        "    answer = await flow.wait_for(Yes, reason='Send it?', timeout=7200)\n"
        "    await flow.receive(Yes, timeout=7200)\n    await flow.sleep(hours=3)\n"
        "    return answer\n"
    )
    assert inside("run", "later.py:later", "{}", "--run-id", "s").code == 7
    for what, command in (
        ("node 'later'", ("approve", "s", "later.py:later", '{"ok": true}')),
        ("waiting for a message", ("send", "s", '{"ok": true}')),
    ):
        shown = inside("show", "s").out
        assert f"waits     {what}" in shown
        assert re.search(r"^due       20.* at the latest, even if nothing arrives$", shown, re.MULTILINE)
        assert inside(*command).code == 0
        assert "due       for a worker; no longer " in inside("show", "s").out
        assert inside("resume", "s", "later.py:later").code == 7
    shown = inside("show", "s").out
    assert "due     " not in shown
    closed = 'closed    later asked "Now?": it is not answered'
    assert f'{closed}\nanswered  later asked "Send it?": {{"ok": true}}, 2' in shown
    asked = json.loads(inside("show", "s", "--json").out)["suspended"]
    rows = [(one["answered"], one["closed"], one["answer"]) for one in asked]
    assert rows == [(False, True, None), (True, False, {"ok": True})]
    late = inside("approve", "s", "later.py:later", '{"ok": true}', "--question", asked[0]["question"])
    fails(late, 2, "is closed: the run no longer waits for its answer")
    assert "waits     sleeping until " in shown


DOTTED = """
    from pydantic import BaseModel
    from stroma import *

    class Yes(BaseModel):
        ok: bool

    @stroma_node("clerk.tools.pay", effect=True)
    async def pay(state: Yes) -> Yes:
        raise TimeoutError("no answer")

    @stroma_flow("clerk")
    async def clerk(flow: Flow, state: Yes) -> Yes:
        await flow.wait_for(Yes, reason="now?", key="ask.first")
        return await flow.step(pay, state)
"""


def test_places_are_shown_as_they_are_written(stroma, inside):
    """Ids with dots and other signs are read as they are in places; --question takes both forms."""
    stroma.file("dotted.py", DOTTED)
    run = inside("run", "dotted.py:clerk", '{"ok": true}', "--run-id", "x")
    assert "node 'clerk' (at 0.!#ask.first): now?" in run.err
    done = inside("approve", "x", "dotted.py:clerk", '{"ok": true}', "--question", "0.!#ask.first:1")
    assert "node 'clerk' (at 0.!#ask.first) of run x is answered" in done.err
    inside("resume", "x", "dotted.py:clerk")
    texts = [
        inside(*words)
        for words in (["show", "x"], ["show", "x", "--tree"], ["tail", "x"], ["diff", "x", "x"])
    ]
    for done in texts:
        text = re.sub("--question '.*?'", "", done.out + done.err)
        assert "clerk.tools.pay#0" in text
        assert "%" not in text
    data = json.loads(inside("show", "x", "--json").out)
    assert data["attempts"][-1]["branch"] == "clerk%2Etools%2Epay#0"
    command = ("approve", "x", "dotted.py:clerk", "--done", '{"ok": true}')
    assert inside(*command, "--question", "0.clerk.tools.pay#0:2").code == 0
    assert inside(*command, "--question", "0.clerk%2Etools%2Epay#0:2").code == 0


def test_a_question_that_somebody_else_answers_meanwhile(desk, inside, fails, monkeypatch):
    """Of two commands at once with different answers, the later one names the answer that was accepted."""
    inside("run", "desk.py:pipeline", '{"n": 1}', "--run-id", "x")
    signal = StromaRunner.signal

    async def signal_second(runner, run_id, answer, **options):
        await signal(runner, run_id, {"approved": True}, **options)
        await signal(runner, run_id, answer, **options)

    monkeypatch.setattr(StromaRunner, "signal", signal_second)
    no = inside("approve", "x", "desk.py:pipeline", '{"approved": false}')
    fails(
        no,
        2,
        """already has the answer {"approved": true, "by": "nobody"}; an accepted answer cannot be changed""",
    )


CHAT = """
from pydantic import BaseModel

from stroma import Flow, stroma_flow


class Say(BaseModel):
    text: str = ""


@stroma_flow("chat", input=Say, output=Say)
async def chat(flow: Flow, first: Say) -> Say:
    said = await flow.receive(Say)
    more = await flow.receive(Say, topic="more")
    return Say(text=f"{first.text} {said.text} {more.text}")
"""


@pytest.fixture
def chat(stroma: Any, inside: Any) -> Any:
    (stroma.home / "chat.py").write_text(CHAT)
    done = inside("run", "chat.py:chat", '{"text": "a"}', "--run-id", "c")
    assert done.code == 7
    assert "run c is waiting for a message\n  send a message: stroma send c MESSAGE" in done.err
    return stroma


def test_a_message_continues_a_run(chat: Any, inside: Any) -> None:
    """Messages are stored, once for an id and continue the run; its pages say what it awaits."""
    shown = inside("show", "c")
    assert "waits     waiting for a message\n" in shown.out
    assert "send a message: stroma send c MESSAGE" in shown.err
    done = inside("send", "c", '{"text": "b"}')
    assert (done.code, done.out) == (0, "")
    assert "the message to run c is stored" in done.err
    assert "or continue it here: stroma resume c chat.py:chat" in done.err
    assert inside("resume", "c", "chat.py:chat").code == 7
    shown = inside("show", "c")
    assert "waiting for a message on 'more'" in shown.out
    assert "send a message: stroma send c MESSAGE --topic more" in shown.err
    tree = inside("show", "c", "--tree").out
    assert "received" in tree
    assert "receiving" in tree
    for _ in range(2):
        data = json.loads(
            inside("send", "last", '{"text": "c"}', "--topic", "more", "--id", "m", "--json").out
        )
        assert data == {"schema": "stroma.send/1", "run_id": "c", "topic": "more", "status": "SUSPENDED"}
    done = inside("resume", "c", "chat.py:chat")
    assert (done.code, json.loads(done.out)) == (0, {"text": "a b c"})


def test_an_ended_run_is_not_said_to_take_a_message(chat: Any, inside: Any, fails: Any) -> None:
    """`show` prints the command that sends a message only while the run takes it."""
    assert inside("cancel", "c").code == 0
    fails(inside("send", "c", "{}"), 2, "takes no message")
    shown = inside("show", "c").err
    assert "stroma send" not in shown
    assert "resume with: stroma resume c chat.py:chat" in shown


def test_a_message_that_nothing_waits_for(chat: Any, inside: Any) -> None:
    """A message that no flow.receive waits for is stored; the hints name what the run waits for instead."""
    done = inside("send", "c", '{"text": "c"}', "--topic", "more")
    assert done.code == 0
    assert (
        "no flow.receive of the run waits for a message on 'more': it is waiting for a message\n" in done.err
    )
    assert done.err.endswith("send a message: stroma send c MESSAGE\n")
    (chat.home / "ask.py").write_text(
        CHAT.replace("flow.receive(Say)", "flow.wait_for(Say, reason='well?')").partition("    more")[0]
        + "    return said\n"
    )
    assert inside("run", "ask.py:chat", "{}", "--run-id", "q").code == 7
    done = inside("send", "q", '{"text": "c"}')
    assert "waits for a message: it is waiting for an answer: well?\n" in done.err
    assert """answer: stroma approve q ask.py:chat '{"text": ""}' --question """ in done.err


def test_a_message_that_cannot_be_sent(chat: Any, inside: Any, fails: Any) -> None:
    """What is no JSON, an unknown run, an id of another message and a run that has ended are errors."""
    fails(inside("send", "c", "{"), 2, "MESSAGE is not JSON")
    fails(inside("send", "x", "1"), 4, "no run whose id begins with 'x'")
    fails(inside("send", "c", "NaN"), 2, "MESSAGE cannot be sent")
    fails(inside("send", "c", "1", "--id", ""), 2, "message id must not be empty")
    assert inside("send", "c", "1", "--id", "m").code == 0
    fails(inside("send", "c", "2", "--id", "m"), 2, "was sent another message with the id 'm'")
    assert inside("cancel", "c").code == 0
    fails(inside("send", "c", "3"), 2, "run 'c' has ended (CANCELLED), and takes no message")
