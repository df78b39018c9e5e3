"""The curve: an SVG that any reader takes, the same each time, whatever the adapter is called."""

import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boundary.record import BoundaryRecord
from boundary.report.curve_svg import LARGEST, Curve, curve_svg
from boundary.selection import select

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
BASE, ADAPTER, DATA = (f"sha256:{digit * 64}" for digit in "abc")


def make_curve(num_layers: int = 12, depth: int = 7) -> Curve:
    scores = tuple(-3 + 2 * min(d / 7, 1) - 0.1 * max(d - 7, 0) for d in range(num_layers + 1))
    full = scores[-1]
    intervals = tuple((score - full - 0.1, score - full + 0.1) for score in scores[:-1])
    return Curve(
        metric="log_likelihood", verdict="improves", depth=depth, scores=scores,
        intervals=(*intervals, (0.0, 0.0)), confidence=0.95, num_samples=64,
    )  # fmt: skip


def texts(svg: str) -> list[str]:
    """Every text of the document, as a reader sees it."""
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_curve_names_its_axes_its_metric_and_its_marks() -> None:
    found = texts(curve_svg(make_curve(), "pirate", {"top-k": -1.2, "random-k": -1.9}))
    for text in (
        "pirate",
        "depth 7 of 12, improves, 64 samples",
        "depth: layers with LoRA, counted from the input",
        "mean log_likelihood",
        "base (depth 0)",
        "full (depth 12)",
        "chosen (depth 7)",
        "95 % interval of the difference to full",
        "control top-k",
        "control random-k",
    ):
        assert text in found
    assert {str(depth) for depth in range(13)} <= set(found)


def test_screen_readers_get_title_and_description() -> None:
    root = ElementTree.fromstring(curve_svg(make_curve(), "pirate", {"top-k": -1.5}))
    title, description = root[0], root[1]
    assert (title.tag, description.tag) == (f"{SVG}title", f"{SVG}desc")
    assert title.text == "pirate: depth 7 of 12, improves"
    assert description.text == (
        "Mean log_likelihood over 64 samples by LoRA depth, from 0 (base) to 12 (full): base -3,"
        " depth 7 (chosen) -1, full -1.5, top-k -1.5. Verdict: improves."
    )
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"


def test_a_record_draws_what_its_selection_draws() -> None:
    scores = np.random.default_rng(0).normal(size=(60, 5))
    scores[:, 2] += 5
    selection = select(scores, seed=7, num_resamples=100)
    record = BoundaryRecord.selected(
        selection, method="forking_sweep", metric="rouge_l", base=BASE, adapter=ADAPTER, data=DATA
    )
    curve = Curve.of_record(record)
    assert curve == Curve.of_selection(selection, "rouge_l")
    assert (curve.depth, curve.num_layers, curve.verdict) == (2, 4, "improves")
    assert curve.scores[2] == selection.curve[2].score
    assert curve.intervals is not None
    assert curve.intervals[4] == (0, 0)


def test_a_pin_has_no_curve() -> None:
    record = BoundaryRecord.pinned(3, 4, "it rhymes", base=BASE, adapter=ADAPTER)
    with pytest.raises(ValueError, match="no curve"):
        Curve.of_record(record)


def test_too_few_samples_are_drawn_without_intervals() -> None:
    selection = select(np.random.default_rng(0).normal(size=(5, 5)), seed=7)
    curve = Curve.of_selection(selection, "rouge_l")
    assert curve.intervals is None
    svg = curve_svg(curve, "pirate")
    assert "depth 4 of 4, too few, 5 samples" in texts(svg)
    assert not any("interval" in text for text in texts(svg))
    assert "FillBetween" not in svg


def test_the_interval_lies_around_the_full_score() -> None:
    """The band's lowest and highest points, from the SVG's own coordinates and its ticks."""
    curve = replace(make_curve(num_layers=2, depth=2), scores=(1.0, 2.0, 3.0),
                    intervals=((-3.0, -1.0), (-2.0, 0.0), (0.0, 0.0)))  # fmt: skip
    svg = curve_svg(curve, "pirate")
    root = ElementTree.fromstring(svg)
    heights = {}
    for group in root.iter(f"{SVG}g"):
        if re.fullmatch(r"ytick_\d+", group.get("id", "")):
            (label,) = group.iter(f"{SVG}text")
            (mark,) = group.iter(f"{SVG}use")
            heights[float("".join(label.itertext()))] = float(str(mark.get("y")))
    (low_value, low_y), *_, (high_value, high_y) = sorted(heights.items())

    (band,) = [g for g in root.iter(f"{SVG}g") if "FillBetween" in g.get("id", "")]
    (path,) = band.iter(f"{SVG}path")
    (use,) = band.iter(f"{SVG}use")
    found = set()
    for y in re.findall(r"-?[\d.]+ (-?[\d.]+)", str(path.get("d"))):
        share = (float(y) + float(str(use.get("y"))) - low_y) / (high_y - low_y)
        found.add(round(low_value + share * (high_value - low_value), 3))
    assert found == {0.0, 1.0, 2.0, 3.0}  # 3 and each of the bounds


HOSTILE = [
    "$x^2$",
    "$\\frac{",  # would be a mathtext error
    "<script>alert(1)</script>",
    "]]> & \"quotes\" 'too' <!-- -->",
    "&#x41;&amp;",
    "海賊 पाइरेट 🏴",
    "\x00\x1b[31m\x7f\u202e\ufffe\n\t",
    "\ud800",
    "",
    "_hidden",  # matplotlib leaves labels out that begin so
    "long " * 400,
]


@pytest.fixture(scope="module")
def plain_tags() -> Counter[str]:
    """The elements of a curve whose names are harmless."""
    root = ElementTree.fromstring(curve_svg(make_curve(), "pirate", {"top-k": -1.0}))
    return Counter(node.tag for node in root.iter())


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_shown_and_never_interpreted(name: str, plain_tags: Counter[str]) -> None:
    svg = curve_svg(make_curve(), name, {name: -1.0})
    svg.encode("utf-8")
    root = ElementTree.fromstring(svg)
    assert Counter(node.tag for node in root.iter()) == plain_tags
    shown = root[0].text or ""
    assert shown.endswith(": depth 7 of 12, improves")
    if name.isprintable():
        assert shown.startswith(f"{name}:")


@given(st.text())
@settings(max_examples=8, deadline=None)
def test_any_text_makes_a_valid_document(name: str) -> None:
    ElementTree.fromstring(curve_svg(make_curve(3, 2), name, {name: -1.0}).encode("utf-8"))


def test_controls_do_not_read_as_mathematics() -> None:
    assert "control $x^2$" in texts(curve_svg(make_curve(), "pirate", {"$x^2$": -1.0}))


def test_the_drawing_is_the_same_in_every_process() -> None:
    code = (
        "from tests.boundary.test_curve_svg import *\n"
        "print(curve_svg(make_curve(), 'pirate', {'top-k': -1.0}), end='')"
    )
    drawn = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed, "PATH": ""},
        ).stdout.decode()
        for seed in ("1", "2")
    }  # fmt: skip
    assert drawn == {curve_svg(make_curve(), "pirate", {"top-k": -1.0})}
    (svg,) = drawn
    assert "metadata" not in svg
    assert "Matplotlib v" not in svg


def test_curves_on_one_page_share_no_clip_path() -> None:
    def ids(svg: str) -> set[str]:
        return set(re.findall(r'(?:clipPath|title|desc) id="([^"]+)"', svg))

    one, other = curve_svg(make_curve(), "a"), curve_svg(make_curve(), "b")
    assert len(ids(one)) == 3
    assert not ids(one) & ids(other)


def test_somebody_elses_settings_change_nothing_and_stay() -> None:
    expected = curve_svg(make_curve(), "pirate")
    with matplotlib.rc_context({"xtick.major.size": 9, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert curve_svg(make_curve(), "pirate") == expected
        assert dict(matplotlib.rcParams) == before


def test_settings_are_put_back_when_drawing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(matplotlib.rcParams)
    monkeypatch.setattr("boundary.report.curve_svg._draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        curve_svg(make_curve(), "pirate")
    assert dict(matplotlib.rcParams) == before


def test_threads_draw_what_one_draws() -> None:
    names = [f"adapter {index}" for index in range(4)]
    before = dict(matplotlib.rcParams)
    alone = [curve_svg(make_curve(), name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: curve_svg(make_curve(), name), names))
    assert together == alone
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_late_and_pyplot_and_torch_never() -> None:
    code = (
        "import sys; from boundary.report.curve_svg import Curve, curve_svg;"
        "curve = Curve('bleu', 'improves', 0, (2.0, 1.0), None, 0.95, 64);"
        "assert 'matplotlib' not in sys.modules; curve_svg(curve, 'a');"
        "assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_there_is_no_background_and_every_colour_has_middle_lightness() -> None:
    """At least 2.5 times as light or dark as white, black and a dark page."""
    svg = curve_svg(make_curve(), "pirate", dict.fromkeys("abcd", -1.0))
    colors = set(re.findall(r"#[0-9a-f]{6}", svg))
    assert len(colors) == 7
    for color in colors:
        luminance = sum(
            weight * (int(color[at : at + 2], 16) / 255) ** 2.2
            for weight, at in ((0.2126, 1), (0.7152, 3), (0.0722, 5))
        )
        for page in (0.0, 0.01, 1.0):
            light, dark = max(luminance, page), min(luminance, page)
            assert (light + 0.05) / (dark + 0.05) > 2.5, (color, page)
    (patch, *_) = re.findall(r'<g id="patch_1">(.*?)</g>', svg, re.DOTALL)
    assert "opacity: 0" in patch


@pytest.mark.parametrize("num_layers", [1, 3, 13, 28, 80, 1000])
def test_ticks_begin_with_the_base_and_end_with_full(num_layers: int) -> None:
    curve = make_curve(num_layers, depth=1)
    root = ElementTree.fromstring(curve_svg(curve, "pirate"))
    ticks = [
        int("".join(group.itertext()))
        for group in root.iter(f"{SVG}g")
        if re.fullmatch(r"xtick_\d+", group.get("id", ""))
    ]
    assert (ticks[0], ticks[-1]) == (0, num_layers)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 14


@given(
    st.lists(st.floats(-LARGEST, LARGEST), min_size=2, max_size=4),
    st.floats(0, LARGEST),
)
@settings(max_examples=12, deadline=None)
def test_any_finite_score_can_be_drawn(scores: list[float], wide: float) -> None:
    curve = replace(
        make_curve(), scores=tuple(scores), depth=1, intervals=tuple((-wide, wide) for _ in scores)
    )
    ElementTree.fromstring(curve_svg(curve, "pirate"))


@pytest.mark.parametrize("value", [1e101, -1e308, float("inf"), float("nan")])
def test_values_that_no_score_has_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        replace(make_curve(1, 1), scores=(0.0, value), intervals=None)
    with pytest.raises(ValueError, match="cannot be drawn"):
        replace(make_curve(1, 1), scores=(0.0, 0.0), intervals=((value, 0.0), (0.0, 0.0)))
