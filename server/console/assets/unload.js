// Unloading an adapter, after a question: whoever uses it finishes either way.

import { Dialog } from "./dialog.js";
import { html, useState } from "./html.js";
import { Problem } from "./notice.js";
import { plural } from "./numbers.js";
import { ask } from "./server.js";

export function Unload({ adapter, onDone, onClose }) {
  const [isBusy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const { name, num_running: running } = adapter;

  async function unload() {
    setBusy(true);
    try {
      const where = `admin/adapters/${encodeURIComponent(name)}?force`;
      await ask(where, { method: "DELETE", scope: "admin" });
      onClose();
      await onDone();
    } catch (raised) {
      setError(raised);
      setBusy(false);
    }
  }

  return html`<${Dialog} title=${`Unload ${name}?`} onClose=${onClose}>
    <p>
      New requests for it are refused from then on.
      ${running > 0 && ` ${plural(running, "request")} that ${running === 1 ? "runs" : "run"} with it will finish.`}
      Its history of calibrations is kept.
    </p>
    <${Problem} error=${error} />
    <div class="row end">
      <button type="button" class="plain" onClick=${onClose}>Keep it</button>
      <button type="button" class="main" disabled=${isBusy} onClick=${unload}>Unload</button>
    </div>
  <//>`;
}
