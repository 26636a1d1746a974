"""Small charts as SVG text, which a page holds without a library: lines over time, bars that make 100, histograms."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from spmd.report.parts import Floats

WIDTH, HEIGHT = 640, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 34
COLORS = ("#2563a8", "#d97706", "#2a9d5c", "#b83280", "#6d5bd0", "#8a6d3b", "#0f8b8d", "#c23b3b")


def lines(title: str, unit: str, series: Mapping[str, tuple[Floats, Floats]]) -> str:
    """`series`: seconds and values, by name; values from 0 on."""
    most_x = max((float(x[-1]) for x, _ in series.values() if len(x)), default=0.0) or 1.0
    most_y = nice(max((float(y.max()) for _, y in series.values() if len(y)), default=0.0) or 1.0)
    drawn = []
    for number, (x, y) in enumerate(series.values()):
        points = " ".join(f"{_x(a / most_x):.1f},{_y(b / most_y):.1f}" for a, b in zip(x, y, strict=True))
        color = COLORS[number % len(COLORS)]
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4"/>')
    x_ticks = [(at / most_x, f"{at:g}") for at in ticks(most_x)]
    y_ticks = [(at / most_y, f"{at:,g}") for at in ticks(most_y)]
    return _chart(title, unit, "s", x_ticks, y_ticks, drawn, list(series))


def histogram(title: str, bins: Sequence[tuple[float, float, float]]) -> str:
    """`bins`: from and to, in milliseconds, on a logarithmic axis, and how many."""
    if not bins:
        return _chart(title, "", "ms", [], [], [], [])
    low, high = math.log10(bins[0][0]), math.log10(bins[-1][1])
    most = nice(max(count for *_, count in bins))
    drawn = []
    for start, end, count in bins:
        left, right = (_x((math.log10(at) - low) / (high - low)) for at in (start, end))
        top = _y(count / most)
        height = _y(0) - top
        drawn.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{height:.1f}" fill="{COLORS[0]}">'
            f"<title>{start:.3g} to {end:.3g} ms: {count:,.0f}</title></rect>"
        )
    decades = [(10.0**power * step) for power in range(math.floor(low), math.ceil(high) + 1) for step in (1, 2, 5)]
    inside = [at for at in decades if low <= math.log10(at) <= high]
    inside = inside[:: max(1, len(inside) // 8)]
    x_ticks = [((math.log10(at) - low) / (high - low), f"{at:g}") for at in inside]
    return _chart(title, "", "ms", x_ticks, [(at / most, f"{at:,g}") for at in ticks(most)], drawn, [])


def stacked(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], colors: Sequence[str]) -> str:
    """One bar a row, of shares in percent."""
    step, label = max(10, min(22, 480 // max(len(rows), 1))), 150
    drawn = []
    for number, (name, shares) in enumerate(rows):
        y, x = number * step, float(label)
        size = min(12, step - 1)
        drawn.append(f'<text x="0" y="{y + step * 0.7:.1f}" font-size="{size}">{escape(name)}</text>')
        for share, part, color in zip(shares, names, colors, strict=True):
            width = share / 100 * (WIDTH - label)
            drawn.append(
                f'<rect x="{x:.2f}" y="{y + 1}" width="{width:.2f}" height="{step - 2}" fill="{color}">'
                f"<title>{escape(name)}: {escape(part)} {share:.1f} %</title></rect>"
            )
            x += width
    return _svg(WIDTH, step * len(rows) + 2, drawn)


def nice(most: float) -> float:
    """A round number from `most` on."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= most * 0.999999)


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to `most`, about five."""
    power = 10.0 ** math.floor(math.log10(most / 4))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if most / (step * power) <= 6)
    return [round(number * step, 12) for number in range(int(most / step + 1e-9) + 1)]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _chart(
    title: str,
    unit: str,
    x_unit: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    drawn: Sequence[str],
    names: Sequence[str],
) -> str:
    """Axes around what is drawn, with a legend where there are several names. Ticks: share of the axis, and text."""
    frame = [f'<text x="{LEFT}" y="14" font-size="13" font-weight="600">{escape(title)}</text>']
    for share, text in y_ticks:
        y = _y(share)
        frame.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dde1e6"/>')
        frame.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" font-size="11" text-anchor="end">{text}</text>')
    for share, text in x_ticks:
        frame.append(
            f'<text x="{_x(share):.1f}" y="{_y(0) + 15:.1f}" font-size="11" text-anchor="middle">{text}</text>'
        )
    frame.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" font-size="11" text-anchor="end">{escape(x_unit)}</text>')
    frame.append(f'<text x="{LEFT - 6}" y="14" font-size="11" text-anchor="end">{escape(unit)}</text>')
    x = float(WIDTH - RIGHT)
    for number, name in reversed(list(enumerate(names)) if 1 < len(names) <= len(COLORS) else []):
        color = COLORS[number % len(COLORS)]
        frame.append(f'<text x="{x}" y="14" font-size="11" text-anchor="end" fill="{color}">{escape(name)}</text>')
        x -= 7 * len(name) + 12
    return _svg(WIDTH, HEIGHT, [*frame, *drawn])


def _svg(width: int, height: int, drawn: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif">'
    return head + "".join(drawn) + "</svg>"
