"""The report of a sweep: one page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.evaluation.appendix_f.measures import FRECHET, FRECHET_MEASURE, MEASURES, Measure
from ldm.evaluation.appendix_f.plan import UNMERGED, Plan
from ldm.evaluation.appendix_f.published import PUBLISHED
from ldm.evaluation.appendix_f.store import Store
from ldm.images import encode_webp

TEMPLATE = Path(__file__).with_suffix(".html")
NOTES = (
    "Every setting draws the same prompts from the same noise; distances are to the picture "
    "without merging.",
    "Controls: “again” draws the unmerged picture twice, the floor of every distance; “rounding” "
    "computes attention by another formula, which no setting can be asked to stay below; “none”, "
    "“random” and “drop” show how much similarity, and attention itself, matter.",
    "A distance to the unmerged picture says how much changed, not whether that is worse. FID "
    "alone decides nothing: of few pictures it is noise, and merging often improves it.",
    "The settings of the draft of the ToMe paper (appendix F) are not public any more: the preset "
    "appendix_f follows the four lines of its code, and claims none of its numbers.",
)


def report_page(
    plan: Plan,
    store: Store,
    table: Sequence[Mapping[str, Any]],
    speed: Mapping[str, Any],
    about: str,
    features: str = "",
    n_shown: int = 6,
) -> str:
    """The page's HTML.

    Args:
        plan: what was drawn.
        store: where.
        table: its rows, in plain values.
        speed: see `ldm.evaluation.appendix_f.sweep_speed`; empty without.
        about: how the pictures were made, in a line.
        features: what the Fréchet distance compares.
        n_shown: prompts whose pictures the page carries, for each size.
    """
    measures = {name: _measure(measure) for name, measure in MEASURES.items()}
    measures[FRECHET] = _measure(FRECHET_MEASURE)
    measures[FRECHET]["meaning"] += f", from the features of {features}"
    if features != "Inception":
        measures[FRECHET]["title"] = "Fréchet (not FID)"
    if not features:
        del measures[FRECHET]
    data = {
        "about": about,
        "notes": NOTES,
        "measures": measures,
        "unmerged": UNMERGED,
        "sizes": list(plan.sizes),
        "entries": list(table),
        "pictures": _pictures(plan, store, n_shown),
        "machine": speed.get("machine", ""),
        "speedAbout": speed.get("about", ""),
        "speed": speed.get("rows", []),
        "published": [asdict(row) for row in PUBLISHED],
    }
    text = json.dumps(data).replace("<", "\\u003c")  # a prompt cannot end the script
    return TEMPLATE.read_text(encoding="utf-8").replace(">DATA<", f">{text}<")


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        "title": measure.title,
        "meaning": measure.meaning,
        "digits": measure.digits,
        "high": measure.is_better_high,
        "distance": measure.is_distance,
    }


def _pictures(plan: Plan, store: Store, n_shown: int) -> list[dict[str, Any]]:
    """Pictures of the first seed of some prompts, in all settings that have them."""
    found = []
    step = max(1, len(plan.prompts) // n_shown)
    chosen = set(range(0, len(plan.prompts), step)[:n_shown])
    for batch in plan.batches():
        for number, (prompt, seed) in zip(batch.numbers, batch.pictures, strict=True):
            if number % plan.n_seeds or number // plan.n_seeds not in chosen:
                continue
            images, values = {}, {}
            for setting in plan.settings[batch.size]:
                rows = store.rows(setting, batch)
                if rows is None:
                    continue
                pixels = store.pixels(setting, batch.size, number)
                content = base64.b64encode(encode_webp(pixels)).decode()
                images[setting.name] = f"data:image/webp;base64,{content}"
                row = rows[number - batch.first]
                values[setting.name] = {name: row.get(name) for name in MEASURES}
            if UNMERGED in images and len(images) > 1:
                group = {"size": batch.size, "prompt": prompt, "seed": seed}
                found.append({**group, "images": images, "values": values})
    return found
