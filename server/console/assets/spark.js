// A figure over the last minutes, as a line without axes: its shape, not its values.

import { line, scale } from "./chart.js";
import { html } from "./html.js";

const WIDTH = 120;
const HEIGHT = 28;

/** values: the oldest first; null where nothing is known. places: how many there may be in all. */
export function Spark({ values, places }) {
  const known = values.map((value, index) => [index + places - values.length, value]);
  const points = known.filter(([, value]) => value !== null);
  const most = Math.max(...points.map(([, value]) => value), 1e-9);
  const x = scale([0, Math.max(1, places - 1)], [0, WIDTH]);
  const y = scale([0, most], [HEIGHT - 1, 2]);
  return html`<svg class="spark" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" aria-hidden="true">
    <path class="grid" d=${`M0 ${HEIGHT - 1}H${WIDTH}`} />
    <path class="line score" d=${line(points.map(([index, value]) => [x(index), y(value)]))} />
  </svg>`;
}
