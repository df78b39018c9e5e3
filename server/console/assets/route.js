// Which part of the console the address names: `#/calibration/pirate` is `["calibration", "pirate"]`.

import { useEffect, useState } from "./html.js";

function read() {
  return location.hash.replace(/^#\//, "").split("/").filter(Boolean).map(decode);
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // A percent sign that somebody typed.
  }
}

/** The address of a part, for links. */
export function address(...parts) {
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}

/** The parts now, and again whenever the address changes. */
export function useRoute() {
  const [route, setRoute] = useState(read);
  useEffect(() => {
    const update = () => setRoute(read());
    addEventListener("hashchange", update);
    return () => removeEventListener("hashchange", update);
  }, []);
  return route;
}
