"""Records: what they refuse to say, and that a file holds the old one or the new."""

import json
import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from boundary.record import FILE_NAME, MAX_FILE_BYTES, BoundaryRecord, RecordError, read, write
from boundary.selection import Selection, select

BASE, ADAPTER, DATA = (f"sha256:{digit * 64}" for digit in "abc")
NUM_LAYERS = 4


def make_selection(best: int = 2, num_samples: int = 60) -> Selection:
    scores = np.random.default_rng(0).normal(size=(num_samples, NUM_LAYERS + 1))
    scores[:, best] += 5
    return select(scores, seed=7, tolerance=0.25, num_resamples=100)


def selected(**selection: int) -> BoundaryRecord:
    return BoundaryRecord.selected(
        make_selection(**selection), method="forking_sweep", metric="log_likelihood",
        base=BASE, adapter=ADAPTER, data=DATA,
    )  # fmt: skip


def pinned(depth: int = 3) -> BoundaryRecord:
    return BoundaryRecord.pinned(depth, NUM_LAYERS, "it rhymes", base=BASE, adapter=ADAPTER)


def fields(record: BoundaryRecord, **changes: Any) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude_none=True) | changes


def refused(content: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        BoundaryRecord.model_validate_json(json.dumps(content))
    (error,) = caught.value.errors()
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def test_a_selection_becomes_a_record_with_all_its_evidence() -> None:
    selection, record = make_selection(), selected()
    assert (record.depth, record.num_layers, record.verdict) == (2, NUM_LAYERS, "improves")
    assert (record.method, record.metric) == ("forking_sweep", "log_likelihood")
    assert (record.tolerance, record.confidence, record.seed) == (0.25, 0.95, 7)
    assert record.num_samples == 60
    assert record.data_fingerprint == DATA
    assert record.curve is not None
    for point, of in zip(record.curve, selection.curve, strict=True):
        assert of.interval is not None
        assert point.score == of.score
        assert point.to_full.low == of.interval.low
    assert selection.confirmed_on is not None
    assert record.confirmation is not None
    assert record.confirmation.low == selection.confirmed_on.to_full.low
    assert abs(datetime.now(UTC) - record.created_at) < timedelta(minutes=1)


def test_keep_full_serves_every_layer() -> None:
    record = selected(best=NUM_LAYERS)
    assert (record.verdict, record.depth) == ("keep_full", NUM_LAYERS)


def test_too_few_samples_make_no_record() -> None:
    with pytest.raises(ValueError, match="too few"):
        selected(num_samples=5)


def test_a_pin_has_a_reason_and_no_evidence() -> None:
    record = pinned()
    assert (record.method, record.reason, record.depth) == ("manual", "it rhymes", 3)
    assert record.curve is record.verdict is record.data_fingerprint is None
    with pytest.raises(ValidationError, match="reason"):
        BoundaryRecord.pinned(3, NUM_LAYERS, " ", base=BASE, adapter=ADAPTER)


@pytest.mark.parametrize("record", [selected(), selected(best=4), pinned()])
def test_a_record_survives_its_file(tmp_path: Path, record: BoundaryRecord) -> None:
    write(record, tmp_path / FILE_NAME)
    assert read(tmp_path / FILE_NAME) == record
    assert read(str(tmp_path / FILE_NAME)) == record


@given(
    scores=st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=6),
    reason=st.text(min_size=1).filter(str.strip),
    created_at=st.datetimes(timezones=st.just(UTC)),
)
def test_any_record_survives_json(scores: list[float], reason: str, created_at: datetime) -> None:
    depth = len(scores) - 1
    curve = [{"score": s, "to_full": {"mean": s, "low": s, "high": s}} for s in scores]
    common: dict[str, Any] = {"depth": depth, "num_layers": depth, "proposed_depth": depth}
    changes = {"curve": curve, "created_at": created_at.isoformat()} | common
    changes["verdict"] = "keep_full"
    pin = fields(pinned(), reason=reason, created_at=created_at.isoformat())
    for content in (fields(selected_once, **changes), pin):
        record = BoundaryRecord.model_validate_json(json.dumps(content))
        assert BoundaryRecord.model_validate_json(record.model_dump_json()) == record
        assert record.created_at == created_at


selected_once = selected()


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        selected_once.depth = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"depth": 5}, "depth must be at most num_layers 4, got 5"),
        ({"depth": -1}, "depth: "),
        ({"depth": 2.0}, "depth: "),
        ({"depth": "2"}, "depth: "),
        ({"depth": True}, "depth: "),
        ({"depth": 1}, "verdict improves means depth 2, got 1"),
        ({"verdict": "keep_full"}, "verdict keep_full means depth 4, got 2"),
        ({"verdict": "too_few"}, "verdict: "),
        ({"proposed_depth": 5}, "proposed_depth must be at most"),
        ({"num_layers": 5}, "curve must have 6 points, one a depth, got 5"),
        ({"num_layers": 0}, "num_layers: "),
        ({"curve": None}, "curve is missing"),
        ({"metric": None}, "metric is missing"),
        ({"data_fingerprint": None}, "data_fingerprint is missing"),
        ({"reason": "why"}, "only a manual pin has a reason"),
        ({"method": "manual", "reason": "why"}, "a manual pin has no metric"),
        ({"method": "By Hand"}, "method: "),
        ({"tolerance": -1.0}, "tolerance: "),
        ({"confidence": 1.0}, "confidence: "),
        ({"num_samples": 0}, "num_samples: "),
        ({"base_fingerprint": ""}, "base_fingerprint: "),
        ({"adapter_fingerprint": "a b c d e f"}, "adapter_fingerprint: "),
        ({"created_at": "2026-01-01T00:00:00"}, "created_at: "),
        ({"created_at": "2026-01-01T00:00:00+01:00"}, "created_at: Value error, must be in UTC"),
        ({"confirmation": {"mean": 1.0, "low": 2.0, "high": 3.0}}, "out of order"),
        ({"confirmation": {"mean": 1.0, "low": 0.0}}, "confirmation.high: "),
        ({"unknown": 1}, "unknown: "),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(changes: dict[str, Any], what: str) -> None:
    assert what in refused(fields(selected_once, **changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    content = fields(selected_once)
    content["curve"][3]["score"] = value
    assert "curve.3.score" in refused(content)


def test_a_time_in_utc_by_any_name_is_utc() -> None:
    other = timezone(timedelta(0), "GMT")
    record = BoundaryRecord(
        **dict(selected_once) | {"created_at": datetime(2026, 1, 1, tzinfo=other)}
    )
    assert record.created_at.tzinfo is UTC


def test_a_mismatch_says_what_differs() -> None:
    here: dict[str, Any] = {"base": BASE, "adapter": ADAPTER, "num_layers": NUM_LAYERS}
    for record in (selected_once, pinned()):
        assert record.mismatch(**here) is None
        for changes, what in [
            ({"base": DATA}, f"base model {BASE}, loaded is {DATA}"),
            ({"adapter": DATA}, f"adapter content {ADAPTER}, loaded is {DATA}"),
            ({"num_layers": 12}, "4 layers, the model has 12"),
        ]:
            assert what in str(record.mismatch(**here | changes))


def test_a_hub_commit_names_a_base() -> None:
    record = BoundaryRecord.pinned(1, 2, "so", base="0f3c" * 10, adapter=ADAPTER)
    assert record.mismatch(base="0f3c" * 10, adapter=ADAPTER, num_layers=2) is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "'boundary.json' is not JSON"),
        (b"{", "'boundary.json' is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[]", "'boundary.json': "),
        (b"{}", "'depth' is wrong: Field required"),
        (b'{"depth": 1, "depth": 2}', "gives 'depth' more than once"),
        (b'{"depth": NaN}', "holds NaN"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * ((1 << 20) + 1), "over the limit of 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read(tmp_path / FILE_NAME)
    assert what in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, what in [("none", "No such file"), (".", "regular"), ("pipe", "regular")]:
        with pytest.raises(RecordError, match=what):
            read(tmp_path / name)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / FILE_NAME
    write(pinned(), path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RecordError, match=r"'boundary\.json' cannot be written: No space"):
        write(selected_once, path)
    assert read(path).method == "manual"
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        kind = "directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        steps.append(f"fsync {kind}")
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert read(source) == selected_once
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write(selected_once, tmp_path / FILE_NAME)
    assert steps == ["fsync file", "rename", "fsync directory"]


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write(selected_once, tmp_path / FILE_NAME)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_directory_that_is_not_there_is_an_error_with_the_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be written: No such file"):
        write(selected_once, tmp_path / "none" / FILE_NAME)


def test_a_large_models_record_fits_its_own_limit(tmp_path: Path) -> None:
    num_layers = 512
    scores = np.random.default_rng(0).normal(size=(40, num_layers + 1)) * 1e-17
    selection = select(scores, seed=0, num_resamples=100)
    record = BoundaryRecord.selected(
        selection, method="m", metric="m", base=BASE, adapter=ADAPTER, data=DATA
    )
    write(record, tmp_path / FILE_NAME)
    assert read(tmp_path / FILE_NAME) == record
    assert (tmp_path / FILE_NAME).stat().st_size < MAX_FILE_BYTES
