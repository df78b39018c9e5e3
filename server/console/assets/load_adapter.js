// Loading an adapter: a name, a path below the server's adapter root, and why it was refused.

import { html, useState } from "./html.js";
import { Problem } from "./notice.js";
import { ask } from "./server.js";

const NOTHING = { name: "", path: "", replace: false };

export function LoadAdapter({ onLoaded }) {
  const [typed, setTyped] = useState(NOTHING);
  const [state, setState] = useState({ isBusy: false, error: null, loaded: null });
  const set = (change) => setTyped({ ...typed, ...change });

  async function load(event) {
    event.preventDefault();
    setState({ isBusy: true, error: null, loaded: null });
    try {
      const { name, path, replace } = typed;
      const where = `admin/adapters/${encodeURIComponent(name.trim())}`;
      const body = { path: path.trim(), replace };
      const loaded = await ask(where, { method: "PUT", scope: "admin", body });
      setState({ isBusy: false, error: null, loaded });
      setTyped(NOTHING);
      await onLoaded();
    } catch (error) {
      setState({ isBusy: false, error, loaded: null });
    }
  }

  return html`<section class="panel" aria-labelledby="load-title">
    <h2 id="load-title">Load an adapter</h2>
    <form onSubmit=${load}>
      <div class="row">
        <label class="field">
          <span>Name</span>
          <input
            required
            autocomplete="off"
            value=${typed.name}
            onInput=${(event) => set({ name: event.target.value })}
          />
        </label>
        <label class="field wide">
          <span>Path, below the server's adapter root</span>
          <input
            required
            autocomplete="off"
            spellcheck="false"
            value=${typed.path}
            onInput=${(event) => set({ path: event.target.value })}
          />
        </label>
        <label class="check">
          <input
            type="checkbox"
            checked=${typed.replace}
            onChange=${(event) => set({ replace: event.target.checked })}
          />
          <span>Replace what has this name</span>
        </label>
        <button type="submit" class="main" disabled=${state.isBusy}>
          ${state.isBusy ? "Loading…" : "Load"}
        </button>
      </div>
      <${Problem} error=${state.error} title="Not loaded." />
      <p role="status">
        ${state.loaded && `${state.loaded.name} is loaded: rank ${state.loaded.rank}.`}
      </p>
    </form>
  </section>`;
}
