// One record of an adapter's history: what was concluded, on what evidence, and what that looks like.

import { Curve } from "./curve.js";
import { Diagnostics } from "./diagnostics.js";
import { Exports } from "./exports.js";
import { html } from "./html.js";
import { moment, number, percent, signed } from "./numbers.js";
import { Outputs } from "./outputs.js";

export const VERDICTS = {
  improves: "improves",
  equal_cheaper: "equal, cheaper",
  keep_full: "keep full",
};

/** Who made a record, without the id of the request that asked for it. */
export const author = (actor) => actor.split(":")[0];

export function Record({ adapter, boundary, other }) {
  const { record, evidence } = boundary;
  return html`<section class="panel record" aria-labelledby="record-title">
    <div class="row between">
      <h2 id="record-title">
        Version ${boundary.version}
        ${boundary.is_active && html`<span class="tag">active</span>`}
      </h2>
      <${Exports} adapter=${adapter} boundary=${boundary} />
    </div>
    <p class="verdict">${conclusion(record, evidence)}</p>
    ${record.curve &&
    html`<${Curve} key=${boundary.id} boundary=${boundary} other=${other} />
      <${Controls} evidence=${evidence} record=${record} />
      <${Diagnostics} evidence=${evidence} depth=${record.depth} />
      <${Numbers} record=${record} evidence=${evidence} />
      <${Outputs} outputs=${evidence.outputs} record=${record} />`}
    <${Facts} boundary=${boundary} />
  </section>`;
}

function conclusion(record, evidence) {
  if (record.method === "manual") return `Set by hand to depth ${record.depth}: ${record.reason}`;
  return evidence.verdict_in_words ?? `${VERDICTS[record.verdict]}: depth ${record.depth}.`;
}

/** Other ways to spend as many layers, beside the lowest ones. */
function Controls({ evidence, record }) {
  const names = { top_k: "layers of most LoRA output", random_k: "layers by lot, five draws" };
  const rows = Object.entries(evidence.controls ?? {});
  if (!rows.length) return null;
  return html`<table class="list compact controls">
    <caption>
      Other ways to spend ${record.proposed_depth} layers
    </caption>
    <thead>
      <tr>
        <th scope="col">Which layers</th>
        <th scope="col" class="figure">Mean score</th>
        <th scope="col" class="figure">The lowest are better by</th>
        <th scope="col" class="figure">Interval</th>
      </tr>
    </thead>
    <tbody>
      <tr>
        <th scope="row">the lowest ${record.proposed_depth}</th>
        <td class="figure">${number(record.curve[record.proposed_depth].score)}</td>
        <td></td>
        <td></td>
      </tr>
      ${rows.map(
        ([name, { mean, difference }]) =>
          html`<tr>
            <th scope="row">${names[name] ?? name}</th>
            <td class="figure">${number(mean)}</td>
            <td class="figure">${signed(difference?.mean)}</td>
            <td class="figure quiet">
              ${difference && `${signed(difference.low)} to ${signed(difference.high)}`}
            </td>
          </tr>`,
      )}
    </tbody>
  </table>`;
}

/** The curve in figures, for whoever does not see it or wants to copy it. */
function Numbers({ record, evidence }) {
  const { lens_full: lens, lora_norms: norms } = evidence;
  return html`<details>
    <summary>Every depth in figures</summary>
    <div class="scroll" tabindex="0" role="region" aria-label="Every depth in figures">
      <table class="list compact">
        <thead>
          <tr>
            <th scope="col" class="figure">Depth</th>
            <th scope="col" class="figure">Score</th>
            <th scope="col" class="figure">To full</th>
            <th scope="col" class="figure">Interval</th>
            <th scope="col" class="figure">Lens, at its last layer</th>
            <th scope="col" class="figure">LoRA norm there</th>
          </tr>
        </thead>
        <tbody>
          ${record.curve.map(
            ({ score, to_full: { mean, low, high } }, depth) =>
              html`<tr class=${depth === record.depth ? "chosen" : null}>
                <th scope="row" class="figure">${depth}</th>
                <td class="figure">${number(score, 4)}</td>
                <td class="figure">${signed(mean, 4)}</td>
                <td class="figure quiet">${signed(low, 4)} to ${signed(high, 4)}</td>
                <td class="figure">${depth && lens ? percent(lens[depth - 1], 1) : ""}</td>
                <td class="figure">${depth && norms ? number(norms[depth - 1], 2) : ""}</td>
              </tr>`,
          )}
        </tbody>
      </table>
    </div>
  </details>`;
}

/** Name and value of everything that a record rests on. */
export function facts({ record, actor, created_at: at }) {
  return [
    ["depth", `${record.depth} of ${record.num_layers}`],
    ["verdict", record.verdict ? VERDICTS[record.verdict] : "set by hand"],
    ["proposed", record.proposed_depth ?? "–"],
    ["metric", record.metric ?? "–"],
    ["method", record.method],
    ["samples", record.num_samples ?? "–"],
    ["tolerance", number(record.tolerance, 4)],
    ["confidence", percent(record.confidence)],
    ["confirmed difference", interval(record.confirmation)],
    ["base score", number(record.curve?.[0].score)],
    ["score at depth", number(record.curve?.[record.depth].score)],
    ["full score", number(record.curve?.at(-1).score)],
    ["seed", record.seed ?? "–"],
    ["data", short(record.data_fingerprint)],
    ["made", `${moment(at)} by ${author(actor)}`],
  ];
}

function Facts({ boundary }) {
  return html`<dl class="facts">
    ${facts(boundary)
      .filter(([, value]) => value !== "–")
      .map(
        ([name, value]) =>
          html`<div>
            <dt>${name}</dt>
            <dd>${value}</dd>
          </div>`,
      )}
  </dl>`;
}

function interval(difference) {
  if (!difference) return "–";
  const { mean, low, high } = difference;
  return `${signed(mean)} (${signed(low)} to ${signed(high)})`;
}

function short(fingerprint) {
  return fingerprint ? fingerprint.replace("sha256:", "").slice(0, 12) : "–";
}
