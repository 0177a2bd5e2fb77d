"""A chat that survives reloads and dead workers: live text, an approval, and a worker beside the web server.

    pip install 'stroma-runner[ui]'
    python examples/chat.py worker     # as many as you like
    python examples/chat.py            # in another terminal; then open http://127.0.0.1:8000

Ask, and reload the page in the middle of a sentence, or kill the worker and start it again: the text stays
right. The model here is a function that loses its connection in its first attempt.
"""

import asyncio
import os
import sys

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stroma import (
    CheckpointNotFound,
    FailurePolicy,
    Flow,
    RequestRefused,
    RunExists,
    StoreError,
    StromaRunner,
    current_node,
)
from stroma.wire import SSE_HEADERS, sse


class Question(BaseModel):
    text: str


class Draft(BaseModel):
    text: str


class Decision(BaseModel):
    send: bool


class Reply(Decision):
    question: str


class Answer(BaseModel):
    text: str
    was_sent: bool


runner = StromaRunner.quick(
    store=os.environ.get("CHAT_DB", "sqlite:///chat.db"),
    events="store",
    lease_seconds=2,
    policy_map={"RECOVERABLE": FailurePolicy(max_retries=3, backoff_seconds=0.2)},
)


@runner.node
async def draft(question: Question) -> Draft:
    node = current_node()
    written: list[str] = []
    for word in f"You asked: {question.text} Here is what I know about it.".split():
        await asyncio.sleep(float(os.environ.get("CHAT_PAUSE", "0.15")))  # A model that takes its time.
        if node.attempt == 1 and len(written) == 4:
            raise ConnectionError("the model closed the connection")
        node.emit(f"{word} ")
        written.append(word)
    return Draft(text=" ".join(written))


@runner.flow
async def chat(flow: Flow, question: Question) -> Answer:
    answer = await flow.step(draft, question)
    decision = await flow.wait_for(Decision, reason="Send this answer?")
    return Answer(text=answer.text, was_sent=decision.send)


PAGE = """<!doctype html><title>Chat</title>
<form><input name="text" value="why is the sky blue?"> <button>Ask</button></form>
<p id="answer"></p><p id="ask" hidden><button id="send">Send it</button></p><p id="end"></p>
<script>
  const $ = (id) => document.getElementById(id), texts = {};
  const show = (event) => {
    const call = `${event.position}/${event.branch}`;
    if (event.kind === "node_start") texts[call] = "";
    if (event.kind === "node_event") texts[call] += event.data;
    if (event.kind === "node_failure" || event.kind === "node_cancelled") delete texts[call];
    if (event.kind === "node_success" || event.kind === "node_skipped") texts[call] = event.state.text;
    $("answer").textContent = Object.values(texts).join(" ");
  };
  const put = async (path, data) => {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch(path, { method: "PUT", headers, body: JSON.stringify(data) });
    if (!response.ok) $("end").textContent = `Not accepted: ${(await response.json()).detail}`;
    return response.ok;
  };
  const follow = (run) => {
    const source = new EventSource(`/chats/${run}/events`);
    for (const kind of ["node_start", "node_event", "node_failure", "node_cancelled", "node_success", "node_skipped"])
      source.addEventListener(kind, (message) => show(JSON.parse(message.data)));
    source.addEventListener("run_suspended", (message) => {
      const [question] = JSON.parse(message.data).details.questions;
      $("ask").hidden = !question;
      $("send").onclick = () => {
        $("ask").hidden = true;
        put(`/chats/${run}/decision`, { question: question.id, send: true });
      };
    });
    source.addEventListener("run_end", (message) => {
      $("ask").hidden = true;
      const { status, final_state, failure } = JSON.parse(message.data).details;
      const done = ["COMPLETED", "RESUMED"].includes(status);
      $("end").textContent = !done ? `${status}: ${failure?.message ?? "it was not sent"}`
        : final_state.was_sent ? "It was sent." : "It was not sent.";
      source.close();
    });
  };
  document.querySelector("form").onsubmit = async (submit) => {
    submit.preventDefault();
    const run = location.hash = crypto.randomUUID();
    if (await put(`/chats/${run}`, { text: submit.target.text.value })) follow(run);
  };
  if (location.hash) follow(location.hash.slice(1));
</script>"""


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse(PAGE)


async def ask(request: Request) -> JSONResponse:
    question = Question.model_validate_json(await request.body())
    await runner.submit(chat, question, run_id=request.path_params["run"])
    return JSONResponse({}, 202)


async def decide(request: Request) -> JSONResponse:
    reply = Reply.model_validate_json(await request.body())
    await runner.signal(request.path_params["run"], Decision(send=reply.send), question=reply.question)
    return JSONResponse({}, 202)


async def events(request: Request) -> Response:
    run = request.path_params["run"]
    await runner.handle(run).status()  # Raises for an unknown run, before the answer begins.
    stream = runner.follow(run, after=request.headers.get("Last-Event-ID"))
    return StreamingResponse(sse(stream), headers=SSE_HEADERS)


# ValueError: of an input, an id or a cursor.
STATUS = {ValueError: 422, CheckpointNotFound: 404, RequestRefused: 409, RunExists: 409, StoreError: 503}


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Say why a request is not accepted, and show no traceback."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return JSONResponse({"detail": str(error)}, status)


app = Starlette(
    routes=[
        Route("/", page),
        Route("/chats/{run}", ask, methods=["PUT"]),
        Route("/chats/{run}/decision", decide, methods=["PUT"]),
        Route("/chats/{run}/events", events),
    ],
    exception_handlers=dict.fromkeys(STATUS, refuse),
)

if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        asyncio.run(runner.serve(chat, poll_seconds=0.2))
    else:
        import uvicorn

        uvicorn.run(app, port=int(os.environ.get("CHAT_PORT", "8000")))
