// A record as a file: the server's own drawing, a table, and everything as JSON.

import { html, useState } from "./html.js";
import { Problem } from "./notice.js";
import { ask } from "./server.js";

const COLUMNS = ["depth", "score", "difference_to_full", "low", "high"];

export function Exports({ adapter, boundary }) {
  const [error, setError] = useState(null);
  const { id, version, record } = boundary;
  const name = `${adapter}-v${version}`;

  async function drawing() {
    setError(null);
    try {
      const svg = await ask(`admin/boundaries/${id}/curve.svg`, { scope: "admin" });
      save(`${name}.svg`, svg, "image/svg+xml");
    } catch (raised) {
      setError(raised);
    }
  }

  return html`<div class="row exports">
    <span class="quiet">Export</span>
    ${record.curve &&
    html`<button type="button" class="plain small" onClick=${drawing}>SVG</button>
      <button
        type="button"
        class="plain small"
        onClick=${() => save(`${name}.csv`, csv(record), "text/csv")}
      >
        CSV
      </button>`}
    <button
      type="button"
      class="plain small"
      onClick=${() =>
        save(`${name}.json`, `${JSON.stringify(boundary, null, 1)}\n`, "application/json")}
    >
      JSON
    </button>
    <${Problem} error=${error} />
  </div>`;
}

function csv({ curve }) {
  const rows = curve.map(({ score, to_full: { mean, low, high } }, depth) =>
    [depth, score, mean, low, high].join(","),
  );
  return `${[COLUMNS.join(","), ...rows].join("\n")}\n`;
}

function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  URL.revokeObjectURL(url);
}
