"""One adapter's calibration on the engine that serves it: scores, choice, texts to look at.

The one pipeline that an admin job and `fathom calibrate` both run. Scores of a sweep are made in
slices between steps, those of generated text by ordinary requests; cancelling the call ends either
and leaves nothing behind. Knows no store and no HTTP.
"""

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boundary.dataset import Dataset
from boundary.mask import representative_depths
from boundary.options import SWEEP_METRICS, CalibrationOptions, check_samples
from boundary.outcome import Calibration, SampleOutput
from boundary.progress import Progress
from boundary.report.report import conclude
from boundary.text_score import TEXT_METRICS, TextScore, text_score
from server.calibration.generation import (
    GenerationOptions,
    Place,
    Text,
    generate_texts,
    texts_max_tokens,
)
from server.calibration.outcome import GenerationCost, Outcome
from server.engine.protocol import Engine, SliceHost, Slices
from server.engine.request import AdapterRef
from server.errors import BadRequest

METRICS = (*SWEEP_METRICS, *TEXT_METRICS)
"""Every metric that a calibration can be asked for."""

Scores = NDArray[np.float64]
"""`[num_samples, num_layers + 1]`"""

OnProgress = Callable[[Progress], None]


def check(
    dataset: Dataset,
    options: CalibrationOptions,
    generation: GenerationOptions,
    max_model_len: int,
) -> None:
    """Raise BadRequest, which names the field, for what could never be calibrated.

    Cheap: worth asking before anything is queued.
    """
    if options.metric not in METRICS:
        known = ", ".join(METRICS)
        raise BadRequest(f"unknown metric {options.metric!r}; known are {known}", param="metric")
    try:
        check_samples(dataset.samples, options)
    except ValueError as error:
        raise BadRequest(str(error), param="metric") from error
    try:
        score = _text_score(options, generation)
    except ValueError as error:
        raise BadRequest(str(error), param="pattern") from error
    if score is not None:
        try:
            score.check(sample.completion for sample in dataset.samples)
        except ValueError as error:
            raise BadRequest(f"metric {options.metric!r}: {error}", param="dataset") from error
    texts_max_tokens(dataset.samples, generation, max_model_len)


async def calibrate(
    engine: Engine,
    adapter: AdapterRef,
    dataset: Dataset,
    options: CalibrationOptions,
    generation: GenerationOptions,
    on_progress: OnProgress,
) -> Outcome:
    """Find and prove an adapter's depth on a loaded engine.

    adapter: resolved, so that it carries its content; see `Engine.resolve`.
    on_progress: called on the event loop, stage by stage: those of `calibrate_slices`, before them
        `generate` for metrics of text, after them `outputs`.

    Raises BadRequest as `check` does, ValueError for samples and scores that cannot be used (such as
    a loss that is no number), and what the engine raises.
    """
    check(dataset, options, generation, engine.info.max_model_len)
    texts = _Texts(engine, adapter, dataset, generation, on_progress)

    # 1. Where text is judged: write it at every depth that is a model of its own.
    score = _text_score(options, generation)
    scores = None
    if score is not None:
        layers = await engine.run_slices(lambda host: _lora_layers(host, adapter), _nothing)
        scores = await _text_scores(texts, score, layers)

    # 2. Score every depth, choose, confirm, look at controls and layers.
    slices_of = await asyncio.to_thread(_calculation)
    calibration, layers = await engine.run_slices(
        lambda host: _calibration(host, slices_of, adapter, dataset, options, scores), on_progress
    )

    # 3. Show a few samples at base, chosen and full depth.
    outputs = await _outputs(texts, calibration, layers)

    assert adapter.digest is not None  # its weights were just used
    fingerprints = {
        "base": engine.info.revision,
        "adapter": adapter.digest,
        "data": dataset.fingerprint,
    }
    report = conclude(
        calibration,
        dataset,
        options,
        adapter=adapter.name,
        layers=layers,
        fingerprints=fingerprints,
        outputs=outputs,
        signature=None if score is None else score.signature,
    )
    return Outcome(calibration, report.record, report, texts.cost)


class _Texts:
    """Texts of one data set by sample and depth, none written twice."""

    def __init__(
        self,
        engine: Engine,
        adapter: AdapterRef,
        dataset: Dataset,
        options: GenerationOptions,
        on_progress: OnProgress,
    ) -> None:
        self.engine = engine
        self.dataset = dataset
        self.options = options
        self._adapter = adapter
        self._on_progress = on_progress
        self._max_tokens = texts_max_tokens(dataset.samples, options, engine.info.max_model_len)
        self._texts: dict[Place, Text] = {}

    async def at(self, places: list[Place], stage: str) -> list[str]:
        """The text of each place."""
        new = [place for place in dict.fromkeys(places) if place not in self._texts]

        def tell(done: int) -> None:
            self._on_progress(Progress(stage, done, len(new)))

        if new:
            tell(0)
            self._texts |= await generate_texts(
                self.engine,
                self._adapter,
                self.dataset.samples,
                new,
                self._max_tokens,
                self.options,
                tell,
            )
        return [self._texts[place].text for place in places]

    @property
    def cost(self) -> GenerationCost:
        """Of all so far."""
        texts = self._texts.values()
        return GenerationCost(
            num_texts=len(texts),
            num_cut=sum(text.is_cut for text in texts),
            num_tokens=sum(text.num_tokens for text in texts),
            max_tokens=self._max_tokens,
        )


def _text_score(options: CalibrationOptions, generation: GenerationOptions) -> TextScore | None:
    """Raises ValueError for a pattern that is no good, or that nothing takes."""
    if options.metric in SWEEP_METRICS:
        if generation.pattern is not None:
            raise ValueError(f"metric {options.metric!r} takes no pattern")
        return None
    return text_score(options.metric, pattern=generation.pattern)


async def _text_scores(texts: _Texts, score: TextScore, layers: frozenset[int]) -> Scores:
    """float64 `[num_samples, num_layers + 1]`"""
    samples = texts.dataset.samples
    depths = representative_depths(layers, texts.engine.info.num_layers)
    places = [(index, depth) for index in range(len(samples)) for depth in depths]
    written = await texts.at(places, "generate")
    scores = [
        score(text, samples[index].completion)
        for (index, _), text in zip(places, written, strict=True)
    ]
    return np.array(scores, dtype=np.float64).reshape(len(samples), len(depths))


async def _outputs(
    texts: _Texts, calibration: Calibration, layers: frozenset[int]
) -> tuple[SampleOutput, ...]:
    """The first samples' texts at base, chosen and full depth."""
    shown = texts.dataset.samples[: texts.options.num_shown]
    num_layers = texts.engine.info.num_layers
    same_as = representative_depths(layers, num_layers)
    depths = sorted({0, calibration.selection.depth, num_layers})
    places = [(index, depth) for index in range(len(shown)) for depth in depths]
    written = await texts.at([(index, same_as[depth]) for index, depth in places], "outputs")
    by_place = dict(zip(places, written, strict=True))
    outputs = []
    for index, sample in enumerate(shown):
        prompt = texts.engine.tokenizer.decode(list(sample.prompt_token_ids))
        assert isinstance(prompt, str)  # one list of ids is one text
        by_depth = {depth: by_place[index, depth] for depth in depths}
        outputs.append(SampleOutput(prompt, sample.completion, by_depth))
    return tuple(outputs)


def _calculation() -> Callable[..., Generator[Progress, None, Calibration]]:
    """`calibrate_slices`, imported when first wanted: it brings torch and PEFT, and takes a second."""
    from boundary.calibration import calibrate_slices

    return calibrate_slices


def _calibration(
    host: SliceHost,
    slices_of: Callable[..., Generator[Progress, None, Calibration]],
    adapter: AdapterRef,
    dataset: Dataset,
    options: CalibrationOptions,
    scores: Scores | None,
) -> Generator[Progress, None, tuple[Calibration, frozenset[int]]]:
    with host.rows(adapter) as rows:
        calibration = yield from slices_of(
            host.model,
            dataset.samples,
            options,
            rows=rows,
            full_depth=adapter.max_depth,
            scores=scores,
            max_tokens=host.max_tokens,
        )
        return calibration, rows.layers


def _lora_layers(host: SliceHost, adapter: AdapterRef) -> Slices:
    with host.rows(adapter) as rows:
        layers = rows.layers
    yield None
    return layers


def _nothing(_: Any) -> None:
    """No progress worth telling."""
