// Reads streams as the clients of both protocols do: a JSON list of {protocol, request, body} on stdin, and on stdout what
// a page then has of each.
import { readFileSync } from "node:fs";
import { HttpAgent } from "@ag-ui/client";
import { parseJsonEventStream, readUIMessageStream, uiMessageChunkSchema } from "ai";

const isOf = (error) => String(error?.message ?? error);

async function agUi({ request, body }) {
  const fetch = async () => new Response(body, { headers: { "content-type": "text/event-stream" } });
  const agent = new HttpAgent({ url: "http://localhost", fetch, threadId: request.threadId });
  agent.messages = request.messages;
  const seen = { types: [], outcome: null };
  await agent.runAgent({ runId: request.runId }, {
    onEvent: ({ event }) => { seen.types.push(event.type); },
    onRunFinishedEvent: ({ event }) => { seen.outcome = event.outcome; },
    onRunErrorEvent: ({ event }) => { seen.outcome = { type: "error", message: event.message }; },
  });
  return { ...seen, messages: agent.messages };
}

async function vercel({ body }) {
  const errors = [], types = [];
  let message = null;
  const stream = parseJsonEventStream({ stream: new Blob([body]).stream(), schema: uiMessageChunkSchema });
  const chunks = stream.pipeThrough(new TransformStream({
    transform(chunk, controller) {
      if (!chunk.success) throw chunk.error;
      types.push(chunk.value.type);
      controller.enqueue(chunk.value);
    },
  }));
  for await (const next of readUIMessageStream({ stream: chunks, onError: (error) => errors.push(isOf(error)) })) {
    message = next;
  }
  return { message, errors, types };
}

const results = [];
for (const stream of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    results.push(await (stream.protocol === "ag_ui" ? agUi : vercel)(stream));
  } catch (error) {
    results.push({ problem: isOf(error) });
  }
}
console.log(JSON.stringify(results));
