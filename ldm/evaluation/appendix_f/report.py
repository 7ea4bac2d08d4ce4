"""The report of an experiment: one page that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.evaluation.appendix_f.measures import FRECHET, FRECHET_MEASURE, MEASURES
from ldm.evaluation.appendix_f.networks import Judge
from ldm.evaluation.appendix_f.plan import CONTROLS, FLOORS, UNMERGED, Plan
from ldm.evaluation.appendix_f.published import paper_rows
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.table import measured
from ldm.evaluation.page import data_url, filled
from ldm.images import encode_webp

TEMPLATE = Path(__file__).with_suffix(".html")
N_SHOWN = 6  # prompts whose pictures the page carries, for each size
NOTES = (
    "Every setting draws the same prompts from the same noise; distances are to the picture "
    "without merging.",
    "Grey numbers are nearer to the unmerged picture than a change of precision alone (controls "
    "“precision” and “rounding”, for PSNR also the 8 bits of a file): of them nothing is claimed.",
    "A distance to the unmerged picture says how much changed, not whether that is worse. FID "
    "alone decides nothing: of few pictures it is noise, and merging often improves it.",
    "“Fewer steps” is the other way to save time: the unmerged model with as many steps as take "
    "the setting's time. Where it is nearer, merging is not the better way.",
    "The settings of the draft of the ToMe paper (appendix F) are not public any more: the preset "
    "appendix_f follows the four lines of its code, and claims none of its numbers.",
)


def report_page(
    plan: Plan,
    store: Store,
    judges: Sequence[Judge],
    table: Sequence[Mapping[str, Any]],
    speed: Mapping[str, Any],
    about: str,
) -> str:
    """The page's HTML.

    Args:
        plan: what was drawn.
        store: where.
        judges: whose measures the pictures have.
        table: its rows, in plain values.
        speed: see `ldm.evaluation.appendix_f.speed`.
        about: how the pictures were made, in a line.
    """
    measures = {name: asdict(measure) for name, measure in MEASURES.items()}
    judge = next((one for one in judges if one.name == FRECHET), None)
    if judge is not None:
        measures[FRECHET] = asdict(FRECHET_MEASURE)
        measures[FRECHET]["meaning"] += f", from the features of {judge.title}"
        if judge.title != "Inception":
            measures[FRECHET]["title"] = "Fréchet (not FID)"
    data = {
        "about": about,
        "notes": [*NOTES, *(f"Control “{name}”: {text}." for name, text in CONTROLS.items())],
        "measures": measures,
        "unmerged": UNMERGED,
        "floors": FLOORS,
        "sizes": list(plan.sizes),
        "model": about.partition(" (")[0],
        "entries": list(table),
        "pictures": _pictures(plan, store, judges),
        "machine": speed.get("machine", ""),
        "speedAbout": speed.get("about", ""),
        "speed": speed.get("rows", []),
        "paper": paper_rows(table),
    }
    return filled(TEMPLATE, data)


def _pictures(plan: Plan, store: Store, judges: Sequence[Judge]) -> list[dict[str, Any]]:
    """Pictures of the first seed of some prompts, in all settings that have them."""
    found = []
    step = max(1, len(plan.prompts) // N_SHOWN)
    chosen = set(range(0, len(plan.prompts), step)[:N_SHOWN])
    for batch in plan.batches():
        shown = [i for i in batch.numbers if i % plan.n_seeds == 0 and i // plan.n_seeds in chosen]
        if not shown:
            continue
        images: dict[int, dict[str, str]] = {number: {} for number in shown}
        values: dict[int, dict[str, Any]] = {number: {} for number in shown}
        for setting in plan.settings_of(batch):
            for number, row in measured(store, setting, batch, judges):
                if number in images:
                    pixels = store.pixels(setting, batch.size, number)
                    images[number][setting.name] = data_url("webp", encode_webp(pixels))
                    values[number][setting.name] = {name: row.get(name) for name in MEASURES}
        for number in shown:
            if UNMERGED in images[number] and len(images[number]) > 1:
                prompt, seed = batch.pictures[number - batch.first]
                group = {"size": batch.size, "prompt": prompt, "seed": seed}
                found.append({**group, "images": images[number], "values": values[number]})
    return found
