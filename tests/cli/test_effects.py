"""Effects whose outcome is unknown, as the command line shows and decides them."""

import json
import re
import shlex

import pytest

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


@pytest.fixture
def shop(stroma):
    stroma.file("shop.py", SHOP)
    return stroma


def test_a_recorded_effect_is_not_started_again(shop, inside, fails):
    """A run id that has called an effect is refused, also when the run is complete; nothing is called."""
    shop.file("well", "")
    words = ("run", "shop.py:pipeline", '{"n": 1}', "--run-id", "x", "-q")
    assert inside(*words).code == 0
    fails(inside(*words), 2, "has a recorded effect (COMPLETED)", "'charge' again", "--restart")
    assert (shop.home / "charges").read_text() == "charge "
    assert inside(*words, "--resume").code == 0
    assert (shop.home / "charges").read_text() == "charge "


def test_an_effect_that_happened(shop, inside, fails):
    """approve --done stores the output of the call, if it fits; the run resumes without a call."""
    done = inside("run", "shop.py:pipeline", '{"n": 1}', "--run-id", "x")
    assert done.code == 7
    line = "effect: nobody knows if call 1 happened (TimeoutError: no answer); its idempotency key is x:1:0:"
    assert f"node 'charge' (at 0): {line}  (asks for Receipt)\n" in done.err
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
    fails(inside("approve", "x", "shop.py:pipeline"), 2, "no answer", "--done JSON")
    fails(inside("approve", "x", "shop.py:pipeline", "--done", "{}", "--not-done"), 2, "several answers")
    assert line in inside("show", "x").out
    waits = json.loads(inside("show", "x", "--json").out)["suspended"]
    assert waits[0]["reason"] == "effect"
    assert waits[0]["effect"] == {"key": "x:1:0:", "number": 1, "cause": "TimeoutError: no answer"}
    words = shlex.split(first)
    assert words[:4] == ["approve", "x", "shop.py:pipeline", "--question"]
    done = inside(*words[:-1], '{"number": 5}', "--resume")
    assert (done.code, json.loads(done.out)) == (0, {"number": 5})
    assert (shop.home / "charges").read_text() == "charge "


def test_an_effect_that_did_not_happen(shop, inside, ran):
    """approve --not-done has the effect called again."""
    ran("x", target="shop.py:pipeline", given='{"n": 1}', code=7)
    shop.file("well", "")
    assert inside("approve", "x", "shop.py:pipeline", "--not-done", "--question", "0:1").code == 0
    done = inside("resume", "x", "shop.py:pipeline", "-q")
    assert (done.code, json.loads(done.out)) == (0, {"number": 1})
    assert (shop.home / "charges").read_text() == "charge charge "


def test_a_question_is_no_effect(shop, inside, fails):
    """--done and --not-done are refused for a node that asks a question."""
    inside("run", "shop.py:question", '{"n": 1}', "--run-id", "q")
    for options in (["--not-done"], ["--done", '{"n": 1}']):
        fails(inside("approve", "q", "shop.py:question", *options), 2, "is not an effect", "stroma approve q")
