// Numbers as people read them. A dash stands for what is not known.

export const DASH = "–";
const MINUS = "−";

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const withMinus = (text) => text.replace("-", MINUS);

/** A score or another plain number, with `digits` after the point. */
export function number(value, digits = 3) {
  return isNumber(value) ? withMinus(value.toFixed(digits)) : DASH;
}

/** The same with its sign, for differences. */
export function signed(value, digits = 3) {
  if (!isNumber(value)) return DASH;
  return (value < 0 ? "" : "+") + number(value, digits);
}

/** A count with its thousands apart. */
export function count(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en") : DASH;
}

/** A share from 0 to 1 in percent. */
export function percent(share, digits = 0) {
  return isNumber(share) ? `${(100 * share).toFixed(digits)} %` : DASH;
}

/** Bytes in the largest unit that leaves a whole part. */
export function bytes(value) {
  if (!isNumber(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${value.toFixed(value >= 100 || power === 0 ? 0 : 1)} ${units[power]}`;
}

/** A duration, given in seconds. */
export function duration(seconds) {
  if (!isNumber(seconds)) return DASH;
  if (seconds < 1) return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

/** How long ago a Unix time in seconds was. */
export function age(unixSeconds) {
  if (!isNumber(unixSeconds)) return DASH;
  const seconds = Math.max(0, Date.now() / 1000 - unixSeconds);
  return seconds < 60 ? "just now" : `${duration(seconds)} ago`;
}

/** A time as the server writes it, in the reader's own zone. */
export function moment(text) {
  if (!text) return DASH;
  const options = { dateStyle: "medium", timeStyle: "short" };
  return new Date(text).toLocaleString(undefined, options);
}

/** `1 layer`, `3 layers`. */
export function plural(amount, noun) {
  return `${count(amount)} ${noun}${amount === 1 ? "" : "s"}`;
}
