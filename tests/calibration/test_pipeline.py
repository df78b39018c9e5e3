"""The whole pipeline on a real engine: PEFT is the oracle of its scores and of its texts."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from boundary.dataset import Dataset, Sample
from boundary.mask import representative_depths
from boundary.options import CalibrationOptions
from boundary.progress import Progress
from boundary.sweep import reference
from boundary.text_score import text_score
from server.calibration.generation import GenerationOptions
from server.calibration.outcome import Outcome
from server.calibration.pipeline import calibrate, check
from server.engine.async_engine import AsyncEngine
from server.engine.request import Request, RequestOutput
from server.errors import BadRequest, EngineDead, GenerationError
from tests.calibration.planted import DEPTH, LENGTH, NUM_SAMPLES, oracle, planted, written
from tests.engine.test_async_engine import run_async, started
from tests.parity.adapters import expected_peft_warnings
from tests.parity.oracle import Oracle
from tests.parity.zoo import NUM_LAYERS
from tests.tiny import Tiny, make_core

ATOL = 1e-4
NUM_COMPARED = 6
"""Samples whose texts PEFT writes too, one forward pass a token."""
QUICK = CalibrationOptions(num_random_masks=1, diagnostics=False)
GENERATION = GenerationOptions(max_tokens=LENGTH, max_num_seqs=8, idle_share=1.0)


class Recorder:
    """An engine that counts the requests that run on it at once."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.requests: list[Request] = []
        self.num_running = 0
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        try:
            async for output in self._engine.generate(request):
                yield output
        finally:
            self.num_running -= 1


def run(
    tiny: Tiny,
    adapter: str,
    dataset: Dataset,
    options: CalibrationOptions = QUICK,
    generation: GenerationOptions = GENERATION,
) -> tuple[Outcome, Recorder, list[Progress]]:
    core = make_core(tiny)
    core.registry.load(adapter, tiny.adapter(adapter))
    seen: list[Progress] = []
    with started(core, max_live_requests=64) as engine:
        recorder = Recorder(engine)

        async def scenario() -> Outcome:
            ref = await engine.resolve(adapter)
            return await calibrate(
                recorder,  # type: ignore[arg-type]
                ref,
                dataset,
                options,
                generation,
                seen.append,
            )

        outcome: Outcome = run_async(scenario)
        assert recorder.num_running == 0
    return outcome, recorder, seen


def alone(tiny: Tiny, peft: Oracle, sample: Sample, depth: int) -> str:
    """What one prompt is continued with at one depth, by PEFT and with no batch."""
    prompt = sample.prompt_token_ids
    return written(tiny, prompt, peft.greedy(prompt, LENGTH, depth).token_ids)


def peft_scores(tiny: Tiny, adapter: str, dataset: Dataset) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny.model_path, attn_implementation="eager")
    with expected_peft_warnings():
        model = PeftModel.from_pretrained(base, tiny.adapter(adapter)).eval()
    return reference(model, dataset.samples)


def test_a_sweep_scores_as_peft_does_and_finds_what_was_planted(tiny: Tiny) -> None:
    dataset = planted(tiny, "a")
    outcome, recorder, seen = run(tiny, "a", dataset, replace(QUICK, diagnostics=True))
    expected = peft_scores(tiny, "a", dataset)
    assert np.abs(outcome.calibration.scores - expected).max() <= ATOL

    record = outcome.record
    assert record is not None
    assert (record.depth, record.verdict, record.method) == (DEPTH, "improves", "forking_sweep")
    assert outcome.changes_depth
    assert (record.metric, record.num_samples, record.num_layers) == (
        "log_likelihood",
        NUM_SAMPLES,
        NUM_LAYERS,
    )
    core = make_core(tiny)
    digest = core.registry.load("a", tiny.adapter("a")).digest
    core.close()
    assert record.mismatch(base=tiny.base.revision, adapter=digest, num_layers=NUM_LAYERS) is None
    assert record.data_fingerprint == dataset.fingerprint

    peft = oracle(tiny, "a")
    assert len(outcome.report.outputs) == GENERATION.num_shown
    for sample, output in zip(dataset.samples, outcome.report.outputs, strict=False):
        assert output.reference == sample.completion
        assert output.by_depth == {
            depth: alone(tiny, peft, sample, depth) for depth in (0, DEPTH, NUM_LAYERS)
        }
    assert len(recorder.requests) == 3 * GENERATION.num_shown
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["score", "choose", "norms", "controls", "lens", "outputs"]
    assert all(progress.done <= progress.total for progress in seen)

    evidence = outcome.evidence()
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    assert evidence["controls"].keys() == {"top_k", "random_k"}
    assert len(evidence["lora_norms"]) == len(evidence["lens_full"]) == NUM_LAYERS
    assert evidence["generation"]["num_texts"] == 3 * GENERATION.num_shown


def test_a_metric_of_text_scores_what_each_depth_writes_alone(tiny: Tiny) -> None:
    dataset = planted(tiny, "a")
    options = replace(QUICK, metric="chrf")
    outcome, recorder, seen = run(tiny, "a", dataset, options)
    peft, score = oracle(tiny, "a"), text_score("chrf")
    expected = [
        [
            score(alone(tiny, peft, sample, depth), sample.completion)
            for depth in range(NUM_LAYERS + 1)
        ]
        for sample in dataset.samples[:NUM_COMPARED]
    ]
    assert np.array_equal(outcome.calibration.scores[:NUM_COMPARED], np.array(expected))
    assert np.all(outcome.calibration.scores[:, DEPTH] == 1)
    assert outcome.record is not None
    assert (outcome.record.depth, outcome.record.verdict) == (DEPTH, "improves")
    assert outcome.record.method == "generation"
    assert outcome.report.signature == score.signature

    num_texts = NUM_SAMPLES * (NUM_LAYERS + 1)
    assert len(recorder.requests) == num_texts, "texts to look at are those that were scored"
    assert outcome.generation.num_texts == num_texts
    assert outcome.generation.num_cut == num_texts
    assert {request.priority for request in recorder.requests} == {1 << 31}
    assert 1 < recorder.most <= GENERATION.max_num_seqs
    done = [progress.done for progress in seen if progress.stage == "generate"]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, num_texts)


def test_depths_that_are_the_same_model_are_written_once(tiny: Tiny) -> None:
    """`shallow` has LoRA in layers 0 and 2 only."""
    dataset = planted(tiny, "shallow", depth=1, num_samples=32)
    options = replace(QUICK, metric="exact_match")
    outcome, recorder, _ = run(tiny, "shallow", dataset, options)
    assert {request.lora.depth for request in recorder.requests} == {0, 1, 3}
    assert len(recorder.requests) == 3 * 32
    scores = outcome.calibration.scores
    assert np.array_equal(scores[:, 1], scores[:, 2])
    assert np.array_equal(scores[:, 3], scores[:, 4])
    assert outcome.report.lora_layers == (0, 2)
    assert outcome.record is not None
    assert (outcome.record.depth, outcome.record.verdict) == (1, "improves")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (frozenset({0, 1, 2, 3}), (0, 1, 2, 3, 4)),
        (frozenset({0, 2}), (0, 1, 1, 3, 3)),
        (frozenset({3}), (0, 0, 0, 0, 4)),
        (frozenset[int](), (0, 0, 0, 0, 0)),
    ],
)
def test_a_depth_is_represented_by_the_smallest_equal_one(
    layers: frozenset[int], expected: tuple[int, ...]
) -> None:
    assert representative_depths(layers, 4) == expected


def test_too_few_samples_make_no_record(tiny: Tiny) -> None:
    outcome, _, _ = run(tiny, "a", planted(tiny, "a", num_samples=5))
    assert outcome.record is None
    assert not outcome.changes_depth
    assert outcome.calibration.selection.num_samples_needed is not None
    assert "5 samples are too few" in outcome.summary
    assert "32" in outcome.summary
    assert outcome.evidence()["verdict"] == "too_few"


def test_what_full_writes_keeps_full(tiny: Tiny) -> None:
    """The negative control: nothing is planted below full."""
    outcome, _, _ = run(tiny, "a", planted(tiny, "a", depth=NUM_LAYERS))
    assert outcome.record is not None
    assert (outcome.record.depth, outcome.record.verdict) == (NUM_LAYERS, "keep_full")
    assert not outcome.changes_depth


def test_prompts_alone_are_calibrated_by_distance(tiny: Tiny) -> None:
    bare = planted(tiny, "a", num_samples=32)
    samples = tuple(replace(s, completion_token_ids=(), completion="") for s in bare.samples)
    options = replace(QUICK, metric="kl_to_full", tolerance=1e6)
    outcome, _, _ = run(tiny, "a", replace(bare, kind="prompt", samples=samples), options)
    assert outcome.record is not None
    assert (outcome.record.depth, outcome.record.verdict) == (0, "equal_cheaper")
    assert [output.reference for output in outcome.report.outputs] == [""] * 3


def test_a_loss_that_is_no_number_fails_with_its_sample(tiny: Tiny) -> None:
    dataset = planted(tiny, "a", num_samples=32)
    core = make_core(tiny)
    core.registry.load("a", tiny.adapter("a"))
    with started(core) as engine:
        weight = core.runner.model.get_input_embeddings().weight
        before = weight.data.clone()

        async def scenario() -> None:
            ref = await engine.resolve("a")
            await calibrate(engine, ref, dataset, QUICK, GENERATION, lambda _: None)

        try:
            weight.data[dataset.samples[3].prompt_token_ids[0]] = float("nan")
            with pytest.raises(ValueError, match="sample 3 is nan"):
                run_async(scenario)
        finally:
            weight.data.copy_(before)


@pytest.mark.parametrize("metric", ["log_likelihood", "exact_match"])
def test_a_cancelled_calibration_leaves_nothing(tiny: Tiny, metric: str) -> None:
    dataset = planted(tiny, "a")
    core = make_core(tiny)
    core.registry.load("a", tiny.adapter("a"))
    with started(core, max_live_requests=64) as engine:
        recorder = Recorder(engine)

        async def scenario() -> None:
            ref = await engine.resolve("a")
            began = asyncio.Event()

            def tell(progress: Progress) -> None:
                if progress.done:
                    began.set()

            options = replace(QUICK, metric=metric)
            work = asyncio.create_task(
                calibrate(recorder, ref, dataset, options, GENERATION, tell)  # type: ignore[arg-type]
            )
            await began.wait()
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            assert recorder.num_running == 0
            # What the engine does next finds it free.
            assert await engine.run_slices(lambda _: nothing(), lambda _: None) is None

        run_async(scenario)
        assert len(recorder.requests) < len(dataset.samples) * (NUM_LAYERS + 1)
    assert core.runner.slots.num_users == 0
    assert core.blocks.num_free == core.blocks.num_blocks


def nothing() -> Any:
    yield None


def test_the_engine_ending_fails_the_calibration(tiny: Tiny) -> None:
    dataset = planted(tiny, "a", num_samples=32)
    core = make_core(tiny)
    core.registry.load("a", tiny.adapter("a"))
    with started(core, max_live_requests=64) as engine:

        async def scenario() -> None:
            ref = await engine.resolve("a")
            stopped = False

            def tell(progress: Progress) -> None:
                nonlocal stopped
                if progress.done and not stopped:
                    stopped = True
                    asyncio.get_running_loop().run_in_executor(None, engine.shutdown)

            options = replace(QUICK, metric="exact_match")
            await calibrate(engine, ref, dataset, options, GENERATION, tell)

        with pytest.raises((GenerationError, EngineDead), match=r"stopped|aborted"):
            run_async(scenario)


@pytest.mark.parametrize(
    ("options", "generation", "param", "why"),
    [
        ({"metric": "bleurt"}, {}, "metric", "unknown metric"),
        ({"metric": "exact_match"}, {"pattern": "(x)"}, "pattern", "takes no pattern"),
        ({}, {"pattern": "(x)"}, "pattern", "takes no pattern"),
        ({"metric": "regex_answer"}, {"pattern": "(("}, "pattern", "pattern"),
        ({"metric": "regex_answer"}, {}, "dataset", "sample 0"),
        ({}, {"max_tokens": 60}, "max_tokens", "line 2"),
    ],
)
def test_what_can_never_be_calibrated_is_refused_by_its_field(
    options: dict[str, Any], generation: dict[str, Any], param: str, why: str
) -> None:
    samples = (Sample((1, 2), (3,), "no number"), Sample((1, 2, 3, 4, 5), (3,), "none"))
    dataset = Dataset("completion", samples, f"sha256:{'d' * 64}", (), 2)
    with pytest.raises(BadRequest, match=why) as caught:
        check(dataset, CalibrationOptions(**options), GenerationOptions(**generation), 64)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("metric", "method", "word"),
    [
        ("log_likelihood", "sweep", "forking_sweep"),
        ("exact_match", "sweep", "generation"),
        ("log_likelihood", "lens", "logit_lens"),
        ("rouge_l", "lens", "logit_lens"),
    ],
)
def test_records_say_how_their_scores_were_made(metric: str, method: Any, word: str) -> None:
    assert CalibrationOptions(metric=metric, method=method).method_word == word
