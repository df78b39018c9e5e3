// Prometheus's text format, read: what `/metrics` says, and what happened between two looks at it.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

/** By name: `[{ labels, value }]`. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = SAMPLE.exec(line);
    if (!match) continue;
    const [, name, given = "", value] = match;
    const labels = {};
    for (const [, key, quoted] of given.matchAll(LABEL)) {
      labels[key] = quoted.replace(/\\(.)/g, (_, escaped) => ESCAPES[escaped] ?? escaped);
    }
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels, value: value === "+Inf" ? Infinity : Number(value) });
  }
  return found;
}

/** The sum of a name's samples; null where there are none. */
export function total(scrape, name) {
  const samples = scrape.get(name);
  return samples ? samples.reduce((sum, { value }) => sum + value, 0) : null;
}

/** How often values fell into which range: `[{ below, count }]`, the last one without a bound.
 *
 * With `before`, only what came after that look. All series of the name are summed. A counter that fell
 * belongs to a server that has started anew.
 */
export function histogram(scrape, name, before = null) {
  const now = cumulative(scrape, name);
  const then = before ? cumulative(before, name) : new Map();
  const isNew = [...now].some(([bound, value]) => value < (then.get(bound) ?? 0));
  let lower = 0;
  return [...now]
    .sort(([a], [b]) => a - b)
    .map(([below, value]) => {
      const upTo = value - (isNew ? 0 : (then.get(below) ?? 0));
      const range = { below, count: upTo - lower };
      lower = upTo;
      return range;
    });
}

function cumulative(scrape, name) {
  const bounds = new Map();
  for (const { labels, value } of scrape.get(`${name}_bucket`) ?? []) {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    bounds.set(bound, (bounds.get(bound) ?? 0) + value);
  }
  return bounds;
}

/** The value that a share of a histogram lies below, as even within its range; null where it is empty. */
export function quantile(ranges, share) {
  const wanted = share * ranges.reduce((sum, { count }) => sum + count, 0);
  if (wanted === 0) return null;
  let seen = 0;
  let from = 0;
  for (const { below, count } of ranges) {
    if (seen + count >= wanted) {
      if (below === Infinity) return from; // more than the last bound: how much is not known
      return from + (below - from) * ((wanted - seen) / count);
    }
    seen += count;
    from = below;
  }
  return from;
}

/** What a counter gained a second between two looks; null where that cannot be said. */
export function rate(scrape, before, name) {
  const now = total(scrape.found, name);
  const then = before && total(before.found, name);
  const spent = before ? (scrape.at - before.at) / 1000 : 0;
  return now === null || then === null || spent <= 0 || now < then ? null : (now - then) / spent;
}
