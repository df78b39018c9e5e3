// An answer token by token. A pointer or the arrow keys choose one; the less likely a token was, the
// stronger its shade. Whoever listens instead of looking gets the whole text once, and each token by key.

import { html } from "./html.js";
import { percent } from "./numbers.js";

const STRIDES = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };

/** What each token looked like when it was last drawn: a node that is the same is not compared again, and
 * a thousand tokens are drawn many times a second. */
const drawn = new WeakMap();

/** chosen: the index of the token looked at. partsAt: the one to mark, or null. */
export function Tokens({ id, label, answer, chosen, partsAt, onChoose }) {
  const { tokens } = answer;
  const at = Math.min(chosen ?? 0, tokens.length - 1);

  function move(event) {
    const target =
      event.key === "Home" ? 0
      : event.key === "End" ? tokens.length - 1
      : event.key in STRIDES ? at + STRIDES[event.key]
      : null;
    if (target === null || !tokens.length) return;
    event.preventDefault();
    onChoose(Math.max(0, Math.min(tokens.length - 1, target)));
  }

  return html`<div
    class="tokens"
    role="listbox"
    tabindex="0"
    aria-label=${label}
    aria-activedescendant=${chosen === null || !tokens.length ? null : `${id}-${at}`}
    onKeyDown=${move}
    onFocus=${() => chosen === null && tokens.length && onChoose(0)}
  >
    ${tokens.map((token, index) => {
      const state = `${chosen === index} ${index === partsAt}`;
      const before = drawn.get(token);
      if (before?.state === state && before.id === id) return before.node;
      const node = html`<span
        key=${index}
        id=${`${id}-${index}`}
        role="option"
        class=${classes(token, index === partsAt)}
        aria-selected=${chosen === index ? "true" : "false"}
        aria-label=${spoken(token, index === partsAt)}
        onMouseEnter=${() => onChoose(index)}
        onClick=${() => onChoose(index)}
        >${shown(token)}</span
      >`;
      drawn.set(token, { id, state, node });
      return node;
    })}
    ${partsAt !== null &&
    partsAt === tokens.length &&
    html`<span
      class="token ended parts"
      role="option"
      aria-selected="false"
      aria-label="ends here, where the other goes on"
      >ends</span
    >`}
  </div>`;
}

/** What the model thought of one place: the likeliest tokens, and the one that was drawn. */
export function Alternatives({ token }) {
  if (!token) return html`<div class="alternatives" aria-hidden="true"></div>`;
  const rows = token.top.some((other) => other.token === token.token)
    ? token.top
    : [...token.top, token];
  return html`<table class="alternatives">
    <caption class="sr">
      The likeliest tokens at this place
    </caption>
    <tbody>
      ${rows.map(({ token: text, logprob }) => {
        const share = Math.exp(logprob);
        return html`<tr class=${text === token.token ? "drawn" : null}>
          <th scope="row"><code>${quoted(text)}</code></th>
          <td class="bar"><span style=${{ width: `${100 * share}%` }}></span></td>
          <td class="figure" title=${`log-probability ${logprob.toFixed(3)}`}>
            ${percent(share, share < 0.1 ? 1 : 0)}
          </td>
          <td class="figure quiet">${logprob.toFixed(2).replace("-", "−")}</td>
        </tr>`;
      })}
    </tbody>
  </table>`;
}

function classes({ text, logprob }, parts) {
  // Four steps: a shade that follows every value would look like noise.
  const doubt = logprob === null ? 0 : Math.min(3, Math.floor(-logprob / 0.7));
  return `token doubt-${doubt}${parts ? " parts" : ""}${text ? "" : " unseen"}`;
}

function shown({ text, token }) {
  if (!text) return /^<.*>$/.test(token) ? token : "";
  return text.replaceAll("\n", "↵\n");
}

function spoken({ token, logprob }, parts) {
  const share = logprob === null ? "" : `, ${percent(Math.exp(logprob))}`;
  return `${quoted(token)}${share}${parts ? ", parts here" : ""}`;
}

/** Text with what cannot be seen spelt out. */
export function quoted(text) {
  return text.replaceAll("\n", "\\n").replaceAll("\t", "\\t").replace(/^ | $/g, "·") || "(nothing)";
}
