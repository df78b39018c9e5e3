"""A curve as an SVG: medians as a line, least and most as a band, on a light ground."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from server.bench.measure import Spread

_SIZE_IN = (7.0, 3.8)
_LINE, _TEXT, _GRID = "#2b6cb0", "#333333", "#dddddd"


def draw(
    xs: Sequence[int],
    ys: Sequence[Spread],
    *,
    quantity: str,
    unit: str,
    title: str,
    path: Path,
    is_doubling: bool = False,
) -> None:
    """Write the drawing; the same findings give the same bytes.

    is_doubling: the points lie at powers of two, and are drawn at equal distances.
    """
    settings = {"svg.hashsalt": quantity, "svg.fonttype": "none", "font.size": 10}
    buffer = io.StringIO()
    with style.context(["default", settings]):
        figure = Figure(figsize=_SIZE_IN, layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="white")
        axes.fill_between(
            xs, [y.min for y in ys], [y.max for y in ys], color=_LINE, alpha=0.18, linewidth=0
        )
        axes.plot(xs, [y.median for y in ys], color=_LINE, marker="o", markersize=4)
        if is_doubling:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(xs), [str(x) for x in xs])
            axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(quantity, color=_TEXT)
        axes.set_ylabel(unit, color=_TEXT)
        axes.set_title(title, color=_TEXT, fontsize=10, loc="left")
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(buffer.getvalue(), encoding="utf-8")
