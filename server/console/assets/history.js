// An adapter's records, the newest first: which one counts, which are looked at, and making another count.

import { html } from "./html.js";
import { Ladder } from "./ladder.js";
import { moment } from "./numbers.js";
import { author, VERDICTS } from "./record.js";

export function History({ boundaries, activeVersion, shown, other, isBusy, onShow, onOther, onActivate }) {
  return html`<section class="panel" aria-labelledby="history-title">
    <h2 id="history-title">History</h2>
    <table class="list compact" role="table">
      <thead role="rowgroup">
        <tr role="row">
          ${["Version", "Depth", "Verdict", "Samples", "Made", "Diff", "Actions"].map(
            (text) =>
              html`<th scope="col" role="columnheader" class=${text === "Samples" ? "figure" : null}>
                ${text === "Actions" ? html`<span class="sr">${text}</span>` : text}
              </th>`,
          )}
        </tr>
      </thead>
      <tbody role="rowgroup">
        ${boundaries.map(row)}
      </tbody>
    </table>
  </section>`;

  function row({ id, version, record, actor, created_at: at }) {
    const verdict = record.verdict ? VERDICTS[record.verdict] : "set by hand";
    const isShown = id === shown;
    return html`<tr key=${id} role="row" class=${isShown ? "chosen" : null}>
      <th scope="row" role="rowheader">
        <button
          type="button"
          class="link"
          aria-pressed=${isShown ? "true" : "false"}
          onClick=${() => onShow(id)}
        >
          Version ${version}
        </button>
        ${version === activeVersion && html`<span class="tag">active</span>`}
      </th>
      <td role="cell" data-label="Depth">
        <span class="reach">
          <${Ladder} depth=${record.depth} numLayers=${record.num_layers} />
          <span aria-hidden="true">${record.depth}</span>
        </span>
      </td>
      <td role="cell" data-label="Verdict">${verdict}</td>
      <td role="cell" data-label="Samples" class="figure">${record.num_samples ?? "–"}</td>
      <td role="cell" data-label="Made">
        ${moment(at)} <span class="quiet">${author(actor)}</span>
      </td>
      <td role="cell" data-label="Diff">
        <input
          type="checkbox"
          aria-label=${`Show version ${version} beside the one that is shown`}
          checked=${id === other}
          disabled=${isShown}
          onChange=${() => onOther(id === other ? null : id)}
        />
      </td>
      <td role="cell" class="actions">
        ${version !== activeVersion &&
        html`<button
          type="button"
          class="plain small"
          disabled=${isBusy}
          aria-label=${`${verb(version)} version ${version}`}
          onClick=${() => onActivate(version)}
        >
          ${verb(version)}
        </button>`}
      </td>
    </tr>`;
  }

  /** An older version than the active one is rolled back to. */
  function verb(version) {
    return activeVersion !== null && version < activeVersion ? "Roll back" : "Activate";
  }
}
