"""`depth.svg`: what a depth is. Four requests in one batch, the layers that each one's adapter reaches.

The file carries a light and a dark palette, each with its own paper, and takes the one that the reader's
system prefers: so it is legible on whatever page it stands.
"""

from dataclasses import dataclass

NUM_LAYERS = 12
WIDTH, HEIGHT = 760, 436

LIGHT = {
    "paper": "#ffffff",
    "text": "#1f2933",
    "quiet": "#5b6673",
    "base": "#e4e8ec",
    "line": "#9aa5b1",
}
DARK = {
    "paper": "#12181f",
    "text": "#e8edf2",
    "quiet": "#a3b0bd",
    "base": "#2b343e",
    "line": "#66727f",
}
ADAPTERS = {"support": ("#0f766e", "#2dd4bf"), "sql": ("#6d28d9", "#b79cff")}
"""An adapter's colour, on light and on dark."""

_LEFT, _TOP, _STEP, _BAR, _COLUMN, _GAP = 118, 74, 22, 18, 128, 30


@dataclass(frozen=True)
class Lane:
    """One request of the picture."""

    adapter: str | None
    depth: int
    asked: str
    """What its client wrote for a model."""
    said: str


LANES = (
    Lane(None, 0, "llama", "depth 0: the base model"),
    Lane("support", 5, "support@5", "depth 5, as asked"),
    Lane("support", 8, "support@auto", "depth 8, calibrated"),
    Lane("sql", NUM_LAYERS, "sql@full", "full: every layer"),
)


def depth_picture() -> str:
    """The picture as SVG."""
    parts = [_head(), _axis()]
    parts += [_lane(lane, _LEFT + index * (_COLUMN + _GAP)) for index, lane in enumerate(LANES)]
    parts.append(_legend())
    return "\n".join([*parts, "</svg>", ""])


def _head() -> str:
    told = "; ".join(
        f"{lane.asked} has LoRA in {lane.depth} of {NUM_LAYERS} layers" for lane in LANES
    )
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title told"
  font-family="system-ui, sans-serif" font-size="13">
<title id="title">Four requests of one batch, each at its own depth</title>
<desc id="told">{told}.</desc>
<style>
{_palette(LIGHT, 0)}
@media (prefers-color-scheme: dark) {{
{_palette(DARK, 1)}
}}
</style>
<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="10"/>"""


def _palette(colours: dict[str, str], index: int) -> str:
    rules = [
        f".paper {{ fill: {colours['paper']} }}",
        f".text {{ fill: {colours['text']} }}",
        f".quiet {{ fill: {colours['quiet']} }}",
        f".base {{ fill: {colours['base']}; stroke: {colours['line']} }}",
        f".arrow {{ stroke: {colours['quiet']}; fill: none }}",
        *(f".{name} {{ fill: {pair[index]} }}" for name, pair in ADAPTERS.items()),
    ]
    return "\n".join(rules)


def _y(layer: int) -> int:
    """The upper edge of a layer's bar; layer 0, next to the input, is the lowest."""
    return _TOP + (NUM_LAYERS - 1 - layer) * _STEP


def _axis() -> str:
    x, low, high = _LEFT - 22, _y(0) + _BAR, _y(NUM_LAYERS - 1)
    labels = [
        f'<text class="quiet" x="{x - 12}" y="{_y(layer) + 14}" text-anchor="end">layer {layer}</text>'
        for layer in (0, NUM_LAYERS - 1)
    ]
    arrow = f"M {x} {low} V {high} m -5 8 l 5 -8 l 5 8"
    return "\n".join([f'<path class="arrow" d="{arrow}"/>', *labels])


def _lane(lane: Lane, x: int) -> str:
    middle = x + _COLUMN // 2
    parts = [
        f'<text class="text" x="{middle}" y="30" text-anchor="middle" font-family="ui-monospace, monospace"'
        f' font-weight="600">{lane.asked}</text>',
        f'<text class="quiet" x="{middle}" y="52" text-anchor="middle" font-size="12">{lane.said}</text>',
    ]
    for layer in range(NUM_LAYERS):
        name = lane.adapter if lane.adapter and layer < lane.depth else "base"
        parts.append(
            f'<rect class="{name}" x="{x}" y="{_y(layer)}" width="{_COLUMN}" height="{_BAR}" rx="4"/>'
        )
    return "\n".join(parts)


def _legend() -> str:
    y = _y(0) + _BAR + 34
    marks = [
        ("support", "base layer with support's LoRA"),
        ("sql", "with sql's LoRA"),
        ("base", "base alone"),
    ]
    parts, x = [], _LEFT
    for name, text in marks:
        parts.append(f'<rect class="{name}" x="{x}" y="{y - 12}" width="24" height="14" rx="4"/>')
        parts.append(f'<text class="text" x="{x + 32}" y="{y}">{text}</text>')
        x += 52 + 7 * len(text)
    for text in (
        "One set of base weights, one copy of each adapter, one batch.",
        "A layer that no request reaches does no LoRA work.",
    ):
        y += 22
        parts.append(f'<text class="quiet" x="{_LEFT}" y="{y}">{text}</text>')
    return "\n".join(parts)
