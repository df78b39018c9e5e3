"""Body of a recalibration -> a plan, with everything refused that could never be calibrated.

The samples come in the body or from a file below the data root. Each thing wrong with them is a 400
that names the line and the field; nothing is queued before all of it is read.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from boundary.dataset import Dataset, DatasetError, from_jsonl, from_records
from boundary.options import LOG_LIKELIHOOD_METRIC, CalibrationOptions
from boundary.selection import MIN_SAMPLES
from server.api.strict import StrictModel
from server.calibration import data_root, pipeline
from server.calibration.generation import GenerationOptions
from server.calibration.jobs import Plan
from server.config import Settings
from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import BadRequest


class DatasetSource(StrictModel):
    """Samples, the text of a file of JSON lines, or the name of one below the data root."""

    samples: list[Any] | None = None
    jsonl: str | None = None
    file: Annotated[str, Field(min_length=1, max_length=4096)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if [self.samples, self.jsonl, self.file].count(None) != 2:
            raise PydanticCustomError("one_source", "give either 'samples', 'jsonl' or 'file'")
        return self


class ShareOfGain(StrictModel):
    """A tolerance as a share of what the adapter gains over the base."""

    share_of_gain: Annotated[float, Field(ge=0, le=1)]


def _kind_of_tolerance(value: Any) -> str:
    return "object" if isinstance(value, dict | ShareOfGain) else "number"


# Told apart first, so that an error is about what was meant.
Tolerance = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[ShareOfGain, Tag("object")],
    Discriminator(_kind_of_tolerance),
]


class RecalibrateRequest(StrictModel):
    """Body of `POST /admin/adapters/{name}/recalibrate`."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "depth": "it is what is looked for; PUT .../boundary pins one"
    }

    dataset: DatasetSource
    metric: str = LOG_LIKELIHOOD_METRIC
    method: Literal["sweep", "lens"] = "sweep"
    tolerance: Tolerance = 0.0
    max_samples: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    activate: bool | None = None
    """Whether the depth counts at once if the verdict allows it; yes unless it is a dry run."""
    dry_run: bool = False
    pattern: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")] | None = (
        None
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None


async def plan(
    body: RecalibrateRequest, adapter: AdapterRef, engine: Engine, settings: Settings
) -> Plan:
    """Raises BadRequest, which names the field, and for samples the line."""
    if body.metric not in pipeline.METRICS:
        known = ", ".join(pipeline.METRICS)
        raise BadRequest(f"unknown 'metric' {body.metric!r}; known are {known}", param="metric")
    if body.dry_run and body.activate:
        raise BadRequest("a 'dry_run' keeps nothing that 'activate' could mean", param="activate")
    options = _options(body)
    generation = GenerationOptions(
        pattern=body.pattern,
        max_tokens=body.max_tokens,
        max_num_seqs=settings.max_num_seqs,
        busy_share=settings.calibration_share,
    )
    dataset = await asyncio.to_thread(_read, body, settings.data_root, engine)
    if len(dataset.samples) < MIN_SAMPLES and not body.dry_run:
        param = "dataset" if len(dataset.samples) == dataset.num_given else "max_samples"
        raise BadRequest(
            f"'{param}': {len(dataset.samples)} samples are too few to conclude anything, at least "
            f"{MIN_SAMPLES} are needed; a 'dry_run' says how many would be enough",
            param=param,
            code="too_few_samples",
        )
    await asyncio.to_thread(pipeline.check, dataset, options, generation, engine.info.max_model_len)
    asked = body.model_dump(mode="json", exclude={"dataset"}, exclude_none=True)
    asked["dataset"] = {
        "file": body.dataset.file,
        "fingerprint": dataset.fingerprint,
        "num_samples": len(dataset.samples),
        "num_given": dataset.num_given,
    }
    return Plan(
        adapter=adapter,
        dataset=dataset,
        options=options,
        generation=generation,
        activate=body.activate is not False and not body.dry_run,
        is_dry_run=body.dry_run,
        asked=asked,
    )


def _options(body: RecalibrateRequest) -> CalibrationOptions:
    share = body.tolerance if isinstance(body.tolerance, ShareOfGain) else None
    try:
        return CalibrationOptions(
            metric=body.metric,
            method=body.method,
            tolerance=share.share_of_gain if share is not None else body.tolerance,  # type: ignore[arg-type]
            relative=share is not None,
            seed=body.seed,
        )
    except ValueError as error:  # the body's own limits hold: what is left is a metric without one
        raise BadRequest(f"'tolerance': {error}", param="tolerance") from error


def _read(body: RecalibrateRequest, root: Path | None, engine: Engine) -> Dataset:
    """Reads and tokenizes, on a thread of its own."""
    given, tokenizer, max_len = body.dataset, engine.tokenizer, engine.info.max_model_len
    try:
        if given.file is not None:
            content = data_root.read(root, given.file)
            return from_jsonl(content, tokenizer, max_len, first=body.max_samples)
        if given.jsonl is not None:
            content = given.jsonl.encode()  # half a surrogate pair was refused with the body
            return from_jsonl(content, tokenizer, max_len, first=body.max_samples)
        assert given.samples is not None
        return from_records(given.samples, tokenizer, max_len, first=body.max_samples)
    except DatasetError as error:
        source = next(name for name, value in given if value is not None)
        param = f"dataset.{source}"
        if source == "samples" and error.line is not None:
            param += f"[{error.line - 1}]" + (f".{error.field}" if error.field else "")
        raise BadRequest(f"'dataset.{source}': {error}", param=param, code="bad_dataset") from error
