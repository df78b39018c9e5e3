// What this server serves and what the person may do with it: asked at the start, and again whenever a
// key changes, somebody asks for it, or the server comes back.

import { createContext, useCallback, useContext, useEffect, useState } from "./html.js";
import { key, onKeys } from "./keys.js";
import { ask } from "./server.js";

const PROBE_MS = 4000;
const Served = createContext(null);

export const ServedProvider = Served.Provider;
export const useServed = () => useContext(Served);

const UNKNOWN = {
  state: "asking", // then "ready", "locked" (it wants a key), "draining" or "away"
  problem: null,
  needsApiKey: false,
  hasAdmin: false,
  isAdmin: false,
  adminProblem: null,
  version: null,
  base: null, // its model card
  adapters: [], // model cards
};

/** The answer, with `refresh()`. */
export function useServedState() {
  const [served, setServed] = useState(UNKNOWN);
  const refresh = useCallback(async () => setServed(await look()), []);

  useEffect(() => {
    refresh();
    return onKeys(refresh);
  }, []);
  useEffect(() => {
    const probe = async () => {
      if (document.hidden) return;
      const state = await ask("ready").then(() => "ready", standing);
      const isBack = state === "ready" && ["away", "draining"].includes(served.state);
      if (isBack) refresh();
      else if (state !== "ready" && state !== served.state) setServed((now) => ({ ...now, state }));
    };
    const timer = setInterval(probe, PROBE_MS);
    return () => clearInterval(timer);
  }, [served.state]);
  return { ...served, refresh };
}

function standing(error) {
  return error.status === 503 ? "draining" : "away";
}

async function look() {
  const served = { ...UNKNOWN };
  try {
    const { version, needs_api_key, has_admin } = await ask("version");
    Object.assign(served, { version, needsApiKey: needs_api_key, hasAdmin: has_admin });
  } catch (error) {
    return { ...served, state: standing(error), problem: error.message };
  }
  // Whether an admin key is right shows when something is asked with it.
  if (served.hasAdmin && key("admin")) {
    try {
      await ask("admin/adapters", { scope: "admin" });
      served.isAdmin = true;
    } catch (error) {
      served.adminProblem = told(error, "admin");
    }
  }
  if (served.needsApiKey && !key("api")) return { ...served, state: "locked" };
  try {
    const { data } = await ask("v1/models", { scope: "api" });
    const base = data.find((card) => card.lora === null) ?? null;
    return { ...served, state: "ready", base, adapters: data.filter((card) => card.lora) };
  } catch (error) {
    const state = error.status === 401 ? "locked" : standing(error);
    return { ...served, state, problem: told(error, "API") };
  }
}

/** Of a key that is not known, the server says how to send one: that is not what a person typed wrong. */
function told(error, scope) {
  return error.status === 401 ? `The server does not know this ${scope} key.` : error.message;
}
