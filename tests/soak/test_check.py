"""The rules of a soak see what they are there for: each is given a record, a sum or a line that breaks it."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.soak import check
from tests.soak.client import take_body, take_event
from tests.soak.record import Record, References, Timeline, Wish
from tests.soak.site import BASE, BASE_CONTENT, Content

OLD: Content = ("a1", 0)
NEW: Content = ("a1", 1)
REFERENCES: References = {
    (BASE_CONTENT, 0, 0): "base says",
    (OLD, 2, 0): "old words",
    (NEW, 2, 0): "new words",
    (OLD, 3, 0): "old depth",
}


def record(**fields: Any) -> Record:
    """A request that was answered as it should be."""
    wish = Wish("a1", 2, (0,), max_tokens=3)
    given: dict[str, Any] = {
        "id": "c1-0",
        "wish": wish,
        "began_s": 10.0,
        "ended_s": 11.0,
        "status": 200,
        "num_ends": 1,
        "depth": 2,
        "texts": ["old"],
        "reasons": ["length"],
    }
    return Record(**given | fields)


def line(**fields: Any) -> Mapping[str, Any]:
    return {
        "message": "request",
        "level": "info",
        "request_id": "c1-0",
        "status": 200,
        "response_id": "cmpl-1",
        "finish": "length",
        "completion_tokens": 3,
    } | fields


def wrong(*records: Record, line: Timeline | None = None) -> list[str]:
    return check.answers_are_right(records, REFERENCES, {"a1": line or Timeline(OLD)})[1]


# ---------------------------------------------------------------- ends


def test_one_end_is_right() -> None:
    assert list(check.ended_once([record()])) == []
    left = record(num_ends=0, has_left=True, texts=["o"], reasons=[None])
    assert list(check.ended_once([left])) == []


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ({"num_ends": 0}, "never ended"),
        ({"num_ends": 2}, "ended 2 times"),
        ({"num_late": 1}, "1 events came after the end"),
        ({"broke": "ReadError: "}, "connection failed"),
        ({"reasons": [None]}, "ended by [None]"),
        ({"reasons": ["abort"]}, "ended by ['abort']"),
        ({"texts": []}, "0 of 1 sequences"),
    ],
)
def test_a_wrong_end_is_seen(fault: dict[str, Any], finding: str) -> None:
    (found,) = check.ended_once([record(**fault)])
    assert finding in found


def test_the_client_counts_ends_of_streams() -> None:
    chunk = '{"choices": [{"index": 0, "text": "%s", "finish_reason": %s}], "lora": {"depth": 2}}'
    seen = record(num_ends=0, texts=[], reasons=[])
    for event in (chunk % ("ol", "null"), chunk % ("d", '"length"'), "[DONE]"):
        take_event(event, seen)
    assert list(check.ended_once([seen])) == []
    assert (seen.texts, seen.num_ends, seen.num_late) == (["old"], 1, 0)
    take_event("[DONE]", seen)
    assert (seen.num_ends, seen.num_late) == (2, 1)
    twice = record(num_ends=0, texts=[], reasons=[])
    for event in (chunk % ("a", '"length"'), chunk % ("b", '"length"')):
        take_event(event, twice)
    assert twice.num_late == 1
    failed = record(num_ends=0, texts=[], reasons=[])
    take_event('{"error": {"code": "generation_failed"}}', failed)
    assert (failed.num_ends, failed.code) == (1, "generation_failed")
    assert list(check.answered_as_documented([failed]))


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("fields", "is_well"),
    [
        ({"status": 503, "code": "queue_full", "retry_after": "1"}, True),
        ({"status": 504, "code": "timeout"}, True),
        ({"status": 503, "code": "queue_full"}, False),
        ({"status": 503, "code": "engine_dead", "retry_after": "1"}, False),
        ({"status": 500, "code": "generation_failed"}, False),
        ({"status": 404, "code": "model_not_found"}, False),
        ({"status": 429, "code": "rate_limit_exceeded", "retry_after": "1"}, False),
        ({"status": 200, "code": "timeout"}, True),
        ({"status": 200, "code": "generation_failed"}, False),
    ],
)
def test_only_documented_statuses_pass(fields: dict[str, Any], is_well: bool) -> None:
    found = list(check.answered_as_documented([record(**fields)]))
    assert (not found) == is_well


def test_a_key_or_an_adapter_may_allow_more() -> None:
    wish = Wish("a1", 2, (0,), 3, allowed=frozenset({404, 429}))
    for status in (404, 429):
        refused = record(wish=wish, status=status, code="x", retry_after="1")
        assert list(check.answered_as_documented([refused])) == []


# ---------------------------------------------------------------- answers


def test_the_right_answer_is_right() -> None:
    assert wrong(record()) == []
    base = record(wish=Wish(BASE, 0, (0,), 4), depth=0, texts=["base"])
    assert check.answers_are_right([base], REFERENCES, {}) == (1, [])


@pytest.mark.parametrize(
    "fault",
    [
        {"texts": ["oxd"]},
        {"texts": ["ol"]},
        {"texts": ["old "]},
        {"texts": ["new"]},
        {"texts": ["bas"]},
        {"depth": 3, "texts": ["olx"]},
        {"has_left": True, "num_ends": 0, "texts": ["x"]},
    ],
)
def test_a_wrong_answer_is_seen(fault: dict[str, Any]) -> None:
    assert len(wrong(record(**fault))) == 1


def test_what_is_left_is_the_beginning_of_an_answer() -> None:
    assert wrong(record(has_left=True, num_ends=0, texts=["o"])) == []


def test_after_a_reload_the_old_content_is_wrong() -> None:
    """Around it either is right: nobody can tell which came first."""
    reloaded = Timeline(OLD)
    reloaded.change(NEW, 5.0, 6.0)
    for began_s, ended_s, texts, is_right in (
        (1.0, 2.0, ["old"], True),
        (1.0, 2.0, ["new"], False),
        (5.5, 7.0, ["old"], True),
        (5.5, 7.0, ["new"], True),
        (7.0, 8.0, ["new"], True),
        (7.0, 8.0, ["old"], False),
    ):
        seen = record(began_s=began_s, ended_s=ended_s, texts=texts)
        assert (wrong(seen, line=reloaded) == []) == is_right


def test_an_answer_is_not_judged_where_one_content_of_two_has_no_reference() -> None:
    """It was left out for a near tie: nobody knows what that content would have said."""
    during = Timeline(OLD)
    during.change(NEW, 10.0, 10.5)
    judged = [record(depth=depth, texts=["other"]) for depth in (2, 3)]
    (found,) = wrong(*judged, line=during)
    assert "at depth 2" in found


def test_an_answer_of_an_unloaded_adapter_is_not_taken_for_right() -> None:
    unloaded = Timeline(OLD)
    unloaded.change(None, 5.0, 6.0)
    assert unloaded.possible(7.0, 8.0) == [None]
    assert unloaded.latest is None
    assert len(wrong(record(began_s=7.0, ended_s=8.0), line=unloaded)) == 1


# ---------------------------------------------------------------- the server's side


def test_a_line_that_is_missing_or_doubled_is_seen() -> None:
    assert list(check.logged_once([record()], [line()])) == []
    assert len(list(check.logged_once([record()], []))) == 1
    assert len(list(check.logged_once([record()], [line(), line()]))) == 1
    assert len(list(check.logged_once([record()], [line(status=500)]))) == 1
    # Who hangs up may do so before the request is there.
    assert list(check.logged_once([record(has_left=True)], [])) == []


def test_an_error_or_a_traceback_in_the_log_is_seen() -> None:
    assert list(check.log_is_clean([line()], [])) == []
    assert len(list(check.log_is_clean([line(level="error")], []))) == 1
    assert len(list(check.log_is_clean([line(exception=[])], []))) == 1
    assert len(list(check.log_is_clean([], ["Traceback (most recent call last):"]))) == 1


def metrics(**fields: float) -> dict[str, list[tuple[Mapping[str, str], float]]]:
    given = {
        "vllm:num_requests_running": 0.0,
        "vllm:num_requests_waiting": 0.0,
        "fathom_kv_blocks": 9.0,
        "fathom_kv_blocks_free": 9.0,
        "vllm:request_success_total": 1.0,
    } | {name.replace("vllm_", "vllm:", 1): value for name, value in fields.items()}
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {
        name: [({}, value)] for name, value in given.items()
    }
    found["vllm:lora_requests_info"] = [
        ({"running_lora_adapters": "", "waiting_lora_adapters": ""}, 1.0)
    ]
    return found


@pytest.mark.parametrize(
    "fault",
    [
        {"fathom_kv_blocks_free": 8.0},
        {"vllm_num_requests_running": 1.0},
        {"vllm_num_requests_waiting": 1.0},
    ],
)
def test_a_block_or_a_request_that_is_left_is_seen(fault: dict[str, float]) -> None:
    assert list(check.all_is_back(metrics())) == []
    assert len(list(check.all_is_back(metrics(**fault)))) == 1


def test_an_adapter_in_use_is_seen() -> None:
    busy = metrics()
    busy["vllm:lora_requests_info"] = [
        ({"running_lora_adapters": "a1", "waiting_lora_adapters": ""}, 1.0)
    ]
    assert len(list(check.all_is_back(busy))) == 1


@pytest.mark.parametrize(
    ("num_ended", "num_used", "num_findings"), [(1.0, 3, 0), (0.0, 3, 1), (2.0, 3, 1), (1.0, 2, 1)]
)
def test_sums_that_do_not_add_up_are_seen(
    num_ended: float, num_used: int, num_findings: int
) -> None:
    before = metrics(**{"vllm_request_success_total": 0.0})
    after = metrics(**{"vllm_request_success_total": num_ended})
    usage = {"completion_tokens": num_used}
    found = list(check.metrics_add_up([record()], [line()], before, after, usage))
    assert len(found) == num_findings


@pytest.mark.parametrize(("last", "is_well"), [(100, True), (101, True), (103, False)])
def test_growth_counts_from_the_warm_up_on(last: int, is_well: bool) -> None:
    samples = [(float(at_s), 50 if at_s < 20 else 100) for at_s in range(90)]
    samples += [(float(at_s), last) for at_s in range(90, 100)]
    growth = check.growth_of(samples, warm_s=20.0)
    assert (list(growth.findings()) == []) == is_well


def test_refusals_are_ends() -> None:
    refused = record(num_ends=0, status=404, texts=[], reasons=[], depth=None)
    take_body({"error": {"code": "model_not_found"}}, refused)
    assert (refused.num_ends, refused.code) == (1, "model_not_found")
    assert list(check.ended_once([refused])) == []
