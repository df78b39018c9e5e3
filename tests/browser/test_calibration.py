"""Calibration: from pasted samples to a depth in force, its history, and jobs that outlive the page."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from server import demo
from tests.browser.conftest import Visit
from tests.browser.served import Site
from tests.browser.watch import Watch

FEW, MANY = 32, 200


def samples(adapter: str, first: int) -> list[str]:
    return demo.valid_path(adapter).read_text(encoding="utf-8").splitlines()[:first]


@pytest.fixture
def quiet(admin: httpx.Client) -> Iterator[None]:
    """No job is left to the next test."""
    yield
    for job in admin.get("/jobs").json()["jobs"]:
        if job["finished_at"] is None:
            admin.delete(f"/jobs/{job['id']}")
            admin.get(f"/jobs/{job['id']}/events")  # ends with the job


def start(page: Page, lines: list[str], *, tolerance: str | None = None) -> None:
    page.get_by_label("Samples: a JSON object a line").fill("\n".join(lines) + "\n")
    if tolerance is not None:
        page.get_by_label("Tolerance").fill(tolerance)
        page.get_by_label("as a share of the adapter's gain").check()
    page.get_by_role("button", name="Start the calibration").click()


def minus(value: float) -> str:
    """As the page writes numbers."""
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def history(page: Page) -> Locator:
    return page.get_by_role("region", name="History").get_by_role("listitem")


def downloaded(page: Page, kind: str) -> tuple[str, str]:
    with page.expect_download() as download:
        page.get_by_role("button", name=kind, exact=True).click()
    return download.value.suggested_filename, Path(download.value.path()).read_text("utf-8")


def test_a_recalibration_to_its_end_then_activated_rolled_back_and_pinned(
    visit: Visit, admin: httpx.Client, quiet: None
) -> None:
    page = visit("calibration/restaurant")
    expect(page.get_by_text("restaurant has never been calibrated")).to_be_visible()
    expect(page.get_by_text("auto means the whole adapter")).to_be_visible()

    # 1. A tolerance under which most of the depths are good enough, and nothing activated by itself.
    page.get_by_label("activate what is confirmed").uncheck()
    start(page, samples("restaurant", FEW), tolerance="0.6")
    job = page.get_by_role("region", name="A calibration runs")
    expect(job.get_by_role("progressbar")).to_be_visible()
    expect(page.get_by_text("The calibration has finished")).to_be_visible()
    expect(page.get_by_text("It is kept, and not active.")).to_be_visible()
    (kept,) = admin.get("/adapters/restaurant/boundaries").json()["boundaries"]
    depth = kept["record"]["depth"]
    assert 0 < depth < 12
    assert not kept["is_active"]
    expect(page.get_by_role("heading", name="Version 1")).to_be_visible()
    expect(page.get_by_text(kept["evidence"]["verdict_in_words"]).first).to_be_visible()
    for output in kept["evidence"]["outputs"]:
        for text in output["by_depth"].values():
            first = text.strip().splitlines()[0]
            expect(page.locator(".outputs").get_by_text(first).first).to_be_visible()

    # 2. The curve by keys, and its figures.
    curve = page.get_by_role("slider", name="Depth on the curve")
    curve.focus()
    page.keyboard.press("Home")
    score = kept["record"]["curve"][0]["score"]
    expect(page.locator(".readout")).to_contain_text(f"Base: {minus(score)}")
    page.keyboard.press("ArrowRight")
    expect(curve).to_have_attribute("aria-valuenow", "1")
    page.get_by_text("Every depth in figures").click()
    figures = page.get_by_role("region", name="Every depth in figures")
    expect(figures.locator("tbody tr")).to_have_count(13)

    # 3. In force by a click, and for requests at once.
    page.get_by_role("button", name="Activate version 1").click()
    expect(page.get_by_text(f"auto means depth {depth} of 12, version 1")).to_be_visible()
    expect(history(page).first).to_contain_text("active")
    assert admin.get("/adapters/restaurant/boundaries").json()["active_version"] == 1

    # 4. By hand, with a reason that the history keeps; beside the other record; and back.
    page.get_by_text("Set a depth by hand").click()
    picker = page.get_by_role("slider", name="Depth to set")
    picker.focus()
    page.keyboard.press("End")
    page.get_by_label("Reason").fill("the whole of it for a demonstration")
    page.get_by_role("button", name="Set depth 12").click()
    expect(page.get_by_text("auto means depth 12 of 12, version 2")).to_be_visible()
    expect(page.get_by_text("the whole of it for a demonstration")).to_be_visible()
    page.get_by_label("Compare version 1").check()
    differences = page.get_by_role("region", name="Versions 2 and 1")
    expect(differences.locator("tr.differs").first).to_contain_text(f"{depth} of 12")
    page.get_by_role("button", name="Roll back version 1").click()
    expect(page.get_by_text(f"auto means depth {depth} of 12, version 1")).to_be_visible()
    told = [entry["action"] for entry in admin.get("/audit?limit=4").json()["entries"]]
    assert told == ["boundary.roll_back", "boundary.pin", "boundary.add", "boundary.activate"]

    # 5. What compare calls calibrated.
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("combobox", name="Adapter").select_option("restaurant")
    expect(page.get_by_role("heading", name=f"Calibrated {depth} of 12")).to_be_visible()

    # 6. As files.
    page.get_by_role("link", name="Calibration").click()
    page.locator("section.calibration").wait_for()  # Compare's choice has the same name
    page.get_by_role("combobox", name="Adapter").select_option("restaurant")
    page.get_by_role("heading", name="Version 1").wait_for()
    name, text = downloaded(page, "CSV")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert name == "restaurant-v1.csv"
    assert [int(row["depth"]) for row in rows] == list(range(13))
    assert [float(row["score"]) for row in rows] == [
        each["score"] for each in kept["record"]["curve"]
    ]
    name, text = downloaded(page, "JSON")
    assert json.loads(text)["record"] == kept["record"]
    name, text = downloaded(page, "SVG")
    assert name == "restaurant-v1.svg"
    assert "<svg" in text[:500]


def test_a_page_that_is_loaded_anew_finds_its_job_and_can_cancel_it(
    visit: Visit, admin: httpx.Client, quiet: None
) -> None:
    page = visit("calibration/arithmetic")
    start(page, samples("arithmetic", MANY))
    expect(page.get_by_role("region", name="A calibration runs")).to_be_visible()
    page.reload()
    job = page.get_by_role("region", name="A calibration runs")
    expect(job.get_by_text("200 samples, log_likelihood")).to_be_visible()
    expect(job.get_by_text(" of ")).to_be_visible()  # progress goes on
    expect(page.get_by_role("button", name="Start the calibration")).to_be_disabled()
    job.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("The calibration was cancelled")).to_be_visible()
    expect(page.get_by_text("Cancelled; nothing of it is kept.")).to_be_visible()
    assert admin.get("/adapters/arithmetic/boundaries").json()["boundaries"] == []


def test_a_job_that_somebody_else_started_is_seen(
    visit: Visit, admin: httpx.Client, quiet: None
) -> None:
    page = visit("calibration/arithmetic")
    expect(page.get_by_text("Calibrate arithmetic anew")).to_be_visible()
    body: dict[str, Any] = {"dataset": {"jsonl": "\n".join(samples("arithmetic", MANY))}}
    assert admin.post("/adapters/arithmetic/recalibrate", json=body).status_code == 202
    expect(page.get_by_role("region", name="A calibration runs")).to_be_visible()


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (3, "not json", "Line 3"),
        (2, '{"prompt": "alone"}', "Line 2 has prompt"),
        (32, '{"prompt": "a", "completion": 7}', "Line 32: 'completion' must be a string"),
        (5, "", "Line 5 is blank"),
    ],
)
def test_what_is_wrong_with_samples_is_told_by_line(
    visit: Visit, watches: list[Watch], line: int, text: str, words: str
) -> None:
    page = visit("calibration/arithmetic")
    watches[-1].expect("status of 400")
    lines = samples("arithmetic", FEW)
    lines[line - 1] = text
    start(page, lines)
    expect(page.get_by_role("alert")).to_contain_text(words)
    page.get_by_role("button", name=f"Go to line {line}").click()
    area = page.get_by_label("Samples: a JSON object a line")
    expect(area).to_be_focused()
    marked = area.evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)")
    assert marked == text


def test_a_file_of_samples_can_be_chosen(
    visit: Visit, watches: list[Watch], tmp_path: Path
) -> None:
    page = visit("calibration/arithmetic")
    watches[-1].expect("status of 400")
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(samples("arithmetic", 3)) + "\n", encoding="utf-8")
    page.get_by_label("Choose a file").set_input_files(path)
    expect(page.get_by_text("3 lines of few.jsonl")).to_be_visible()
    page.get_by_role("button", name="Start the calibration").click()
    expect(page.get_by_role("alert")).to_contain_text("3 samples are too few")


def test_an_adapter_that_is_not_there_is_said_to_be_missing(visit: Visit, site: Site) -> None:
    page = visit("calibration/nobody")
    expect(page.get_by_text("There is no adapter nobody")).to_be_visible()
