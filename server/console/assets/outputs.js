// A few samples as they were continued at base, chosen and full depth.

import { html } from "./html.js";

export function Outputs({ outputs, record }) {
  if (!outputs?.length) return null;
  const depths = Object.keys(outputs[0].by_depth).map(Number);
  return html`<section aria-labelledby="outputs-title">
    <h3 id="outputs-title">What it writes</h3>
    <ol class="outputs">
      ${outputs.map(
        ({ prompt, reference, by_depth: texts }) =>
          html`<li>
            <p class="prompt">${prompt}</p>
            <dl>
              ${reference && entry("should be", reference, "reference")}
              ${depths.map((depth) => entry(name(depth, record), texts[depth], null))}
            </dl>
          </li>`,
      )}
    </ol>
  </section>`;
}

function entry(term, text, kind) {
  return html`<div class=${kind}>
    <dt>${term}</dt>
    <dd>${text.trim() || html`<span class="quiet">nothing</span>`}</dd>
  </div>`;
}

function name(depth, { depth: chosen, num_layers: full }) {
  if (depth === 0) return "base";
  if (depth === full) return chosen === full ? "full, chosen" : "full";
  return `depth ${depth}, chosen`;
}
