// One depth of a comparison: its ladder, its answer as it comes, how fast, and why it ended.

import { timing } from "./generation.js";
import { html } from "./html.js";
import { describe, DepthPicker, Ladder } from "./ladder.js";
import { Problem } from "./notice.js";
import { DASH, duration, number } from "./numbers.js";
import { Alternatives, Tokens } from "./tokens.js";

/** A depth before it has been asked. */
export const UNASKED = { state: "idle", tokens: [] };

const STATES = {
  idle: "",
  waiting: "waiting",
  streaming: "writing",
  stopped: "stopped by you",
  failed: "failed",
};
const FINISHES = { stop: "ended by itself", length: "reached max tokens" };

export function Lane({ lane, scale, answer, partsAt, chosen, onChoose, onDepth, onRemove }) {
  const { id, kind, depth } = lane;
  const { numLayers, max } = scale;
  const heading = `lane-${id}-name`;
  const name = { base: "Base", calibrated: "Calibrated", full: "Full" }[kind] ?? "Depth";
  return html`<article class="lane" aria-labelledby=${heading}>
    <div class="gauge" aria-hidden="true">
      <${Ladder} depth=${depth} numLayers=${numLayers} isUpright />
    </div>
    <header>
      <h2 id=${heading}>
        ${name} <span class="quiet">${depth} of ${numLayers}</span>
      </h2>
      ${kind === "depth" &&
      html`<${DepthPicker}
          label="Depth of this answer"
          depth=${depth}
          numLayers=${numLayers}
          max=${max}
          onDepth=${onDepth}
        />
        <button
          type="button"
          class="plain small"
          aria-label=${`Take depth ${depth} away`}
          onClick=${onRemove}
        >
          ×
        </button>`}
    </header>
    <div class="text">
      ${answer.state === "waiting" && html`<p class="quiet">Waiting for the first token…</p>`}
      ${answer.state === "idle" && html`<p class="quiet">${idleNote(kind)}</p>`}
      ${answer.tokens.length > 0 &&
      html`<p class="sr">${answer.tokens.map(({ text }) => text).join("")}</p>
        <${Tokens}
          id=${`lane-${id}`}
          label=${`Tokens at ${describe(depth, numLayers)}`}
          answer=${answer}
          chosen=${chosen}
          partsAt=${partsAt}
          onChoose=${onChoose}
        />`}
      <${Problem} error=${answer.error} />
    </div>
    ${answer.tokens.length > 0 && html`<${Alternatives} token=${answer.tokens[chosen] ?? null} />`}
    <${Figures} answer=${answer} />
  </article>`;
}

function Figures({ answer }) {
  const { toFirst, rate } = answer.state === "idle" ? {} : timing(answer);
  const how = FINISHES[answer.finish] ?? "";
  return html`<dl class="figures">
    <div>
      <dt>first token</dt>
      <dd>${toFirst === undefined || toFirst === null ? DASH : duration(toFirst)}</dd>
    </div>
    <div>
      <dt>tokens/s</dt>
      <dd>${number(rate, 1)}</dd>
    </div>
    <div>
      <dt>tokens</dt>
      <dd>${answer.state === "idle" ? DASH : (answer.numTokens ?? answer.tokens.length)}</dd>
    </div>
    <div class="how">
      <dt class="sr">state</dt>
      <dd>${answer.state === "done" ? how : STATES[answer.state]}</dd>
    </div>
  </dl>`;
}

function idleNote(kind) {
  if (kind === "base") return "The base model, without the adapter.";
  if (kind === "full") return "Every layer with its LoRA.";
  if (kind === "calibrated") return "What a request gets that asks for no depth.";
  return "Any depth between: drag, or use the arrow keys.";
}
