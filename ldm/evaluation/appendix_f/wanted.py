"""From the flags to a plan: which prompts, settings and sizes are wanted, each checked."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import options
from ldm.cli.lists import at_least, choices, numbers, share, words
from ldm.cli.parser import Arguments
from ldm.distributed import Process
from ldm.errors import InputError
from ldm.evaluation.appendix_f.plan import (
    CONTROLS,
    UNMERGED,
    Plan,
    Setting,
    control_settings,
    preset_settings,
    read_settings,
    unique,
)
from ldm.evaluation.appendix_f.protocols import RATIOS, Protocol
from ldm.evaluation.benchmark.program import MODELS
from ldm.settings import NUMBERS, SIZE_STEP, Settings

if TYPE_CHECKING:  # torch comes only after the flags are checked
    from ldm.evaluation.appendix_f.work import Work
    from ldm.modules.diffusionmodules.openaimodel import UNetModel
    from ldm.pipeline import Pipeline

MOST_PICTURES = 100_000  # of a setting at one size
MOST_PIXELS = int(NUMBERS["H"][2])
SPEED_MODELS = ("own", *MODELS)
AGAINST = ("tomesd", "todo")  # what differences are listed to


def check(args: Arguments) -> None:
    """Check what can be checked without torch."""
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: allowed is 0 or more, so that a run can be resumed")
    at_least(1, args, "n_prompts", "n_seeds", "n_samples", "rounds")
    at_least(2, args, "n_reference")
    for flag in ("fid_weights", "fid_reference", "lpips_weights", "clip"):
        value = getattr(args, flag)
        if value is not None and not Path(value).exists():
            raise InputError(f"--{flag.replace('_', '-')} {value}: there is no such file")
    if args.fid_weights is not None and args.fid_reference is None:
        raise InputError("--fid-weights: FID needs --fid-reference, too")
    if args.table_only and not any(Path(args.outdir).glob("pictures/*/*/*.png")):
        raise InputError(f"--table-only: there are no pictures in {args.outdir}; draw them first")
    speed_models(args)
    if args.sizes is not None:
        numbers(args.sizes, "--sizes", SIZE_STEP, most=MOST_PIXELS)
    args.prompts = None if args.from_file is None else options.read_prompts(args.from_file)


def speed_models(args: Arguments) -> list[str]:
    """Which models' speed is measured."""
    standard = "own" if args.quick else ",".join(SPEED_MODELS)
    text = standard if args.speed is None else args.speed
    return choices(text, "--speed", SPEED_MODELS, may_be_empty=True)


def make_plan(
    args: Arguments,
    protocol: Protocol,
    defaults: dict[str, Any],
    unet: UNetModel,
    process: Process,
) -> tuple[Plan, list[Any] | None, dict[tuple[int, str], Work]]:
    """What to draw, the scenes that the prompts name, if they do, and what each setting saves."""
    from ldm.evaluation.appendix_f.work import count_work

    names = ("steps", "sampler", "scale")
    sampling = Settings(
        seed=args.seed,
        n_samples=args.n_samples or 1,
        **{name: getattr(args, name) for name in names},
    )
    own = {name: getattr(protocol, name) for name in names}
    sampling = sampling.filled({name: value for name, value in own.items() if value is not None})
    sampling = sampling.filled(defaults)
    prompts: Sequence[str]
    scenes = None
    if args.prompts is not None:
        prompts = args.prompts[: args.n_prompts]
    else:
        prompts, scenes = protocol.prompts(args.n_prompts or protocol.n_prompts)
    n_seeds = args.n_seeds or protocol.n_seeds
    if len(prompts) * n_seeds > MOST_PICTURES:
        raise InputError(
            f"--n_seeds {n_seeds}: {len(prompts)} prompts make more than {MOST_PICTURES} pictures "
            "of each setting, which is the limit"
        )
    settings = chosen_settings(args, protocol, sampling)
    side, f = protocol.size or defaults["H"], defaults["f"]
    per_size: dict[int, tuple[Setting, ...]] = {}
    work: dict[tuple[int, str], Work] = {}
    for size in numbers(args.sizes or str(side), "--sizes", SIZE_STEP, most=MOST_PIXELS):
        saved = count_work(unet, {s.key: s for s in settings}, size // f, size // f)
        work |= {(size, key): one for key, one in saved.items()}
        per_size[size] = tuple(s for s in settings if is_of_use(s, saved[s.key]))
        idle = [s.name for s in settings if s not in per_size[size]]
        if idle and process.is_first:
            print(f"At {size}x{size} these merge nothing and are left out: {', '.join(idle)}")
    control_share = protocol.control_share if args.prompts is None else 1
    plan = Plan(per_size, tuple(prompts), n_seeds, sampling, control_share)
    return plan, scenes, work


def filled(plan: Plan, args: Arguments, pipeline: Pipeline) -> Plan:
    """The plan with as many pictures at a time as memory has room for, if none are asked for.

    A run that goes on keeps the number that it began with.
    """
    if args.n_samples is not None:
        return plan
    try:
        about = json.loads((Path(args.outdir) / "about.json").read_text())["about"]
        n_samples = int(about["n_samples"])
    except (OSError, ValueError, KeyError, TypeError):
        from ldm.evaluation.appendix_f.experiment import pictures_together

        n_samples = pictures_together(pipeline, plan, max(plan.sizes))
    return replace(plan, sampling=replace(plan.sampling, n_samples=n_samples))


def dry_run(plan: Plan, protocol: Protocol, args: Arguments) -> list[str]:
    """What would be drawn, what it takes, and txt2img commands that draw the same."""
    sampling = plan.sampling
    drawn = [(len(b.pictures), s.sampling) for b in plan.batches() for s in plan.settings_of(b)]
    n_all = sum(n for n, _ in drawn)
    n_steps = sum(n * changes.get("steps", sampling.steps or 0) for n, changes in drawn)
    lines = [
        f"{protocol.title}: {len(plan.prompts)} prompts x {plan.n_seeds} seeds, {sampling.steps} "
        f"steps of {sampling.sampler}, guidance {sampling.scale:g}",
        f"{n_all} pictures, {n_steps} steps in all",
        f"The prompts, one a line for PROMPTS.txt, begin with: {plan.prompts[0]!r}",
    ]
    for size, settings in plan.settings.items():
        lines.append(
            f"\n{size}x{size}: {len(settings)} settings, each of {plan.n_pictures} pictures"
            + (f"; controls of one in {plan.control_share}" if plan.control_share > 1 else "")
        )
        for setting in settings:
            words: list[Any] = ["python", "scripts/txt2img.py", "--from-file", "PROMPTS.txt"]
            words += ["--repeat", plan.n_seeds, "--seed", sampling.seed, "--steps", sampling.steps]
            words += ["--sampler", sampling.sampler, "--scale", f"{sampling.scale:g}"]
            words += ["--n_samples", sampling.n_samples, "--H", size, "--W", size]
            words += [] if args.ckpt is None else ["--ckpt", args.ckpt]
            words += setting.flags
            shown = shlex.join(map(str, words))
            lines.append(f"  {setting.name}: {CONTROLS.get(setting.control, shown)}")
    return lines


def chosen_settings(args: Arguments, protocol: Protocol, sampling: Settings) -> tuple[Setting, ...]:
    """All settings that the flags name, the unmerged one first."""
    presets = {} if args.settings is not None else dict(protocol.presets)
    if args.presets is not None:
        standard = () if args.settings is not None else RATIOS
        names = words(args.presets, "--presets", may_be_empty=True)
        presets = {name: protocol.presets.get(name, (None, *standard)) for name in names}
    if args.ratios is not None:
        texts = words(args.ratios, "--ratios", may_be_empty=True)
        ratios = (None, *(share(text, "--ratios") for text in texts))
        presets = dict.fromkeys(presets, ratios)
    found = [] if args.no_controls else control_settings(sampling)
    for name, amounts in presets.items():
        found += preset_settings([name], amounts)
    if args.settings is not None:
        found += read_settings(args.settings)
    return unique(found)


def chosen_against(text: str | None, plan: Plan) -> list[str]:
    """The settings to list differences to; of names with commas the longest that fits is meant."""
    names = dict.fromkeys(s.name for settings in plan.settings.values() for s in settings)
    if text is None:
        return [name for name in AGAINST if name in names]
    words(text, "--against", may_be_empty=True)  # not too many
    known = {_parts(name): name for name in names}
    rest = _parts(text)
    found = []
    while rest:
        lengths = range(max(map(len, known)), 0, -1)
        fitting = next((rest[:n] for n in lengths if rest[:n] in known), None)
        if fitting is None:
            raise InputError(f"--against {rest[0]}: the settings are {'; '.join(names)}")
        found.append(known[fitting])
        rest = rest[len(fitting) :]
    return list(dict.fromkeys(found))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def is_of_use(setting: Setting, saved: Work) -> bool:
    """Whether a setting changes anything: it is a control, or the unmerged one, or saves work."""
    has_effect = saved.saved_attention > 0 or saved.saved_whole != 0
    return bool(setting.name == UNMERGED or setting.control or has_effect) or (
        setting.config.context == "trim"
    )
