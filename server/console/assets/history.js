// An adapter's records, the newest first: which one counts, which are looked at, and making another count.

import { html } from "./html.js";
import { Ladder } from "./ladder.js";
import { moment } from "./numbers.js";
import { author, VERDICTS } from "./record.js";

export function History({ boundaries, activeVersion, shown, other, isBusy, onShow, onOther, onActivate }) {
  return html`<section class="panel history" aria-labelledby="history-title">
    <h2 id="history-title">History</h2>
    <ol>
      ${boundaries.map(entry)}
    </ol>
  </section>`;

  function entry({ id, version, record, actor, created_at: at }) {
    const isShown = id === shown;
    const verdict = record.verdict ? VERDICTS[record.verdict] : "set by hand";
    const samples = record.num_samples ? `, ${record.num_samples} samples` : "";
    return html`<li key=${id} class=${isShown ? "chosen" : null}>
      <div class="row between">
        <button
          type="button"
          class="link"
          aria-pressed=${isShown ? "true" : "false"}
          onClick=${() => onShow(id)}
        >
          Version ${version}
        </button>
        ${version === activeVersion
          ? html`<span class="tag">active</span>`
          : html`<button
              type="button"
              class="plain small"
              disabled=${isBusy}
              aria-label=${`${verb(version)} version ${version}`}
              onClick=${() => onActivate(version)}
            >
              ${verb(version)}
            </button>`}
      </div>
      <div class="reach">
        <${Ladder} depth=${record.depth} numLayers=${record.num_layers} />
        <span><span aria-hidden="true">${record.depth}</span> <span class="quiet">${verdict}</span></span>
      </div>
      <div class="row between quiet note">
        <span>${moment(at)}, ${author(actor)}${samples}</span>
        ${boundaries.length > 1 &&
        html`<label class="check">
          <input
            type="checkbox"
            aria-label=${`Compare version ${version} with the one that is shown`}
            checked=${id === other}
            disabled=${isShown}
            onChange=${() => onOther(id === other ? null : id)}
          />
          <span aria-hidden="true">diff</span>
        </label>`}
      </div>
    </li>`;
  }

  /** An older version than the active one is rolled back to. */
  function verb(version) {
    return activeVersion !== null && version < activeVersion ? "Roll back" : "Activate";
  }
}
