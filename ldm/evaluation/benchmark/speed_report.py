"""The benchmark's results: derived figures, a table, a file, a picture, and what machine it was."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldm.device import processor_says
from ldm.evaluation.benchmark.breakdown import PARTS
from ldm.evaluation.benchmark.speed import UPSTREAM, UPSTREAM_STEPS, Case, Row
from ldm.util import written_whole

PACKAGES = ("torch", "numpy", "einops", "diffusers", "tomesd")
COLUMNS = ("setting", "ms/step", "speed-up", "range", "of oracle", "peak MiB", *PARTS)
PATH = ("fused attention", "layout and memory", "type", "merging")  # from upstream's way to ours
_COLOURS = {
    "off": "0.4",
    "ours": "tab:blue",
    "compiled": "tab:cyan",
    "graph": "tab:green",
    "kernels": "tab:olive",
    "kernels, graph": "tab:brown",
    "peer": "0.7",
}


def machine(device: torch.device) -> dict[str, Any]:
    """What the measurements were made on."""
    about: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_says("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
    }
    if hasattr(os, "sysconf"):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        about["memory_gib"] = round(pages / 2**30, 1)
    if hasattr(os, "getloadavg"):
        about["load_before"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about["gpu"] = gpu.name
        about["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        about["cuda"] = torch.version.cuda
    return about


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def figures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with their medians, and how they compare with no merging and with their oracle.

    ``speedup`` is the ratio of medians; ``speedup_range`` the lowest and the highest ratio of two
    neighbouring measurements; ``of_oracle`` our speed-up in terms of the oracle's.
    """
    by_key = {(row.case, row.kind, row.name): row for row in rows}
    found = []
    for row in rows:
        entry = {**asdict(row.case), **asdict(row), "median_ms": _median(row.ms)}
        del entry["case"]
        base = by_key.get((row.case, "off", "off"))
        entry["speedup"] = entry["speedup_range"] = entry["of_oracle"] = None
        if base is not None and base.ms and row.ms:
            ratios = [before / after for before, after in zip(base.ms, row.ms, strict=False)]
            entry["speedup"] = median(base.ms) / median(row.ms)
            entry["speedup_range"] = [min(ratios), max(ratios)]
        perfect = by_key.get((row.case, "oracle", row.name))
        if row.kind == "ours" and perfect is not None and perfect.ms and row.ms:
            entry["of_oracle"] = median(perfect.ms) / median(row.ms)
        found.append(entry)
    return found


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows of one case."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for entry in figures(rows):
        name = _label(entry)
        if entry["error"]:
            lines.append(f"| {name} | {entry['error']} |{' |' * (len(COLUMNS) - 2)}")
            continue
        spread = entry["speedup_range"]
        shares = [entry["shares"].get(part) for part in PARTS]
        cells = [
            name,
            _shown(entry["median_ms"], ".1f" if (entry["median_ms"] or 0) < 1000 else ".0f"),
            _shown(entry["speedup"], ".2f"),
            "" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}",
            _shown(entry["of_oracle"], ".1%"),
            _shown(entry["peak_mib"], ".0f"),
            *(_shown(share, ".1%") for share in shares),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_upstream(rows: Sequence[Row]) -> list[str]:
    """How our fastest setting compares with upstream's own way to compute, in each case with it.

    And what each thing on the way gains: attention, layout, type, and merging.
    """
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case and row.ms]
        ours = [row for row in here if row.kind == "ours"]
        unmerged = {row.name: row for row in here if row.kind in ("off", "peer")}
        path = [unmerged[name] for name in (*UPSTREAM_STEPS, "off") if name in unmerged]
        if ours and UPSTREAM in unmerged:
            best = min(ours, key=lambda row: median(row.ms))
            gain, spread = _times(path[0], best)
            line = f"{title(case)}: {best.name} is {gain} times ({spread}) as fast as {UPSTREAM}"
            if len(path) == len(PATH):
                steps = zip(PATH, path, [*path[1:], best], strict=True)
                line += ": " + ", ".join(f"{name} {_times(a, b)[0]}" for name, a, b in steps)
            lines.append(line)
    return lines


def _times(slow: Row, fast: Row) -> tuple[str, str]:
    """How much faster: of the medians, and the range within rounds."""
    ratios = [before / after for before, after in zip(slow.ms, fast.ms, strict=False)]
    gain = median(slow.ms) / median(fast.ms)
    return f"{gain:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"


def title(case: Case) -> str:
    """A case in words."""
    return (
        f"{case.model}, {case.size}x{case.size}, batch {case.batch}, {case.dtype}, {case.attention}"
    )


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write everything, whole or not at all."""
    with written_whole(path, "w") as file:
        file.write(json.dumps({**about, "rows": figures(rows)}, indent=1) + "\n")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the speed-ups: a panel for each case, a bar for each setting, a mark for its oracle."""
    from matplotlib.figure import Figure

    entries = [entry for entry in figures(rows) if entry["speedup"] is not None]
    cases = list(dict.fromkeys(row.case for row in rows))
    panels = {
        case: [e for e in entries if Case(**{k: e[k] for k in asdict(case)}) == case]
        for case in cases
    }
    panels = {case: shown for case, shown in panels.items() if shown}
    if not panels:
        return
    heights = [0.5 + 0.25 * sum(e["kind"] != "oracle" for e in shown) for shown in panels.values()]
    figure = Figure(figsize=(8, sum(heights) + 0.5 * len(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (case, shown) in zip(axes, panels.items(), strict=True):
        bars = [e for e in shown if e["kind"] != "oracle"]
        limits = {e["name"]: e["speedup"] for e in shown if e["kind"] == "oracle"}
        places = range(len(bars))
        axis.barh(places, [e["speedup"] for e in bars], color=[_COLOURS[e["kind"]] for e in bars])
        marks = [
            (i, limits[e["name"]])
            for i, e in zip(places, bars, strict=True)
            if e["kind"] == "ours" and e["name"] in limits
        ]
        axis.plot([m[1] for m in marks], [m[0] for m in marks], "k|", markersize=12)
        axis.set_yticks(places, [_label(e) for e in bars])
        axis.invert_yaxis()
        axis.axvline(1, color="k", linewidth=0.5)
        axis.set_title(title(case), fontsize="medium")
    axes[-1].set_xlabel("speed-up over no merging (|: the oracle)")
    with written_whole(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _label(entry: Mapping[str, Any]) -> str:
    """What a setting is called in the table and the plot."""
    derived = entry["kind"] not in ("off", "ours", "peer")
    return f"{entry['name']}, {entry['kind']}" if derived else entry["name"]


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
