"""The report's plots as PNG files, for documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.evaluation.appendix_f.measures import MEASURES
from ldm.evaluation.appendix_f.plan import CONTROLS

FLOORS = ("again", "rounding")  # controls that would stretch the axis
N_COLORS = 10  # of matplotlib's cycle
MARKERS = "os^Dv"  # the next one when the colours begin again


def write_plots(
    folder: Path, table: Sequence[dict[str, Any]], measure: str = "psnr_db"
) -> list[Path]:
    """Quality against saved work, and against speed where that was measured; one file a size.

    Args:
        folder: where they go.
        table: rows of `table_json`, with ``speedup``.
        measure: which quality.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    written = []
    for size in dict.fromkeys(row["size"] for row in table):
        shown = [
            row
            for row in table
            if row["size"] == size and measure in row["measures"] and row["control"] not in FLOORS
        ]
        if not shown:
            continue
        axes = {"saved_work": "self-attention work saved"}
        if any(row["speedup"] is not None for row in shown):
            axes["speedup"] = "speed-up of a U-Net step"
        figure = Figure(figsize=(6.5 * len(axes), 4.8), layout="constrained")
        for axis, (name, title) in zip(
            figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True
        ):
            _draw(axis, [row for row in shown if row[name] is not None], name, measure)
            axis.set(xlabel=title, ylabel=MEASURES[measure].title, title=f"{size}x{size}")
        figure.axes[0].xaxis.set_major_formatter(PercentFormatter(1))
        figure.axes[0].legend(fontsize="small")
        path = folder / f"{measure}-{size}.png"
        part = path.with_name(f".{path.name}.part")
        figure.savefig(part, dpi=150, format="png")
        part.replace(path)
        written.append(path)
    return written


def _draw(axis: Any, rows: Sequence[dict[str, Any]], x: str, measure: str) -> None:
    families = dict.fromkeys(row["family"] for row in rows)
    for i, family in enumerate(sorted(families, key=lambda name: name == "controls")):
        own = sorted((row for row in rows if row["family"] == family), key=lambda row: row[x])
        means = [row["measures"][measure]["mean"] for row in own]
        bounds = [
            [
                abs(row["measures"][measure][end] - mean)
                for row, mean in zip(own, means, strict=True)
            ]
            for end in ("low", "high")
        ]
        is_control = family == "controls"
        marker = MARKERS[i // N_COLORS % len(MARKERS)]
        style: dict[str, Any] = {"color": f"C{i % N_COLORS}", "linestyle": "-", "marker": marker}
        if is_control:
            style |= {"color": "0.5", "markerfacecolor": "none", "linestyle": "none"}
        axis.errorbar([row[x] for row in own], means, bounds, label=family, capsize=2, **style)
        for row, mean in zip(own, means, strict=True):
            if is_control:
                label = next(name for name in CONTROLS if name == row["control"])
                axis.annotate(label, (row[x], mean), xytext=(5, 5), textcoords="offset points")
    best = frontier([(r[x], r["measures"][measure]["mean"]) for r in rows if not r["control"]])
    axis.plot(*zip(*best, strict=True), "k--", linewidth=1, label="frontier")


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both numbers, from the largest first number on."""
    found: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found
