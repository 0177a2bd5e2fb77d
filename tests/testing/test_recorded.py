"""recorded(): answers of a provider, through the real clients, without a network."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import httpx
import httpx2
import openai
import pytest
import requests
from tests.testing.pipelines import Number, make, patient

from stroma import RunStatus
from stroma.testing import FakeClock, recorded
from stroma.testing.recorded import _clean

KEY = "sk-proj-0123456789abcdefghij"
OPENAI = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"42, and your key is {KEY}"}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}  # fmt: skip
ANTHROPIC = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-haiku-4-5", "stop_reason": "end_turn",
    "stop_sequence": None, "content": [{"type": "text", "text": "forty-two"}], "usage": {"input_tokens": 5, "output_tokens": 2},
}  # fmt: skip
CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
STREAM = "".join(
    f"data: {json.dumps({**CHUNK, 'choices': [{'index': 0, 'delta': {'content': text}, 'finish_reason': None}]})}\n\n"
    for text in ("for", "ty-", "two")
)


class Provider(ThreadingHTTPServer):
    """What a provider would say; it counts what it is asked."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self):
        self.received_requests = []
        self.refusals = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                provider = self.server
                provider.received_requests.append((self.path, dict(self.headers), body))
                if provider.refusals:
                    provider.refusals -= 1
                    self.reply(429, {"error": {"message": "too many"}}, ("retry-after", "7"))
                elif b'"stream":true' in body.replace(b" ", b""):
                    self.reply(200, STREAM + "data: [DONE]\n\n", ("content-type", "text/event-stream"))
                else:
                    self.reply(
                        200, ANTHROPIC if "messages" in self.path else OPENAI, ("set-cookie", "session=1")
                    )

            def do_GET(self):
                self.server.received_requests.append((self.path, dict(self.headers), b""))
                self.reply(200, b"\x89PNG\x00\xff", ("content-type", "image/png"))

            def reply(self, status, body, *headers):
                data = (
                    body
                    if isinstance(body, bytes)
                    else (body if isinstance(body, str) else json.dumps(body)).encode()
                )
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                if not any(name == "content-type" for name, _ in headers):
                    self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def provider():
    server = Provider()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask_openai(url, text="?", **options):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        return client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": text}], **options
        )


def ask_anthropic(url):
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0) as client:
        return client.messages.create(
            model="claude-haiku-4-5", max_tokens=9, messages=[{"role": "user", "content": "?"}]
        )


def stream_openai(url):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        messages = [{"role": "user", "content": "?"}]
        with client.chat.completions.create(model="gpt-4o-mini", messages=messages, stream=True) as stream:
            return "".join(chunk.choices[0].delta.content for chunk in stream)


CLIENTS = {
    "openai": lambda url: ask_openai(url).choices[0].message.content.replace(KEY, "***"),
    "openai stream": stream_openai,
    "anthropic": lambda url: ask_anthropic(url).content[0].text,
    "httpx": lambda url: httpx.post(f"{url}/x", json={"a": 1}).json()["usage"],
    "httpx2": lambda url: httpx2.post(f"{url}/x", json={"a": 1}).json()["usage"],
    "requests": lambda url: requests.post(f"{url}/x", json={"a": 1}, timeout=60).json()["usage"],
    "bytes": lambda url: httpx.get(f"{url}/picture").content,
}


@pytest.mark.parametrize("ask", CLIENTS.values(), ids=CLIENTS)
def test_a_client_is_answered_as_the_provider_did(ask, provider, tmp_path):
    """What was recorded once is given again, to the same request, without the provider."""
    path = tmp_path / "answers.json"
    with recorded(path, upstream=provider.url, mode="record") as answers:
        first = ask(answers.url)
    request = len(provider.received_requests)
    assert request == 1
    with recorded(path) as answers:
        assert ask(answers.url) == first
        assert ask(answers.url) == first
        assert len(answers.requests) == 2
    assert len(provider.received_requests) == request


@pytest.mark.core
def test_no_secret_is_in_the_file(provider, tmp_path):
    """Keys in headers, addresses and bodies, and those that the provider repeats, are not written down."""
    path = tmp_path / "answers.json"
    with recorded(path, upstream=provider.url, mode="record") as answers:
        ask_openai(answers.url)
        ask_anthropic(answers.url)
        body = {
            "password": "hunter2hunter2",
            "max_tokens": 5,
            "nested": [{"api_key": "abc"}, "Bearer abcdefghijklmnopqrstuvwx"],
        }
        headers = {"authorization": "Basic dXNlcjpwYXNzd29yZA==", "cookie": "sid=secretsid"}
        httpx.post(f"{answers.url}/x?key=paramsecret&q=1", json=body, headers=headers)
        httpx.post(f"{answers.url}/y", json={"said": "my Basic dXNlcjpwYXNzd29yZA== is out"}, headers=headers)
    text = path.read_text()
    for secret in (
        KEY,
        "hunter2",
        'abc"',
        "abcdefghijkl",
        "dXNlcjpw",
        "secretsid",
        "paramsecret",
        "session=1",
    ):
        assert secret not in text, secret
    assert '"max_tokens": 5' in text
    assert "q=1" in text
    assert "authorization" not in text
    # The provider itself was asked with them.
    assert any(KEY in str(headers) for _, headers, _ in provider.received_requests)
    assert any("paramsecret" in path for path, *_ in provider.received_requests)


@pytest.mark.core
@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("password=hunter22&x=1", "password=***&x=1"),
        (
            "see https://x.org/a?sig=abc123&n=2 and /b?token=t1",
            "see https://x.org/a?sig=***&n=2 and /b?token=***",
        ),
        ('data: {"access_token": "tok en", "n": 1}', 'data: {"access_token": "***", "n": 1}'),
        (r"{\"authorization\":\"Basic dXNlcjpw\"}", r"{\"authorization\":\"***\"}"),
        (
            "sorted(rows, key=len); the token=1 is no parameter",
            "sorted(rows, key=len); the token=1 is no parameter",
        ),
    ],
)
def test_secrets_in_texts_go_by_their_names(text, entry):
    """In forms, addresses and JSON inside of a text, what stands under the name of a secret is not written down."""
    assert _clean(text, []) == entry
    assert _clean({"said": [text]}, []) == {"said": [entry]}


def test_another_key_finds_the_same_answer(provider, tmp_path):
    """Who replays needs no key, or another one."""
    path = tmp_path / "answers.json"

    def ask(url, key):
        return httpx.post(
            f"{url}/x", json={"api_key": key, "a": 1}, headers={"authorization": f"Bearer {key}"}
        ).status_code

    with recorded(path, upstream=provider.url, mode="record") as answers:
        ask(answers.url, "first-key-of-many")
    with recorded(path) as answers:
        assert ask(answers.url, "none") == 200


def test_scrub_and_ignore(provider, tmp_path):
    """A body is kept as scrub leaves it, and names that make no difference make none."""
    path = tmp_path / "answers.json"

    def scrub(body):
        return {**body, "name": "somebody"} if isinstance(body, dict) else body

    with recorded(path, upstream=provider.url, mode="record", scrub=scrub, ignore=["user"]) as answers:
        httpx.post(f"{answers.url}/x", json={"name": "Ada", "user": "1"})
    assert "Ada" not in path.read_text()
    with recorded(path, scrub=scrub, ignore=["user"]) as answers:
        assert httpx.post(f"{answers.url}/x", json={"name": "Bob", "user": "2"}).status_code == 200


@pytest.mark.core
async def test_answers_come_in_their_order_and_the_last_one_stays(provider, tmp_path):
    """A refusal that was recorded is met again, with what it says of the wait; afterwards the answer is the last one."""
    path = tmp_path / "answers.json"
    provider.refusals = 1

    async def run(url):
        async def ask(state):
            async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
                messages = [{"role": "user", "content": "?"}]
                answer = await client.chat.completions.create(model="gpt-4o-mini", messages=messages)
            return {"n": 1}, answer

        with FakeClock() as clock:
            result = await patient(0).run([make("ask", ask)], Number())
        return result.status, [event.reason for event in result.trace], result.total_tokens, clock.waits

    with recorded(path, upstream=provider.url, mode="record") as answers:
        first = await run(answers.url)
    assert first == (RunStatus.COMPLETED, ["rate_limit", None], 10, [7.0])
    with recorded(path) as answers:
        assert await run(answers.url) == first
        assert (await run(answers.url))[1] == [None]
        answers.rewind()
        assert await run(answers.url) == first


@pytest.mark.core
def test_a_request_that_was_not_recorded(provider, tmp_path):
    """It is refused for good, and is an error at the end which says what was asked."""
    path = tmp_path / "answers.json"
    with recorded(path, upstream=provider.url, mode="record") as answers:
        ask_openai(answers.url)
    with pytest.raises(
        AssertionError,
        match=r"answers.json lacks 1 of the requests; the first is POST /v1/chat/completions .*other",
    ):
        with recorded(path) as answers, pytest.raises(openai.NotFoundError, match=r"is not in answers\.json"):
            ask_openai(answers.url, "other")
    with pytest.raises(ZeroDivisionError):
        with recorded(path) as answers:
            httpx.get(f"{answers.url}/nothing")
            raise ZeroDivisionError


def test_what_is_no_recording(tmp_path):
    """A missing or foreign file says how to record; recording needs to know whom to ask."""
    with pytest.raises(FileNotFoundError, match="--stroma-record"):
        recorded(tmp_path / "none.json").__enter__()
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="record it again"):
        recorded(tmp_path / "other.json").__enter__()
    with pytest.raises(ValueError, match="upstream="):
        recorded(tmp_path / "x.json", mode="record")
    with pytest.raises(ValueError, match='"replay" or "record"'):
        recorded(tmp_path / "x.json", mode="auto")


def test_a_provider_that_cannot_be_reached(tmp_path):
    """A recording without the provider is an error, and writes nothing."""
    (tmp_path / "x.json").write_text("as it was")
    with pytest.raises(AssertionError, match="cannot be reached"):
        with recorded(tmp_path / "x.json", upstream="http://127.0.0.1:1/v1", mode="record") as answers:
            assert httpx.get(f"{answers.url}/x").status_code == 502
    assert (tmp_path / "x.json").read_text() == "as it was"


async def test_many_at_once(provider, tmp_path):
    """Requests side by side are each answered with their own answer."""
    path = tmp_path / "answers.json"

    async def ask(url):
        async with httpx.AsyncClient() as client:
            replies = await asyncio.gather(*(client.post(f"{url}/x", json={"n": n}) for n in range(20)))
        return [reply.status_code for reply in replies]

    with recorded(path, upstream=provider.url, mode="record") as answers:
        assert set(await ask(answers.url)) == {200}
    with recorded(path) as answers:
        assert set(await ask(answers.url)) == {200}
        assert sorted(request.body["n"] for request in answers.requests) == list(range(20))
