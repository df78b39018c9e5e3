// What every view is written with: preact, its hooks, and tagged templates in the place of JSX.

import { h } from "./vendor/preact.mjs";
import htm from "./vendor/htm.mjs";

export { createContext, render } from "./vendor/preact.mjs";
export {
  useCallback,
  useContext,
  useEffect,
  useMemo,
  useRef,
  useState,
} from "./vendor/hooks.mjs";

export const html = htm.bind(h);
