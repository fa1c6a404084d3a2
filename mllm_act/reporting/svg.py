"""Small plots as SVG text. Colours are variables of the page's style sheet, which has a light and a dark theme."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 220, 52, 30, 10
COLORS = 6  # --line-0 to --line-5


def lines(
    title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], log: bool = False
) -> str:
    """Returns curves over steps.

    Args:
      title: read by screen readers and shown above.
      series: name -> (steps, values), at least one value in all; values that are not finite are left out.
      log: logarithmic values; those that are not positive are left out.
    """
    kept = {
        name: [
            (x, y) for x, y in zip(*points, strict=True) if math.isfinite(y) and (y > 0 or not log)
        ]
        for name, points in series.items()
    }
    everything = [point for points in kept.values() for point in points]
    if not everything:
        return ""
    xs, ys = zip(*everything, strict=True)
    if log:
        ys = tuple(math.log10(y) for y in ys)
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    x_span, y_span = (x_high - x_low) or 1, (y_high - y_low) or 1

    def place(x: float, y: float) -> str:
        y = math.log10(y) if log else y
        across = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - 12)
        down = TOP + (1 - (y - y_low) / y_span) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for tick in range(4):
        y = y_low + tick / 3 * y_span
        down = TOP + (1 - tick / 3) * (HEIGHT - TOP - BOTTOM)
        label = f"{10**y if log else y:.3g}"
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>')
    for x, anchor in ((x_low, "start"), (x_high, "end")):
        across = LEFT if anchor == "start" else WIDTH - 12
        parts.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="{anchor}">{x:g}</text>')
    for i, (name, points) in enumerate(kept.items()):
        path = " ".join(place(x, y) for x, y in points)
        parts.append(
            f'<polyline class="curve" style="stroke:var(--line-{i % COLORS})" stroke-dasharray="{_dash(i)}" '
            f'points="{path}"><title>{html.escape(name)}</title></polyline>'
        )
    label = html.escape(f"{title}: {', '.join(kept)}")
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _dash(number: int) -> str:
    """Curves differ in their dashes too, for those who do not see their colours."""
    return ("none", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")[number % 6]


def legend(names: Sequence[str]) -> str:
    """Returns the names beside their lines, for all plots of a page."""
    items = "".join(
        f'<li><svg viewBox="0 0 34 8" width="34" height="8" aria-hidden="true"><line x1="1" x2="33" y1="4" y2="4" '
        f'class="curve" style="stroke:var(--line-{i % COLORS})" stroke-dasharray="{_dash(i)}"/></svg> '
        f"{html.escape(name)}</li>"
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def interval(low: float, rate: float, high: float) -> str:
    """Returns a bar of a success rate with its interval; the numbers stand beside it, so it is hidden from readers."""
    x = [round(100 * value, 1) for value in (low, rate, high)]
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="fill" width="{x[1]}" height="10"/>'
        f'<rect class="interval" x="{x[0]}" y="4" width="{max(x[2] - x[0], 0.5)}" height="2"/></svg>'
    )
