"""A whole experiment: pictures, their measures, speed, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ldm.config import load_config
from ldm.demo.classifier import load_classifier
from ldm.demo.scenes import Scene
from ldm.distributed import Process
from ldm.errors import InputError
from ldm.evaluation.appendix_f.features import (
    ClassifierFeatures,
    InceptionFeatures,
    clip_network,
    lpips_network,
    reference_from,
    rendered_reference,
)
from ldm.evaluation.appendix_f.files import write_text
from ldm.evaluation.appendix_f.frechet import Statistics
from ldm.evaluation.appendix_f.measures import Judge
from ldm.evaluation.appendix_f.plan import Plan
from ldm.evaluation.appendix_f.plots import write_plots
from ldm.evaluation.appendix_f.report import report_page
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.summary import (
    picture_rows,
    read,
    summarize,
    table_csv,
    table_json,
    to_csv,
)
from ldm.evaluation.appendix_f.sweep import Sweep
from ldm.evaluation.appendix_f.sweep_speed import measure_speed
from ldm.evaluation.benchmark.speed_report import machine
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.pipeline import Pipeline

SD_MODELS = {
    "sd1.5": ("configs/stable-diffusion/v1-inference.yaml", 512),
    "sd2.1": ("configs/stable-diffusion/v2-inference-v.yaml", 768),
}
# Entries of a picture's settings that differ from picture to picture.
OF_PICTURE = {"prompt", "seed", "n_iter", "H", "W", "tome"}


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
        speed: names of models: own, or of `SD_MODELS`.
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


def conduct(
    model: Mapping[str, Any],
    plan: Plan,
    scenes: Sequence[Scene] | None,
    outdir: str | Path,
    process: Process,
    extras: Extras,
    has_all: bool = False,
) -> Sweep:
    """Draw and measure this process's share of the pictures, and wait for the others.

    Args:
        model: arguments of ``Pipeline.from_checkpoint``.
        plan: what to draw.
        scenes: what each prompt names, where that is known.
        outdir: the folder of results.
        process: this one; joined with the others.
        extras: which measures there are.
        has_all: draw nothing.

    Raises:
        InputError: the folder was begun with something else, or a network cannot be used.
    """
    pipeline = Pipeline.from_checkpoint(**model)
    pipeline.model.first_stage_model.float()  # its rounding would hide small differences
    judge = _judge(extras, scenes is not None, pipeline.model.device)
    about = pipeline.about(plan.sampling, "", 0)
    common = {name: value for name, value in about.items() if name not in OF_PICTURE}
    common["n_seeds"] = plan.n_seeds
    common["features"] = judge.features.name if judge.features else None
    common["networks"] = [name for name in ("lpips", "clip_score") if getattr(judge, name)]
    if about["device"] == "cpu":
        common["threads"] = torch.get_num_threads()
    store = Store(outdir)
    if process.is_first:
        store.claim(common, plan.prompts)
        store.remove_leftovers()
    process.wait()
    sweep = Sweep(pipeline, plan, store, judge, scenes, process)
    if not has_all:
        sweep.run()
    process.wait()
    return sweep


def _judge(extras: Extras, has_scenes: bool, device: torch.device) -> Judge:
    classifier = load_classifier() if has_scenes else None
    if extras.fid_weights is not None and extras.fid_reference is None:
        raise InputError("--fid-weights: FID needs --fid-reference, too")
    features: Any = ClassifierFeatures(classifier) if classifier else None
    if extras.fid_weights is not None:
        features = InceptionFeatures(extras.fid_weights, device)
    return Judge(
        classifier,
        features,
        None if extras.lpips_weights is None else lpips_network(extras.lpips_weights),
        None if extras.clip is None else clip_network(extras.clip),
    )


def finish(sweep: Sweep, unet: UNetModel, extras: Extras, command: str) -> None:
    """Put the results of all processes together; the first one measures speed and writes.

    Args:
        sweep: carried out.
        unet: the model's outline.
        extras: what is measured besides.
        command: how all this can be repeated.
    """
    plan, store, pipeline, features = sweep.plan, sweep.store, sweep.pipeline, sweep.judge.features
    results = read(plan, store, sweep.process, features.width if features else 0)
    if not sweep.process.is_first:
        return
    references = {size: _reference(sweep, size, extras) for size in plan.sizes} if features else {}
    entries = summarize(plan, results, unet, pipeline.defaults["f"], references, extras.against)
    speed = _speed(sweep, extras) if extras.speed else {}
    own = {
        (row["size"], row["key"]): row["speedup"] for row in speed.get("rows", []) if row["is_own"]
    }
    table = [{**row, "speedup": own.get((row["size"], row["key"]))} for row in table_json(entries)]

    folder = store.folder / "report"
    write_text(folder / "table.csv", table_csv(entries))
    write_text(folder / "pictures.csv", to_csv(list(picture_rows(plan, store))))
    where = machine(pipeline.model.device)
    document = {
        "command": command,
        "machine": where,
        "model": pipeline.about(plan.sampling, "", 0)["model"],
        "table": table,
        "speed": speed,
    }
    write_text(folder / "table.json", json.dumps(document, indent=1) + "\n")
    name = features.name if features else ""
    page = report_page(plan, store, table, speed, _about(sweep, command, where), name)
    write_text(folder / "index.html", page)
    if find_spec("matplotlib") is None:
        print('For plots as PNG files: pip install -e ".[evaluation]"')
    else:
        write_plots(folder, table)
    print(f"Open {folder / 'index.html'}; the table is {folder / 'table.csv'}")


def _about(sweep: Sweep, command: str, where: Mapping[str, Any]) -> str:
    """How the pictures were made, in a line."""
    plan, sampling = sweep.plan, sweep.plan.sampling
    made = sweep.pipeline.about(sampling, "", 0)
    return (
        f"{made['model']['name']} ({made['model']['hash']}), {len(plan.prompts)} prompts x "
        f"{plan.n_seeds} seeds, {sampling.steps} steps of {sampling.sampler}, guidance "
        f"{sampling.scale:g}, {made['dtype']} on {where.get('gpu') or where['processor']}, torch "
        f"{made['torch']}: {command}"
    )


def _reference(sweep: Sweep, size: int, extras: Extras) -> Statistics:
    """What is known of the reference pictures; kept on the disk, as it takes a while."""
    features = sweep.judge.features
    assert features is not None
    if extras.fid_reference is not None and Path(extras.fid_reference).is_file():
        return reference_from(extras.fid_reference, features)
    if extras.fid_reference is None:
        path = sweep.store.folder / "reference" / f"renders-{extras.n_rendered}-{size}.npz"
        if not path.exists():
            rendered_reference(features, extras.n_rendered, size).save(path)
    else:
        path = sweep.store.folder / "reference" / f"{Path(extras.fid_reference).name}.npz"
        if not path.exists():
            reference_from(extras.fid_reference, features).save(path)
    return reference_from(path, features)


def _speed(sweep: Sweep, extras: Extras) -> dict[str, Any]:
    """Milliseconds of a U-Net step for the settings, on each of the models."""
    pipeline, plan = sweep.pipeline, sweep.plan
    models = {"own": pipeline.info.config}
    sizes: dict[str, Sequence[int]] = {"own": plan.sizes}
    for name, (path, size) in SD_MODELS.items():
        models[name], sizes[name] = load_config(path), [size]
    settings = {s.key: s for group in plan.settings.values() for s in group}
    weight = next(pipeline.model.model.parameters())
    return measure_speed(
        {name: models[name] for name in extras.speed},
        sizes,
        list(settings.values()),
        str(weight.dtype).removeprefix("torch."),
        weight.device,
        sweep.store,
        own="own",
        rounds=extras.rounds,
    )
