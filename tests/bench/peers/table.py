"""The results as markdown: tokens per second of every peer in every case, then ratios with targets."""

from collections.abc import Mapping, Sequence

from tests.bench.peers.cases import Case
from tests.bench.peers.ratios import ENGINE, Result, Spread

_NOTHING = "-"


def rates(
    cases: Sequence[Case],
    titles: Mapping[str, str],
    results: Sequence[Result],
    excluded: Mapping[tuple[str, str], str],
    notes: Mapping[tuple[str, str], str],
) -> str:
    """Peers down, cases across; where there is no number, the reason stands in its place."""
    by_pair = {(result.case, result.peer): result for result in results}
    lines = [
        _row(["output tokens/s: median (least to most)", *(case.title for case in cases)]),
        _rule(len(cases)),
    ]
    for peer, title in titles.items():
        cells = []
        for case in cases:
            pair = (case.key, peer)
            found = by_pair.get(pair)
            if found is None or found.tokens_per_s is None:
                cells.append(_text(excluded.get(pair, "no sample was kept")))
            else:
                cells.append(f"{_spread(found.tokens_per_s, 1)} {notes.get(pair, '')}".strip())
        lines.append(_row([title, *cells]))
    return "\n".join(lines) + "\n"


def ratios(cases: Sequence[Case], titles: Mapping[str, str], results: Sequence[Result]) -> str:
    """A line for every peer in every case: the ratio, its target and whether the median meets it."""
    header = ["case", "against", "Fathom over it, round by round: median (least to most)"]
    lines = [_row([*header, "rounds", "target", "met"]), _rule(5)]
    for case in cases:
        for found in results:
            if found.case != case.key or found.peer == ENGINE:
                continue
            ratio = found.ratio
            lines.append(
                _row(
                    [
                        case.title,
                        titles[found.peer],
                        _NOTHING if ratio is None else _spread(ratio, 2),
                        "0" if ratio is None else str(ratio.num),
                        _NOTHING if found.target is None else f">= {found.target:g}",
                        {True: "yes", False: "**no**", None: _NOTHING}[found.is_met],
                    ]
                )
            )
    return "\n".join(lines) + "\n"


def _spread(found: Spread, digits: int) -> str:
    values = (found.median, found.min, found.max)
    median, least, most = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({least} to {most})"


def _text(reason: str) -> str:
    """A reason as one cell."""
    return " ".join(reason.replace("|", "\\|").split())


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(num_more: int) -> str:
    return "|---" * (1 + num_more) + "|"
