"""A PEFT model, its tokenizer and samples -> the depth of its adapter, with the evidence.

The same samples, scores, choice and record as `fathom calibrate` makes of the adapter's files, by
PEFT's own forward pass instead of a server's, on whatever device and in whatever dtype the model is.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from boundary import dataset as datasets
from boundary.calibration import calibrate_slices
from boundary.dataset import Dataset
from boundary.depth import lora_modules, num_decoder_layers
from boundary.limits import is_held_back
from boundary.mask import representative_depths
from boundary.notebook.calibrated import Calibrated
from boundary.notebook.identity import Unknowable, adapter_of, base_of
from boundary.notebook.texts import Texts
from boundary.options import SWEEP_METRICS, CalibrationOptions, check_samples
from boundary.outcome import SampleOutput
from boundary.progress import Progress, drain
from boundary.report.report import conclude
from boundary.rows import PeftLoraRows
from boundary.sample import usual_max_tokens
from boundary.sweep import MAX_TOKENS, Scores
from boundary.text_score import TextScore, text_score

DEFAULT_OPTIONS = CalibrationOptions()

Samples = str | os.PathLike[str] | Dataset | Iterable[Mapping[str, Any]]
"""A JSONL file, a data set that was read already, or what its lines hold, one mapping a sample."""


def calibrate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    options: CalibrationOptions = DEFAULT_OPTIONS,
    *,
    name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    max_len: int | None = None,
    max_samples: int | None = None,
    pattern: str | None = None,
    max_tokens: int | None = None,
    num_shown: int = 3,
    batch_tokens: int = MAX_TOKENS,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Calibrated:
    """Find and prove the depth of the model's active adapter.

    Modules in training mode are in eval mode meanwhile, and nothing of the model is changed after.

    samples: `{"prompt", "completion"}`, `{"messages"}` or, for `kl_to_full`, `{"prompt"}`; see
        `boundary.dataset`. They should be new to the adapter.
    name: what a report calls the adapter; by default its name in the model.
    base: the base model's files or hub id; by default where the model says that it came from.
    max_len: the context in tokens; by default the model's own. Longer prompts lose their start.
    max_samples: takes the first so many samples only.
    pattern: for the metric `regex_answer` alone.
    max_tokens: of generated texts; by default the longest reference's and a quarter more.
    num_shown: samples whose texts at base, chosen and full depth the report shows.
    batch_tokens: tokens alive at once, padding included, which bounds the memory that it takes.
    on_progress, should_stop: called with each slice's progress, and asked before each slice.

    Raises ValueError for a model that has no adapter active, several, or one that is held back; for
    samples (DatasetError) and options that do not go together; for models that cannot be swept.
    Raises Stopped if told to stop.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel, got {type(model).__name__}")
    adapter = _active_adapter(model)
    num_layers = num_decoder_layers(model)
    max_len = max_len or _context(model)
    dataset = _read(samples, tokenizer, max_len, max_samples)
    score = _text_score(options, pattern)
    check_samples(dataset.samples, options)
    if score is not None:
        score.check(sample.completion for sample in dataset.samples)
    if max_tokens is not None:
        _refuse_no_room(dataset, max_tokens, max_len)
    rows = PeftLoraRows(model)
    texts = Texts(
        model, tokenizer, dataset.samples, max_tokens or usual_max_tokens(dataset.samples), max_len
    )

    def slices() -> Generator[Progress, None, Calibrated]:
        # 1. Where text is judged: write it at every depth that is a model of its own.
        same_as = representative_depths(rows.layers, num_layers)
        scores: Scores | None = None
        if score is not None:
            places = [(i, depth) for i in range(len(dataset.samples)) for depth in same_as]
            written = yield from texts.at(places, "generate")
            values = [
                score(written[index, depth], dataset.samples[index].completion)
                for index, depth in places
            ]
            scores = np.array(values, dtype=np.float64).reshape(-1, num_layers + 1)

        # 2. Score every depth, choose, confirm, look at controls and layers.
        calibration = yield from calibrate_slices(
            model, dataset.samples, options, rows=rows, scores=scores, max_tokens=batch_tokens
        )

        # 3. Show a few samples at base, chosen and full depth.
        shown = range(min(num_shown, len(dataset.samples)))
        depths = sorted({0, calibration.selection.depth, num_layers})
        places = [(index, same_as[depth]) for index in shown for depth in depths]
        written = yield from texts.at(places, "outputs")
        outputs = tuple(
            SampleOutput(
                str(tokenizer.decode(list(dataset.samples[index].prompt_token_ids))),
                dataset.samples[index].completion,
                {depth: written[index, same_as[depth]] for depth in depths},
            )
            for index in shown
        )

        # 4. Say what it was made of, and conclude.
        content = adapter_of(model, adapter)
        fingerprints = {"adapter": content.fingerprint, "data": dataset.fingerprint}
        why_no_record = None
        try:
            fingerprints["base"] = base_of(model, base)
        except Unknowable as error:
            why_no_record = str(error)
        report = conclude(
            calibration, dataset, options, adapter=name or adapter, layers=rows.layers,
            fingerprints=fingerprints, outputs=outputs,
            signature=None if score is None else score.signature,
        )  # fmt: skip
        if calibration.selection.verdict == "too_few":
            why_no_record = "too few samples to conclude anything"
        return Calibrated(calibration, report, content, why_no_record)

    with _evaluating(model):
        return drain(slices(), on_progress=on_progress, should_stop=should_stop)


def _active_adapter(model: PeftModel) -> str:
    active = model.active_adapters
    if len(active) != 1:
        found = ", ".join(map(repr, active)) or "none"
        raise ValueError(f"one adapter must be active, found {found}; see model.set_adapter")
    kind = model.peft_config[active[0]].peft_type
    if kind != "LORA":
        raise ValueError(f"the active adapter is of type {kind}: only LoRA has a depth")
    for name, module, _ in lora_modules(model):
        if module.disable_adapters or is_held_back(module):
            raise ValueError(
                f"LoRA of {name} is switched off (disable_adapter, lora_depth): a calibration would"
                " find that it does nothing"
            )
    return str(active[0])


def _context(model: PeftModel) -> int:
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)  # num_decoder_layers takes no other
    text_config = base.config.get_text_config(decoder=True)
    return int(getattr(text_config, "max_position_embeddings", 0) or 1 << 20)


def _read(
    samples: Samples, tokenizer: PreTrainedTokenizerBase, max_len: int, first: int | None
) -> Dataset:
    if isinstance(samples, Dataset):
        if first is not None:
            raise ValueError("max_samples is for samples that were not read yet")
        return samples
    if isinstance(samples, str | os.PathLike):
        return datasets.load(samples, tokenizer, max_len, first=first)
    records = [dict(record) if isinstance(record, Mapping) else record for record in samples]
    return datasets.from_records(records, tokenizer, max_len, first=first)


def _refuse_no_room(dataset: Dataset, max_tokens: int, max_len: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    for line, sample in enumerate(dataset.samples, start=1):
        room = max_len - len(sample.prompt_token_ids)
        if max_tokens > room:
            raise ValueError(
                f"max_tokens is {max_tokens}, but the prompt of line {line} leaves room for {room}"
                f" in the context of {max_len}"
            )


def _text_score(options: CalibrationOptions, pattern: str | None) -> TextScore | None:
    if options.metric not in SWEEP_METRICS:
        return text_score(options.metric, pattern=pattern)
    if pattern is not None:
        raise ValueError(f"metric {options.metric!r} takes no pattern")
    return None


@contextmanager
def _evaluating(model: PeftModel) -> Iterator[None]:
    """Without dropout, and with each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
