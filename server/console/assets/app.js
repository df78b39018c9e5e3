// The frame of every part: what is served, the parts to go to, whether the server answers, the keys.

import { Adapters } from "./adapters.js";
import { Calibration } from "./calibration.js";
import { Compare } from "./compare.js";
import { html, useEffect, useState } from "./html.js";
import { Keyring } from "./keyring.js";
import { key } from "./keys.js";
import { Live } from "./live.js";
import { Empty } from "./notice.js";
import { address, useRoute } from "./route.js";
import { ServedProvider, useServedState } from "./served.js";

const PARTS = {
  compare: { name: "Compare", view: Compare, needs: "models" },
  adapters: { name: "Adapters", view: Adapters, needs: "models" },
  calibration: { name: "Calibration", view: Calibration, needs: "admin" },
  live: { name: "Live", view: Live, needs: null },
};

const STANDING = {
  asking: "asking the server",
  ready: "ready",
  locked: "needs a key",
  draining: "stopping",
  away: "no answer",
};

export function App() {
  const served = useServedState();
  const [asked, ...rest] = useRoute();
  const [showsKeys, setShowsKeys] = useState(false);
  const current = PARTS[asked] ? asked : "compare";
  const part = PARTS[current];
  const openKeys = () => setShowsKeys(true);

  useEffect(() => {
    document.title = `${part.name} · Fathom`;
  }, [current]);

  return html`<${ServedProvider} value=${served}>
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header class="top">
      <span class="brand">
        <svg class="mark" viewBox="0 0 16 16" aria-hidden="true">
          <path class="rung on" d="M2 1h12v3H2zM2 5h12v3H2z" />
          <path class="rung off" d="M2 9h12v2.5H2zM2 12.5h12V15H2z" />
        </svg>
        Fathom
      </span>
      ${served.base &&
      html`<span class="base" title=${served.base.root}>${served.base.id}</span>`}
      <nav aria-label="Parts of the console">
        ${Object.entries(PARTS)
          .filter(([, { needs }]) => needs !== "admin" || mayOperate(served))
          .map(
            ([name, { name: text }]) =>
              html`<a key=${name} href=${address(name)} aria-current=${name === current ? "page" : null}>
                ${text}
              </a>`,
          )}
      </nav>
      <span class="standing ${served.state}" role="status">${STANDING[served.state]}</span>
      <button type="button" class="plain" onClick=${openKeys}>Keys</button>
    </header>
    <main id="main" tabindex="-1">
      <h1 class="sr">${part.name}</h1>
      ${view(part, served, rest, openKeys)}
    </main>
    ${showsKeys && html`<${Keyring} onClose=${() => setShowsKeys(false)} />`}
  <//>`;
}

/** The part itself, or why it has nothing to show yet. */
function view(part, served, rest, openKeys) {
  if (served.state === "asking") return html`<p class="quiet wait">Asking the server…</p>`;
  if (part.needs === "admin" && !served.isAdmin) {
    return html`<${Empty} title="This part is for who operates the server">
      <p>
        ${served.hasAdmin
          ? "Calibration needs the admin key of this server."
          : "Start the server with --admin-key to open it: until then nobody can calibrate over HTTP."}
      </p>
      ${served.hasAdmin &&
      html`<button type="button" class="main" onClick=${openKeys}>Type a key</button>`}
    <//>`;
  }
  if (part.needs === "models" && served.state === "locked") {
    return html`<${Empty} title=${wanted(served)}>
      <p>It is kept in this tab only, and forgotten when you close it.</p>
      <button type="button" class="main" onClick=${openKeys}>Type a key</button>
    <//>`;
  }
  if (part.needs && served.state === "away" && served.base === null) {
    return html`<${Empty} title="The server does not answer">
      <p>This page tries again every few seconds.</p>
    <//>`;
  }
  return html`<${part.view} path=${rest} />`;
}

function wanted(served) {
  return served.problem ? "This server does not know that key" : "This server asks for an API key";
}

/** Also until the server has said so: a part that comes later would move the others under a pointer. */
function mayOperate({ state, isAdmin }) {
  return isAdmin || (state === "asking" && key("admin") !== "");
}

/** The address names parts of the console, so a link within the page must not change it. */
function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}
