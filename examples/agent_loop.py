"""An agent with tools in a loop of your own: a flow whose model calls and tool calls are steps, under one budget.

    python examples/agent_loop.py

Needs neither a key nor a network: a scripted provider answers on this machine. Its first reply is a rate
limit, its second one asks for a tool with arguments that are wrong, and with the loop as it stands here it
would never end.
"""

import asyncio
import json
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stroma import ExecutionBudget, Flow, StepFailed, StromaRunner


class Conversation(BaseModel):
    messages: list[dict[str, str]]


class Reply(BaseModel):
    """What the model must say: a text for the user, or a tool that is to be called."""

    text: str = ""
    tool: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)


class Arguments(BaseModel):
    model_config = ConfigDict(extra="allow")  # Whatever the model says; the tool's own contract judges it.


class Order(BaseModel):
    order: int


class Status(BaseModel):
    status: str


# Without a limit the two would talk all night.
runner = StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=3_000))


@runner.node("model", input=Conversation, output=Reply)
async def model(conversation: Conversation) -> tuple[Any, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(conversation.messages).encode())
    body = await asyncio.to_thread(lambda: json.load(urllib.request.urlopen(request, timeout=10)))
    answer = body["choices"][0]["message"]["content"]
    # The response beside the output, so that its tokens are counted and priced.
    try:
        return json.loads(answer), body
    except ValueError:
        return answer, body  # Not JSON: the contract refuses it.


@runner.node
async def lookup(order: Order) -> Status:
    return Status(status=f"order {order.order} left the warehouse on Monday")


TOOLS: dict[str, Any] = {"lookup": lookup}


@runner.flow
async def agent(flow: Flow, conversation: Conversation) -> Conversation:
    messages = conversation.messages
    while True:
        reply: Reply = await flow.step(model, Conversation(messages=messages))
        if not reply.tool:
            print(f"agent: {reply.text}")
            messages = [*messages, {"role": "user", "content": "And the next one?"}]
            continue
        # Arguments come from a model: they are validated before the tool sees them, and the model learns what
        # is wrong.
        try:
            answer = (await flow.step(TOOLS[reply.tool], Arguments(**reply.arguments))).status
        except StepFailed as error:
            answer = str(error.failure)
        print(f"tool:  {answer.splitlines()[0]}")
        messages = [*messages, {"role": "tool", "content": answer}]


class Provider(BaseHTTPRequestHandler):
    """The scripted model: 600 tokens a turn, and the next tool call, for any input."""

    turns = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Provider.turns += 1
        if Provider.turns == 1:
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        script: list[dict[str, Any]] = [
            {"tool": "lookup", "arguments": {"order": "the blue one"}},
            {"tool": "lookup", "arguments": {"order": 4711}},
            {"text": "Order 4711 left the warehouse on Monday."},
        ]
        content = json.dumps(script[(Provider.turns - 2) % 3])
        usage = {"prompt_tokens": 500, "completion_tokens": 100, "total_tokens": 600}
        body = {"model": "gpt-4o-mini", "choices": [{"message": {"content": content}}], "usage": usage}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        question = Conversation(messages=[{"role": "user", "content": "Where is my order?"}])
        result = asyncio.run(runner.run(agent, question, run_id="agent"))
        server.shutdown()
    print()
    for event in result.trace:
        print(f"{event.node_id:7s} attempt {event.attempt}: {event.outcome} {event.reason or ''}".rstrip())
    print(f"{result.status}: {result.failure if result.failure else ''}")
    print(f"{result.total_tokens} tokens, ${result.total_cost_usd:.6f}")
