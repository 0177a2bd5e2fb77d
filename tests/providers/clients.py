"""The real SDKs and HTTP clients, made to ask one address once: `ask` waits, `ask_async` is awaited.

One client for all calls where the SDK lets the address be given with the call: making one loads the
certificates of the machine each time. What is slow to import is imported when it is first asked for.
"""

import asyncio
import functools
import json
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.providers.server import PLAIN, READ_TIMEOUT, Answer

MESSAGES: Any = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Sdk:
    """A package that speaks to a provider.

    Attributes:
        packages: where the exceptions come from: its own, and those of the client below it that it lets
            through.
    """

    title: str
    packages: tuple[str, ...]
    ask: Callable[..., Any]
    ask_async: Callable[..., Awaitable[Any]]


def seconds(answer: Answer) -> float:
    """It waits briefly only for an answer that does not come."""
    return READ_TIMEOUT if answer.fault == "hang" else 30


def options(answer: Answer) -> dict[str, Any]:
    """What a call is made with."""
    return {"stream": answer.stream, "timeout": seconds(answer)}


@functools.cache
def _openai() -> Any:
    import openai

    return openai.OpenAI(api_key="none", max_retries=0)


@functools.cache
def _anthropic() -> Any:
    import anthropic

    return anthropic.Anthropic(api_key="none", max_retries=0)


def ask_openai(url: str, answer: Answer = PLAIN) -> Any:
    completions = _openai().with_options(base_url=url).chat.completions
    reply: Any = completions.create(model="gpt-4o-mini", messages=MESSAGES, **options(answer))
    return list(reply) if answer.stream else reply


def ask_anthropic(url: str, answer: Answer = PLAIN) -> Any:
    messages = _anthropic().with_options(base_url=url).messages
    reply: Any = messages.create(model="claude-haiku-4-5", max_tokens=9, messages=MESSAGES, **options(answer))
    return list(reply) if answer.stream else reply


async def ask_openai_async(url: str, answer: Answer = PLAIN) -> Any:
    import openai

    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
        reply: Any = await client.chat.completions.create(
            model="gpt-4o-mini", messages=MESSAGES, **options(answer)
        )
        return [part async for part in reply] if answer.stream else reply


async def ask_anthropic_async(url: str, answer: Answer = PLAIN) -> Any:
    import anthropic

    async with anthropic.AsyncAnthropic(api_key="none", base_url=url, max_retries=0) as client:
        reply: Any = await client.messages.create(
            model="claude-haiku-4-5", max_tokens=9, messages=MESSAGES, **options(answer)
        )
        return [part async for part in reply] if answer.stream else reply


@functools.cache
def _google() -> Any:
    from google import genai

    return genai.Client(api_key="none")


def _google_call(url: str, answer: Answer) -> dict[str, Any]:
    where = {"base_url": url, "timeout": int(seconds(answer) * 1000)}
    return {"model": "gemini-2.5-flash", "contents": "hello", "config": {"http_options": where}}


def ask_google(url: str, answer: Answer = PLAIN) -> Any:
    call = _google_call(url, answer)
    if answer.stream:
        return list(_google().models.generate_content_stream(**call))
    return _google().models.generate_content(**call)


async def ask_google_async(url: str, answer: Answer = PLAIN) -> Any:
    from google import genai

    call = _google_call(url, answer)
    async with genai.Client(api_key="none").aio as client:
        if answer.stream:
            return [part async for part in await client.models.generate_content_stream(**call)]
        return await client.models.generate_content(**call)


@functools.cache
def _mistral() -> Any:
    from mistralai.client import Mistral

    return Mistral(api_key="none")


def _mistral_call(url: str, answer: Answer) -> dict[str, Any]:
    where = {"server_url": url, "timeout_ms": int(seconds(answer) * 1000)}
    return {"model": "mistral-small-latest", "messages": MESSAGES, **where}


def ask_mistral(url: str, answer: Answer = PLAIN) -> Any:
    call = _mistral_call(url, answer)
    return list(_mistral().chat.stream(**call)) if answer.stream else _mistral().chat.complete(**call)


async def ask_mistral_async(url: str, answer: Answer = PLAIN) -> Any:
    from mistralai.client import Mistral

    call = _mistral_call(url, answer)
    async with Mistral(api_key="none") as client:
        if answer.stream:
            return [part async for part in await client.chat.stream_async(**call)]
        return await client.chat.complete_async(**call)


@functools.cache
def _httpx() -> Any:
    import httpx

    return httpx.Client()


def _cohere_call(answer: Answer) -> dict[str, Any]:
    how = {"max_retries": 0, "timeout_in_seconds": seconds(answer)}
    return {"model": "command-a-03-2025", "messages": MESSAGES, "request_options": how}


def ask_cohere(url: str, answer: Answer = PLAIN) -> Any:
    import cohere

    client = cohere.ClientV2(api_key="none", base_url=url, httpx_client=_httpx())
    call = _cohere_call(answer)
    return list(client.chat_stream(**call)) if answer.stream else client.chat(**call)


async def ask_cohere_async(url: str, answer: Answer = PLAIN) -> Any:
    import cohere

    call = _cohere_call(answer)
    async with cohere.AsyncClientV2(api_key="none", base_url=url) as client:
        if answer.stream:
            return [part async for part in client.chat_stream(**call)]
        return await client.chat(**call)


@functools.cache
def _aws() -> Any:
    import botocore.session

    return botocore.session.get_session()


def aws_client(url: str, answer: Answer = PLAIN, **credentials: str) -> Any:
    from botocore.config import Config

    keys = credentials or {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    config = Config(retries={"total_max_attempts": 1}, read_timeout=seconds(answer))
    return _aws().create_client(
        "bedrock-runtime", region_name="us-east-1", endpoint_url=url, config=config, **keys
    )


def ask_aws(url: str, answer: Answer = PLAIN) -> Any:
    call = {"modelId": "m", "messages": [{"role": "user", "content": [{"text": "hello"}]}]}
    client = aws_client(url, answer)
    if isinstance(answer.body, bytes):
        return list(client.converse_stream(**call)["stream"])
    return client.converse(**call)


def aws_event(kind: str, data: dict[str, Any] | None = None) -> bytes:
    """An event of a stream, or an exception in the middle of it, in AWS's binary frame."""
    payload = json.dumps({"message": "no"} if data is None else data).encode()
    what = "exception" if data is None else "event"
    headers = b""
    for name, value in ((":message-type", what), (f":{what}-type", kind)):
        headers += bytes([len(name)]) + name.encode() + b"\7" + struct.pack("!H", len(value)) + value.encode()
    prelude = struct.pack("!II", 16 + len(headers) + len(payload), len(headers))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + headers + payload
    return message + struct.pack("!I", zlib.crc32(message))


def ask_requests(url: str, answer: Answer = PLAIN) -> Any:
    import requests

    response = requests.post(url, timeout=seconds(answer))
    response.raise_for_status()
    return response


async def ask_aiohttp_async(url: str, answer: Answer = PLAIN) -> Any:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_read=seconds(answer))
    async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url) as response:
        response.raise_for_status()
        return await response.read()


def ask_aiohttp(url: str, answer: Answer = PLAIN) -> Any:
    return asyncio.run(ask_aiohttp_async(url, answer))


def _in_thread(ask: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """For packages without an async client."""

    async def ask_async(url: str, answer: Answer = PLAIN) -> Any:
        return await asyncio.to_thread(ask, url, answer)

    return ask_async


SDKS = {
    "openai": Sdk("OpenAI", ("openai", "httpx2"), ask_openai, ask_openai_async),
    "anthropic": Sdk("Anthropic", ("anthropic", "httpx2"), ask_anthropic, ask_anthropic_async),
    "google-genai": Sdk("Google", ("google", "httpx2"), ask_google, ask_google_async),
    "mistralai": Sdk("Mistral", ("mistralai", "httpx2"), ask_mistral, ask_mistral_async),
    "cohere": Sdk("Cohere", ("cohere", "httpx"), ask_cohere, ask_cohere_async),
    "botocore": Sdk("AWS", ("botocore",), ask_aws, _in_thread(ask_aws)),
    "requests": Sdk("requests", ("requests",), ask_requests, _in_thread(ask_requests)),
    "aiohttp": Sdk("aiohttp", ("aiohttp",), ask_aiohttp, ask_aiohttp_async),
}
ASK = {name: sdk.ask for name, sdk in SDKS.items()}
ASK_ASYNC = {name: sdk.ask_async for name, sdk in SDKS.items()}
