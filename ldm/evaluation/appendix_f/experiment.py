"""A whole experiment: pictures, their measures, speed, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ldm.demo.classifier import load_classifier
from ldm.demo.scenes import Scene
from ldm.distributed import Process
from ldm.evaluation.appendix_f.draw import Experiment
from ldm.evaluation.appendix_f.measures import FRECHET
from ldm.evaluation.appendix_f.networks import (
    Judge,
    attribute_judges,
    clip_judge,
    inception_judge,
    lpips_judge,
    reference,
)
from ldm.evaluation.appendix_f.plan import Batch, Plan, Setting
from ldm.evaluation.appendix_f.plots import write_plots
from ldm.evaluation.appendix_f.report import report_page
from ldm.evaluation.appendix_f.speed import OWN, measure_speed
from ldm.evaluation.appendix_f.statistics import Statistics
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.table import (
    add_equal_time,
    make_table,
    picture_rows,
    read,
    table_csv,
    to_csv,
)
from ldm.evaluation.appendix_f.work import Work
from ldm.evaluation.benchmark.speed_report import machine
from ldm.images import encode_png, to_pixels
from ldm.pipeline import Pipeline

# Entries of a picture's settings that differ from picture to picture.
OF_PICTURE = {"prompt", "seed", "n_iter", "H", "W", "tome"}
FEW, MORE = 2, 6  # steps that a trial batch takes
FULL = 0.8  # share of a GPU's memory that a batch may fill
MOST_TOGETHER = 32


@dataclass(frozen=True)
class Extras:
    """What is measured besides.

    Attributes:
        against: settings whose differences to all others are listed.
        fid_weights: of Inception; None does without FID, or takes the demo's classifier.
        fid_reference: a folder or file; None takes renders, for the demo.
        n_rendered: how many of these.
        lpips_weights: a file, or None.
        clip: a folder, or None.
        speed: names of models: own, or of the benchmark's `MODELS`.
        rounds: of the measurement of speed.
    """

    against: Sequence[str] = ()
    fid_weights: str | None = None
    fid_reference: str | None = None
    n_rendered: int = 2000
    lpips_weights: str | None = None
    clip: str | None = None
    speed: Sequence[str] = ()
    rounds: int = 5


def load(model: Mapping[str, Any]) -> Pipeline:
    """The drawing model, whose first stage decodes in float32: rounding could hide differences.

    Args:
        model: arguments of ``Pipeline.from_checkpoint``.

    Raises:
        InputError: it cannot be had.
    """
    pipeline = Pipeline.from_checkpoint(**model)
    pipeline.model.first_stage_model.float()
    return pipeline


def conduct(
    pipeline: Pipeline,
    plan: Plan,
    scenes: Sequence[Scene] | None,
    outdir: str | Path,
    process: Process,
    extras: Extras,
    has_all: bool = False,
) -> Experiment:
    """Draw and measure this process's share of the pictures, and wait for the others.

    Args:
        pipeline: see `load`.
        plan: what to draw.
        scenes: what each prompt names, where that is known.
        outdir: the folder of results.
        process: this one; joined with the others.
        extras: which measures there are; those that earlier runs lack are added.
        has_all: draw nothing.

    Raises:
        InputError: the folder was begun with something else, or a network cannot be used.
    """
    about = pipeline.about(plan.sampling, "", 0)
    common = {name: value for name, value in about.items() if name not in OF_PICTURE}
    common["n_seeds"] = plan.n_seeds
    if about["device"] == "cpu":
        common["threads"] = torch.get_num_threads()
    judges = make_judges(extras, scenes is not None, pipeline.model.device)
    store = Store(outdir)
    if process.is_first:
        store.remove_leftovers()
        store.claim(common, plan.prompts)
        if extras.fid_reference is not None:  # complains before hours of drawing
            references(plan, store, judges, extras)
    process.wait()
    if not process.is_first:
        store.claim(common, plan.prompts)
    experiment = Experiment(pipeline, plan, store, judges, scenes, process)
    if not has_all:
        experiment.draw()
    experiment.judge()
    process.wait()
    return experiment


def make_judges(extras: Extras, has_scenes: bool, device: torch.device) -> list[Judge]:
    """The networks that there are files for.

    Raises:
        InputError: one cannot be used.
    """
    judges = attribute_judges(load_classifier()) if has_scenes else []
    if extras.fid_weights is not None:
        judges = [judge for judge in judges if judge.name != FRECHET]
        judges.append(inception_judge(extras.fid_weights, device))
    if extras.lpips_weights is not None:
        judges.append(lpips_judge(extras.lpips_weights))
    if extras.clip is not None:
        judges.append(clip_judge(extras.clip))
    return judges


def finish(
    experiment: Experiment,
    work: Mapping[tuple[int, str], Work],
    extras: Extras,
    command: str,
) -> None:
    """Put the results of all processes together; the first one measures speed and writes.

    Args:
        experiment: carried out.
        work: what each setting saves, by size and key.
        extras: what is measured besides.
        command: how all this can be repeated.
    """
    plan, store, judges = experiment.plan, experiment.store, experiment.judges
    results = read(plan, store, experiment.process, judges)
    if not experiment.process.is_first:
        return
    known = references(plan, store, judges, extras)
    table = make_table(plan, results, work, known, extras.against)
    speed = _speed(experiment, extras) if extras.speed else {"rows": []}
    own = {(row["size"], row["key"]): row for row in speed["rows"] if row["model"] == OWN}
    for row in table:
        timed = own.get((row["size"], row["key"]), {})
        row |= {"speedup": timed.get("speedup"), "speed_range": timed.get("range")}
    name, speedups = _time_that_counts(plan, speed["rows"])
    add_equal_time(table, results, speedups, plan.sampling.steps or 1, name)

    where = machine(experiment.pipeline.model.device)
    store.write_text("report/table.csv", table_csv(table))
    store.write_text("report/pictures.csv", to_csv(list(picture_rows(plan, store, judges))))
    document = {
        "command": command,
        "machine": where,
        "model": experiment.pipeline.about(plan.sampling, "", 0)["model"],
        "table": table,
        "speed": speed,
    }
    store.write_json("report/table.json", document)
    page = report_page(plan, store, judges, table, speed, _about(experiment, command, where))
    path = store.write_text("report/index.html", page)
    if find_spec("matplotlib") is None:
        print('For plots as PNG files: pip install -e ".[evaluation]"')
    else:
        write_plots(path.parent, table)
    print(f"Open {path}; the table is {path.with_name('table.csv')}")


def references(
    plan: Plan, store: Store, judges: Sequence[Judge], extras: Extras
) -> dict[int, Statistics]:
    """What is known of the reference pictures of each size, if one of the judges compares them.

    Raises:
        InputError: they cannot be used.
    """
    judge = next((one for one in judges if one.name == FRECHET), None)
    if judge is None:
        return {}
    source, n, cache = extras.fid_reference, extras.n_rendered, store.folder / "reference"
    return {size: reference(judge, source, n, size, cache) for size in plan.sizes}


def _time_that_counts(
    plan: Plan, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, dict[tuple[int, str], float]]:
    """The model whose time tells how many fewer steps are as fast: SD's shapes, else our own.

    Merging gains more in larger pictures, so a time counts for those of its own size.
    """
    fits = [row for row in rows if row["size"] in plan.sizes and row["speedup"] is not None]
    name = next((row["model"] for row in fits if row["model"] != OWN), OWN)
    speedups = {(r["size"], r["key"]): r["speedup"] for r in fits if r["model"] == name}
    return name, speedups


def _about(experiment: Experiment, command: str, where: Mapping[str, Any]) -> str:
    """How the pictures were made, in a line."""
    plan, sampling = experiment.plan, experiment.plan.sampling
    made = experiment.pipeline.about(sampling, "", 0)
    return (
        f"{made['model']['name']} ({made['model']['hash']}), {len(plan.prompts)} prompts x "
        f"{plan.n_seeds} seeds, {sampling.steps} steps of {sampling.sampler}, guidance "
        f"{sampling.scale:g}, {made['dtype']} on {where.get('gpu') or where['processor']}, torch "
        f"{made['torch']}: {command}"
    )


def _speed(experiment: Experiment, extras: Extras) -> dict[str, Any]:
    """Milliseconds of a U-Net step for the settings, on each of the models."""
    pipeline, plan = experiment.pipeline, experiment.plan
    settings = {s.key: s for group in plan.settings.values() for s in group}
    return measure_speed(
        extras.speed,
        (pipeline.info.config, plan.sizes),
        list(settings.values()),
        next(pipeline.model.model.parameters()),
        experiment.store,
        extras.rounds,
    )


# --- before drawing -----------------------------------------------------------------------------


def pictures_together(pipeline: Pipeline, plan: Plan, size: int) -> int:
    """How many pictures of a size fill a GPU, a power of two; 1 elsewhere.

    Memory grows evenly with the pictures; the growth from one to two of them is measured.
    """
    device = pipeline.model.device
    if device.type != "cuda":
        return 1
    peaks = []
    for n in (1, 2):
        trial = replace(plan, sampling=replace(plan.sampling, n_samples=n))
        batch = Batch(size, 0, tuple((plan.prompts[0], i) for i in range(n)))
        peaks.append(Experiment(pipeline, trial, Store("")).drawn(Setting(""), batch, 1).peak_mib)
    first, second = (float(peak or 0) for peak in peaks)
    free, total = (amount / 2**20 for amount in torch.cuda.mem_get_info(device))
    room = FULL * min(total, free + torch.cuda.memory_reserved(device) / 2**20) - first
    fits = 1 + int(room / max(second - first, 1.0))
    return max(n for n in (1, 2, 4, 8, 16, MOST_TOGETHER) if n <= max(fits, 1))


def expected_cost(pipeline: Pipeline, plan: Plan) -> tuple[float, float]:
    """Hours of drawing and GiB of pictures, from one unmerged batch of each size.

    Settings are taken to be as slow as no merging; what merging saves comes off.
    """
    steps = plan.sampling.steps or 1
    hours = gib = 0.0
    for size in plan.sizes:
        batches = [batch for batch in plan.batches() if batch.size == size]
        experiment = Experiment(pipeline, plan, Store(""))
        unmerged, batch = plan.settings[size][0], batches[0]
        few, more = min(FEW, steps), min(MORE, steps)
        experiment.drawn(unmerged, batch, few)  # to warm up
        fast, slow = (experiment.drawn(unmerged, batch, n) for n in (few, more))
        per_step = (slow.seconds - fast.seconds) / (more - few) if more > few else 0.0
        seconds = slow.seconds + (steps - more) * max(per_step, 0.0)
        n_bytes = sum(len(encode_png(pixels)) for pixels in to_pixels(slow.pictures))
        drawn = sum(
            len(one.pictures) / len(batch.pictures) * s.sampling.get("steps", steps) / steps
            for one in batches
            for s in plan.settings_of(one)
        )
        hours += drawn * seconds / 3600
        gib += sum(len(plan.settings_of(one)) for one in batches) * n_bytes / 2**30
    return hours, gib
