// Live: what the server does now, from `/metrics` as Prometheus would read it.

import { histogram, parse, quantile, rate, total } from "./exposition.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { Problem } from "./notice.js";
import { bytes, count, DASH, duration, number, percent } from "./numbers.js";
import { ask } from "./server.js";
import { Soundings } from "./soundings.js";
import { Spark } from "./spark.js";

const EVERY_MS = 2000;
const WINDOWS = { "last minute": 30, "last 5 minutes": 150 };
const KEPT = 151;
const whole = (value) => number(value, 0);
const TILES = [
  ["Running", "gauge", "vllm:num_requests_running", count],
  ["Waiting", "gauge", "vllm:num_requests_waiting", count],
  ["Tokens/s written", "rates", "vllm:generation_tokens_total", whole],
  ["Prompt tokens/s", "rates", "vllm:prompt_tokens_total", whole],
  ["KV cache in use", "gauge", "vllm:kv_cache_usage_perc", (share) => percent(share, 1)],
  ["LoRA on the device", "gauge", "fathom_lora_bytes", bytes],
];

export function Live() {
  const [looks, setLooks] = useState([]); // the newest last, each `{ at, found }`
  const [error, setError] = useState(null);
  const [windowName, setWindow] = useState("last minute");
  const isGone = useRef(false);

  useEffect(() => {
    const look = async () => {
      if (document.hidden) return;
      try {
        const found = parse(await ask("metrics"));
        if (isGone.current) return;
        setLooks((before) => [...before.slice(-KEPT + 1), { at: performance.now(), found }]);
        setError(null);
      } catch (raised) {
        if (!isGone.current) setError(raised);
      }
    };
    look();
    const timer = setInterval(look, EVERY_MS);
    return () => {
      isGone.current = true;
      clearInterval(timer);
    };
  }, []);

  const now = looks.at(-1);
  if (!now) return html`<${Problem} error=${error} /><p class="quiet wait">Asking…</p>`;
  const length = WINDOWS[windowName];
  const then = looks[Math.max(0, looks.length - 1 - length)];
  const recent = looks.slice(-length);
  const gauge = (name) => recent.map(({ found }) => total(found, name));
  const rates = (name) => recent.map((look, index) => rate(look, recent[index - 1] ?? null, name));
  const spread = (name) => histogram(now.found, name, then.found);

  return html`<section class="live">
    <div class="row between">
      <p class="quiet">
        ${looks.length <= length && `Watched for ${duration((now.at - then.at) / 1000)} so far. `}
        Latencies are read from histograms, and so are estimates.
      </p>
      <fieldset class="switch small">
        <legend class="sr">Time that is shown</legend>
        ${Object.keys(WINDOWS).map(
          (name) =>
            html`<label>
              <input
                type="radio"
                name="window"
                checked=${name === windowName}
                onChange=${() => setWindow(name)}
              />
              <span>${name}</span>
            </label>`,
        )}
      </fieldset>
    </div>
    <${Problem} error=${error} />
    <div class="tiles">
      ${TILES.map(([name, read, metric, shown]) => tile(name, { gauge, rates }[read](metric), shown))}
    </div>
    <div class="columns">
      <${Latencies} spread=${spread} />
      <${Soundings} ranges=${spread("fathom_request_depth")} windowName=${windowName} />
    </div>
    <${Skipped} found=${now.found} />
  </section>`;

  function tile(name, values, shown) {
    return html`<div class="tile">
      <h2>${name}</h2>
      <p class="big">${shown(values.at(-1))}</p>
      <${Spark} values=${values} places=${length} />
    </div>`;
  }
}

function Latencies({ spread }) {
  const rows = {
    "to the first token": "vllm:time_to_first_token_seconds",
    "between tokens": "vllm:inter_token_latency_seconds",
    "in the queue": "vllm:request_queue_time_seconds",
    "whole request": "vllm:e2e_request_latency_seconds",
  };
  return html`<section class="panel" aria-labelledby="latency-title">
    <h2 id="latency-title">Latency</h2>
    <table class="list compact">
      <thead>
        <tr>
          <th scope="col">Time</th>
          <th scope="col" class="figure">p50</th>
          <th scope="col" class="figure">p95</th>
          <th scope="col" class="figure">p99</th>
          <th scope="col" class="figure">of</th>
        </tr>
      </thead>
      <tbody>
        ${Object.entries(rows).map(([text, name]) => {
          const ranges = spread(name);
          const amount = ranges.reduce((sum, range) => sum + range.count, 0);
          return html`<tr>
            <th scope="row">${text}</th>
            ${[0.5, 0.95, 0.99].map(
              (share) => html`<td class="figure">${estimate(ranges, share)}</td>`,
            )}
            <td class="figure quiet">${count(amount)}</td>
          </tr>`;
        })}
      </tbody>
    </table>
  </section>`;
}

/** A quantile, as far as a histogram can tell: within its first range and past its last one, bounds. */
function estimate(ranges, share) {
  const value = quantile(ranges, share);
  const bounds = ranges.map(({ below }) => below).filter(Number.isFinite);
  if (value !== null && value <= bounds[0]) return `< ${duration(bounds[0])}`;
  if (value !== null && value >= bounds.at(-1)) return `> ${duration(bounds.at(-1))}`;
  return duration(value);
}

/** By adapter, what its requests' depths saved since the server started. */
function Skipped({ found }) {
  const applied = found.get("fathom_lora_layers_applied_total") ?? [];
  const skipped = found.get("fathom_lora_layers_skipped_total") ?? [];
  if (!applied.length) return null;
  const left = new Map(skipped.map(({ labels, value }) => [labels.adapter, value]));
  return html`<section class="panel" aria-labelledby="skipped-title">
    <h2 id="skipped-title">LoRA layer applications since the start</h2>
    <table class="list compact">
      <thead>
        <tr>
          <th scope="col">Adapter</th>
          <th scope="col" class="figure">Applied</th>
          <th scope="col" class="figure">Skipped</th>
          <th scope="col" class="figure">Share skipped</th>
        </tr>
      </thead>
      <tbody>
        ${applied.map(({ labels: { adapter }, value }) => {
          const not = left.get(adapter) ?? 0;
          return html`<tr>
            <th scope="row">${adapter === ":others" ? "all others" : adapter}</th>
            <td class="figure">${count(value)}</td>
            <td class="figure">${count(not)}</td>
            <td class="figure">${value + not ? percent(not / (value + not)) : DASH}</td>
          </tr>`;
        })}
      </tbody>
    </table>
  </section>`;
}
