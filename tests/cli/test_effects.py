"""Effects whose outcome is unknown, as the command line shows and decides them."""

import asyncio
import html
import json
import re
import shlex
import time

import pytest
from pydantic import BaseModel
from tests.cli.test_signals import wait_for
from tests.kit import passing

from stroma import SQLiteStore, StromaRunner, Unknown
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.identity import idempotency_key
from stroma.cli.formatting import localize
from stroma.testing import crash_at

SHOP = """
    import os
    from pydantic import BaseModel
    from sums import Sum, node
    from stroma import *

    class Receipt(BaseModel):
        number: int

    contract = NodeContract(node_id="charge", input_schema=Sum, output_schema=Receipt, effect=True)
    @stroma_node("charge", contract)
    async def charge(state):
        with open("charges", "a") as file:
            file.write("charge ")
        if os.path.exists("well"):
            return {"number": 1}
        raise TimeoutError("no answer")

    async def asks(state):
        return {"n": current_node().wait_for(Sum, reason="how many?").n}

    pipeline = Pipeline("shop", [charge])
    question = Pipeline("question", [node("ask", asks)])
"""

#: The idempotency key of the first node of run x.
KEY = idempotency_key("x", 1, 0, "")


@pytest.fixture
def shop(stroma):
    stroma.file("shop.py", SHOP)
    return stroma


def test_a_recorded_effect_is_not_started_again(shop, inside, fails):
    """A run id that has called an effect is refused, also when the run is complete; nothing is called."""
    shop.file("well", "")
    words = ("run", "shop.py:pipeline", '{"n": 1}', "--run-id", "x", "-q")
    assert inside(*words).code == 0
    done = inside(*words)
    fails(done, 2, "has a recorded effect (COMPLETED)", "'charge' again", "--restart")
    assert "resume=True" not in done.err
    assert (shop.home / "charges").read_text() == "charge "
    assert inside(*words, "--resume").code == 0
    assert (shop.home / "charges").read_text() == "charge "


def test_an_effect_that_happened(shop, inside, fails):
    """approve --done stores the output of the call, if it fits; the run resumes without a call."""
    done = inside("run", "shop.py:pipeline", '{"n": 1}', "--run-id", "x")
    assert done.code == 7
    line = f"effect: nobody knows if call 1 happened (TimeoutError: no answer); its idempotency key is {KEY}"
    assert f"node 'charge' (at 0): {line}  (asks for Receipt)\n" in done.err
    reconcile = "  call its reconcile again, if it has one: stroma resume x shop.py:pipeline\n  answer: "
    assert done.err.count(reconcile) == 1
    first, second = re.findall(r"  answer: stroma (approve .*)\n", done.err)
    assert second == "approve x shop.py:pipeline --question 0:1 --not-done"
    fails(
        inside("approve", "x", "shop.py:pipeline", "--question", "0:1", "--done", '{"number": "x"}'),
        2,
        "--done does not fit",
        "number",
    )
    fails(
        inside("approve", "x", "shop.py:pipeline", '{"number": 1}', "--question", "0:1"),
        2,
        "is an effect",
        "--not-done",
    )
    fails(inside("approve", "x", "shop.py:pipeline", "--not-done"), 2, "pass --question", second)
    fails(inside("approve", "x", "shop.py:pipeline"), 2, "no answer", "--done JSON", "if call 1 happened")
    fails(inside("approve", "x", "shop.py:pipeline", "--done", "{}", "--not-done"), 2, "several answers")
    assert line in inside("show", "x").out
    waits = json.loads(inside("show", "x", "--json").out)["suspended"]
    assert waits[0]["reason"] == "effect"
    assert waits[0]["effect"] == {"key": KEY, "number": 1, "cause": "TimeoutError: no answer"}
    words = shlex.split(first)
    assert words[:4] == ["approve", "x", "shop.py:pipeline", "--question"]
    done = inside(*words[:-1], '{"number": 5}', "--resume")
    assert (done.code, json.loads(done.out)) == (0, {"number": 5})
    assert (shop.home / "charges").read_text() == "charge "


def test_an_answer_in_the_place_of_the_pipeline(shop, inside, fails):
    """approve without FILE:NAME says that the answer is in its place, and has the right command."""
    assert inside("run", "shop.py:question", '{"n": 1}', "--run-id", "x", "-q").code == 7
    done = inside("approve", "x", '{"n": 5}')
    fails(done, 2, """FILE_OR_MODULE:NAME is missing: {"n": 5} is in its place""")
    hint = done.err.split("before the answer: ")[1]
    assert shlex.split(hint) == ["stroma", "approve", "x", "shop.py:question", '{"n": 5}']
    assert inside(*shlex.split(hint)[1:]).code == 0


def test_a_dry_run_names_what_must_be_settled(shop, inside, ran):
    """--dry-run says first that an effect's outcome must be stated; it refuses another node in its place."""
    ran("x", target="shop.py:pipeline", given='{"n": 1}', code=7)
    planned = inside("resume", "x", "shop.py:pipeline", "--dry-run").out
    assert planned.startswith(
        "settles effect 'charge' first: nobody knows if call 1 happened; its reconcile or a"
    )
    data = json.loads(inside("resume", "x", "shop.py:pipeline", "--dry-run", "--json").out)
    assert data["settles"] == [KEY]
    shop.file("shop.py", SHOP.replace("[charge]", "[node('first', asks), charge]"))
    changed = inside("resume", "x", "shop.py:pipeline", "--dry-run")
    assert (changed.code, "settles" in changed.out) == (2, False)
    assert f"nobody knows if call 1 of effect 'charge' with key {KEY} happened" in " ".join(
        changed.out.split()
    )
    shop.file("shop.py", SHOP)
    done = inside("approve", "x", "shop.py:pipeline", "--done", '{"number": 1}', "--question", "0:1")
    assert done.code == 0
    assert inside("resume", "x", "shop.py:pipeline", "-q").code == 0
    assert "settles" not in inside("resume", "x", "shop.py:pipeline", "--dry-run").out


def test_an_effect_that_did_not_happen(shop, inside, ran, fails):
    """approve --not-done has the effect called again."""
    ran("x", target="shop.py:pipeline", given='{"n": 1}', code=7)
    shop.file("well", "")
    for words in (["is answered;"], ["already has this answer;"]):
        done = inside("approve", "x", "shop.py:pipeline", "--not-done", "--question", "0:1")
        assert (done.code, all(word in done.err for word in words)) == (0, True), done
    other = ("approve", "x", "shop.py:pipeline", "--done", '{"number": 1}', "--question", "0:1")
    fails(inside(*other), 2, "already has the answer --not-done")
    done = inside("resume", "x", "shop.py:pipeline", "-q")
    assert (done.code, json.loads(done.out)) == (0, {"number": 1})
    assert (shop.home / "charges").read_text() == "charge charge "


def test_a_question_is_no_effect(shop, inside, fails):
    """--done and --not-done are refused for a node that asks a question."""
    inside("run", "shop.py:question", '{"n": 1}', "--run-id", "q")
    for options in (["--not-done"], ["--done", '{"n": 1}']):
        fails(inside("approve", "q", "shop.py:question", *options), 2, "is not an effect", "stroma approve q")


IN_FLIGHT = (
    SHOP
    + """
    import asyncio

    async def look(state, key):
        return {"number": 7} if os.path.exists("well") else NotDone()

    slow = NodeContract(
        node_id="pay", input_schema=Sum, output_schema=Receipt, effect=True, reconcile=look
    )
    @stroma_node("pay", slow)
    async def pay(state):
        print("paying", flush=True)
        await asyncio.Event().wait()

    payment = Pipeline("payment", [pay])

    runner = StromaRunner(ContractRegistry(), CheckpointManager(InMemoryStore()))
    @runner.flow("calls", input=Sum, output=Sum)
    async def calls(flow, state):
        for n in range(2):
            state = await flow.step(node("add", add), state)
        await flow.step(pay, state)
        return state

    async def add(state):
        return {"n": state.n + 1}
"""
)


@pytest.fixture
def paying(shop):
    """Starts a pipeline whose payment never ends; returns its process and the line of show about it."""
    shop.file("pay.py", IN_FLIGHT)
    processes = []

    def start(target):
        words = ("run", target, '{"n": 1}', "--run-id", "p", "-q", "--db", "p.db")
        processes.append(process := shop.popen(*words))
        wait_for(process, "paying")
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def facts(inside, run_id="p", db="p.db"):
    """The lines of show above the attempts, by their label."""
    lines = inside("show", run_id, "--db", db).out.partition("\n\n")[0].splitlines()
    return {line[:10].strip(): line[10:] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pay.py:payment", "pay.py:calls"])
def test_a_call_in_flight_is_shown(shop, inside, paying, target):
    """show says since when an effect is in flight, and until when its owner has the run."""
    process = paying(target)
    shown = facts(inside)
    at = r"0\.\S+" if "calls" in target else "0"
    call = rf"pay \(at {at}\): call 1 since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d, idempotency key \w+"
    assert re.fullmatch(call, shown["in flight"])
    place = rf"process {process.pid} on \S+"
    assert re.fullmatch(rf"{place}, lease until [\d :-]{{19}}; last record [\d :-]{{19}}", shown["owner"])
    assert "deaths" not in shown
    if "calls" in target:
        assert shown["nodes"] == "2 calls done, 2 attempts"
        assert re.search(r"\n0 +calls *\n", inside("show", "p", "--db", "p.db").out)
        assert "2 calls" in inside("runs", "--db", "p.db").out
    process.kill()
    process.wait()
    shown = facts(inside)
    gone = "its process is gone, and nobody knows if it happened until the run is resumed"
    assert re.fullmatch(rf"{call}; {gone} and reconcile or a person states it", shown["unknown"])
    assert re.match(rf"{place} is gone; last record", shown["owner"])
    assert shown["deaths"] == "its process died 1 time"
    done = inside("export", "p", "--format", "html", "--db", "p.db")
    assert f"<b>deaths</b> {shown['deaths']}<" in done.out
    assert json.loads(inside("export", "p", "--db", "p.db").out)["deaths"] == 1
    shop.file("well", "")
    assert inside("resume", "p", target, "-q", "--db", "p.db").code == 0
    shown = facts(inside)
    assert re.fullmatch(rf"pay \(at {at}\): call 1 happened, as reconcile stated", shown["stated"])
    assert "unknown" not in shown
    assert shown["deaths"] == "its process died 1 time"
    data = json.loads(inside("show", "p", "--json", "--db", "p.db").out)
    assert data["deaths"] == 1
    assert [one["state"] for one in data["effects"]] == ["happened"]
    assert data["effects"][0]["statement"] == {"number": 1, "happened": True, "source": "reconcile"}


def test_what_a_person_stated_is_shown(any_url, shop, inside, ran):
    """show says that a person stated of a call that it did not happen, from every store."""
    db = ("--db", any_url)
    ran("x", *db, target="shop.py:pipeline", given='{"n": 1}', code=7)
    shop.file("well", "")
    assert inside("approve", "x", "shop.py:pipeline", "--not-done", "--question", "0:1", *db).code == 0
    assert inside("resume", "x", "shop.py:pipeline", "-q", *db).code == 0
    shown = inside("show", "x", *db).out
    assert [
        line for line in shown.splitlines() if "a person stated" in line and "call 1 did not happen" in line
    ]
    assert "\nstated " not in shown  # It is listed once.
    (effect,) = json.loads(inside("show", "x", "--json", *db).out)["effects"]
    assert (effect["call"], effect["state"], effect["idempotency_key"]) == (2, "happened", KEY)


class Bill(BaseModel):
    cents: int = 100


@pytest.mark.parametrize(
    ("state", "labels"),
    [
        ("gone", {"owner", "unknown"}),
        ("blocked", {"owner", "unknown", "blocked"}),
        ("asked", {"waits"}),
        ("stated", {"stated"}),
    ],
)
def test_every_view_has_the_same_facts(state, labels, tmp_path, inside):
    """Every view names a dead owner, the call of an effect with its key, and why a run is blocked."""

    async def pay(store):
        runner = StromaRunner.quick(store=store)
        reconcile = {"asked": lambda bill, key: Unknown(), "stated": lambda bill, key: bill}

        @runner.node("charge", input=Bill, output=Bill, effect=True, reconcile=reconcile.get(state))
        async def charge(bill: Bill) -> Bill:
            return bill

        log = runner.node("log", input=Bill, output=Bill)(passing())
        with crash_at("after_node", "charge"):
            await runner.run([log, charge], Bill(), run_id="x")
        if state in reconcile:
            return await runner.run([log, charge], Bill(), run_id="x", resume=True)
        if state == "blocked":
            await store.block("x", "it makes step 'audit'", "2+abc", None, time.time_ns() // 1_000_000)
        return None

    db, key = str(tmp_path / "x.db"), idempotency_key("x", 1, 1, "")
    with SQLiteStore(db) as store:
        result = asyncio.run(pay(store))
        facts = History(store).facts(store.get_run("x"))
    assert {label for label, _ in facts} == labels
    shown, tailed = inside("show", "x", "--db", db).out, inside("tail", "x", "--db", db).out
    page = html.unescape(inside("export", "x", "--format", "html", "--db", db).out)
    for label, text in facts:
        assert f"{label:<9} {localize(text)}\n" in shown
        assert f"<b>{label}</b> {text}<" in page
        assert (localize(text) in tailed) == (label in ("unknown", "waits", "blocked"))
    assert ("continued after " in page) == (state in ("asked", "stated"))
    assert page.count(f"idempotency key <code>{key}</code>") == (page.count('<details class="attempt"') - 1)
    assert ("waits" in labels) == (result is not None and f"its idempotency key is {key}" in result.to_html())
    assert ("blocked for" in inside("runs", "--db", db).out) == ("blocked" in labels)
    data = json.loads(inside("export", "x", "--db", db).out)
    assert data["effects"][0]["idempotency_key"] == key
    assert data["owner"]["is_gone"] == ("owner" in labels)
