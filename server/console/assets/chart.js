// What charts share: their width in real pixels, so that text has its own size on a phone, and axes.

import { html, useEffect, useRef, useState } from "./html.js";

/** `[ref, width]` of an element, as it is now. */
export function useWidth(first = 640) {
  const element = useRef(null);
  const [width, setWidth] = useState(first);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(entry.contentRect.width || first));
    observer.observe(element.current);
    return () => observer.disconnect();
  }, []);
  return [element, width];
}

/** A line of a chart from values to pixels. */
export function scale([low, high], [from, to]) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

/** About `amount` round values within a range. */
export function ticks(low, high, amount) {
  const rough = (high - low || 1) / amount;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at += 1) {
    found.push(Number((at * step).toPrecision(12)));
  }
  return found;
}

/** Whole numbers from 0 to `last`, as many as have room. */
export function wholeTicks(last, room) {
  const every = Math.max(1, Math.ceil(last / Math.max(1, room)));
  const found = [];
  for (let at = 0; at < last; at += every) found.push(at);
  if (last - found.at(-1) < every && found.length > 1) found.pop();
  return [...found, last];
}

/** A path through points. */
export function line(points) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

/** Words for each figure that a chart shows by colour or shape. */
export function Legend({ entries }) {
  return html`<ul class="legend">
    ${entries.map(
      ([kind, text]) =>
        html`<li>
          <svg viewBox="0 0 18 10" aria-hidden="true">${sample(kind)}</svg>
          <span>${text}</span>
        </li>`,
    )}
  </ul>`;
}

function sample(kind) {
  if (kind === "band") return html`<rect class="band" width="18" height="10" />`;
  if (kind === "top_k") return html`<path class="control top_k" d="M9 1l4 4-4 4-4-4z" />`;
  if (kind === "random_k") return html`<path class="control random_k" d="M9 1l5 8H4z" />`;
  if (kind === "chosen") return html`<circle class="chosen" cx="9" cy="5" r="4" />`;
  return html`<path class="line ${kind}" d="M0 5h18" />`;
}
