// How deep the requests of the last minutes reached: a ladder whose rungs are as long as their share.

import { html } from "./html.js";
import { count, percent } from "./numbers.js";
import { Empty } from "./notice.js";

export function Soundings({ ranges, windowName }) {
  const rows = named(ranges);
  const amount = rows.reduce((sum, row) => sum + row.count, 0);
  const most = Math.max(...rows.map((row) => row.count), 1);
  return html`<section class="panel soundings" aria-labelledby="soundings-title">
    <h2 id="soundings-title">Depth of requests</h2>
    ${amount === 0
      ? html`<${Empty} title="No request in the ${windowName}">
          <p>Every request counts here when it comes, at the depth that it reaches.</p>
        <//>`
      : html`<table>
          <caption class="sr">
            Requests by depth, ${windowName}
          </caption>
          <tbody>
            ${rows.map(
              (row) =>
                html`<tr>
                  <th scope="row" class="figure">${row.name}</th>
                  <td class="rungs">
                    <span class="rung-track">
                      <span class="rung-bar" style=${{ width: `${(100 * row.count) / most}%` }}></span>
                    </span>
                  </td>
                  <td class="figure">${row.count ? count(row.count) : ""}</td>
                  <td class="figure quiet">${row.count ? percent(row.count / amount) : ""}</td>
                </tr>`,
            )}
          </tbody>
        </table>`}
  </section>`;
}

/** Ranges as depths: each by itself, or several where a model has many layers. */
function named(ranges) {
  let from = 0;
  return ranges
    .filter(({ below }) => below !== Infinity)
    .map(({ below, count: amount }, index, all) => {
      const isFull = index === all.length - 1 && index > 0;
      const span = from === below ? `${below}` : `${from}–${below}`;
      from = below + 1;
      return { name: below === 0 ? "base" : isFull ? `full ${span}` : span, count: amount };
    });
}
