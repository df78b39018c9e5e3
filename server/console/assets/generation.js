// One streamed answer at one depth: its tokens with their log-probabilities, and when they came.
//
// Times are this browser's: they hold the way to the server, and what the other depths that run
// beside it cost.

import { events, ServerError } from "./server.js";

const NUM_ALTERNATIVES = 5;

/** What to send for a question at a depth. */
export function requestOf({ model, isChat, prompt, system, maxTokens, temperature, seed }, depth) {
  const body = {
    model,
    ...(depth === null ? {} : { lora_depth: depth }),
    max_tokens: maxTokens,
    temperature,
    ...(seed === null ? {} : { seed }),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (!isChat) return ["v1/completions", { ...body, prompt, logprobs: NUM_ALTERNATIVES }];
  const messages = [{ role: "user", content: prompt }];
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const logprobs = { logprobs: true, top_logprobs: NUM_ALTERNATIVES };
  return ["v1/chat/completions", { ...body, messages, ...logprobs }];
}

/** Run it, and call `onChange` with what is known whenever there is more. Never throws. */
export async function generate([path, body], signal, onChange) {
  const answer = {
    state: "waiting", // then "streaming", and at last "done", "stopped" or "failed"
    tokens: [], // { token, text, logprob, top: [{ token, logprob }] }
    error: null,
    lora: null,
    finish: null,
    numTokens: null,
    sentAt: performance.now(),
    firstAt: null,
    lastAt: null,
  };
  const read = path.includes("chat") ? chatReader() : completionReader();
  const isEnd = (event) => event.text === "[DONE]";
  try {
    for await (const { data } of events(path, { method: "POST", scope: "api", body, signal, isEnd })) {
      if (!data) continue;
      answer.lora = data.lora ?? answer.lora;
      answer.numTokens = data.usage?.completion_tokens ?? answer.numTokens;
      const [choice] = data.choices;
      if (!choice) continue;
      answer.finish = choice.finish_reason ?? answer.finish;
      if (read(choice, answer.tokens)) {
        answer.lastAt = performance.now();
        answer.firstAt ??= answer.lastAt;
        answer.state = "streaming";
      }
      onChange({ ...answer });
    }
    answer.state = "done";
  } catch (error) {
    if (isTooManyLogprobs(error, body)) return generate([path, fewer(body)], signal, onChange);
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    answer.error = answer.state === "failed" ? told(error, answer) : null;
  }
  onChange({ ...answer });
}

/** Seconds to the first token, and tokens a second after it; null where there are too few. */
export function timing({ sentAt, firstAt, lastAt, tokens, numTokens }) {
  const spent = (lastAt - firstAt) / 1000;
  const amount = numTokens ?? tokens.length;
  return {
    toFirst: firstAt === null ? null : (firstAt - sentAt) / 1000,
    rate: spent > 0 && amount > 1 ? (amount - 1) / spent : null,
  };
}

function told(error, { tokens }) {
  if (error.code !== "broken" || !tokens.length) return error;
  const when = `The connection broke after ${tokens.length} tokens: the server was stopped or is starting`;
  const then = "What came before is as it was. Run it again when the server is back.";
  return new ServerError(`${when} again. ${then}`, { code: "broken" });
}

/** A server may allow fewer alternatives than are asked for, down to none. */
function isTooManyLogprobs(error, body) {
  return error.status === 400 && /logprobs/.test(error.param ?? "") && asked(body) > 0;
}

const asked = (body) => body.top_logprobs ?? body.logprobs;

function fewer(body) {
  return "top_logprobs" in body ? { ...body, top_logprobs: 0 } : { ...body, logprobs: 0 };
}

/** Adds a chunk's tokens; true if there were any. Offsets count characters, not UTF-16 units. */
function completionReader() {
  let characters = [];
  const offsets = [];
  return ({ text, logprobs }, tokens) => {
    characters = characters.concat(Array.from(text));
    for (const [index, token] of (logprobs?.tokens ?? []).entries()) {
      const top = Object.entries(logprobs.top_logprobs[index] ?? {});
      offsets.push(logprobs.text_offset[index]);
      tokens.push({
        token,
        text: "",
        logprob: logprobs.token_logprobs[index],
        top: ranked(top.map(([other, logprob]) => ({ token: other, logprob }))),
      });
    }
    // The text of the last token may lag behind it, so the end is cut anew each time.
    for (let at = Math.max(0, tokens.length - 12); at < tokens.length; at += 1) {
      const text = characters.slice(offsets[at], offsets[at + 1]).join("");
      if (text !== tokens[at].text) tokens[at] = { ...tokens[at], text };
    }
    return Boolean(logprobs?.tokens.length);
  };
}

/** The same of a chat, whose tokens come as bytes: a character shows with its last one. */
function chatReader() {
  const decoder = new TextDecoder();
  return ({ logprobs, finish_reason: finish }, tokens) => {
    const entries = logprobs?.content ?? [];
    for (const [index, { token, bytes, logprob, top_logprobs: top }] of entries.entries()) {
      // The token that ends a turn is no part of its text.
      const isEnd = finish === "stop" && index === entries.length - 1 && /^<.*>$/.test(token);
      const text = isEnd ? "" : decoder.decode(new Uint8Array(bytes ?? []), { stream: true });
      tokens.push({ token, text, logprob, top: ranked(top) });
    }
    return entries.length > 0;
  };
}

function ranked(top) {
  return top.sort((a, b) => b.logprob - a.logprob).slice(0, NUM_ALTERNATIVES);
}
