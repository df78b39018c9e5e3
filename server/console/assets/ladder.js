// A model's layers as rungs: filled below the depth, hollow above it, a dot where an adapter has no LoRA
// at all. The one picture of depth, wherever the console shows one.

import { html } from "./html.js";

const DENSE = 30;
const SOLID = 64;

/** depth: how many layers apply their LoRA. layers: those that have any; null for all. */
export function Ladder({ depth, numLayers, layers = null, label, isUpright = false }) {
  const has = layers && new Set(layers);
  const kind = (layer) => (has && !has.has(layer) ? "bare" : layer < depth ? "on" : "off");
  // Rungs of many layers would be narrower than the gaps between them.
  const spacing = numLayers > SOLID ? "solid" : numLayers > DENSE ? "dense" : "airy";
  return html`<span
    class="ladder ${isUpright ? "upright" : "level"} ${spacing}"
    role="img"
    aria-label=${label ?? describe(depth, numLayers)}
  >
    ${Array.from({ length: numLayers }, (_, layer) => html`<i class="rung ${kind(layer)}"></i>`)}
  </span>`;
}

/** A ladder whose depth can be set, with a pointer or the keys of a slider. */
export function DepthPicker({ label, depth, numLayers, max = numLayers, layers, onDepth }) {
  return html`<label class="picker">
    <span class="sr">${label}</span>
    <span aria-hidden="true">
      <${Ladder} depth=${depth} numLayers=${numLayers} layers=${layers} />
    </span>
    <input
      type="range"
      min="0"
      max=${numLayers}
      value=${depth}
      aria-valuetext=${describe(depth, numLayers)}
      onInput=${(event) => onDepth(Math.min(max, Number(event.target.value)))}
    />
  </label>`;
}

/** A depth in words. */
export function describe(depth, numLayers) {
  if (depth === 0) return "depth 0, the base model";
  if (depth === numLayers) return `depth ${depth} of ${numLayers}, the whole adapter`;
  return `depth ${depth} of ${numLayers}`;
}
