// A depth set by hand, with the reason that the history will show.

import { html, useState } from "./html.js";
import { DepthPicker, describe } from "./ladder.js";

export function Pin({ depth: first, numLayers, layers, isBusy, onPin }) {
  const [depth, setDepth] = useState(first);
  const [reason, setReason] = useState("");

  async function pin(event) {
    event.preventDefault();
    if (await onPin(depth, reason)) setReason("");
  }

  return html`<details class="panel pin">
    <summary>Set a depth by hand</summary>
    <form onSubmit=${pin}>
      <p>${describe(depth, numLayers)}</p>
      <${DepthPicker}
        label="Depth to set"
        depth=${depth}
        numLayers=${numLayers}
        layers=${layers}
        onDepth=${setDepth}
      />
      <div class="row">
        <label class="field wide">
          <span>Reason</span>
          <input
            required
            maxlength="2000"
            value=${reason}
            onInput=${(event) => setReason(event.target.value)}
          />
        </label>
        <button type="submit" class="main" disabled=${isBusy || !reason.trim()}>
          Set depth ${depth}
        </button>
      </div>
    </form>
  </details>`;
}
