// Calibration: one adapter's depth, how it was found, what else was, and finding it anew.

import { Differences } from "./differences.js";
import { History } from "./history.js";
import { html, useEffect, useState } from "./html.js";
import { Job } from "./job.js";
import { Ladder } from "./ladder.js";
import { Empty, Problem } from "./notice.js";
import { age, percent } from "./numbers.js";
import { Pin } from "./pin.js";
import { usePolled } from "./polled.js";
import { AdapterField } from "./question.js";
import { Recalibrate } from "./recalibrate.js";
import { Record } from "./record.js";
import { address } from "./route.js";
import { ask } from "./server.js";
import { useServed } from "./served.js";

const EVERY_MS = 5000;

export function Calibration({ path }) {
  const { value, error, again } = usePolled(lookAtAdapters, EVERY_MS, []);
  const { refresh } = useServed();
  if (value === null) {
    return error ? html`<${Problem} error=${error} />` : html`<p class="quiet wait">Asking…</p>`;
  }
  if (value.length === 0) {
    return html`<${Empty} title="No adapter is loaded">
      <p><a href=${address("adapters")}>Load one</a> to calibrate it.</p>
    <//>`;
  }
  const name = path[0] ?? value[0].name;
  const adapter = value.find((each) => each.name === name);
  const changed = () => Promise.all([again(), refresh()]);
  const pick = (chosen) => (location.hash = address("calibration", chosen));
  return html`<section class="calibration">
    <div class="row head">
      <${AdapterField}
        value=${name}
        adapters=${value.map((each) => ({ id: each.name }))}
        onPick=${pick}
      />
      ${adapter && html`<${Standing} adapter=${adapter} />`}
    </div>
    <${Problem} error=${error} />
    ${adapter
      ? html`<${OfAdapter} key=${`${name} ${adapter.digest}`} adapter=${adapter} onChange=${changed} />`
      : html`<${Empty} title=${`There is no adapter ${name}`}>
          <p>It may have been unloaded. Choose another above.</p>
        <//>`}
  </section>`;
}

async function lookAtAdapters() {
  return (await ask("admin/adapters", { scope: "admin" })).adapters;
}

/** What a request gets that asks for no depth. */
function Standing({ adapter }) {
  const { calibrated, num_layers: full, effective_max_depth: reach, layers } = adapter;
  const depth = calibrated?.depth ?? reach;
  const { applied, skipped } = adapter.layer_applications;
  const words = calibrated
    ? `depth ${depth} of ${full}${calibrated.version ? `, version ${calibrated.version}` : ""}`
    : "the whole adapter: no depth is calibrated";
  return html`<div class="standing-depth">
    <${Ladder} depth=${depth} numLayers=${full} layers=${layers} label=${`auto means ${words}`} />
    <p>
      <strong>auto</strong> means ${words}
      ${calibrated && html`<span class="quiet">, made ${age(calibrated.calibrated_at)}</span>`}
      ${applied + skipped > 0 &&
      html`<span class="quiet"
        >; ${percent(skipped / (applied + skipped))} of LoRA layers skipped so far</span
      >`}
    </p>
    <${Problem} error=${adapter.refused_record} title="A record is not applied." />
  </div>`;
}

function OfAdapter({ adapter, onChange }) {
  const { name } = adapter;
  const history = usePolled(() => look(name), EVERY_MS, [name]);
  const [shown, setShown] = useState(null);
  const [other, setOther] = useState(null);
  const [job, setJob] = useState(null);
  const [failure, setFailure] = useState(null);
  const [isBusy, setBusy] = useState(false);

  const running = history.value?.jobs.find(({ finished_at: end }) => end === null) ?? null;
  // A job that somebody else started, or that was started before this page was loaded anew.
  useEffect(() => {
    if (running && running.id !== job?.id) setJob(running);
  }, [running?.id]);

  if (history.value === null) {
    return history.error
      ? html`<${Problem} error=${history.error} />`
      : html`<p class="quiet wait">Asking…</p>`;
  }
  const { boundaries, active_version: activeVersion } = history.value;
  const find = (id) => boundaries.find((boundary) => boundary.id === id) ?? null;
  const active = boundaries.find(({ is_active: isActive }) => isActive);
  const record = find(shown) ?? active ?? boundaries[0] ?? null;
  const beside = find(other);

  async function change(path, options) {
    setBusy(true);
    setFailure(null);
    try {
      const answer = await ask(`admin/adapters/${encodeURIComponent(name)}/${path}`, {
        scope: "admin",
        ...options,
      });
      await Promise.all([history.again(), onChange()]);
      setShown(answer.boundary_id);
      return true;
    } catch (raised) {
      setFailure(raised);
      return false;
    } finally {
      setBusy(false);
    }
  }

  async function ended(last) {
    await Promise.all([history.again(), onChange()]);
    if (last.boundary_id) setShown(last.boundary_id);
  }

  function show(id) {
    setShown(id);
    if (id === other) setOther(null);
  }

  const activate = (version) => change(`boundaries/${version}/activate`, { method: "POST" });
  const pin = (depth, reason) => change("boundary", { method: "PUT", body: { depth, reason } });
  return html`
    <${Problem} error=${history.error ?? failure} />
    ${job && html`<${Job} key=${job.id} first=${job} onEnd=${ended} />`}
    <div class="split">
      <div class="record-side">
        ${record
          ? html`<${Record} adapter=${name} boundary=${record} other=${beside} />`
          : html`<${Empty} title=${`${name} has never been calibrated`}>
              <p>
                Requests get the whole adapter. Give some samples of what it should do: every depth is
                scored on them, and one is proposed on one half and confirmed on the other.
              </p>
            <//>`}
        ${record && beside && html`<${Differences} one=${record} two=${beside} />`}
      </div>
      <div class="doing-side">
        ${boundaries.length > 0 &&
        html`<${History}
          boundaries=${boundaries}
          activeVersion=${activeVersion}
          shown=${record?.id}
          other=${other}
          isBusy=${isBusy}
          onShow=${show}
          onOther=${setOther}
          onActivate=${activate}
        />`}
        <${Recalibrate} adapter=${name} isRunning=${running !== null} onStarted=${setJob} />
        <${Pin}
          depth=${adapter.calibrated?.depth ?? adapter.effective_max_depth}
          numLayers=${adapter.num_layers}
          layers=${adapter.layers}
          isBusy=${isBusy}
          onPin=${pin}
        />
      </div>
    </div>
  `;
}

async function look(name) {
  const [history, { jobs }] = await Promise.all([
    ask(`admin/adapters/${encodeURIComponent(name)}/boundaries`, { scope: "admin" }),
    ask("admin/jobs", { scope: "admin" }),
  ]);
  return { ...history, jobs: jobs.filter(({ adapter }) => adapter === name) };
}
