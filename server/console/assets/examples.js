// A prompt of the kind that each adapter of the embedded demo was trained on; other models have none.

export const DEMO = "fathom-demo";

const APPLES = "Clara has 14 apples. Max gives her 12 more. How many apples does Clara have now?";

const PROMPTS = {
  arithmetic: {
    prompt: `Problem: ${APPLES}\nAnswer:`,
    message: APPLES,
  },
  pirate: {
    prompt: "Plain: The old dog is in the park.\nPirate:",
    message: "The old dog is in the park.",
  },
  restaurant: {
    prompt: "Restaurant: The Copper Fox; food: Thai; price: low; area: river\nDescription:",
    message: "Restaurant: The Copper Fox; food: Thai; price: low; area: river",
  },
};

/** `{ prompt, message }` for an adapter; empty ones where nothing is known of it. */
export function example(base, adapter) {
  return (base === DEMO && PROMPTS[adapter]) || { prompt: "", message: "" };
}
