// Two records of one adapter, fact by fact; what is the same in both is left quiet.

import { html } from "./html.js";
import { facts } from "./record.js";

export function Differences({ one, two }) {
  const others = new Map(facts(two));
  return html`<section class="panel" aria-labelledby="differences-title">
    <h2 id="differences-title">Versions ${one.version} and ${two.version}</h2>
    <table class="list compact">
      <thead>
        <tr>
          <th scope="col">What</th>
          <th scope="col" class="figure">Version ${one.version}</th>
          <th scope="col" class="figure">Version ${two.version}</th>
        </tr>
      </thead>
      <tbody>
        ${facts(one).map(([name, value]) => {
          const isSame = String(value) === String(others.get(name));
          return html`<tr class=${isSame ? "same" : "differs"}>
            <th scope="row">${name}${!isSame && html`<span class="sr">, differs</span>`}</th>
            <td class="figure">${value}</td>
            <td class="figure">${others.get(name)}</td>
          </tr>`;
        })}
      </tbody>
    </table>
  </section>`;
}
