// Two views by layer that explain a calibration and never decide it: the logit lens, which is how likely
// the right answer is when a layer's output is read as if it were the last, and how much a layer's LoRA adds.

import { Legend, line, scale, useWidth, wholeTicks } from "./chart.js";
import { html } from "./html.js";
import { number, percent } from "./numbers.js";

const HEIGHT = 130;
const MARGIN = { top: 8, right: 8, bottom: 20, left: 44 };

export function Diagnostics({ evidence, depth }) {
  const { lens_base: base, lens_full: full, lora_norms: norms } = evidence;
  if (!full && !norms) return null;
  return html`<div class="diagnostics">
    ${full &&
    html`<${Chart}
      title="Logit lens: probability of the right answer, by layer"
      series=${[
        ["score", full],
        ["other", base],
      ]}
      depth=${depth}
      format=${percent}
    />`}
    ${norms &&
    html`<${Chart}
      title="Norm of each layer's LoRA output"
      series=${[["bars", norms]]}
      depth=${depth}
      format=${(value) => number(value, 1)}
    />`}
  </div>`;
}

function Chart({ title, series, depth, format }) {
  const [element, width] = useWidth(300);
  const values = series.flatMap(([, each]) => each);
  const numLayers = series[0][1].length;
  const most = Math.max(...values, 0) || 1;
  const x = scale([-0.5, numLayers - 0.5], [MARGIN.left, width - MARGIN.right]);
  const y = scale([0, most], [HEIGHT - MARGIN.bottom, MARGIN.top]);
  const bar = Math.max(1, (x(1) - x(0)) * 0.7);
  const words = series.map(([kind, each]) => {
    const name = { score: "with the whole adapter", other: "base", bars: "norm" }[kind];
    return `${name}: ${each.map((value) => format(value)).join(", ")}`;
  });
  return html`<figure class="diagnostic">
    <figcaption>${title}</figcaption>
    <div ref=${element}>
      <svg width=${width} height=${HEIGHT} role="img" aria-label=${`${title}. ${words.join(". ")}`}>
        ${[0, most].map(
          (value) =>
            html`<path class="grid" d=${`M${MARGIN.left} ${y(value)}H${width - MARGIN.right}`} />
              <text class="tick" x=${MARGIN.left - 6} y=${y(value) + 4} text-anchor="end">
                ${format(value)}
              </text>`,
        )}
        ${wholeTicks(numLayers - 1, width / 44).map(
          (value) =>
            html`<text class="tick" x=${x(value)} y=${HEIGHT - 4} text-anchor="middle">${value}</text>`,
        )}
        ${series.map(([kind, each]) =>
          kind === "bars"
            ? each.map(
                (value, layer) =>
                  html`<rect
                    class="rung ${layer < depth ? "on" : "off"}"
                    x=${x(layer) - bar / 2}
                    y=${y(value)}
                    width=${bar}
                    height=${Math.max(0, y(0) - y(value))}
                  />`,
              )
            : html`<path class="line ${kind}" d=${line(each.map((v, l) => [x(l), y(v)]))} />`,
        )}
      </svg>
    </div>
    ${series.length > 1 &&
    html`<${Legend}
      entries=${[
        ["score", "whole adapter"],
        ["other", "base"],
      ]}
    />`}
  </figure>`;
}
