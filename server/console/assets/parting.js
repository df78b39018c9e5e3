// Where two answers part: the first token that is not the same in both.

/** Its index; null while they agree as far as both have come.
 *
 * An answer that has ended where the other goes on parts there too.
 */
export function parting(a, b) {
  const shared = Math.min(a.tokens.length, b.tokens.length);
  for (let index = 0; index < shared; index += 1) {
    if (a.tokens[index].token !== b.tokens[index].token) return index;
  }
  const hasEnded = ({ state }) => state === "done";
  if (a.tokens.length === b.tokens.length) return null;
  const shorter = a.tokens.length < b.tokens.length ? a : b;
  return hasEnded(shorter) ? shared : null;
}

/** For each answer, where it parts from the last one; for the last, where anybody first parts from it. */
export function partings(answers) {
  const reference = answers.at(-1);
  const found = answers.slice(0, -1).map((answer) => parting(answer, reference));
  const first = found.filter((index) => index !== null);
  return [...found, first.length ? Math.min(...first) : null];
}
