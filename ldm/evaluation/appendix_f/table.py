"""From the numbers of single pictures to a table with confidence intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.distributed import Process
from ldm.evaluation.appendix_f.measures import FRECHET, MEASURES, badness, is_above_floor
from ldm.evaluation.appendix_f.networks import Judge
from ldm.evaluation.appendix_f.plan import UNMERGED, Batch, Plan, Setting
from ldm.evaluation.appendix_f.statistics import (
    Estimate,
    FrechetDistance,
    Statistics,
    bootstrap,
)
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.work import Work

COLUMNS = (*MEASURES, "saved_work", "seconds", "peak_mib")
Key = tuple[int, str]  # size and name of a setting


@dataclass(frozen=True)
class Results:
    """What was measured of every picture, for each size and name of a setting.

    Attributes:
        is_there: whether all pictures of a prompt are there, (n_prompts,).
        values: (n_prompts, n_seeds, measures), in the order of `COLUMNS`; NaN where nothing is.
        features: likewise, (n_prompts, n_seeds, k); k is 0 without a Fréchet distance.
    """

    is_there: Mapping[Key, Tensor]
    values: Mapping[Key, Tensor]
    features: Mapping[Key, Tensor]


def read(plan: Plan, store: Store, process: Process, judges: Sequence[Judge] = ()) -> Results:
    """Read this process's share from the disk, and put all processes' together.

    Args:
        plan: what there should be.
        store: where.
        process: this one; with others it has to be joined.
        judges: the networks whose results count.
    """
    width = next((judge.width for judge in judges if judge.name == FRECHET), 0)
    own: dict[tuple[int, str, int], tuple[list[float], Tensor]] = {}
    for batch in process.share(plan.batches()):
        for setting in plan.settings_of(batch):
            for number, row in measured(store, setting, batch, judges):
                numbers = [_number(row.get(name)) for name in COLUMNS]
                vector = row.get(FRECHET, torch.full((width,), torch.nan))
                own[batch.size, setting.name, number] = numbers, vector
    found = {key: value for part in process.gathered(own) for key, value in part.items()}
    shape = (len(plan.prompts), plan.n_seeds)
    is_there, values, features = {}, {}, {}
    for size, setting in _keys(plan):
        rows = [found.get((size, setting.name, i)) for i in range(plan.n_pictures)]
        absent = [torch.nan] * len(COLUMNS), torch.full((width,), torch.nan)
        pairs = [absent if row is None else row for row in rows]
        key = (size, setting.name)
        is_there[key] = torch.tensor([row is not None for row in rows]).view(shape).all(dim=1)
        measured_there = torch.tensor([row[0] for row in pairs], dtype=torch.float64)
        values[key] = measured_there.view(*shape, len(COLUMNS))
        features[key] = torch.stack([row[1] for row in pairs]).view(*shape, width)
    return Results(is_there, values, features)


def _number(value: Any) -> float:
    return torch.nan if value is None else float(value)


def _keys(plan: Plan) -> list[tuple[int, Setting]]:
    return [(size, setting) for size in plan.sizes for setting in plan.settings[size]]


def measured(
    store: Store, setting: Setting, batch: Batch, judges: Sequence[Judge]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and measures of each picture of a batch; nothing where one is missing."""
    rows = store.rows(setting, batch)
    if rows is None:
        return
    judged = store.judged(setting, batch) if judges else {}
    for i, (number, row) in enumerate(zip(batch.numbers, rows, strict=True)):
        seen = dict(row)
        for judge in judges:
            if judge.entry in judged:
                vector = torch.from_numpy(judged[judge.entry][i])
                value = vector.item() if judge.width == 1 else vector
                seen[judge.name] = None if judge.width == 1 and value != value else value
        yield number, seen


def make_table(
    plan: Plan,
    results: Results,
    work: Mapping[tuple[int, str], Work],
    references: Mapping[int, Statistics],
    against: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row of plain values for every setting at every size.

    Args:
        plan: what was drawn.
        results: what was measured.
        work: what a setting saves, by size and key of the setting.
        references: what is known of the reference pictures, for each size that has some.
        against: names of settings; the differences to them, for the same noise, are listed, too.
    """
    distances = {size: FrechetDistance(known) for size, known in references.items()}
    table = []
    for size, setting in tqdm(_keys(plan), desc="confidence intervals", unit="setting"):
        key = (size, setting.name)
        values = results.values[key][results.is_there[key]]
        estimates = _estimates(values)
        features = results.features[key][results.is_there[key]]
        can_tell = features.shape[:2].numel() > 1 and bool(features.isfinite().all())
        if size in distances and can_tell:
            estimates[FRECHET] = distances[size].estimate(features)
        saved, seconds, peak = (_median(values, name) for name in COLUMNS[-3:])
        own = work[size, setting.key]
        if setting.control == "steps":
            share = 1 - setting.sampling["steps"] / (plan.sampling.steps or 1)
            own = Work(share, share)
        n_together = min(plan.sampling.n_samples, plan.n_pictures)
        # How much goes at a similarity depends on the pictures, of which the count knows nothing.
        is_known = all(c.similarity is None for c in (setting.config, *setting.config.rules))
        table.append(
            {
                "size": size,
                "setting": setting.name,
                "family": setting.family,
                "control": setting.control,
                "tome": setting.keys(),
                "sampling": dict(setting.sampling),
                "source": setting.source,
                "key": setting.key,
                "saved_work": own.saved_attention if saved is None else saved,
                "saved_whole": own.saved_whole if is_known else None,
                "n_prompts": len(values),
                "seconds": seconds,
                "gib": None if peak is None else peak / 1024 / n_together,
                "measures": {name: asdict(one) for name, one in estimates.items()},
                "differences": {
                    name: _plain(_difference(results, key, (size, name)))
                    for name in against
                    if (size, name) in results.values and name != setting.name
                },
            }
        )
    for size in plan.sizes:
        _mark_floor([row for row in table if row["size"] == size])
    return table


def _mark_floor(rows: Sequence[dict[str, Any]]) -> None:
    """Note which measures of a size's rows nothing can be claimed of."""
    floors: dict[str, float] = {}
    for row in rows:
        if row["control"] in ("precision", "rounding"):
            for name, measure in MEASURES.items():
                if measure.is_distance and (one := row["measures"].get(name)):
                    known = floors.get(name, one["mean"])
                    floors[name] = max(known, one["mean"], key=partial(badness, measure))
    for row in rows:
        row["above_floor"] = [
            name
            for name, one in row["measures"].items()
            if not row["control"] and is_above_floor(name, one["mean"], floors.get(name))
        ]


def _difference(results: Results, one: Key, other: Key) -> dict[str, Estimate]:
    both = results.is_there[one] & results.is_there[other]
    return _estimates((results.values[one] - results.values[other])[both])


def _estimates(values: Tensor) -> dict[str, Estimate]:
    """Means of the measures, (n_prompts, n_seeds, measures), with intervals over the prompts."""
    found = {}
    for i, name in enumerate(MEASURES):
        per_prompt = values[..., i].mean(dim=1)
        if len(per_prompt) and bool(per_prompt.isfinite().all()):
            found[name] = bootstrap(per_prompt)
    return found


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in estimates.items()}


def _median(values: Tensor, name: str) -> float | None:
    found = values[..., COLUMNS.index(name)]
    found = found[found.isfinite()]
    return found.quantile(0.5).item() if len(found) else None  # torch's median is the lower one


def add_equal_time(
    table: Sequence[dict[str, Any]],
    results: Results,
    speedups: Mapping[tuple[int, str], float],
    steps: int,
    model: str,
) -> None:
    """Compare each setting with fewer steps of the unmerged model that take as much time.

    Args:
        table: gets, in each merged row, ``equal_time``: for each sampler how many steps these
            are, and the setting's measures minus theirs, for the same noise.
        results: what was measured.
        speedups: of a step, by size and key of the setting; without one nothing is compared.
        steps: of the plan.
        model: whose step that is.
    """
    for row in table:
        speedup = speedups.get((row["size"], row["key"]))
        row["equal_time"] = {}
        if row["control"] or row["setting"] == UNMERGED or speedup is None:
            continue
        others: dict[str, dict[str, Any]] = {}
        for other in table:
            if other["size"] != row["size"] or other["control"] != "steps":
                continue
            sampler, n = other["sampling"]["sampler"], other["sampling"]["steps"]
            best = others.get(sampler)
            if n <= steps / speedup and (best is None or n > best["sampling"]["steps"]):
                others[sampler] = other
        for sampler, other in others.items():
            keys = [(row["size"], name) for name in (row["setting"], other["setting"])]
            row["equal_time"][sampler] = {
                "model": model,
                "steps": other["sampling"]["steps"],
                "measures": other["measures"],
                "differences": _plain(_difference(results, *keys)),
            }


# --- files --------------------------------------------------------------------------------------


def table_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """The table in CSV: a column for each measure and its bounds."""
    names = [name for name in (*MEASURES, FRECHET) if any(name in r["measures"] for r in table)]
    others = list(dict.fromkeys(name for row in table for name in row["differences"]))
    lines = []
    for row in table:
        first = ("size", "setting", "family", "control", "saved_work", "saved_whole", "n_prompts")
        line = {name: row[name] for name in first}
        for name in names:
            line |= _columns(name, row["measures"].get(name))
        for other in others:
            for name in names:
                if any(name in r["differences"].get(other, {}) for r in table):
                    one = row["differences"].get(other, {}).get(name)
                    line |= _columns(f"{name} minus that of {other}", one)
        lines.append({**line, "source": row["source"], "key": row["key"]})
    return to_csv(lines)


def _columns(name: str, one: Mapping[str, float] | None) -> dict[str, float | None]:
    bounds = one or dict.fromkeys(("mean", "low", "high"))
    return {name: bounds["mean"], f"{name} low": bounds["low"], f"{name} high": bounds["high"]}


def to_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as CSV, numbers in full; nothing where there are none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def picture_rows(
    plan: Plan, store: Store, judges: Sequence[Judge] = ()
) -> Iterator[dict[str, Any]]:
    """The measures of every single picture on the disk, in the plan's order."""
    for batch in plan.batches():
        for setting in plan.settings_of(batch):
            for number, row in measured(store, setting, batch, judges):
                prompt, seed = batch.pictures[number - batch.first]
                yield {
                    "size": batch.size,
                    "setting": setting.name,
                    "picture": number,
                    "prompt": prompt,
                    "seed": seed,
                    **{name: row.get(name) for name in COLUMNS},
                }
