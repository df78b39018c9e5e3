// The keys that a person typed: kept for this tab only, gone when it closes, and never in a URL.
//
// A server has keys of two scopes. The API key asks the model, the admin key operates the server.

const SCOPES = ["api", "admin"];
const listeners = new Set();
const kept = {};

for (const scope of SCOPES) kept[scope] = read(scope);

function read(scope) {
  try {
    return sessionStorage.getItem(`fathom-${scope}-key`) ?? "";
  } catch {
    return ""; // A browser that keeps nothing at all: the key lasts until the page is reloaded.
  }
}

/** The key of a scope; empty where none was typed. */
export function key(scope) {
  return kept[scope];
}

/** Use these keys from now on; an empty one is forgotten. */
export function setKeys(keys) {
  for (const scope of SCOPES) {
    kept[scope] = keys[scope].trim();
    try {
      if (kept[scope]) sessionStorage.setItem(`fathom-${scope}-key`, kept[scope]);
      else sessionStorage.removeItem(`fathom-${scope}-key`);
    } catch {
      // As above.
    }
  }
  for (const listener of listeners) listener();
}

/** Call `listener` after every change; returns what ends that. */
export function onKeys(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}
