// The server, asked over its documented HTTP routes. Every failure comes back as a ServerError whose
// message can be shown as it is.

import { key } from "./keys.js";

export class ServerError extends Error {
  /** status: 0 where no answer came. code, param: the server's own words for programs, or null. */
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

const UNREACHABLE = "The server does not answer. It may be stopped, or starting again.";
const BROKEN = "The connection broke before the answer was complete.";

/** What a route answers: parsed JSON, or text of another kind. */
export async function ask(path, options = {}) {
  const response = await send(path, options);
  try {
    const isJson = response.headers.get("content-type")?.startsWith("application/json");
    return isJson ? await response.json() : await response.text();
  } catch (error) {
    throw asServerError(error, BROKEN);
  }
}

/** Server-sent events of a route, each `{ name, data }`, until the server or `signal` ends them.
 *
 * An error that the server sends as its last event is thrown. A stream that is cut, which looks like
 * an end, is an error too: whoever reads knows by `isEnd` what the real end is.
 */
export async function* events(path, { isEnd, ...options }) {
  const response = await send(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError(BROKEN, { code: "broken" });
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = parse(part);
        if (event.data?.error?.message) throw refusal(event.data.error, 200);
        yield event;
        if (isEnd(event)) return;
      }
    }
  } catch (error) {
    throw asServerError(error, BROKEN);
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(path, { method = "GET", scope = null, body, signal } = {}) {
  const headers = {};
  if (scope && key(scope)) headers.authorization = `Bearer ${key(scope)}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    throw asServerError(error, UNREACHABLE);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  if (said?.error) throw refusal(said.error, response.status);
  throw new ServerError(`The server answered ${response.status}.`, { status: response.status });
}

function refusal({ message, code, param }, status) {
  return new ServerError(message, { status, code, param });
}

function asServerError(error, message) {
  if (error instanceof ServerError || error.name === "AbortError") return error;
  return new ServerError(message, { code: message === BROKEN ? "broken" : "unreachable" });
}

function parse(block) {
  const event = { name: "message", data: null, text: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    if (line.startsWith("data: ")) event.text += line.slice(6);
  }
  if (event.text && event.text !== "[DONE]") event.data = JSON.parse(event.text);
  return event;
}
