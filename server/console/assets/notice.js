// What a view says where it has nothing to show, and what went wrong, in the server's own words.

import { html } from "./html.js";

/** An empty place that says what would fill it. */
export function Empty({ title, children }) {
  return html`<div class="empty">
    <p class="empty-title">${title}</p>
    <div class="quiet">${children}</div>
  </div>`;
}

/** An error: ServerError, text, or nothing at all. */
export function Problem({ error, title }) {
  if (!error) return null;
  const text = typeof error === "string" ? error : error.message;
  return html`<div class="problem" role="alert">
    ${title && html`<strong>${title}</strong>`}
    <span>${text.charAt(0).toUpperCase() + text.slice(1)}</span>
  </div>`;
}
