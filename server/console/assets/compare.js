// Compare: one prompt at several depths, written side by side, and where the answers part.

import { example } from "./examples.js";
import { generate, requestOf } from "./generation.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { Lane, UNASKED } from "./lane.js";
import { Empty } from "./notice.js";
import { partings } from "./parting.js";
import { Question } from "./question.js";
import { useServed } from "./served.js";
import { quoted } from "./tokens.js";

const MAX_LANES = 6;
const DRAW_MS = 60;

export function Compare({ path }) {
  const { adapters, base, refresh } = useServed();
  const [question, setQuestion] = useState(null);
  const [arranged, setArranged] = useState(null); // lanes that somebody changed, or has asked
  const [answers, setAnswers] = useState({});
  const [chosen, setChosen] = useState(null);
  const [run, setRun] = useState(null);
  const nextId = useRef(0);
  const card = adapters.find(({ id }) => id === question?.model) ?? null;
  const layers = card?.lora.num_layers ?? 0;
  const isRunning = run !== null;
  // Until then they follow what is served: what is calibrated may change while somebody looks.
  const lanes = arranged ?? usualLanes(card);

  useEffect(() => {
    const known = adapters.some(({ id }) => id === question?.model);
    if (known || question?.model === base?.id) return;
    const first = adapters.find(({ id }) => id === path[0]) ?? adapters[0] ?? base;
    if (first) choose(first.id, { isChat: false, maxTokens: 48, temperature: 0, seed: 0, system: "" });
  }, [adapters, base]);
  useEffect(() => {
    refresh();
  }, []);
  useEffect(() => () => run?.abort(), [run]);

  function choose(model, defaults = question) {
    const next = { isExample: true, prompt: "", ...defaults, model };
    setQuestion(withExample(next));
    setArranged(null);
    setAnswers({});
    setChosen(null);
  }

  /** The example of the adapter and kind, for as long as nobody typed anything else. */
  function withExample(next) {
    if (!next.isExample) return next;
    const { prompt, message } = example(base?.id, next.model);
    return { ...next, prompt: next.isChat ? message : prompt };
  }

  function newLane(depth) {
    nextId.current += 1;
    return { id: `added-${nextId.current}`, kind: "depth", depth };
  }

  async function start(event) {
    event?.preventDefault();
    if (isRunning) return;
    const aborter = new AbortController();
    setRun(aborter);
    setArranged(lanes);
    setChosen(null);
    setAnswers({});
    const written = {};
    // Drawing each token when it comes would take longer than its way here, and the figures below
    // the answers would tell of the drawing.
    const drawing = setInterval(() => setAnswers({ ...written }), DRAW_MS);
    const streams = lanes.map(({ id, depth }) => {
      const request = requestOf(question, card ? depth : null);
      return generate(request, aborter.signal, (answer) => (written[id] = answer));
    });
    await Promise.all(streams);
    clearInterval(drawing);
    setAnswers(written);
    setRun(null);
  }

  function change(id, depth) {
    setArranged(lanes.map((lane) => (lane.id === id ? { ...lane, depth } : lane)));
    setAnswers({ ...answers, [id]: UNASKED });
  }

  if (!question) {
    return html`<${Empty} title="Nothing is served that this key may use">
      <p>Load an adapter, or ask whoever operates the server for a key that may use one.</p>
    <//>`;
  }
  const shown = lanes.map(({ id }) => answers[id] ?? UNASKED);
  const parts = partings(shown);
  const keys = (event) =>
    event.key === "Enter" && (event.ctrlKey || event.metaKey) && start(event);
  return html`<form class="compare" onSubmit=${start} onKeyDown=${keys}>
    <${Question}
      question=${question}
      adapters=${adapters}
      base=${base}
      onChange=${(next) => setQuestion(withExample(next))}
      onAdapter=${(model) => choose(model)}
    />
    <div class="row">
      ${isRunning
        ? // By their keys two buttons: were it one, stopping would make it submit within its own click.
          html`<button key="stop" type="button" class="main" onClick=${() => run.abort()}>
            Stop
          </button>`
        : html`<button key="run" type="submit" class="main" disabled=${!question.prompt}>
            Run ${lanes.length} ${lanes.length === 1 ? "depth" : "depths"}
          </button>`}
      ${card &&
      html`<button
        type="button"
        class="plain"
        disabled=${isRunning || lanes.length >= MAX_LANES}
        onClick=${() => setArranged(insert(lanes, newLane(layers >> 1)))}
      >
        Add a depth
      </button>`}
      <p class="quiet summary" role="status">
        ${isRunning ? "Writing…" : summary(lanes, shown, parts)}
      </p>
    </div>
    <div class="lanes">
      ${lanes.map(
        (lane, index) =>
          html`<${Lane}
            key=${lane.id}
            lane=${lane}
            scale=${{ numLayers: layers || 1, max: card?.lora.allowed_max_depth ?? 0 }}
            answer=${shown[index]}
            partsAt=${parts[index]}
            chosen=${chosen}
            onChoose=${setChosen}
            onDepth=${(depth) => change(lane.id, depth)}
            onRemove=${() => setArranged(lanes.filter(({ id }) => id !== lane.id))}
          />`,
      )}
    </div>
    <${Curl} request=${requestOf(question, card ? lanes.at(-1).depth : null)} />
  </form>`;
}

/** Base, one between, what is calibrated, and the whole adapter, as far as a key may go. */
function usualLanes(card) {
  const lane = (kind, depth) => ({ id: kind, kind, depth });
  if (!card) return [lane("base", 0)];
  const { num_layers: full, calibrated_depth: calibrated, allowed_max_depth: max } = card.lora;
  const usual = [lane("base", 0), lane("depth", Math.min(max, full >> 1))];
  if (calibrated !== null && calibrated <= max) usual.push(lane("calibrated", calibrated));
  if (max === full) usual.push(lane("full", full));
  return usual;
}

/** A new depth stands before the whole adapter, which the others are compared with. */
function insert(lanes, lane) {
  const at = lanes.findIndex(({ kind }) => kind === "calibrated" || kind === "full");
  return at < 0 ? [...lanes, lane] : [...lanes.slice(0, at), lane, ...lanes.slice(at)];
}

/** Where the answers part, in words. */
function summary(lanes, answers, parts) {
  const asked = answers.filter(({ state }) => state !== "idle");
  if (asked.length === 0) return "Ctrl and Enter runs it, too.";
  if (asked.length < 2 || asked.some(({ state }) => state === "failed")) return "";
  const last = lanes.at(-1);
  const sentences = lanes.slice(0, -1).map(({ depth }, index) => {
    if (parts[index] === null) return `depth ${depth} says the same`;
    const says = (answer) => {
      const token = answer.tokens[parts[index]]?.token;
      return token === undefined ? "ends" : `“${quoted(token)}”`;
    };
    const instead = `${says(answers[index])} instead of ${says(answers.at(-1))}`;
    return `depth ${depth} parts at token ${parts[index] + 1}, ${instead}`;
  });
  return `Beside depth ${last.depth}: ${sentences.join("; ")}.`;
}

/** The last lane as a command to paste: the page does nothing that this does not. */
function Curl({ request: [path, body] }) {
  const { stream, stream_options, ...rest } = body;
  const data = JSON.stringify(rest).replaceAll("'", "'\\''");
  const url = new URL(path, document.baseURI).href;
  return html`<details class="curl">
    <summary>The same with curl</summary>
    <pre tabindex="0">
curl ${url} -H 'Content-Type: application/json' -H "Authorization: Bearer $FATHOM_API_KEY" \\
  -d '${data}'</pre
    >
  </details>`;
}
