"""Curves as an SVG: medians as a line, least and most as a band, on a light ground.

One curve, or several beside each other, whose scales all begin at zero.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from server.bench.measure import Spread
from server.bench.scaling.curve import Curve

_ALONE_IN = (7.0, 3.8)
_PANEL_IN = (3.4, 2.6)
_NUM_COLUMNS = 3
_LINE, _TEXT, _GRID = "#2b6cb0", "#333333", "#dddddd"


@dataclass(frozen=True, slots=True)
class Panel:
    """One curve. ys: output tokens a second."""

    quantity: str
    xs: Sequence[int]
    ys: Sequence[Spread]

    @classmethod
    def of(cls, curve: Curve) -> Self:
        """What was measured in this process."""
        points = curve.points
        return cls(curve.quantity, [one.x for one in points], [one.tokens_per_s for one in points])

    @classmethod
    def read(cls, report: Path) -> Self:
        """From the JSON that a curve's command wrote. ValueError: it has none."""
        try:
            curve: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["findings"][
                "curve"
            ]
            points = curve["points"]
            rates = [[run["output_tokens_per_s"] for run in point["runs"]] for point in points]
            return cls(curve["quantity"], [one["x"] for one in points], [*map(Spread.of, rates)])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{report}: not a curve's report") from error

    @property
    def is_doubling(self) -> bool:
        """Whether each point is twice the one before: then they are drawn at equal distances."""
        pairs = zip(self.xs, self.xs[1:], strict=False)
        return len(self.xs) > 1 and all(b == 2 * a for a, b in pairs)


def draw(panels: Sequence[Panel], *, title: str, path: Path) -> None:
    """Write the drawing; the same findings give the same bytes."""
    quantities = [panel.quantity for panel in panels]
    settings = {"svg.hashsalt": ", ".join(quantities), "svg.fonttype": "none", "font.size": 10}
    num_columns = min(_NUM_COLUMNS, len(panels))
    num_rows = -(-len(panels) // num_columns)
    width, height = _ALONE_IN if len(panels) == 1 else _PANEL_IN
    buffer = io.StringIO()
    with style.context(["default", settings]):
        figure = Figure(
            figsize=(width * num_columns, height * num_rows),
            layout="constrained",
            facecolor="white",
        )
        FigureCanvasSVG(figure)
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(num_rows, num_columns, number + 1, facecolor="white")
            _draw_panel(axes, panel)
            if number % num_columns == 0:
                axes.set_ylabel("output tokens/s", color=_TEXT)
        figure.suptitle(title, color=_TEXT, fontsize=10, x=0.01, ha="left")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(buffer.getvalue(), encoding="utf-8")


def _draw_panel(axes: Axes, panel: Panel) -> None:
    least, most = [y.min for y in panel.ys], [y.max for y in panel.ys]
    axes.fill_between(panel.xs, least, most, color=_LINE, alpha=0.18, linewidth=0)
    axes.plot(panel.xs, [y.median for y in panel.ys], color=_LINE, marker="o", markersize=4)
    if panel.is_doubling:
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(panel.xs), [str(x) for x in panel.xs])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.quantity, color=_TEXT)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
