// Starting a calibration: samples as JSON lines, pasted or from a file, and what is wrong with them by line.

import { html, useRef, useState } from "./html.js";
import { Problem } from "./notice.js";
import { plural } from "./numbers.js";
import { ask } from "./server.js";

const METRICS = {
  log_likelihood: "log-likelihood of the completion",
  kl_to_full: "distance from the full adapter (prompts alone)",
  exact_match: "exact match of written texts",
  regex_answer: "answer found by a pattern",
  rouge_l: "ROUGE-L of written texts",
  bleu: "BLEU of written texts",
  chrf: "chrF of written texts",
};
const WRITES = ["exact_match", "regex_answer", "rouge_l", "bleu", "chrf"];
const UNSET = {
  text: "",
  file: null,
  metric: "log_likelihood",
  method: "sweep",
  tolerance: 0,
  isShare: false,
  maxSamples: null,
  maxTokens: null,
  pattern: "",
  seed: 0,
  activate: true,
  isDry: false,
};

export function Recalibrate({ adapter, isRunning, onStarted }) {
  const [form, setForm] = useState(UNSET);
  const [error, setError] = useState(null);
  const [isBusy, setBusy] = useState(false);
  const area = useRef(null);
  const set = (change) => setForm((now) => ({ ...now, ...change }));
  const lines = form.text.split("\n");
  const numLines = lines.length - (lines.at(-1) === "" ? 1 : 0);

  async function upload(event) {
    const [file] = event.target.files;
    if (!file) return;
    setError(null);
    set({ text: await file.text(), file: file.name });
    event.target.value = ""; // so that the same file, mended, can be chosen again
  }

  async function start(event) {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      const path = `admin/adapters/${encodeURIComponent(adapter)}/recalibrate`;
      const { job } = await ask(path, { method: "POST", scope: "admin", body: bodyOf(form) });
      onStarted(job);
    } catch (raised) {
      setError(raised);
    }
    setBusy(false);
  }

  /** Put the cursor into a line and mark it. */
  function go(line) {
    const begin = lines.slice(0, line - 1).reduce((sum, text) => sum + text.length + 1, 0);
    area.current.focus();
    area.current.setSelectionRange(begin, begin + (lines[line - 1]?.length ?? 0));
  }

  return html`<section class="panel" aria-labelledby="recalibrate-title">
    <h2 id="recalibrate-title">Calibrate ${adapter} anew</h2>
    <form class="recalibrate" onSubmit=${start}>
      <label class="field">
        <span>Samples: a JSON object a line, of prompt and completion, or messages</span>
        <textarea
          ref=${area}
          rows="5"
          class="prompt"
          spellcheck="false"
          placeholder='{"prompt": "...", "completion": "..."}'
          value=${form.text}
          onInput=${(event) => set({ text: event.target.value, file: null })}
        ></textarea>
      </label>
      <div class="row">
        <label class="upload plain">
          Choose a file…
          <input type="file" class="sr" accept=".jsonl,.json,.txt" onChange=${upload} />
        </label>
        <span class="quiet">
          ${form.text
            ? `${plural(numLines, "line")}${form.file ? ` of ${form.file}` : ""}`
            : "At least 32 lines; a few hundred are better."}
        </span>
      </div>
      <div class="row">
        ${choice("Metric", "metric", METRICS, "wide")}
        ${choice("Proposed by", "method", { sweep: "the scores", lens: "the logit lens" })}
        ${figure("Tolerance", "tolerance", { min: 0, step: "any" })}
        ${check("as a share of the adapter's gain", "isShare")}
      </div>
      <div class="row">
        ${figure("Samples at most", "maxSamples", { min: 1, placeholder: "all" })}
        ${figure("Seed", "seed", { min: 0 })}
        ${WRITES.includes(form.metric) &&
        figure("Tokens a text", "maxTokens", { min: 1, placeholder: "auto" })}
        ${form.metric === "regex_answer" &&
        html`<label class="field">
          <span>Pattern</span>
          <input
            value=${form.pattern}
            spellcheck="false"
            onInput=${(event) => set({ pattern: event.target.value })}
          />
        </label>`}
        ${check("activate what is confirmed", "activate", form.isDry)}
        ${check("dry run, keep nothing", "isDry")}
      </div>
      <${Wrong} error=${error} lines=${lines} onGo=${go} />
      <div class="row">
        <button type="submit" class="main" disabled=${isBusy || isRunning || !form.text.trim()}>
          ${isBusy ? "Checking the samples…" : "Start the calibration"}
        </button>
        ${isRunning && html`<p class="quiet">One runs already.</p>`}
      </div>
    </form>
  </section>`;

  function choice(label, name, options, width = null) {
    return html`<label class="field ${width}">
      <span>${label}</span>
      <select value=${form[name]} onChange=${(event) => set({ [name]: event.target.value })}>
        ${Object.entries(options).map(
          ([value, text]) =>
            html`<option value=${value} selected=${value === form[name]}>${text}</option>`,
        )}
      </select>
    </label>`;
  }

  function figure(label, name, limits) {
    return html`<label class="field narrow">
      <span>${label}</span>
      <input
        type="number"
        inputmode="decimal"
        ...${limits}
        value=${form[name] ?? ""}
        onInput=${(event) =>
          set({ [name]: event.target.value === "" ? null : Number(event.target.value) })}
      />
    </label>`;
  }

  function check(label, name, isOff = false) {
    return html`<label class="check">
      <input
        type="checkbox"
        checked=${form[name] && !isOff}
        disabled=${isOff}
        onChange=${(event) => set({ [name]: event.target.checked })}
      />
      <span>${label}</span>
    </label>`;
  }
}

/** The server's words; where they name a line, that line and a way to it. */
function Wrong({ error, lines, onGo }) {
  if (!error) return null;
  const line = Number(/\bline (\d+)\b/.exec(error.message)?.[1] ?? 0);
  const message = error.message.replace(/^'dataset\.jsonl': /, "");
  return html`<${Problem} error=${message} title="Not started." />
    ${line > 0 &&
    line <= lines.length &&
    html`<div class="wrong-line">
      <span class="figure quiet">${line}</span>
      <code>${lines[line - 1].slice(0, 200) || "(blank)"}</code>
      <button type="button" class="plain small" onClick=${() => onGo(line)}>Go to line ${line}</button>
    </div>`}`;
}

function bodyOf(form) {
  const tolerance = form.tolerance ?? 0;
  return {
    dataset: { jsonl: form.text },
    metric: form.metric,
    method: form.method,
    tolerance: form.isShare ? { share_of_gain: tolerance } : tolerance,
    seed: form.seed ?? 0,
    dry_run: form.isDry,
    ...(form.isDry ? {} : { activate: form.activate }),
    ...(form.maxSamples === null ? {} : { max_samples: form.maxSamples }),
    ...(WRITES.includes(form.metric) && form.maxTokens ? { max_tokens: form.maxTokens } : {}),
    ...(form.metric === "regex_answer" && form.pattern ? { pattern: form.pattern } : {}),
  };
}
