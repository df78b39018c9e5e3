"""The results as one SVG: a panel for each case, a bar for each peer, its least and most as a whisker."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

from tests.bench.peers.cases import Case
from tests.bench.peers.ratios import ENGINE, Result

_OURS, _THEIRS = "#c2410c", "#64748b"


def draw(
    cases: Sequence[Case], titles: Mapping[str, str], results: Sequence[Result], path: Path
) -> None:
    """Write `path`. A peer without a number in a case has no bar there."""
    figure = Figure(figsize=(12, 1.5 + 0.32 * len(titles) * -(-len(cases) // 2)))
    axes = figure.subplots(-(-len(cases) // 2), 2, squeeze=False).flatten()
    for axis, case in zip(axes, cases, strict=False):
        found = [r for r in results if r.case == case.key and r.tokens_per_s is not None]
        spreads = [r.tokens_per_s for r in found if r.tokens_per_s is not None]
        medians = [spread.median for spread in spreads]
        axis.barh(
            [titles[r.peer] for r in found],
            medians,
            xerr=[
                [spread.median - spread.min for spread in spreads],
                [spread.max - spread.median for spread in spreads],
            ],
            color=[_OURS if r.peer == ENGINE else _THEIRS for r in found],
            capsize=2,
        )
        axis.invert_yaxis()
        axis.set_title(case.title, fontsize=10)
        axis.set_xlabel("output tokens per second", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
