"""BoundaryRecord: one adapter's depth with the evidence for it, as it is stored and shipped.

A record names by fingerprint the base model, the adapter's content and the data it was made from,
so that it is never applied to anything else. As `boundary.json` it lies beside an adapter's weights
and goes wherever they go. Knows no model and no database; whoever applies a record asks `mismatch`.
"""

import json
import os
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from boundary import strict_json, whole_file
from boundary.intervals import Interval
from boundary.selection import Selection

FILE_NAME = "boundary.json"
MAX_FILE_BYTES = 1 << 20  # 100 layers take 30 kB
MAX_LAYERS = 4096

try:
    LIBRARY_VERSION = version("fathom-lora")
except PackageNotFoundError:  # a source tree that nobody installed
    LIBRARY_VERSION = "0+unknown"

Fingerprint = Annotated[str, Field(pattern=r"^[A-Za-z0-9:._-]{8,128}$")]
"""`sha256:<hex>`, or the commit of a model hub."""
Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class RecordError(ValueError):
    """A `boundary.json` that cannot be read or written, with its name and what is wrong."""


class _Frozen(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Difference(_Frozen):
    """A mean paired difference and its two-sided interval."""

    mean: Finite
    low: Finite
    high: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.mean <= self.high:
            raise ValueError("low, mean and high are out of order")
        return self

    @classmethod
    def of(cls, interval: Interval) -> Self:
        """The same numbers as a record keeps them."""
        return cls(mean=interval.mean, low=interval.low, high=interval.high)


class CurvePoint(_Frozen):
    """One depth: its mean score, and how that differs from full over all samples."""

    score: Finite
    to_full: Difference


class BoundaryRecord(_Frozen):
    """One depth for one adapter on one base, with what it rests on; see `selection.select`.

    Either selected from samples, with all the evidence, or pinned by hand, with a reason.

    method: how the scores were made, such as `forking_sweep`; `manual` for a pin.
    proposed_depth: what half of the samples proposed; `depth` is that or full, as the verdict says.
    curve: one point a depth, 0 to `num_layers`.
    confirmation: (proposed - full) on the half that took no part in proposing.
    """

    schema_version: Literal[1] = 1
    depth: Annotated[int, Field(ge=0)]
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    method: Word
    reason: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    metric: Word | None = None
    verdict: Literal["improves", "equal_cheaper", "keep_full"] | None = None
    proposed_depth: Annotated[int, Field(ge=0)] | None = None
    curve: tuple[CurvePoint, ...] | None = None
    confirmation: Difference | None = None
    tolerance: Annotated[Finite, Field(ge=0)] | None = None
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    num_samples: Annotated[int, Field(ge=1)] | None = None
    base_fingerprint: Fingerprint
    adapter_fingerprint: Fingerprint
    data_fingerprint: Fingerprint | None = None
    created_at: AwareDatetime
    library_version: Annotated[str, Field(min_length=1, max_length=64)] = LIBRARY_VERSION

    @field_validator("created_at")
    @classmethod
    def _is_utc(cls, value: datetime) -> datetime:
        if value.utcoffset() != timedelta(0):
            raise ValueError("must be in UTC")
        return value.astimezone(UTC)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("depth", "proposed_depth"):
            depth = getattr(self, name)
            if depth is not None and depth > self.num_layers:
                raise ValueError(
                    f"{name} must be at most num_layers {self.num_layers}, got {depth}"
                )
        evidence = {name: getattr(self, name) for name in EVIDENCE}
        if self.method == "manual":
            given = [name for name, value in evidence.items() if value is not None]
            if given:
                raise ValueError(f"a manual pin has no {given[0]}")
            if self.reason is None or not self.reason.strip():
                raise ValueError("a manual pin needs a reason")
            return self
        missing = [name for name, value in evidence.items() if value is None]
        if missing:
            raise ValueError(f"{missing[0]} is missing: only a manual pin goes without")
        if self.reason is not None:
            raise ValueError("only a manual pin has a reason")
        assert self.curve is not None
        if len(self.curve) != self.num_layers + 1:
            raise ValueError(
                f"curve must have {self.num_layers + 1} points, one a depth, got {len(self.curve)}"
            )
        served = self.num_layers if self.verdict == "keep_full" else self.proposed_depth
        if self.depth != served:
            raise ValueError(f"verdict {self.verdict} means depth {served}, got {self.depth}")
        return self

    @classmethod
    def selected(
        cls,
        selection: Selection,
        *,
        method: str,
        metric: str,
        base: str,
        adapter: str,
        data: str,
    ) -> Self:
        """A record of what a selection concluded, made now; ValueError if it concluded nothing."""
        if selection.verdict == "too_few" or selection.confirmed_on is None:
            raise ValueError("a selection from too few samples makes no record")
        points = []
        for point in selection.curve:
            assert point.interval is not None  # enough samples have intervals
            points.append(CurvePoint(score=point.score, to_full=Difference.of(point.interval)))
        return cls(
            depth=selection.depth,
            num_layers=len(selection.curve) - 1,
            method=method,
            metric=metric,
            verdict=selection.verdict,
            proposed_depth=selection.proposed_depth,
            curve=tuple(points),
            confirmation=Difference.of(selection.confirmed_on.to_full),
            tolerance=selection.tolerance,
            confidence=selection.confidence,
            seed=selection.seed,
            num_samples=selection.num_samples,
            base_fingerprint=base,
            adapter_fingerprint=adapter,
            data_fingerprint=data,
            created_at=datetime.now(UTC),
        )

    @classmethod
    def pinned(cls, depth: int, num_layers: int, reason: str, *, base: str, adapter: str) -> Self:
        """A record of somebody's decision, made now."""
        return cls(
            depth=depth,
            num_layers=num_layers,
            method="manual",
            reason=reason,
            base_fingerprint=base,
            adapter_fingerprint=adapter,
            created_at=datetime.now(UTC),
        )

    def mismatch(self, *, base: str, adapter: str, num_layers: int) -> str | None:
        """Why this record must not be applied to these, or None if it may be."""
        if self.base_fingerprint != base:
            return f"made for base model {self.base_fingerprint}, loaded is {base}"
        if self.adapter_fingerprint != adapter:
            return f"made for adapter content {self.adapter_fingerprint}, loaded is {adapter}"
        if self.num_layers != num_layers:
            return f"made for {self.num_layers} layers, the model has {num_layers}"
        return None


EVIDENCE = (
    "metric", "verdict", "proposed_depth", "curve", "confirmation", "tolerance", "confidence",
    "seed", "num_samples", "data_fingerprint",
)  # fmt: skip
"""Fields that a selected record has and a manual pin has not."""


def read(path: str | os.PathLike[str]) -> BoundaryRecord:
    """The record in a file; raises RecordError, with the field if one is at fault."""
    path = Path(path)
    try:
        content = strict_json.read_file(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise RecordError(str(error)) from error
    return parse(content, path.name)


def parse(content: bytes, name: str) -> BoundaryRecord:
    """The record in a file's content; `name` names the file in a RecordError."""
    try:
        strict_json.parse(content)  # for what pydantic forgives: equal keys, half a surrogate pair
        return BoundaryRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])[: strict_json.MAX_SHOWN]
        about = f"'{field}' is wrong: " if field else ""
        raise RecordError(f"{name!r}: {about}{first['msg']}") from None
    except ValueError as error:
        raise RecordError(f"{name!r} {error}") from None


def write(record: BoundaryRecord, path: str | os.PathLike[str]) -> None:
    """Put the record in a file, which afterwards, also after a crash, is the old one or the new.

    Raises RecordError, and leaves nothing behind, if that fails.
    """
    path = Path(path)
    fields = record.model_dump(mode="json", exclude_none=True)
    content = json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"\n"
    try:
        whole_file.write({path: content})
    except OSError as error:
        raise RecordError(f"{path.name!r} cannot be written: {error.strerror}") from error
