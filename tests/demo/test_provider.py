"""The demo's provider as a real server, asked by the real `openai` client."""

import asyncio
import http.client
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from stroma.demo import provider
from stroma.demo.pipeline import Extraction, Label, Risk
from stroma.demo.provider import FAULTS, Provider, digest_of, faults_of
from stroma.demo.provider import answer as answer_of

DOCUMENTS = Path(provider.__file__).parent / "documents"
MODEL = "gpt-4o-mini"


def read(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def shipped() -> dict[str, str]:
    return {path.name: read(path) for path in sorted(DOCUMENTS.iterdir()) if path.is_file()}


def client_of(running: Provider, timeout: float = 10) -> openai.AsyncOpenAI:
    # No proxy from the environment stands between a process and its own machine.
    return openai.AsyncOpenAI(
        base_url=running.base_url,
        api_key="demo",
        max_retries=0,
        timeout=timeout,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )


async def complete(
    client: openai.AsyncOpenAI, text: str, task: str = "extract", *, model: str = MODEL
) -> Any:
    return await client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": f"TASK: {task}\nAnswer with one JSON object."},
            {"role": "user", "content": text},
        ],
        response_format={"type": "json_object"},
    )


@pytest.fixture(scope="module")
def calm() -> Iterator[Provider]:
    with Provider(faults=()) as running:
        yield running


# --- Answers over the shipped documents ---------------------------------------------------------------------

# document | kind | party | reference | date | currency | total | flags
EXPECTED_TABLE = """
contract-nda-oswin-labs.txt | contract | Oswin Labs ApS | NDA-2025-06 | 2025-04-03 |  |  |
contract-services-harrow-kestrel.md | contract | Harrow Kestrel Logistics Ltd | HKL-MSA-2025-014 | 2025-06-01 | GBP | 153000.00 | auto_renewal unlimited_liability
credit-note-copperline-CM-1207.txt | credit_note | Copperline Packaging Inc. | CM-1207 | 2025-05-19 | USD | -312.80 |
invoice-brandt-RE-2025-0417.txt | invoice | Brandt Feinmechanik GmbH | RE-2025-0417 | 2025-03-14 | EUR | 2424.51 |
invoice-brandt-resent.eml | invoice | Brandt Feinmechanik GmbH | RE-2025-0417 | 2025-03-14 | EUR | 2736.29 | bank_details_changed
invoice-copperline-88213.txt | invoice | Copperline Packaging Inc. | 88213 | 2025-04-22 | USD | 7010.00 |
invoice-larkspur-items-only.txt | invoice | Ines Larkspur | 2025/031 | 2025-05-09 | GBP |  | total_missing
invoice-meridian-two-currencies.txt | invoice | Meridian Freight & Customs B.V. | MFC-250588 | 2025-05-13 | USD | 3150.00 | two_currencies
invoice-roussel-F2025-118.txt | invoice | Atelier Roussel SARL | F2025-118 | 2025-05-06 | EUR | 2916.00 |
invoice-tidewater-THL-20931.eml | invoice | Tidewater Hosting Ltd | THL-20931 | 2025-05-01 | GBP | 1055.66 |
purchase-order-castellan-4500017832.csv | purchase_order | Castellan Foods S.p.A. | 4500017832 | 2025-04-28 | EUR | 8960.40 |
reminder-delivery-voss.txt | reminder | Voss Kältetechnik AG | 71-44092 | 2025-05-16 |  |  | late_delivery
reminder-payment-tidewater-THL-19874.eml | reminder | Tidewater Hosting Ltd | THL-19874 | 2025-05-16 | GBP | 1066.00 | overdue
scan-0012.txt | other |  |  |  |  |  | empty
scan-fenwick-0391.txt | other |  |  |  |  |  | ocr_noise
support-anfrage-muehlbauer.eml | support | Jörg Mühlbauer |  | 2025-05-14 |  |  |
support-outage-pemberton.eml | support | Samuel Adeyemi | AF-48217 | 2025-05-20 |  |  | urgent
support-refund-kessler.eml | support | M. Kessler | AF-48190 | 2025-05-19 |  |  | prompt_injection
"""  # noqa: E501


def _expected(row: str) -> tuple[str, tuple[Any, ...]]:
    name, *cells = (cell.strip() for cell in row.split("|"))
    *texts, total, flags = cells
    return name, (*(text or None for text in texts), float(total) if total else None, flags.split())


EXPECTED = dict(map(_expected, EXPECTED_TABLE.strip().splitlines()))


def test_extract() -> None:
    """Each shipped document is read for what it says."""
    fields = ("kind", "party", "reference", "date", "currency", "total", "flags")
    answers = {name: answer_of("extract", text) for name, text in shipped().items()}
    assert {name: tuple(got[f] for f in fields) for name, got in answers.items()} == EXPECTED
    for got in answers.values():
        assert got["summary"]
        assert "\n" not in got["summary"]
        assert list(got) == [*fields[:-1], "summary", "flags"]


def test_injection_is_not_obeyed() -> None:
    """An order hidden in a support mail is reported; the invoice that it claims to be is not there."""
    text = shipped()["support-refund-kessler.eml"]
    assert "Ignore all previous instructions" in text
    assert "9,800.00 EUR" in text
    got = answer_of("extract", text)
    assert got["kind"] == "support"
    assert got["total"] is None
    assert got["reference"] != "KC-9001"
    assert "prompt_injection" in got["flags"]
    assert "9,800" not in json.dumps(got)
    assert "Consulting" not in json.dumps(got)


def test_classify_and_risk() -> None:
    """One call each sorts and weighs all records; the same invoice number twice is a high risk of both."""
    message = json.dumps({"records": [{"name": name} for name in shipped()]})
    labels, risks = (answer_of(task, message) for task in ("classify", "risk"))
    assert [label["name"] for label in labels["labels"]] == list(shipped())
    assert [risk["name"] for risk in risks["risks"]] == list(shipped())
    categories = {label["name"]: (label["category"], label["priority"]) for label in labels["labels"]}
    levels = {risk["name"]: risk["level"] for risk in risks["risks"]}
    assert categories["invoice-copperline-88213.txt"] == ("payable", "normal")
    assert categories["invoice-brandt-resent.eml"] == ("payable", "high")
    assert categories["credit-note-copperline-CM-1207.txt"][0] == "receivable"
    assert categories["contract-nda-oswin-labs.txt"] == ("legal", "normal")
    assert categories["support-refund-kessler.eml"] == ("support", "high")
    assert categories["scan-0012.txt"] == ("ignore", "low")
    assert {name for name, level in levels.items() if level == "high"} == {
        "contract-services-harrow-kestrel.md",
        "invoice-brandt-RE-2025-0417.txt",
        "invoice-brandt-resent.eml",
        "support-refund-kessler.eml",
    }
    assert levels["invoice-copperline-88213.txt"] == "low"
    (twin,) = [risk for risk in risks["risks"] if risk["name"] == "invoice-brandt-RE-2025-0417.txt"]
    assert "invoice-brandt-resent.eml" in " ".join(twin["reasons"])


# --- Documents nobody has seen ------------------------------------------------------------------------------


def test_unseen_documents() -> None:
    """A document that does not ship with the demo is of no kind, and its answers fit the contracts."""
    got = answer_of("extract", "INVOICE No. PT-77\nTotal  $1,981.00")
    Extraction.model_validate({"name": "mine.txt", **got})
    assert (got["kind"], got["total"]) == ("other", None)
    message = '{"records": [{"name": "mine.txt"}]}'
    (label,), (risk,) = answer_of("classify", message)["labels"], answer_of("risk", message)["risks"]
    assert (Label.model_validate(label).category, Risk.model_validate(risk).level) == ("ignore", "low")


# --- Faults -------------------------------------------------------------------------------------------------


async def provoke(
    fault: str, text: str = "Invoice no. 1", task: str = "extract", hang_seconds: float = 4.0
) -> Any:
    with Provider(faults=[fault], hang_seconds=hang_seconds) as running:
        async with client_of(running, 0.3 if hang_seconds == 4.0 else 10) as client:
            return await complete(client, text, task)


@pytest.mark.parametrize(
    ("fault", "error", "status", "code"),
    [
        ("429", openai.RateLimitError, 429, "rate_limit_exceeded"),
        ("500", openai.InternalServerError, 500, None),
        ("503", openai.InternalServerError, 503, None),
    ],
)
def test_error_statuses(
    fault: str, error: type[openai.APIStatusError], status: int, code: str | None
) -> None:
    """An error has the status, the exception class and the body that OpenAI's would have."""
    with pytest.raises(error) as caught:
        asyncio.run(provoke(fault))
    assert type(caught.value) is error
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert isinstance(caught.value.body, dict)
    assert sorted(caught.value.body) == ["code", "message", "param", "type"]


def test_hang_and_drop() -> None:
    """A hang runs into the client's timeout; a dropped connection, or the end of a hang, is no timeout."""
    with pytest.raises(openai.APITimeoutError):
        asyncio.run(provoke("hang"))
    for fault, hang_seconds in (("drop", 4.0), ("hang", 0.05)):
        with pytest.raises(openai.APIConnectionError) as caught:
            asyncio.run(provoke(fault, hang_seconds=hang_seconds))
        assert not isinstance(caught.value, openai.APITimeoutError)


def test_rate_limit_says_when_to_come_back() -> None:
    """Both forms of Retry-After are in use: seconds and `retry-after-ms`."""

    async def headers(text: str) -> tuple[str | None, str | None]:
        with pytest.raises(openai.RateLimitError) as caught:
            await provoke("429", text)
        headers = caught.value.response.headers
        return headers.get("retry-after"), headers.get("retry-after-ms")

    async def ask() -> set[tuple[str | None, str | None]]:
        return set(await asyncio.gather(*(headers(f"document {n}") for n in range(12))))

    assert asyncio.run(ask()) == {("1", None), (None, "300")}


@pytest.mark.parametrize("task", ["extract", "classify", "risk"])
def test_wrong_answers(task: str) -> None:
    """Truncated JSON and a wrong type arrive as a success that is billed."""
    text = "Invoice no. 1" if task == "extract" else '{"records": [{"name": "a"}]}'
    malformed, wrong = (asyncio.run(provoke(fault, text, task)) for fault in ("malformed", "wrong_type"))
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(malformed.choices[0].message.content)
    assert malformed.usage.completion_tokens > 0
    got = json.loads(wrong.choices[0].message.content)
    values: dict[str, Any] = {
        "extract": got.get("total"),
        "classify": got.get("labels", [{}])[0].get("priority"),
        "risk": got.get("risks", [{}])[0].get("level"),
    }
    assert values[task] == ("twelve hundred" if task == "extract" else 3)


def test_completion_shape(calm: Provider) -> None:
    """The model is echoed and usage is about one token per four characters."""
    text = "Invoice no. 1\n" + "line of text\n" * 300

    async def ask() -> Any:
        async with client_of(calm) as client:
            return await complete(client, text, model="some-model")

    got = asyncio.run(ask())
    assert got.model == "some-model"
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.prompt_tokens == pytest.approx(len(text) / 4, rel=0.1)
    assert got.usage.completion_tokens == pytest.approx(len(got.choices[0].message.content) / 4, abs=1)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_bad_requests_say_what_is_wrong(calm: Provider) -> None:
    """A wrong request is a 400, and is not counted as served."""

    async def ask(text: str, task: str) -> str:
        async with client_of(calm) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await complete(client, text, task)
            return caught.value.message

    before = calm.calls()
    assert "not one of the demo's" in asyncio.run(ask("x", "translate"))
    assert "not one of the demo's" in asyncio.run(ask("[]", "risk"))
    assert calm.calls() == before


# --- Which call gets which fault ----------------------------------------------------------------------------


def test_shipped_documents_have_every_fault() -> None:
    """Over the shipped documents each fault occurs, and one document needs three attempts."""
    plans = {name: faults_of(digest_of("extract", text)) for name, text in shipped().items()}
    everything = Counter(fault for plan in plans.values() for fault in plan)
    assert set(everything) == set(FAULTS)
    assert everything["hang"] == everything["malformed"] == everything["wrong_type"] == 1
    assert any(len(plan) == 2 for plan in plans.values())
    assert plans["support-refund-kessler.eml"] == ()


async def outcome_of(client: openai.AsyncOpenAI, text: str) -> str:
    try:
        got = await complete(client, text)
    except openai.APITimeoutError:
        return "hang"
    except openai.APIConnectionError:
        return "drop"
    except openai.APIStatusError as error:
        return str(error.status_code)
    try:
        total = json.loads(got.choices[0].message.content)["total"]
    except ValueError:
        return "malformed"
    return "wrong_type" if isinstance(total, str) else "ok"


def test_later_messages_change_neither_answer_nor_faults() -> None:
    """A request to fix an earlier answer is a further call of the same text."""
    text = "some text"

    async def ask(running: Provider) -> list[str]:
        async with client_of(running) as client:
            first = await outcome_of(client, text)
            got = await client.chat.completions.create(
                model=MODEL,
                messages=[
                    {"role": "system", "content": "TASK: extract"},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "{"},
                    {"role": "user", "content": "Your last answer was not valid JSON."},
                ],
            )
            return [first, json.loads(got.choices[0].message.content or "")["kind"]]

    with Provider(faults=["500"]) as running:
        assert asyncio.run(ask(running)) == ["500", "other"]
        assert running.calls() == {digest_of("extract", text): 2}


def test_close_ends_it_while_a_request_hangs() -> None:
    """After close() the port refuses connections, also while a request hangs; a second call does nothing."""
    running = Provider(faults=["hang"])
    address = urlsplit(running.base_url).netloc
    messages = [{"role": "system", "content": "TASK: extract"}, {"role": "user", "content": ""}]
    body = json.dumps({"model": "m", "messages": messages})
    hanging = http.client.HTTPConnection(address, timeout=10)
    hanging.request("POST", "/v1/chat/completions", body)
    running.close()
    running.close()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(address, timeout=10).connect()
    hanging.close()
