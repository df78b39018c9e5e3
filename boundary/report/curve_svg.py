"""A calibration's curve as an SVG: score by depth, what was chosen, and how sure that is.

Drawn from a stored record as well as from a fresh selection. The same input gives the same bytes.
Reads on a light and on a dark page: no background, colours of middle lightness. matplotlib is
imported when the first curve is drawn.
"""

import hashlib
import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Self
from xml.sax.saxutils import escape

from boundary.record import BoundaryRecord
from boundary.report.quoting import printable, shortened
from boundary.selection import Selection, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN, HEIGHT_IN = 8.0, 4.5
POINTS_PER_INCH = 72
MAX_TITLE_CHARS = 40  # of the widest, a line holds 41
LARGEST = 1e100
"""Larger numbers, which no score is but a stranger's file may hold, overflow while drawing."""

TEXT, CURVE, CHOSEN, ENDS = "#808488", "#3b87c8", "#d97724", "#808488"
CONTROLS = (("#9a6fd0", "D"), ("#2f9e68", "^"), ("#c2588f", "v"), ("#8f8a2e", "s"))

_drawing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Curve:
    """What is drawn: one value a depth, 0 (base) to `num_layers` (full).

    intervals: of (depth - full), for all depths at once; None where there were too few samples.
    depth: the chosen one.
    """

    metric: str
    verdict: Verdict
    depth: int
    scores: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...] | None
    confidence: float
    num_samples: int

    def __post_init__(self) -> None:
        bounds = (bound for interval in self.intervals or () for bound in interval)
        for value in (*self.scores, *bounds):
            if not abs(value) <= LARGEST:
                raise ValueError(f"a curve with the value {value} cannot be drawn")

    @property
    def num_layers(self) -> int:
        """The full depth."""
        return len(self.scores) - 1

    @classmethod
    def of_record(cls, record: BoundaryRecord) -> Self:
        """Raises ValueError for a record that was pinned by hand, which has no curve."""
        if (
            record.curve is None
            or record.metric is None
            or record.verdict is None
            or record.confidence is None
            or record.num_samples is None
        ):
            raise ValueError("a depth that was pinned by hand has no curve")
        return cls(
            metric=record.metric,
            verdict=record.verdict,
            depth=record.depth,
            scores=tuple(point.score for point in record.curve),
            intervals=tuple((point.to_full.low, point.to_full.high) for point in record.curve),
            confidence=record.confidence,
            num_samples=record.num_samples,
        )

    @classmethod
    def of_selection(cls, selection: Selection, metric: str) -> Self:
        """The same, also where there were too few samples for a record."""
        found = [point.interval for point in selection.curve]
        intervals = tuple((one.low, one.high) for one in found if one is not None)
        return cls(
            metric=metric,
            verdict=selection.verdict,
            depth=selection.depth,
            scores=tuple(point.score for point in selection.curve),
            intervals=intervals if len(intervals) == len(found) else None,
            confidence=selection.confidence,
            num_samples=selection.num_samples,
        )


def curve_svg(
    curve: Curve, adapter: str, controls: Mapping[str, float] = MappingProxyType({})
) -> str:
    """An SVG document of the curve.

    adapter: any text; it is shown, never interpreted.
    controls: mean score by name, drawn at the chosen depth, whose budget of layers they spend.

    Safe in several threads, as long as no other code changes matplotlib's settings meanwhile: they
    are global, and are put back afterwards.
    """
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # An id that other curves on the same page do not have.
    digest = hashlib.sha256(repr((curve, adapter, dict(controls))).encode("utf-8", "replace"))
    key = digest.hexdigest()[:12]
    settings = {
        "svg.hashsalt": key,
        "svg.fonttype": "none",  # letters stay letters: small, searchable, read aloud
        "font.family": "sans-serif",
        "font.size": 10,
    }
    buffer = io.StringIO()
    with _drawing, style.context(["default", settings]):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0.11, 0.29, 0.86, 0.57))
        _draw(axes, curve, controls)
        legend = figure.legend(
            loc="lower center", ncols=3, frameon=False, labelcolor=TEXT, fontsize=9
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return _document(buffer.getvalue(), curve, adapter, controls, key)


def _draw(axes: "Axes", curve: Curve, controls: Mapping[str, float]) -> None:
    num_layers, full_score = curve.num_layers, curve.scores[-1]
    depths = range(num_layers + 1)
    if curve.intervals is not None:
        axes.fill_between(
            depths,
            [full_score + low for low, _ in curve.intervals],
            [full_score + high for _, high in curve.intervals],
            color=CURVE, alpha=0.22, linewidth=0,
            label=f"{100 * curve.confidence:.4g} % interval of the difference to full",
        )  # fmt: skip
    axes.axhline(full_score, color=ENDS, linewidth=1, linestyle=(0, (4, 3)))
    marker = "o" if num_layers <= 48 else ""
    axes.plot(
        depths, curve.scores, color=CURVE, linewidth=1.8, marker=marker, markersize=3.5,
        label="mean score",
    )  # fmt: skip

    def point(
        depth: int, score: float, marker: str, color: str, label: str, *, filled: bool = True
    ) -> None:
        axes.plot(
            [depth], [score], marker=marker, color=color, markersize=7, linestyle="none",
            markerfacecolor=color if filled else "none", label=label, clip_on=False, zorder=4,
        )  # fmt: skip

    point(0, curve.scores[0], "s", ENDS, "base (depth 0)", filled=False)
    point(num_layers, full_score, "s", ENDS, f"full (depth {num_layers})")
    axes.axvline(curve.depth, color=CHOSEN, linewidth=1, linestyle=(0, (1, 2)))
    axes.plot(
        [curve.depth], [curve.scores[curve.depth]], marker="o", markersize=12, linestyle="none",
        markerfacecolor="none", markeredgecolor=CHOSEN, markeredgewidth=2.2, clip_on=False, zorder=5,
        label=f"chosen (depth {curve.depth})",
    )  # fmt: skip
    for index, (name, score) in enumerate(controls.items()):
        color, marker = CONTROLS[index % len(CONTROLS)]
        point(curve.depth, score, marker, color, f"control {_drawable(name)}")

    axes.patch.set_alpha(0)
    axes.set_xlim(0, num_layers)
    axes.set_xticks(_ticks(num_layers))
    axes.set_xlabel("depth: layers with LoRA, counted from the input", color=TEXT)
    axes.set_ylabel(f"mean {curve.metric}", color=TEXT, parse_math=False)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.tick_params(colors=TEXT)
    axes.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(TEXT)


def _ticks(num_layers: int) -> list[int]:
    """Round depths, about a dozen, and the full one."""
    steps = (factor * 10**power for power in range(4) for factor in (1, 2, 5))
    step = next(step for step in steps if num_layers / step <= 13)
    ticks = [tick for tick in range(0, num_layers, step) if num_layers - tick > step / 2]
    return [*ticks, num_layers]


def _drawable(text: str) -> str:
    """What the font that measures labels knows; it warns of every other character."""
    return "".join(c if " " <= c <= "~" else "?" for c in shortened(printable(text), 30))


def _document(
    drawn: str, curve: Curve, adapter: str, controls: Mapping[str, float], key: str
) -> str:
    """The drawing with title and description, which a reader's own fonts set and screen readers say.

    Names come in here, as XML, and never through matplotlib, which would read `$` as mathematics
    and lacks the glyphs of most scripts.
    """
    name = printable(adapter)
    verdict = curve.verdict.replace("_", " ")
    means = [f"base {curve.scores[0]:.4g}"]
    means += [f"depth {curve.depth} (chosen) {curve.scores[curve.depth]:.4g}"]
    means += [f"full {curve.scores[-1]:.4g}"]
    means += [f"{printable(control)} {score:.4g}" for control, score in controls.items()]
    ending = f"depth {curve.depth} of {curve.num_layers}, {verdict}"
    title = escape(f"{name}: {ending}")
    description = escape(
        f"Mean {curve.metric} over {curve.num_samples} samples by LoRA depth, from 0 (base) to"
        f" {curve.num_layers} (full): {', '.join(means)}. Verdict: {verdict}."
    )
    heading = escape(shortened(name, MAX_TITLE_CHARS))
    heading_end = escape(f"{ending}, {curve.num_samples} samples")
    middle = WIDTH_IN * POINTS_PER_INCH / 2
    start = drawn.index("<svg ")
    inside = drawn.index(">", start) + 1
    end = drawn.rindex("</svg>")
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<svg role="img" aria-labelledby="title-{key} description-{key}"'
        f"{drawn[start + len('<svg') : inside]}\n"
        f' <title id="title-{key}">{title}</title>\n'
        f' <desc id="description-{key}">{description}</desc>\n'
        f"{drawn[inside:end].strip(chr(10))}\n"
        f' <g text-anchor="middle" font-family="DejaVu Sans, Verdana, sans-serif" fill="{TEXT}">'
        f'<text x="{middle:g}" y="18" font-size="14">{heading}</text>'
        f'<text x="{middle:g}" y="34" font-size="10">{heading_end}</text></g>\n'
        "</svg>\n"
    )
