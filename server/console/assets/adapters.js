// Adapters: what each is, where it lies, how deep it reaches and what that saves; loading and unloading.

import { html, useEffect, useState } from "./html.js";
import { Ladder } from "./ladder.js";
import { LoadAdapter } from "./load_adapter.js";
import { Empty, Problem } from "./notice.js";
import { age, bytes, count, DASH, percent, plural } from "./numbers.js";
import { usePolled } from "./polled.js";
import { address } from "./route.js";
import { ask } from "./server.js";
import { useServed } from "./served.js";
import { Unload } from "./unload.js";

const EVERY_MS = 5000;
const MAX_ROWS = 200;
/** Modules in the order in which a layer runs them; others come after. */
const ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

export function Adapters() {
  const served = useServed();
  const { isAdmin, adapters: cards } = served;
  const { value, error, again } = usePolled(() => look(isAdmin), EVERY_MS, [isAdmin]);
  const [wanted, setWanted] = useState("");
  const [unloading, setUnloading] = useState(null);
  const rows = (value ?? cards.map(ofCard)).filter(({ name }) => name.includes(wanted));
  // Until the first answer that a new key gives, there are cards alone.
  const isWhole = isAdmin && rows.every((row) => "layer_applications" in row);
  const news = () => Promise.all([again(), served.refresh()]);

  return html`<section class="adapters">
    <div class="row">
      <p>
        ${plural(value?.length ?? cards.length, "adapter")}
        ${served.base && html` on <strong>${served.base.id}</strong>`}
      </p>
      ${(value ?? cards).length > 8 &&
      html`<label class="field inline">
        <span class="sr">Show names that hold</span>
        <input
          type="search"
          placeholder="Filter by name"
          value=${wanted}
          onInput=${(event) => setWanted(event.target.value)}
        />
      </label>`}
    </div>
    <${Problem} error=${error} />
    ${rows.length === 0
      ? html`<${Empty} title=${wanted ? `No adapter's name holds “${wanted}”` : "No adapter is loaded"}>
          <p>
            ${wanted ? "" : "Name one with --adapter when the server starts, or load one below."}
          </p>
        <//>`
      : html`<${Table} rows=${rows.slice(0, MAX_ROWS)} isAdmin=${isWhole} onUnload=${setUnloading} />`}
    ${rows.length > MAX_ROWS &&
    html`<p class="quiet">The first ${MAX_ROWS} of ${count(rows.length)}: type a part of a name.</p>`}
    ${isAdmin && html`<${LoadAdapter} onLoaded=${news} />`}
    ${unloading &&
    html`<${Unload} adapter=${unloading} onDone=${news} onClose=${() => setUnloading(null)} />`}
  </section>`;
}

async function look(isAdmin) {
  if (isAdmin) return (await ask("admin/adapters", { scope: "admin" })).adapters;
  return (await ask("v1/models", { scope: "api" })).data.filter(({ lora }) => lora).map(ofCard);
}

/** What a model card tells, which is less than who operates the server may see. */
function ofCard({ id, lora }) {
  return {
    name: id,
    rank: lora.rank,
    num_layers: lora.num_layers,
    effective_max_depth: lora.effective_max_depth,
    calibrated: lora.calibrated_depth === null ? null : { depth: lora.calibrated_depth },
  };
}

function Table({ rows, isAdmin, onUnload }) {
  const columns = [
    "Adapter",
    "Depth of auto",
    "Rank",
    ...(isAdmin
      ? ["Modules", "Memory", "Where", "Calibrated", "Requests", "LoRA skipped", "Actions"]
      : []),
  ];
  const right = new Set(["Rank", "Memory", "Requests", "LoRA skipped"]);
  return html`<table class="list wide" role="table">
    <caption class="sr">
      Adapters
    </caption>
    <thead role="rowgroup">
      <tr role="row">
        ${columns.map(
          (text) =>
            html`<th scope="col" role="columnheader" class=${right.has(text) ? "figure" : null}>
              ${text === "Actions" ? html`<span class="sr">${text}</span>` : text}
            </th>`,
        )}
      </tr>
    </thead>
    <tbody role="rowgroup">
      ${rows.map(
        (row) => html`<${Row} key=${row.name} row=${row} isAdmin=${isAdmin} onUnload=${onUnload} />`,
      )}
    </tbody>
  </table>`;
}

function Row({ row, isAdmin, onUnload }) {
  const { calibrated, num_layers: full } = row;
  const depth = calibrated?.depth ?? row.effective_max_depth;
  const words = calibrated ? `${depth} of ${full}` : "full, not calibrated";
  const skipped = isAdmin ? shareSkipped(row.layer_applications) : null;
  return html`<tr role="row">
    <th scope="row" role="rowheader">
      <a href=${isAdmin ? address("calibration", row.name) : address("compare", row.name)}>
        ${row.name}
      </a>
      ${row.refused_record &&
      html`<span class="quiet note">A record is not applied: ${row.refused_record}</span>`}
    </th>
    <td role="cell" data-label="Depth of auto">
      <span class="reach">
        <${Ladder}
          depth=${depth}
          numLayers=${full}
          layers=${row.layers?.length ? row.layers : null}
          label=${words}
        />
        <span aria-hidden="true">${words}</span>
      </span>
    </td>
    <td role="cell" data-label="Rank" class="figure">${row.rank}</td>
    ${isAdmin &&
    html`<td role="cell" data-label="Modules">
        <span class="quiet" title=${row.modules.join(", ")}>${modules(row.modules)}</span>
      </td>
      <td role="cell" data-label="Memory" class="figure">${bytes(row.num_bytes)}</td>
      <td role="cell" data-label="Where">${place(row)}</td>
      <td role="cell" data-label="Calibrated">${age(calibrated?.calibrated_at)}</td>
      <td role="cell" data-label="Requests" class="figure">
        ${count(row.num_requests)}
        ${row.num_running > 0 && html`<span class="quiet"> (${row.num_running} running)</span>`}
      </td>
      <td role="cell" data-label="LoRA skipped" class="figure">${percent(skipped)}</td>
      <td role="cell" class="actions">
        <button
          type="button"
          class="plain small"
          aria-label=${`Unload ${row.name}`}
          onClick=${() => onUnload(row)}
        >
          Unload
        </button>
      </td>`}
  </tr>`;
}

/** Of the layer applications that its tokens met, the share above their depth. */
function shareSkipped({ applied, skipped }) {
  return applied + skipped ? skipped / (applied + skipped) : null;
}

function modules(names) {
  if (names.length === 0) return DASH;
  const place = (name) => (ORDER.indexOf(name) + 1 || ORDER.length + 1);
  const ordered = [...names].sort((a, b) => place(a) - place(b));
  return ordered.map((name) => name.replace(/_proj$/, "")).join(" ");
}

function place({ residency, resident_depth: depth, num_layers: full }) {
  if (residency === "device") {
    return depth !== null && depth < full ? `device, below ${depth}` : "device";
  }
  return residency === "host" ? "host" : "disk";
}
