"""The report's plots as PNG files, for documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.evaluation.appendix_f.measures import MEASURES, Measure, badness
from ldm.evaluation.appendix_f.plan import FLOORS
from ldm.util import written_whole

NAME = "psnr_db"  # of the measure that is plotted
GREY = "0.6"


def write_plots(folder: Path, table: Sequence[dict[str, Any]]) -> list[Path]:
    """Quality against saved work, and against speed where that was measured; one file a size.

    Args:
        folder: where they go.
        table: rows of `make_table`, with ``speedup``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    written = []
    for size in dict.fromkeys(row["size"] for row in table):
        shown = [
            row
            for row in table
            if row["size"] == size
            and NAME in row["measures"]
            and row["control"] not in (*FLOORS, "steps")
        ]
        if not shown:
            continue
        axes = {"saved_work": "self-attention work saved"}
        if any(row["speedup"] is not None for row in shown):
            axes["speedup"] = "speed-up of a U-Net step"
        figure = Figure(figsize=(6.5 * len(axes), 4.8), layout="constrained")
        plots = figure.subplots(1, len(axes), squeeze=False)[0]
        for axis, (x, title) in zip(plots, axes.items(), strict=True):
            _draw(axis, [row for row in shown if row[x] is not None], x)
            axis.set(xlabel=title, ylabel=MEASURES[NAME].title, title=f"{size}x{size}")
        figure.axes[0].xaxis.set_major_formatter(PercentFormatter(1))
        figure.axes[0].legend(fontsize="small")
        path = folder / f"{NAME}-{size}.png"
        with written_whole(path) as file:
            figure.savefig(file, dpi=150, format="png")
        written.append(path)
    return written


def _draw(axis: Any, rows: Sequence[dict[str, Any]], x: str) -> None:
    from matplotlib import colormaps

    families = list(dict.fromkeys(row["family"] for row in rows if not row["control"]))
    colours = [colormaps["turbo"]((i + 0.5) / len(families)) for i in range(len(families))]
    for family, colour in zip(families, colours, strict=True):
        own = sorted((row for row in rows if row["family"] == family), key=lambda row: row[x])
        means = [row["measures"][NAME]["mean"] for row in own]
        axis.plot([row[x] for row in own], means, "-", color=colour, label=family)
        for row in own:
            _mark(axis, row, x, GREY if _is_open(row, x) else colour)
    for row in rows:
        if row["control"]:
            _mark(axis, row, x, "0.5", markerfacecolor="none")
            place = row[x], row["measures"][NAME]["mean"]
            axis.annotate(row["control"], place, xytext=(5, 5), textcoords="offset points")
    points = [(r[x], r["measures"][NAME]["mean"]) for r in rows if not r["control"]]
    best = frontier(points, MEASURES[NAME])
    if best:
        xs, ys = zip(*reversed(best), strict=True)
        axis.plot(xs, ys, "k--", linewidth=1, drawstyle="steps-pre", label="frontier")


def _mark(axis: Any, row: dict[str, Any], x: str, colour: Any, **style: Any) -> None:
    one = row["measures"][NAME]
    ranges: dict[str, Any] = {"yerr": [[one["mean"] - one["low"]], [one["high"] - one["mean"]]]}
    if x == "speedup" and row["speed_range"] is not None:
        low, high = row["speed_range"]
        ranges["xerr"] = [[max(0.0, row[x] - low)], [max(0.0, high - row[x])]]
    ranges["yerr"] = [[max(0.0, end[0])] for end in ranges["yerr"]]
    axis.errorbar(row[x], one["mean"], fmt="o", color=colour, capsize=2, **ranges, **style)


def _is_open(row: dict[str, Any], x: str) -> bool:
    """Whether nothing can be said: above the precision floor, or as fast as not merging."""
    low, high = row["speed_range"] or (0.0, 0.0)
    return NAME in row["above_floor"] or (x == "speedup" and low <= 1 <= high)


def frontier(points: Sequence[tuple[float, float]], measure: Measure) -> list[tuple[float, float]]:
    """The points that no other one beats in both numbers, from the largest first number on.

    Each holds from the next smaller first number up to its own: the frontier is a flight of steps.
    """
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (-p[0], badness(measure, p[1]))):
        if not found or badness(measure, y) < badness(measure, found[-1][1]):
            found.append((x, y))
    return found
