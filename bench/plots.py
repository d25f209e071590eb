"""Plots as SVG elements for a page: no script, no address, text that stays text.

Lines and letters take the page's colour, so that a plot follows its light or dark scheme.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any
from xml.etree import ElementTree

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench.measure import Measurement
from bench.roofs import Roof

INK = "#010203"  # stands for the page's colour
# Okabe and Ito's colours, told apart by most eyes on light and dark, and a marker for each.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "triton_fa",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"
# Ratios further from 1 than this, either way, are as dark as a cell gets.
STRONGEST = 2.0
CELL = (1.05, 0.62)  # inches
WIDE = 8  # cells in a line


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG element and what stands below it."""

    svg: str
    caption: str


def draw(name: str, title: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> str:
    """Paint one pair of axes; `name` keeps the ids of several plots of a page apart."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        text = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return embedded(text.getvalue(), name, title)


def embedded(document: str, name: str, title: str) -> str:
    """A document of matplotlib's as an element: named for screen readers, without namespaces."""
    root = ElementTree.fromstring(document.replace(INK, "currentColor"))
    used = set(re.findall(r"#([\w-]+)", document))
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for key in [key for key in element.attrib if key.startswith("{")]:
            element.set(key.removeprefix(XLINK), element.attrib.pop(key))
        if "id" in element.attrib and element.get("id") not in used:
            del element.attrib["id"]
        for key, value in element.attrib.items():
            element.set(key, renamed(key, value, name))
    root.attrib.pop("version", None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    heading = ElementTree.Element("title", id=f"{name}-title")
    heading.text = title
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def renamed(key: str, value: str, name: str) -> str:
    """An attribute whose ids, and what refers to them, start with the plot's name."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    return value.replace("url(#", f"url(#{name}-")


def scatter(
    name: str,
    title: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    paint: Callable[[Axes], None] = lambda axes: None,
) -> str:
    """Points of several backends over two logarithmic axes."""

    def fill(axes: Axes) -> None:
        for index, (label, found) in enumerate(points.items()):
            x, y = zip(*found, strict=True)
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            axes.scatter(x, y, s=22, color=color, marker=marker, label=label, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(alpha=0.25, color=INK, linewidth=0.5)
        paint(axes)
        axes.legend(loc="best")

    return draw(name, title, (7.2, 4.2), fill)


Points = dict[str, list[tuple[float, float]]]


def rates(
    measurements: Sequence[Measurement], point: Callable[[Measurement, float], tuple[float, float]]
) -> Points:
    """A point for each timed row of each backend, where work was counted."""
    found: Points = {}
    for m in measurements:
        for label, o in m.outcomes.items():
            us = o.times.best("clean")
            if us is not None and m.bytes and m.flops and m.row.phase != "metadata":
                found.setdefault(label, []).append(point(m, us))
    return found


def speed(name: str, measurements: Sequence[Measurement]) -> list[Plot]:
    """Rate against the longest sequence: TB/s of rows about memory, TFLOP/s of prefill."""
    plots = []
    for unit, prefill in (("TB/s", False), ("TFLOP/s", True)):
        with_keys = [m for m in measurements if m.row.phase != "combine"]
        rows = [m for m in with_keys if (m.row.phase == "prefill") == prefill]

        def point(m: Measurement, us: float, prefill: bool = prefill) -> tuple[float, float]:
            rate = m.teraflops(us) if prefill else m.terabytes(us)
            return max(m.row.k_lens), rate or 0.0

        if points := rates(rows, point):
            count = sum(map(len, points.values()))
            title = f"{unit} against the keys of the longest sequence, {count} points"
            label = f"{name}-{'prefill' if prefill else 'decode'}"
            svg = scatter(label, title, points, ("keys of the longest sequence", unit))
            plots.append(Plot(svg, f"{title}. Every point is a row of the tables below."))
    return plots


def roofline(name: str, measurements: Sequence[Measurement], roof: Roof) -> list[Plot]:
    """TFLOP/s against arithmetic intensity, below the roofs of memory and of products."""

    def point(m: Measurement, us: float) -> tuple[float, float]:
        return m.flops / m.bytes, m.teraflops(us) or 0.0

    points = rates(measurements, point)
    if not points:
        return []
    ends = [x for found in points.values() for x, _ in found]
    ridge = roof.tflop_per_s / roof.tb_per_s
    low, high = min(*ends, ridge) / 1.5, max(*ends, ridge) * 1.5

    def roofs(axes: Axes) -> None:
        x = [low, ridge, high]
        y = [low * roof.tb_per_s, roof.tflop_per_s, roof.tflop_per_s]
        axes.plot(x, y, color=INK, linewidth=1, label=f"{roof.tb_per_s} TB/s, {y[-1]:g} TFLOP/s")

    title = f"Roofline, {sum(map(len, points.values()))} points"
    labels = ("FLOP per mandatory byte", "TFLOP/s")
    svg = scatter(f"{name}-roofline", title, points, labels, roofs)
    return [Plot(svg, f"{title}. The line is the measured roof ({roof.source}).")]


def heat_map(name: str, title: str, groups: Mapping[str, Mapping[str, float]]) -> Plot:
    """Ratios in cells, group by group; blue is above 1, red below."""
    lines: list[tuple[str, list[tuple[str, float]]]] = []
    for group, ratios in groups.items():
        cells = list(ratios.items())
        for first in range(0, len(cells), WIDE):
            lines.append((group if first == 0 else "", cells[first : first + WIDE]))
    norm = CenteredNorm(0, math.log2(STRONGEST), clip=True)
    colors = colormaps["RdBu"]

    def cell(axes: Axes, x: int, y: int, row: str, ratio: float) -> None:
        color = colors(norm(math.log2(ratio)))
        ink = "black" if sum(color[:3]) > 1.6 else "white"
        axes.add_patch(Rectangle((x, y), 0.96, 0.94, color=color, linewidth=0))
        middle: Any = {"ha": "center", "va": "center", "color": ink}
        axes.text(x + 0.48, y + 0.22, f"{ratio:.2f}", **middle)
        axes.text(x + 0.48, y + 0.64, "\n".join(row.split(".", 2)), size=5.5, **middle)

    def fill(axes: Axes) -> None:
        for y, (_, cells) in enumerate(lines):
            for x, (row, ratio) in enumerate(cells):
                cell(axes, x, y, row, ratio)
        axes.set_xlim(0, WIDE)
        axes.set_ylim(len(lines), 0)
        axes.set_xticks([])
        axes.set_yticks([y + 0.47 for y in range(len(lines))], [group for group, _ in lines])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    size = (0.8 + CELL[0] * WIDE, 0.2 + CELL[1] * len(lines))
    found = [ratio for _, cells in lines for _, ratio in cells]
    caption = f"{title}, {len(found)} rows from {min(found):.2f} to {max(found):.2f}."
    svg = draw(name, title, size, fill)
    return Plot(svg, f"{caption} Blue is above 1, red below; the tables hold the same numbers.")
