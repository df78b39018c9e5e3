// A model's layers as rungs: filled below the depth, hollow above it, a dot where an adapter has no LoRA
// at all. The one picture of depth, wherever the console shows one.

import { html } from "./html.js";

const RUNG = 7;
const GAP = 2;
const THICK = 12;

/** depth: how many layers apply their LoRA. layers: those that have any; null for all. */
export function Ladder({ depth, numLayers, layers = null, label, isUpright = false }) {
  const length = numLayers * RUNG - GAP;
  const has = layers && new Set(layers);
  const rungs = Array.from({ length: numLayers }, (_, layer) => {
    const at = layer * RUNG;
    const isBare = has && !has.has(layer);
    const thickness = isBare ? 2 : THICK;
    const across = (THICK - thickness) / 2;
    const [x, y, width, height] = isUpright
      ? [across, at, thickness, RUNG - GAP]
      : [at, across, RUNG - GAP, thickness];
    const kind = isBare ? "bare" : layer < depth ? "on" : "off";
    return html`<rect class="rung ${kind}" x=${x} y=${y} width=${width} height=${height} rx="1" />`;
  });
  const box = isUpright ? `0 0 ${THICK} ${length}` : `0 0 ${length} ${THICK}`;
  return html`<svg
    class="ladder ${isUpright ? "upright" : "level"}"
    viewBox=${box}
    preserveAspectRatio="none"
    role="img"
    aria-label=${label ?? describe(depth, numLayers)}
  >
    ${rungs}
  </svg>`;
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
