"""From the rows of single pictures to a table with confidence intervals."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.distributed import Process
from ldm.evaluation.appendix_f.frechet import FrechetDistance, Statistics
from ldm.evaluation.appendix_f.gather import Gathered
from ldm.evaluation.appendix_f.measures import FRECHET, MEASURES, decode
from ldm.evaluation.appendix_f.metrics import Estimate, bootstrap
from ldm.evaluation.appendix_f.plan import Plan, Setting
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.work import saved_work
from ldm.modules.diffusionmodules.openaimodel import UNetModel

COLUMNS = (*MEASURES, "saved_work")


@dataclass(frozen=True)
class Results:
    """What was measured of every picture, for each size and name of a setting.

    Attributes:
        is_there: whether all pictures of a prompt are there, (n_prompts,).
        values: (n_prompts, n_seeds, measures), in the order of `COLUMNS`; NaN where nothing is.
        features: likewise, (n_prompts, n_seeds, k); k is 0 without a Fréchet distance.
    """

    is_there: Mapping[tuple[int, str], Tensor]
    values: Mapping[tuple[int, str], Tensor]
    features: Mapping[tuple[int, str], Tensor]


@dataclass
class Entry:
    """A row of the table.

    Attributes:
        size: pixels a side.
        setting: which.
        saved_work: share of the self-attention work.
        n_prompts: prompts whose pictures are all there.
        estimates: of each measure, over prompts.
        differences: to other settings, by their names: of each measure, for the same noise.
    """

    size: int
    setting: Setting
    saved_work: float
    n_prompts: int
    estimates: dict[str, Estimate]
    differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)


def read(plan: Plan, store: Store, process: Process, n_features: int = 0) -> Results:
    """Read this process's rows from the disk, and put all processes' rows together.

    Args:
        plan: what there should be.
        store: where.
        process: this one; with others it has to be joined.
        n_features: length of the vectors for the Fréchet distance; 0 where there are none.
    """
    keys = [(size, setting) for size in plan.sizes for setting in plan.settings[size]]
    values, features = Gathered(torch.float64), Gathered(torch.float32)
    for gathered, width in ((values, len(COLUMNS)), (features, n_features)):
        gathered.update(torch.empty(0), torch.empty(0, width))  # a process may have nothing else
    for batch in process.share(plan.batches()):
        for k, (size, setting) in enumerate(keys):
            rows = store.rows(setting, batch) if size == batch.size else None
            if rows is None:
                continue
            numbers = torch.tensor([k * plan.n_pictures + i for i in batch.numbers])
            values.update(numbers, torch.stack([_values(row) for row in rows]))
            if n_features:
                features.update(numbers, torch.stack([decode(row["features"]) for row in rows]))
    numbers, measured = values.compute()
    _, vectors = features.compute() if n_features else (numbers, measured[:, :0])
    names = [(size, setting.name) for size, setting in keys]
    present = torch.zeros(len(names) * plan.n_pictures, dtype=torch.bool)
    present[numbers] = True
    shape = (len(names), len(plan.prompts), plan.n_seeds)

    def table(found: Tensor) -> dict[tuple[int, str], Tensor]:
        all_rows = torch.full((len(present), found.shape[1]), math.nan, dtype=found.dtype)
        all_rows[numbers] = found
        return dict(zip(names, all_rows.view(*shape, found.shape[1]), strict=True))

    is_there = dict(zip(names, present.view(shape).all(dim=2), strict=True))
    return Results(is_there, table(measured), table(vectors))


def _values(row: Mapping[str, Any]) -> Tensor:
    found = [row.get(name) for name in COLUMNS]
    return torch.tensor([math.nan if v is None else v for v in found], dtype=torch.float64)


def summarize(
    plan: Plan,
    results: Results,
    unet: UNetModel,
    f: int,
    reference: Mapping[int, Statistics],
    against: Sequence[str] = (),
) -> list[Entry]:
    """The table: every setting at every size.

    Args:
        plan: what was drawn.
        results: what was measured.
        unet: tells what a control saves.
        f: pixels to a latent.
        reference: what is known of the reference pictures, for each size that has some.
        against: names of settings to compare with, too.
    """
    entries = []
    distances = {size: FrechetDistance(known) for size, known in reference.items()}
    keys = [(size, setting) for size in plan.sizes for setting in plan.settings[size]]
    for size, setting in tqdm(keys, desc="confidence intervals", unit="setting"):
        is_there = results.is_there[size, setting.name]
        all_values = results.values[size, setting.name]
        values = all_values[is_there]
        saved = values[..., COLUMNS.index("saved_work")]
        is_measured = bool(saved.isfinite().any())
        entry = Entry(
            size=size,
            setting=setting,
            saved_work=saved.nanmean().item()
            if is_measured
            else saved_work(unet, setting.config, size // f, size // f),
            n_prompts=len(values),
            estimates=_estimates(values),
        )
        if size in distances and values.shape[0] * values.shape[1] > 1:
            features = results.features[size, setting.name][is_there]
            entry.estimates[FRECHET] = distances[size].estimate(features)
        for name in against:
            if (size, name) in results.values and name != setting.name:
                both = is_there & results.is_there[size, name]
                difference = (all_values - results.values[size, name])[both]
                entry.differences[name] = _estimates(difference)
        entries.append(entry)
    return entries


def _estimates(values: Tensor) -> dict[str, Estimate]:
    """Means of the measures, (n_prompts, n_seeds, measures), with intervals over the prompts."""
    found = {}
    for i, name in enumerate(MEASURES):
        per_prompt = values[..., i].mean(dim=1)
        if len(per_prompt) and bool(per_prompt.isfinite().all()):
            found[name] = bootstrap(per_prompt)
    return found


def table_csv(entries: Sequence[Entry]) -> str:
    """The table in CSV: a column for each measure and its bounds."""
    measures = [name for name in (*MEASURES, FRECHET) if any(name in e.estimates for e in entries)]
    others = list(dict.fromkeys(name for e in entries for name in e.differences))
    lines = []
    for entry in entries:
        setting = entry.setting
        line: dict[str, Any] = {
            "size": entry.size,
            "setting": setting.name,
            "family": setting.family,
            "control": setting.control,
            "saved_work": entry.saved_work,
            "n_prompts": entry.n_prompts,
        }
        for name in measures:
            line |= _columns(name, entry.estimates.get(name))
        for other, name in itertools.product(others, MEASURES):
            if any(name in e.differences.get(other, {}) for e in entries):
                estimate = entry.differences.get(other, {}).get(name)
                line |= _columns(f"{name} minus that of {other}", estimate)
        lines.append({**line, "source": setting.source, "key": setting.key})
    return to_csv(lines)


def _columns(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    one = asdict(estimate) if estimate else dict.fromkeys(("mean", "low", "high"))
    return {name: one["mean"], f"{name} low": one["low"], f"{name} high": one["high"]}


def to_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def picture_rows(plan: Plan, store: Store) -> Iterator[dict[str, Any]]:
    """The measures of every single picture on the disk, in the plan's order."""
    for batch in plan.batches():
        for setting in plan.settings[batch.size]:
            rows = store.rows(setting, batch)
            for number, (prompt, seed), row in zip(
                batch.numbers, batch.pictures, rows or (), strict=bool(rows)
            ):
                yield {
                    "size": batch.size,
                    "setting": setting.name,
                    "picture": number,
                    "prompt": prompt,
                    "seed": seed,
                    **{name: row.get(name) for name in (*MEASURES, "saved_work", "seconds")},
                }


def table_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The table in plain values."""
    return [
        {
            "size": e.size,
            "setting": e.setting.name,
            "family": e.setting.family,
            "control": e.setting.control,
            "tome": e.setting.keys(),
            "source": e.setting.source,
            "key": e.setting.key,
            "saved_work": e.saved_work,
            "n_prompts": e.n_prompts,
            "measures": {name: asdict(one) for name, one in e.estimates.items()},
            "differences": {
                other: {name: asdict(one) for name, one in estimates.items()}
                for other, estimates in e.differences.items()
            },
        }
        for e in entries
    ]
