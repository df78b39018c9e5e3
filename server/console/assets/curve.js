// A calibration's curve: mean score by depth with the interval of its difference to full, the depth that
// was chosen, controls of equal budget, and a second record's curve to compare with.

import { Legend, line, scale, ticks, useWidth, wholeTicks } from "./chart.js";
import { html, useState } from "./html.js";
import { number, signed } from "./numbers.js";

const HEIGHT = 260;
const MARGIN = { top: 14, right: 30, bottom: 34, left: 56 };
const CONTROLS = { top_k: "as many layers, of most output", random_k: "as many layers, by lot" };
const NEAR = 0.15;
/** What "near full" shows: this share of the way from base to full. */

export function Curve({ boundary, other }) {
  const { record, evidence } = boundary;
  const [element, width] = useWidth();
  const [isNear, setNear] = useState(false);
  const [depth, setDepth] = useState(record.depth);
  const full = record.curve.length - 1;
  const scores = record.curve.map(({ score }) => score);
  const controls = Object.entries(evidence.controls ?? {}).filter(([name]) => name in CONTROLS);
  const spent = record.proposed_depth;

  const x = scale([0, full], [MARGIN.left, width - MARGIN.right]);
  const [low, high] = range(record, other?.record, controls, isNear);
  const y = scale([low, high], [HEIGHT - MARGIN.bottom, MARGIN.top]);
  const at = (values) => line(values.map((value, index) => [x(index), y(value)]));
  const band = bandOf(record);

  function move(event) {
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };
    const target =
      event.key === "Home" ? 0 : event.key === "End" ? full : depth + (steps[event.key] ?? NaN);
    if (Number.isNaN(target)) return;
    event.preventDefault();
    setDepth(Math.max(0, Math.min(full, target)));
  }

  function point(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
    setDepth(Math.max(0, Math.min(full, Math.round(share * full))));
  }

  return html`<figure class="curve">
    <div class="row between">
      <p class="readout" id="curve-readout">${reading(record, depth, other?.record)}</p>
      <fieldset class="switch small">
        <legend class="sr">What the chart shows</legend>
        ${[
          ["Whole curve", false],
          ["Near full", true],
        ].map(
          ([text, value]) =>
            html`<label>
              <input
                type="radio"
                name="range"
                checked=${isNear === value}
                onChange=${() => setNear(value)}
              />
              <span>${text}</span>
            </label>`,
        )}
      </fieldset>
    </div>
    <div
      ref=${element}
      class="plot"
      role="slider"
      tabindex="0"
      aria-label="Depth on the curve"
      aria-valuemin="0"
      aria-valuemax=${full}
      aria-valuenow=${depth}
      aria-valuetext=${reading(record, depth, other?.record)}
      onKeyDown=${move}
      onPointerMove=${point}
      onPointerDown=${point}
    >
      <svg width=${width} height=${HEIGHT} aria-hidden="true">
        <defs>
          <clipPath id="plot">
            <rect
              x=${MARGIN.left - 6}
              y=${MARGIN.top - 6}
              width=${Math.max(0, width - MARGIN.left - MARGIN.right + 12)}
              height=${HEIGHT - MARGIN.top - MARGIN.bottom + 12}
            />
          </clipPath>
        </defs>
        ${ticks(low, high, 5).map(
          (value) =>
            html`<path class="grid" d=${`M${MARGIN.left} ${y(value)}H${width - MARGIN.right}`} />
              <text class="tick" x=${MARGIN.left - 8} y=${y(value) + 4} text-anchor="end">
                ${number(value, digits(high - low))}
              </text>`,
        )}
        ${wholeTicks(full, width / 48).map(
          (value) =>
            html`<text class="tick" x=${x(value)} y=${HEIGHT - MARGIN.bottom + 16} text-anchor="middle">
              ${value === 0 ? "base" : value === full ? `full ${full}` : value}
            </text>`,
        )}
        <text class="tick" x=${(MARGIN.left + width) / 2} y=${HEIGHT - 3} text-anchor="middle">
          depth
        </text>
        <g clip-path="url(#plot)">
          <path
            class="band"
            d=${`${at(band.map(([, upper]) => upper))}${line(
              band.map(([lower], index) => [x(index), y(lower)]).reverse(),
            ).replace("M", "L")}Z`}
          />
          <path class="line full" d=${`M${x(0)} ${y(scores[full])}H${x(full)}`} />
          <path class="cursor" d=${`M${x(depth)} ${MARGIN.top - 6}V${HEIGHT - MARGIN.bottom + 4}`} />
          ${other?.record.curve &&
          html`<path class="line other" d=${at(other.record.curve.map(({ score }) => score))} />
            <circle
              class="chosen other"
              cx=${x(other.record.depth)}
              cy=${y(other.record.curve[other.record.depth].score)}
              r="5"
            />`}
          <path class="line score" d=${at(scores)} />
          ${full <= 48 &&
          scores.map((score, index) => html`<circle class="dot" cx=${x(index)} cy=${y(score)} r="2.5" />`)}
          ${controls.map(([name, { mean }]) => {
            const [cx, cy] = [x(spent), y(mean)];
            const shape =
              name === "top_k"
                ? `M${cx} ${cy - 5}l5 5-5 5-5-5z`
                : `M${cx} ${cy - 5}l5.5 9h-11z`;
            return html`<path class="control ${name}" d=${shape} />`;
          })}
          <circle class="chosen" cx=${x(record.depth)} cy=${y(scores[record.depth])} r="5.5" />
        </g>
      </svg>
    </div>
    <${Legend}
      entries=${[
        ["score", `mean ${record.metric}`],
        ["band", `${100 * record.confidence} % interval of the difference to full`],
        ["chosen", `chosen, ${record.depth}`],
        ...controls.map(([name]) => [name, CONTROLS[name]]),
        ...(other ? [["other", `version ${other.version}`]] : []),
      ]}
    />
  </figure>`;
}

/** The interval, drawn about full's score. */
function bandOf({ curve }) {
  const fullScore = curve.at(-1).score;
  return curve.map(({ to_full: { low, high } }) => [fullScore + low, fullScore + high]);
}

function range(record, other, controls, isNear) {
  const all = [record, ...(other?.curve ? [other] : [])];
  const values = all.flatMap((each) => [
    ...each.curve.map(({ score }) => score),
    ...bandOf(each).flat(),
  ]);
  values.push(...controls.map(([, { mean }]) => mean));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (isNear) {
    const [base, full] = [record.curve[0].score, record.curve.at(-1).score];
    const reach = Math.abs(full - base) * NEAR || 1;
    const chosen = Math.abs(full - record.curve[record.depth].score) * 1.2;
    low = full - Math.max(reach, chosen);
    high = Math.min(high, full + Math.max(reach, chosen));
  }
  const room = (high - low || 1) * 0.04;
  return [low - room, high + room];
}

function digits(span) {
  return Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(span))));
}

function reading(record, depth, other) {
  const { score, to_full: difference } = record.curve[depth];
  const { mean, low, high } = difference;
  const name = depth === 0 ? "Base" : depth === record.num_layers ? "Full" : `Depth ${depth}`;
  const versus =
    depth === record.num_layers
      ? ""
      : `; to full ${signed(mean)} (${signed(low)} to ${signed(high)})`;
  const beside = other?.curve ? `; the other record ${number(other.curve[depth].score)}` : "";
  return `${name}: ${number(score)}${versus}${beside}`;
}
