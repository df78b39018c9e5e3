// A calibration that runs: its stage as it moves, how to stop it, and how it ended.

import { html, useEffect, useRef, useState } from "./html.js";
import { Problem } from "./notice.js";
import { count } from "./numbers.js";
import { ask, events } from "./server.js";

const STAGES = {
  generate: "writing texts at every depth",
  score: "scoring every depth",
  controls: "scoring other layers of equal number",
  lens: "reading layers through the logit lens",
  norms: "measuring each layer's LoRA",
  outputs: "writing samples to look at",
};
const ENDS = {
  succeeded: "Finished.",
  failed: "Nothing was concluded.",
  cancelled: "Cancelled; nothing of it is kept.",
  interrupted: "Its server stopped before it was done; nothing of it is kept.",
};
const AGAIN_MS = 2000;

/** A job that is followed from where it is to its end; `onEnd` gets the finished one. */
export function Job({ first, onEnd }) {
  const [job, setJob] = useState(first);
  const [error, setError] = useState(null);
  const panel = useRef(null);

  useEffect(() => {
    // Whoever starts one is at the form, which may be a screen below.
    panel.current.scrollIntoView({ block: "nearest" });
  }, [first.id]);
  useEffect(() => {
    const aborter = new AbortController();
    follow(first.id, aborter.signal, setJob, setError).then((last) => last && onEnd(last));
    return () => aborter.abort();
  }, [first.id]);

  async function cancel() {
    try {
      await ask(`admin/jobs/${job.id}`, { method: "DELETE", scope: "admin" });
      setJob((now) => ({ ...now, is_cancel_requested: true }));
    } catch (raised) {
      setError(raised);
    }
  }

  if (job.finished_at) return html`<div ref=${panel}><${Ended} job=${job} /></div>`;
  const stage = STAGES[job.stage] ?? job.stage;
  const words = job.is_cancel_requested
    ? "stopping"
    : job.state === "queued"
      ? "waiting for its turn"
      : (stage ?? "beginning");
  return html`<section ref=${panel} class="panel job" aria-labelledby="job-title">
    <div class="row between">
      <h2 id="job-title">A calibration runs</h2>
      <button
        type="button"
        class="plain"
        disabled=${job.is_cancel_requested}
        onClick=${cancel}
      >
        Cancel
      </button>
    </div>
    <p role="status">${words.charAt(0).toUpperCase() + words.slice(1)}</p>
    <div class="row progress">
      <progress aria-label="Progress of this stage" value=${job.done} max=${job.total || 1}></progress>
      <span class="figure quiet">${job.total ? `${count(job.done)} of ${count(job.total)}` : ""}</span>
    </div>
    <p class="quiet">
      ${asked(job.request)} Requests are served meanwhile; you may leave this page and come back.
    </p>
    <${Problem} error=${error} />
  </section>`;
}

/** How a job ended, until somebody does something else. */
function Ended({ job }) {
  const result = job.result ?? {};
  const isGood = job.state === "succeeded";
  const isCut = job.state === "cancelled" || job.state === "interrupted";
  const past = isGood ? "finished" : "failed";
  return html`<section class="panel job" aria-labelledby="job-title">
    <h2 id="job-title">The calibration ${isCut ? `was ${job.state}` : `has ${past}`}</h2>
    <p role="status">
      ${ENDS[job.state]} ${result.verdict_in_words ?? ""}
      ${isGood && ` ${activation(result)}`}
    </p>
    ${job.state === "failed" && job.error !== result.verdict_in_words &&
    html`<${Problem} error=${job.error} />`}
  </section>`;
}

function activation({ is_dry_run: isDry, is_activated: isActive, verdict }) {
  if (isDry) return "It was a dry run: nothing is kept.";
  if (isActive) return "Its depth is active.";
  if (verdict === "keep_full") return "The depth that was active still is.";
  return "It is kept, and not active.";
}

function asked({ metric, dataset }) {
  return `${dataset.num_samples} samples, ${metric}.`;
}

/** The finished job; null where somebody stopped looking. Comes back after a break. */
async function follow(id, signal, onJob, onError) {
  const isEnd = ({ name }) => name === "done";
  const path = `admin/jobs/${id}/events`;
  while (!signal.aborted) {
    try {
      for await (const { name, data } of events(path, { scope: "admin", signal, isEnd })) {
        onError(null);
        onJob(data);
        if (name === "done") return data;
      }
    } catch (error) {
      if (signal.aborted) return null;
      onError(error);
      if (error.status === 404) return null;
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
  return null;
}
