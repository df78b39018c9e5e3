// Something asked again and again while somebody looks: a hidden page asks nothing.

import { useCallback, useEffect, useRef, useState } from "./html.js";

/** Of the server's time, one part in so many goes to somebody who only looks. */
const SPARED = 20;

/** The newest answer of `look`, the error of the last try, and `again()` to ask at once.
 *
 * An answer stays when a later try fails. `inputs`: what makes it another question.
 */
export function usePolled(look, everyMs, inputs) {
  const [found, setFound] = useState({ value: null, error: null });
  const turn = useRef(0);
  const again = useCallback(async () => {
    const mine = (turn.current += 1);
    try {
      const value = await look();
      if (mine === turn.current) setFound({ value, error: null });
    } catch (error) {
      if (mine === turn.current) setFound((before) => ({ ...before, error }));
    }
  }, inputs);

  useEffect(() => {
    let timer = null;
    let isOver = false;
    const go = async () => {
      const began = performance.now();
      if (!document.hidden) await again();
      const spent = performance.now() - began;
      if (!isOver) timer = setTimeout(go, Math.max(everyMs, SPARED * spent));
    };
    go();
    return () => {
      isOver = true;
      clearTimeout(timer);
      turn.current += 1; // an answer that still comes is of a question nobody asks any more
    };
  }, inputs);
  return { ...found, again };
}
