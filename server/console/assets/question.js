// What is asked in a comparison: adapter, prompt or chat, and how tokens are drawn.

import { html } from "./html.js";

const FEW = 200;

export function Question({ question, adapters, base, onChange, onAdapter }) {
  const set = (change) => onChange({ ...question, ...change });
  const { isChat } = question;
  return html`<div class="question">
    <div class="row">
      <${AdapterField} value=${question.model} adapters=${adapters} base=${base} onPick=${onAdapter} />
      <fieldset class="switch">
        <legend class="sr">Kind of request</legend>
        ${kind("Completion", false)} ${kind("Chat", true)}
      </fieldset>
      ${figure("Max tokens", "maxTokens", { min: 1, step: 1 })}
      ${figure("Temperature", "temperature", { min: 0, max: 5, step: 0.1 })}
      ${figure("Seed", "seed", { min: 0, step: 1, placeholder: "none" })}
    </div>
    ${isChat &&
    html`<label class="field">
      <span>System</span>
      <textarea
        rows="1"
        placeholder="none"
        value=${question.system}
        onInput=${(event) => set({ system: event.target.value })}
      ></textarea>
    </label>`}
    <label class="field">
      <span>${isChat ? "Message" : "Prompt"}</span>
      <textarea
        rows="3"
        class="prompt"
        spellcheck="false"
        value=${question.prompt}
        onInput=${(event) => set({ prompt: event.target.value, isExample: false })}
      ></textarea>
    </label>
  </div>`;

  function kind(text, value) {
    return html`<label>
      <input
        type="radio"
        name="kind"
        checked=${isChat === value}
        onChange=${() => set({ isChat: value })}
      />
      <span>${text}</span>
    </label>`;
  }

  function figure(text, name, limits) {
    return html`<label class="field narrow">
      <span>${text}</span>
      <input
        type="number"
        inputmode="decimal"
        ...${limits}
        value=${question[name] ?? ""}
        onInput=${(event) =>
          set({ [name]: event.target.value === "" ? null : Number(event.target.value) })}
      />
    </label>`;
  }
}

/** A choice among few; among thousands, a field that completes what is typed. */
export function AdapterField({ value, adapters, base = null, onPick }) {
  const names = [...adapters.map(({ id }) => id), ...(base ? [base.id] : [])];
  if (names.length <= FEW) {
    return html`<label class="field">
      <span>Adapter</span>
      <select value=${value} onChange=${(event) => onPick(event.target.value)}>
        ${names.map(
          (name) =>
            html`<option value=${name} selected=${name === value}>
              ${name}${base?.id === name ? " (base, no adapter)" : ""}
            </option>`,
        )}
      </select>
    </label>`;
  }
  return html`<label class="field">
    <span>Adapter, one of ${names.length}</span>
    <input
      list="adapter-names"
      value=${value}
      onChange=${(event) => names.includes(event.target.value) && onPick(event.target.value)}
    />
    <datalist id="adapter-names">${names.map((name) => html`<option value=${name} />`)}</datalist>
  </label>`;
}
