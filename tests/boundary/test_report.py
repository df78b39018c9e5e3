"""Reports: every verdict in words, a table of many, strict JSON, and a page nobody can break."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.text import Text

from boundary import strict_json
from boundary.intervals import Interval
from boundary.outcome import ControlResult, SampleOutput
from boundary.record import BoundaryRecord
from boundary.report.directory import write_report
from boundary.report.page import report_markdown
from boundary.report.report import CalibrationReport, number, to_json, verdict_sentence
from boundary.report.table import report_table
from boundary.selection import Selection, select

NUM_LAYERS = 4
BASE, ADAPTER, DATA = (f"sha256:{digit * 64}" for digit in "abc")
HOSTILE = "[red]$x$[/red] `` | ``` <b>\n# heading\r\x1b[31m \u202e 海賊"


def make_selection(verdict: str) -> Selection:
    rng = np.random.default_rng(2)
    num_samples = 5 if verdict == "too_few" else 60
    scores = rng.normal(size=(num_samples, 1)) + rng.normal(size=(num_samples, NUM_LAYERS + 1)) / 3
    scores[:, :2] -= 1
    if verdict == "improves":
        scores[:, 2] += 1
    elif verdict == "full_proposed":
        scores[:, NUM_LAYERS] += 5
    elif verdict == "keep_full":
        scores[:, 3] += 0.16
    tolerance = 0.5 if verdict == "equal_cheaper" else 0.0
    selection = select(scores, seed=7, tolerance=tolerance, num_resamples=200)
    assert selection.verdict == ("keep_full" if verdict == "full_proposed" else verdict)
    return selection


def make_record(selection: Selection) -> BoundaryRecord | None:
    if selection.verdict == "too_few":
        return None
    return BoundaryRecord.selected(
        selection, method="forking_sweep", metric="log_likelihood",
        base=BASE, adapter=ADAPTER, data=DATA,
    )  # fmt: skip


def make_report(verdict: str = "improves", **changes: Any) -> CalibrationReport:
    selection = make_selection(verdict)
    masks = ((True, False, True, False), (False, True, False, True))
    report = CalibrationReport(
        adapter="pirate",
        metric="log_likelihood",
        selection=selection,
        record=make_record(selection),
        controls={
            "top-k": ControlResult(-0.5, Interval(0.3, 0.1, 0.5), masks[:1]),
            "random-k": ControlResult(-1.5, None, masks),
        },
        lens_base=(0.1, 0.2, 0.3, 0.4),
        lens_full=(0.15, 0.25, 0.35, 0.45),
        lora_norms=(1.5, 2.5, 3.5, 4.5),
        outputs=(SampleOutput("Say it.", "Arr!", {4: "Arr!!", 0: "It.", 2: "Arr!"}),),
        truncated_lines=(3, 17),
        held_out={"base": -3.25, "chosen": -1.25, "full": -1.75, "top-k": -2.25},
    )
    return replace(report, **changes)


def headings(page: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    return [
        tokens[index + 1].content
        for index, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def fences(page: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    return [token.content for token in tokens if token.type == "fence"]


# Words.


@pytest.mark.parametrize(
    ("verdict", "parts"),
    [
        ("improves", ["Depth 2 of 4 scores higher", "50% fewer", "95 % interval +", "30 samples"]),
        ("equal_cheaper", ["Depth 2 of 4 saves work", "50% fewer", "tolerance of 0.5000"]),
        ("keep_full", ["Keep the whole adapter (depth 4)", "proposed, but not", "does not say"]),
        ("full_proposed", ["Keep the whole adapter (depth 4): no smaller depth was proposed."]),
        ("too_few", ["5 samples are too few", "at least 32 are needed", "(depth 4)"]),
    ],
)
def test_a_verdict_in_words(verdict: str, parts: list[str]) -> None:
    sentence = verdict_sentence(make_report(verdict))
    for part in parts:
        assert part in sentence
    assert ("might be enough" in sentence) == (verdict == "keep_full")


@pytest.mark.parametrize(
    ("verdict", "lora_layers", "saved"),
    [
        ("improves", None, 0.5),  # depth 2 of 4
        ("improves", (0, 1, 2), 1 / 3),
        ("improves", (3,), 1.0),
        ("improves", (0, 1), 0.0),
        ("improves", (), 0.0),
        ("keep_full", None, 0.0),
        ("too_few", None, 0.0),
    ],
)
def test_only_layers_that_have_lora_can_be_saved(
    verdict: str, lora_layers: tuple[int, ...] | None, saved: float
) -> None:
    assert make_report(verdict, lora_layers=lora_layers).share_saved == pytest.approx(saved)


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [
        (0.0, "0.0000", "+0.0000"),
        (0.03125, "0.0312", "+0.0312"),
        (-2.5, "-2.5000", "-2.5000"),
        (0.00001234, "1.23e-05", "+1.23e-05"),
        (1.5e7, "1.5e+07", "+1.5e+07"),
        (float("nan"), "nan", "+nan"),
    ],
)
def test_numbers_keep_their_figures(value: float, plain: str, signed: str) -> None:
    assert number(value) == plain
    assert number(value, signed=True) == signed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens_base": (0.1,)}, "lens_base must have 4 values, got 1"),
        ({"lora_norms": (0.1,) * 5}, "lora_norms must have 4 values, got 5"),
        ({"controls": {"x": ControlResult(0, None, ((True,),))}}, "a mask must have 4 values"),
        ({"lora_layers": (4,)}, "no layer 4 of 4"),
        ({"outputs": (SampleOutput("", "", {5: ""}),)}, "depth must be 0 to 4, got 5"),
    ],
)
def test_what_the_model_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_report(**changes)


# The table.


def printed(reports: list[CalibrationReport], width: int = 200) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system="truecolor").print(
        report_table(reports)
    )
    return file.getvalue()


def test_the_table_shows_mixed_verdicts_a_row_each() -> None:
    verdicts = ["improves", "equal_cheaper", "keep_full", "full_proposed", "too_few"]
    reports = [make_report(verdict, adapter=f"{verdict} one") for verdict in verdicts]
    reports[3] = replace(reports[3], controls={})
    table = report_table(reports)
    assert [str(column.header) for column in table.columns] == [
        "adapter", "metric", "n", "base", "chosen", "full", "top-k", "random-k", "depth", "saved",
        "verdict",
    ]  # fmt: skip
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert columns["n"] == ["60", "60", "60", "60", "5"]
    assert columns["depth"] == ["2/4", "2/4", "4/4", "4/4", "4/4"]
    assert columns["top-k"] == ["-0.500", "-0.500", "-0.500", "", "-0.500"]
    assert columns["saved"] == ["50%", "50%", "0%", "0%", "0%"]
    improves, equal, keep, full_proposed, too_few = columns["verdict"]
    half = reports[0].selection.confirmed_on
    assert half is not None
    mean, low, high = (
        f"{x:+.3f}" for x in (half.to_full.mean, half.to_full.low, half.to_full.high)
    )
    assert improves == f"improves {mean} [{low}, {high}]"
    assert equal.startswith("equal cheaper ")
    assert keep.startswith("keep full (depth 3: ")
    assert full_proposed == "keep full"
    assert too_few == f"too few: needs {reports[4].selection.num_samples_needed}"
    scores = reports[0].scores
    assert [columns[name][0] for name in scores] == [f"{score:.3f}" for score in scores.values()]
    assert "equal_cheaper one" in printed(reports)


def test_a_narrow_terminal_loses_no_column() -> None:
    reports = [make_report(verdict) for verdict in ("improves", "keep_full", "too_few")]
    lines = Text.from_ansi(printed(reports, width=80)).plain.splitlines()
    assert max(map(len, lines)) <= 80
    improves = next(line for line in lines if " 60 " in line)
    scores = [f"{score:.3f}" for score in reports[0].scores.values()]
    assert improves.split()[2:] == ["60", *scores, "-0.500", "-1.500", "2/4", "50%", "improves"]
    half = reports[1].selection.confirmed_on
    assert half is not None
    verdicts = "".join(line[-9:].strip() for line in lines)
    assert f"keepfull(depth3:{half.to_full.mean:+.3f}[" in verdicts.replace(" ", "")
    assert f"{half.to_full.high:+.3f}])" in verdicts


def test_a_name_is_no_markup_and_controls_no_terminal() -> None:
    shown = printed([make_report(adapter=HOSTILE)])
    assert "[red]$x$[/red]" in shown
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown


# JSON.


def test_the_json_holds_everything() -> None:
    report = make_report(fingerprints={"base": "other"}, command="fathom calibrate", signature="s")
    content = strict_json.parse(to_json(report).encode())
    selection = report.selection
    assert report.record is not None
    assert content["adapter"] == "pirate"
    assert (content["verdict"], content["depth"], content["num_layers"]) == ("improves", 2, 4)
    assert content["scores"] == report.scores
    assert content["share_saved"] == 0.5
    assert [point["score"] for point in content["selection"]["curve"]] == [
        point.score for point in selection.curve
    ]
    assert content["selection"]["seed"] == 7
    assert content["record"] == report.record.model_dump(mode="json")
    assert content["controls"]["top-k"] == {
        "mean": -0.5, "difference": {"mean": 0.3, "low": 0.1, "high": 0.5}, "layers": [[0, 2]],
    }  # fmt: skip
    assert content["controls"]["random-k"]["layers"] == [[0, 2], [1, 3]]
    assert content["lens_full"] == [0.15, 0.25, 0.35, 0.45]
    assert content["lora_norms"] == [1.5, 2.5, 3.5, 4.5]
    assert content["outputs"][0]["by_depth"] == {"0": "It.", "2": "Arr!", "4": "Arr!!"}
    assert content["truncated_lines"] == [3, 17]
    assert content["held_out"]["chosen"] == -1.25
    assert content["fingerprints"] == {"base": BASE, "adapter": ADAPTER, "data": DATA}
    assert (content["command"], content["signature"]) == ("fathom calibrate", "s")


def test_every_field_of_a_report_is_in_its_json() -> None:
    assert set(CalibrationReport.__dataclass_fields__) <= set(
        strict_json.parse(to_json(make_report()).encode())
    )


def test_too_few_samples_have_a_report_without_a_record() -> None:
    report = make_report("too_few", fingerprints={"base": BASE})
    content = strict_json.parse(to_json(report).encode())
    assert content["record"] is None
    assert content["selection"]["confirmed_on"] is None
    assert content["fingerprints"] == {"base": BASE}


def test_what_json_has_no_word_for_is_null_or_replaced() -> None:
    output = SampleOutput(HOSTILE, "\ud800", {0: "\ud83d\ude00"})
    report = make_report(
        adapter=HOSTILE, lora_norms=(float("nan"), float("inf"), 1.0, 2.0), outputs=(output,)
    )
    content = strict_json.parse(to_json(report).encode("utf-8"))
    assert content["adapter"] == HOSTILE
    assert content["lora_norms"] == [None, None, 1.0, 2.0]
    assert content["outputs"][0] == {
        "prompt": HOSTILE, "reference": "\ufffd", "by_depth": {"0": "\U0001f600"},
    }  # fmt: skip


# The page.


def page(report: CalibrationReport) -> str:
    return report_markdown(report, curve="curve.svg", json="report.json")


SECTIONS = [
    "Calibration of `pirate`", "Scores", "Every depth", "Layer by layer", "Sample outputs",
    "Sample 1", "What was cut", "How to get the same again",
]  # fmt: skip


@pytest.mark.parametrize("verdict", ["improves", "equal_cheaper", "keep_full", "too_few"])
def test_the_page_tells_all_of_a_calibration(verdict: str) -> None:
    report = make_report(verdict)
    found = page(report)
    assert headings(found) == SECTIONS
    assert verdict_sentence(report) in found
    assert "![Mean score by depth](curve.svg)" in found
    depth = report.selection.depth
    for row in (
        f"| chosen (depth {depth}) | below depth {depth} | {number(report.scores['chosen'])} |  |"
        " -1.2500 |",
        "| `top-k` | 0, 2 | -0.5000 | +0.3000 (95 % interval +0.1000 to +0.5000) | -2.2500 |",
        "| `random-k` | 2 draws | -1.5000 | too few samples |  |",
        "| 3 | 0.4000 | 0.4500 | 4.5000 |",
        "| seed | 7 |",
        "| metric | `log_likelihood` |",
    ):
        assert row in found
    assert "2 lines lost their start" in found
    assert ": 3, 17." in found
    if report.record is not None:
        for fingerprint in (BASE, ADAPTER, DATA):
            assert f"`{fingerprint}`" in found


def test_outputs_stand_under_their_depths_in_order() -> None:
    found = page(make_report())
    assert fences(found) == ["Say it.\n", "Arr!\n", "It.\n", "Arr!\n", "Arr!!\n"]
    places = [found.index(f"\nDepth {name}\n") for name in ("0 (base)", "2 (chosen)", "4 (full)")]
    assert places == sorted(places)


def test_full_may_be_what_was_chosen() -> None:
    assert "\nDepth 4 (full, chosen)\n" in page(make_report("keep_full"))


def test_sections_without_content_are_left_out() -> None:
    selection = make_selection("improves")
    found = page(CalibrationReport("pirate", "bleu", selection))
    assert headings(found) == [
        "Calibration of `pirate`", "Scores", "Every depth", "What was cut",
        "How to get the same again",
    ]  # fmt: skip
    assert "every prompt fitted" in found
    assert "held-out" not in found


def test_many_cut_lines_are_counted_and_the_first_named() -> None:
    found = page(make_report(truncated_lines=tuple(range(1, 251))))
    assert "250 lines lost" in found
    assert "99, 100 and 150 more." in found


@pytest.mark.parametrize("text", [HOSTILE, "```\n# heading", "````text\n</pre>", "`", "|", "~~~"])
def test_nobodys_text_gets_out_of_its_place(text: str) -> None:
    def report(text: str) -> CalibrationReport:
        return make_report(
            adapter=text, outputs=(SampleOutput(text, text, {0: text, 2: text, 4: text}),),
            signature=text, command=text, held_out={text: 1.0},
            controls={text: ControlResult(0.0, None, ((True,) * NUM_LAYERS,))},
        )  # fmt: skip

    plain, found = page(report("pirate")), page(report(text))
    found.encode("utf-8")
    assert headings(found)[1:] == SECTIONS[1:]
    assert len(fences(found)) == 6
    tokens = MarkdownIt("commonmark").enable("table").parse(found)
    assert not [token for token in tokens if token.type == "html_block"]
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {
        "text", "code_inline", "image", "strong_open", "strong_close", "link_open", "link_close",
        "softbreak",
    }  # fmt: skip
    assert cells(tokens) == cells(MarkdownIt("commonmark").enable("table").parse(plain))
    assert "\x1b" not in found


def cells(tokens: list[Any]) -> list[str]:
    """The tables' structure: a row's or a cell's beginning, one after the other."""
    return [token.type for token in tokens if token.type in ("tr_open", "th_open", "td_open")]


# The directory.


def test_the_directory_holds_page_curve_and_json(tmp_path: Path) -> None:
    report = make_report()
    path = write_report(report, tmp_path / "new" / "reports")
    assert path.name == "report.md"
    assert {file.name for file in path.parent.iterdir()} == {
        "report.md",
        "curve.svg",
        "report.json",
    }
    assert path.read_text(encoding="utf-8") == page(report)
    assert path.with_name("report.json").read_text(encoding="utf-8") == to_json(report)
    ElementTree.parse(path.with_name("curve.svg"))


def test_the_same_report_gives_the_same_files_and_leaves_others_alone(tmp_path: Path) -> None:
    report = make_report("too_few", adapter=HOSTILE)
    (tmp_path / "notes.txt").write_text("mine")
    write_report(report, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_report(report, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert before["notes.txt"] == b"mine"


def test_a_report_that_cannot_be_made_writes_nothing(tmp_path: Path) -> None:
    report = make_report()
    curve = (replace(report.selection.curve[0], score=1e200), *report.selection.curve[1:])
    broken = replace(report, selection=replace(report.selection, curve=curve))
    with pytest.raises(ValueError, match="cannot be drawn"):
        write_report(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()
