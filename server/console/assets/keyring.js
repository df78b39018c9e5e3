// Where a person types the keys of this server, and reads whether they are right.

import { Dialog } from "./dialog.js";
import { html, useEffect, useState } from "./html.js";
import { key, setKeys } from "./keys.js";
import { Problem } from "./notice.js";
import { useServed } from "./served.js";

export function Keyring({ onClose }) {
  const served = useServed();
  const [typed, setTyped] = useState({ api: key("api"), admin: key("admin") });
  const [isTried, setTried] = useState(false);
  const isRight =
    served.state === "ready" && (!key("admin") || served.isAdmin || !served.hasAdmin);

  useEffect(() => {
    if (isTried && isRight) onClose();
  }, [served]);

  function use(event) {
    event.preventDefault();
    setTried(true);
    setKeys(typed);
  }

  function field(scope, label, note) {
    return html`<label class="field">
      <span>${label}</span>
      <input
        type="password"
        autocomplete="off"
        spellcheck="false"
        value=${typed[scope]}
        onInput=${(event) => setTyped({ ...typed, [scope]: event.target.value })}
      />
      <span class="quiet">${note}</span>
    </label>`;
  }

  return html`<${Dialog} title="Keys" onClose=${onClose}>
    <form onSubmit=${use}>
      ${field(
        "api",
        "API key",
        served.needsApiKey
          ? "Asks the model. This server wants one."
          : "This server answers without one.",
      )}
      ${served.hasAdmin
        ? field("admin", "Admin key", "Opens calibration, and loads and unloads adapters.")
        : html`<p class="quiet">
            Calibration and loading are off, because the server has no admin key. It gets one by
            <code>--admin-key</code>.
          </p>`}
      ${isTried && html`<${Problem} error=${served.state === "locked" && served.problem} />`}
      ${isTried && html`<${Problem} error=${key("admin") && served.adminProblem} />`}
      <p class="quiet">
        Kept in this tab until it is closed, and sent to this server only.
      </p>
      <div class="row end">
        <button type="button" class="plain" onClick=${onClose}>Cancel</button>
        <button type="submit" class="main">Use these keys</button>
      </div>
    </form>
  <//>`;
}
