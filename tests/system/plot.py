"""A plot as an SVG file: downtime against memory in use, both axes logarithmic (W3C, SVG 1.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 420, 64, 48, 36, 24
#: label, colour, place in a point
LINES = (("Atoll, downtime", "#b5442e", 1), ("plain socket, same bytes", "#3b6ea5", 2))


def downtime(points: Sequence[tuple[float, float, float]]) -> str:
    """Of (MiB moved, seconds down, seconds of a plain socket)."""
    across = _axis([point[0] for point in points], 2)
    up = _axis([seconds * 1e3 for point in points for seconds in point[1:]], 10)

    def x(mib: float) -> float:
        return LEFT + _part(mib, across) * (WIDTH - LEFT - RIGHT)

    def y(ms: float) -> float:
        return HEIGHT - BOTTOM - _part(ms, up) * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">Downtime of a migration over loopback TCP, ms</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">MiB moved</text>',
    ]
    foot, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    for mib in across:
        at = f"{x(mib):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{foot}" stroke="#ddd"/>')
        parts.append(f'<text x="{at}" y="{foot + 16}" text-anchor="middle">{mib:.0f}</text>')
    for ms in up:
        at = f"{y(ms):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{end}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(ms) + 4:.1f}" text-anchor="end">{ms:.0f}</text>')
    for number, (label, colour, place) in enumerate(LINES):
        places = [(x(point[0]), y(point[place] * 1e3)) for point in points]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in places]
        parts.append(f'<text x="{LEFT + 12}" y="{TOP + 18 + 18 * number}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _axis(values: Sequence[float], base: int) -> list[float]:
    """Powers of the base around all values, at least two."""
    low = math.floor(math.log(min(values), base))
    high = max(low + 1, math.ceil(math.log(max(values), base)))
    return [float(base) ** power for power in range(low, high + 1)]


def _part(value: float, axis: Sequence[float]) -> float:
    return math.log(value / axis[0]) / math.log(axis[-1] / axis[0])
