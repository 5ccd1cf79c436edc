"""The report's figures as inline SVG: numbers in, one `<svg>` out; nothing is loaded, nothing is random.

Every mark has a tooltip (`<title>`), every figure a sentence for those who do not see it. Colours are the page's CSS
variables, so figures follow its light and dark scheme. Drawn 460 wide with large type: they read on a phone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460, 52, 14, 34, 46
LEGEND_LENGTH = 48  # characters: WIDTH less the mark, at 14 pixels
SERIES = ("var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-4)", "var(--series-5)")
RAMP = ("#1b1f5e", "#2c4a8c", "#2d7597", "#3f9e8a", "#7fc26a", "#d7e04a")
SHAPES = ("circle", "square", "triangle", "diamond", "circle")


@dataclass
class Line:
    """A series of points.

    Attributes:
        label: in the legend and the tooltips.
        points: (x, y) pairs, x ascending.
        band: (low, high) at each point; empty for none.
    """

    label: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()


def svg(body: str, height: float, words: str, width: float = WIDTH) -> str:
    """The frame of a figure; `words` is what a screen reader says."""
    return f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(words)}">{body}</svg>'


class Plane:
    """Data coordinates to the figure's.

    Args:
        x, y: (low, high) of the data.
        height: of the figure.
    """

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: float = 300) -> None:
        self.x_range, self.y_range, self.height = x, y, height

    def x(self, value: float) -> float:
        """Pixels from the left edge."""
        low, high = self.x_range
        return LEFT + (value - low) / max(high - low, 1e-12) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top edge."""
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / max(high - low, 1e-12) * (self.height - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The `d` of a line through points."""
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def axes(
        self, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]
    ) -> str:
        """Grid lines, tick labels, axis labels."""
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        parts = [
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{self.y(v) + 4.5:.1f}" text-anchor="end">{escape(text)}</text>'
            for v, text in y_ticks
        ]
        parts += [
            f'<line class="grid" x1="{self.x(v):.1f}" x2="{self.x(v):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text x="{self.x(v):.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>'
            for v, text in x_ticks
        ]
        parts.append(
            f'<text x="{(LEFT + right) / 2}" y="{self.height - 8}" text-anchor="middle">{escape(x_label)}</text>'
        )
        parts.append(f'<text x="0" y="14">{escape(y_label)}</text>')  # above the ticks, however wide they are
        return "".join(parts)


def thinned(ticks: Sequence[tuple[float, str]], plane: Plane, gap: float = 34) -> list[tuple[float, str]]:
    """Ticks whose labels do not touch."""
    kept: list[tuple[float, str]] = []
    for value, text in ticks:
        if not kept or plane.x(value) - plane.x(kept[-1][0]) >= gap:
            kept.append((value, text))
    return kept


def nice_ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """About `count` round numbers from low to high."""
    if high <= low:
        return [(low, f"{low:.3g}")]
    raw = (high - low) / count
    power = 10.0
    while power > raw:
        power /= 10
    while power * 10 <= raw:
        power *= 10
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = int(-(-low // step))
    values = [step * k for k in range(first, int(high // step) + 1)]
    return [(v, f"{v:.6g}") for v in values]


PERCENT_TICKS = tuple((v, str(v)) for v in (0, 20, 40, 60, 80, 100))


def line_chart(
    lines: Sequence[Line], words: str, *, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]] = (),
    percent: bool = False, mark: tuple[float, str] | None = None, x_from: float | None = None,
) -> str:  # fmt: skip
    """Lines with bands, to scale on both axes.

    Args:
        percent: y runs from 0 to 100.
        mark: (x, label) of an upright dotted line.
        x_from: where the x axis starts; None for the least x.
    """
    lines = [line for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points] + ([mark[0]] if mark else [])
    ys = [y for line in lines for _, y in line.points] + [v for line in lines for pair in line.band for v in pair]
    low, high = (0.0, 100.0) if percent else (min(ys), max(ys))
    if not percent:
        margin = 0.06 * (high - low) or 0.5
        low, high = low - margin, high + margin
    legend = 20 * len(lines)
    plane = Plane((min(xs) if x_from is None else x_from, max(xs)), (low, high), 300 + legend)
    plane.height = 300
    ticks = thinned(x_ticks or nice_ticks(*plane.x_range), plane)
    body = [plane.axes(x_label, y_label, ticks, PERCENT_TICKS if percent else nice_ticks(low, high))]
    if mark:
        x = plane.x(mark[0])
        body.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{300 - BOTTOM}"><title>{escape(mark[1])}'
            "</title></line>"
        )
    unit = " %" if percent else ""
    for number, line in enumerate(lines):
        colour, shape = SERIES[number % len(SERIES)], SHAPES[number % len(SHAPES)]
        if line.band:
            around = [(x, pair[1]) for (x, _), pair in zip(line.points, line.band, strict=True)]
            around += [(x, pair[0]) for (x, _), pair in reversed(list(zip(line.points, line.band, strict=True)))]
            body.append(f'<path d="{plane.path(around)}Z" fill="{colour}" opacity=".18"/>')
        dash = ' stroke-dasharray="6 4"' if number % 2 else ""
        body.append(f'<path d="{plane.path(line.points)}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for index, (x, y) in enumerate(line.points):
            span = f" ({line.band[index][0]:.1f} to {line.band[index][1]:.1f})" if line.band else ""
            label = next((text for v, text in x_ticks if v == x), f"{x:.4g}")
            body.append(_mark(shape, plane.x(x), plane.y(y), colour, f"{line.label}: {y:.4g}{unit}{span} at {label}"))
        y = 316 + 20 * number
        body.append(_mark(shape, LEFT + 8, y - 5, colour, line.label))
        body.append(f'<text x="{LEFT + 22}" y="{y}">{escape(_ending(line.label))}</text>')
    return svg("".join(body), 300 + legend + 4, words)


def _ending(label: str) -> str:
    """As much as there is room for: the end of a path tells runs apart. The mark's tooltip has the whole."""
    return label if len(label) <= LEGEND_LENGTH else f"…{label[1 - LEGEND_LENGTH :]}"


def _mark(shape: str, x: float, y: float, colour: str, words: str) -> str:
    title = f"<title>{escape(words)}</title>"
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>'
    outline = {"square": ((-4, -4), (4, -4), (4, 4), (-4, 4)), "triangle": ((0, -5), (5, 4), (-5, 4))}.get(
        shape, ((0, -5), (5, 0), (0, 5), (-5, 0))
    )
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outline)
    return f'<polygon points="{points}" fill="{colour}">{title}</polygon>'


def bars(
    values: Sequence[tuple[str, float, tuple[float, float] | None]], words: str, *, x_label: str, high: float = 100.0
) -> str:
    """Horizontal bars with their values written beside them.

    Args:
        values: (label, value, interval or None).
    """
    left, row, right = 150, 26, 54
    scale = (WIDTH - left - right) / max(high, 1e-12)
    body = []
    for number, (label, value, interval) in enumerate(values):
        y = 6 + row * number
        shown = label if len(label) <= 20 else label[:19] + "…"
        span = f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
        body.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(shown)}</text>'
            f'<rect x="{left}" y="{y + 2}" width="{max(value * scale, 0.5):.1f}" height="{row - 8}" fill="{SERIES[0]}">'
            f"<title>{escape(label)}: {value:.4g}{span}</title></rect>"
        )
        end = left + value * scale
        if interval:
            a, b = left + interval[0] * scale, left + min(interval[1], high) * scale
            body.append(f'<line class="whisker" x1="{a:.1f}" x2="{b:.1f}" y1="{y + 11}" y2="{y + 11}"/>')
            end = max(end, b)
        body.append(f'<text x="{end + 6:.1f}" y="{y + 15}">{value:.4g}</text>')
    height = 6 + row * len(values) + 24
    body.append(f'<text x="{left}" y="{height - 6}">{escape(x_label)}</text>')
    return svg("".join(body), height, words)


def colour_of(share: float) -> str:
    """A colour of the ramp, share 0 … 1."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    part = place - index
    ends = [[int(RAMP[index + k][c : c + 2], 16) for c in (1, 3, 5)] for k in (0, 1)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*ends, strict=True))


def heat_map(
    grid: Sequence[Sequence[float]], x_names: Sequence[str], y_names: Sequence[str], words: str, *, x_label: str,
    y_label: str, value_label: str, span: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """grid[i][j] at x_names[i], y_names[j]: the first, the middle and the last of each are written at the axes.

    Args:
        span: values of the first and the last colour; None: the least value, and where the largest 5 % begin.
    """
    flat = sorted(v for row in grid for v in row)
    low, high = span or (flat[0], flat[int(0.95 * (len(flat) - 1))])
    side, height, left, top = 300.0, 392, 64.0, 30.0
    across, down = side / len(x_names), side / len(y_names)
    body = []
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            x, y = left + i * across, top + side - (j + 1) * down
            share = (value - low) / max(high - low, 1e-12)
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{across + 0.4:.1f}" height="{down + 0.4:.1f}" '
                f'fill="{colour_of(share)}"><title>{escape(value_label)} {value:.4g} at {escape(x_names[i])}, '
                f"{escape(y_names[j])}</title></rect>"
            )
    for index in sorted({0, len(x_names) // 2, len(x_names) - 1}):
        place = left + (index + 0.5) * across
        body.append(f'<text x="{place:.1f}" y="{top + side + 18}" text-anchor="middle">{escape(x_names[index])}</text>')
    for index in sorted({0, len(y_names) // 2, len(y_names) - 1}):
        place = top + side - (index + 0.5) * down + 5
        body.append(f'<text x="{left - 6}" y="{place:.1f}" text-anchor="end">{escape(y_names[index])}</text>')
    body.append(f'<text x="{left + side / 2}" y="{top + side + 40}" text-anchor="middle">{escape(x_label)}</text>')
    body.append(f'<text x="0" y="14">{escape(y_label)}</text>')
    for index in range(40):
        y = top + side - (index + 1) * side / 40
        body.append(
            f'<rect x="380" y="{y:.1f}" width="14" height="{side / 40 + 0.4:.1f}" fill="{colour_of(index / 39)}"/>'
        )
    body.append(f'<text x="400" y="{top + 12}">{high:.3g}</text><text x="400" y="{top + side}">{low:.3g}</text>')
    return svg("".join(body), height, words)
