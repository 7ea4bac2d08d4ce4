"""Draw the same pictures with many settings of Token Merging, and measure what each one costs.

The same noise and the same prompts for all settings; every picture is compared with the unmerged
one. What is finished stays: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import flags, options
from ldm.cli.lists import at_least, numbers, share, words
from ldm.cli.parser import Arguments, Parser
from ldm.cli.program import said_when_stopped
from ldm.config import load_config
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
from ldm.evaluation.appendix_f.protocols import PROTOCOLS, RATIOS, Protocol, quick
from ldm.settings import SAMPLERS, SIZE_STEP, Settings

if TYPE_CHECKING:  # torch comes only after the flags are checked
    from ldm.evaluation.appendix_f.work import Work
    from ldm.modules.diffusionmodules.openaimodel import UNetModel
    from ldm.pipeline import Pipeline

EPILOG = """
examples:
  a first impression, with the demo model:
    python scripts/appendix_f.py --quick
  the experiment on the demo model, at two sizes:
    python scripts/appendix_f.py --sizes 128,256
  what it would draw, with which commands, how long it takes and how much disk:
    python scripts/appendix_f.py --dry-run
  settings of your own, against two presets:
    python scripts/appendix_f.py --settings mine.yaml --presets tomesd,todo --against tomesd
  a checkpoint by the published protocol, on eight GPUs:
    torchrun --nproc-per-node 8 scripts/appendix_f.py --protocol tomesd --ckpt sd-v1-5.safetensors

A file for --settings names each setting and gives its keys, those of configs/tome, for example:
    kv 3/4, 5x5 cells: {preset: balanced, window: 5}
    all tokens of a cell: {method: grid, ratio: 0.75, apply_to: [kv], proportional: true}
    random pairs, 3/4: {control: random, ratio: 0.75}
Controls are: again, rounding, precision, none, random, drop. Settings that merge nothing at a size
are left out there.

Written are OUTDIR/report/index.html, which loads nothing from elsewhere, and beside it plots,
table.csv and table.json (every setting, with 95 % bootstrap intervals over the prompts) and
pictures.csv (every picture's measures). The same command goes on where it was stopped. A measure
that was left out is added later by the same command with its flag: no picture is drawn for it.
"""


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    group = parser.add_argument_group("the experiment")
    add = group.add_argument
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="demo: prompts of held-out scenes (default with the demo model); tomesd: two pictures "
        "for each ImageNet class, 50 steps of PLMS, guidance 7.5, 512x512, the settings of the "
        "published tables, controls for one class in 20 (default otherwise)",
    )
    add("--quick", action="store_true", help="few settings, prompts and steps: some minutes")
    add(
        "--dry-run",
        action="store_true",
        help="say what would be drawn, and how long it takes and how much disk by one trial batch",
    )
    add(
        "--docs",
        nargs="?",
        const=DOCS,
        metavar="YAML",
        help=f"make every table and picture of README and docs that depends on the demo model, as "
        f"listed in a file (default: {DOCS}); with --quick a rehearsal, which leaves them alone",
    )
    add(
        "--statistics",
        action="store_true",
        help="print how alike merged tokens are in each block, beside what is published of Stable "
        "Diffusion",
    )
    add("--table-only", action="store_true", help="draw nothing; make the table of what is there")
    add("--from-file", metavar="FILE", help="prompts of your own, one a line")
    add(
        "--n_prompts",
        type=int,
        metavar="N",
        help="use N prompts (demo: 32; tomesd: 1000, fewer are spread over the classes)",
    )
    add("--n_seeds", type=int, metavar="N", help="pictures of each prompt (demo: 3; tomesd: 2)")
    add("--sizes", metavar="PIXELS,...", help="sides of the pictures (default: the model's)")
    add("--outdir", default="outputs/appendix_f", metavar="DIR", help="default: %(default)s")
    group = parser.add_argument_group("what is compared")
    add = group.add_argument
    add("--presets", metavar="NAME,...", help="of configs/tome, or files of your own")
    add(
        "--ratios",
        metavar="RATIO,...",
        help="also draw each preset at these ratios, where its method can have them",
    )
    add(
        "--settings",
        metavar="FILE",
        help="settings in a YAML file; without presets and ratios by default",
    )
    add("--no-controls", action="store_true", help=f"leave out {', '.join(CONTROLS)}")
    add(
        "--against",
        metavar="NAME,...",
        help="settings whose differences to all others are listed, for the same noise (default: "
        "tomesd and todo, where they are compared)",
    )
    group = parser.add_argument_group("what is measured besides")
    add = group.add_argument
    add(
        "--fid-weights",
        metavar="FILE",
        help="Inception weights of pytorch-fid (pt_inception-2015-12-05-6726825d.pth), for FID",
    )
    add(
        "--fid-reference",
        metavar="PATH",
        help="what FID compares with: a folder of pictures, or an .npz file with mu and sigma "
        "(demo: fresh renders, compared by the features of its own classifier)",
    )
    add("--n_reference", type=int, metavar="N", help="demo: so many renders (default: 2000)")
    add("--lpips-weights", metavar="FILE", help="torchvision's AlexNet weights, for LPIPS")
    add("--clip", metavar="DIR", help="a CLIP model in transformers' form, for CLIP scores")
    add(
        "--speed",
        metavar="MODEL,...",
        help=f"time the settings on {', '.join(SPEED_MODELS)} (default: all; with --quick: own; "
        '"" for none)',
    )
    add("--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    group = parser.add_argument_group("how to draw (defaults come from protocol and model)")
    add = group.add_argument
    add("--ddim_steps", "--steps", type=int, dest="steps", metavar="N", help="sampling steps")
    add("--sampler", choices=SAMPLERS, help="how noise is removed")
    add("--scale", type=float, help="guidance")
    add("--seed", type=int, default=42, help="of the first picture (default: 42)")
    add(
        "--n_samples",
        type=int,
        metavar="N",
        help="pictures at a time (default: as many as fit a GPU's memory; 1 on a processor); more "
        "are faster, and lose more where the run is stopped",
    )
    flags.add_model_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    check(args)
    process = Process.from_environment()
    args.device = process.device(args.device)
    model = options.model_arguments(args)
    options.check_writable(args.outdir)
    if args.docs is not None:
        return docs(args)

    from ldm.checkpoint.load import default_checkpoint, inspect_checkpoint
    from ldm.evaluation.appendix_f.work import unet_outline

    path = model["path"] or default_checkpoint()[0]
    info = inspect_checkpoint(path, model["config"], model["parameterization"], model["ema"])
    is_demo = info.defaults.get("vocabulary") == VOCABULARY
    protocol = PROTOCOLS[args.protocol or ("demo" if is_demo else "tomesd")]
    if args.quick:
        protocol = quick(protocol)
    unet = unet_outline(info.config)
    plan, scenes, work = make_plan(args, protocol, info.defaults, unet, process)
    against = chosen_against(args.against, plan)

    from ldm.evaluation.appendix_f.experiment import Extras, conduct, expected_cost, finish, load

    extras = Extras(
        against=against,
        fid_weights=args.fid_weights,
        fid_reference=args.fid_reference,
        n_rendered=args.n_reference or (200 if args.quick else 2000),
        lpips_weights=args.lpips_weights,
        clip=args.clip,
        speed=speed_models(args),
        rounds=args.rounds,
    )
    pipeline = load({**model, "tome": False})
    plan = filled(plan, args, pipeline)
    if args.statistics:
        return statistics(plan, pipeline)
    if args.dry_run:
        print("\n".join(dry_run(plan, protocol, args)))
        hours, gib = expected_cost(pipeline, plan)
        print(f"By a trial batch: {hours:.3g} hours of drawing here, {gib:.2g} GiB of pictures")
        return
    go_on = f"{args.outdir} keeps what is finished; the same command goes on"
    with process.joined(), said_when_stopped(lambda: go_on):
        experiment = conduct(pipeline, plan, scenes, args.outdir, process, extras, args.table_only)
        finish(experiment, work, extras, command(argv))


def docs(args: Arguments) -> None:
    """Make what README and docs show of the demo model."""
    from ldm.evaluation.docs import make_docs

    spec = load_config(args.docs)
    for name in ("experiments", "tables", "pictures"):
        if not isinstance(spec.get(name), dict):
            raise InputError(f"--docs {args.docs}: {name} must be a mapping")
    for path in make_docs(spec, Path.cwd(), Path(args.outdir), args.quick):
        print(f"Written: {path}")


def statistics(plan: Plan, pipeline: Pipeline) -> None:
    """Print a table of the mean cosine of merged pairs, of the first batch at each size."""
    from ldm.evaluation.appendix_f.similarity import cosine_table, mean_cosines

    for size in plan.sizes:
        settings = replace(plan.sampling, H=size, W=size, prompt=plan.prompts)
        batch = [(prompt, settings.seed + i) for i, prompt in enumerate(plan.prompts[:8])]
        print(f"{size}x{size}, ratio 0.5, {len(batch)} pictures:\n")
        print(cosine_table(mean_cosines(pipeline, settings, batch)), end="\n\n")


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
    speed_models(args)
    if args.sizes is not None:
        numbers(args.sizes, "--sizes", SIZE_STEP)
    if args.from_file is not None:
        options.read_prompts(args.from_file)


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
    if args.from_file is not None:
        prompts = options.read_prompts(args.from_file)[: args.n_prompts]
    else:
        prompts, scenes = protocol.prompts(args.n_prompts or protocol.n_prompts)
    settings = chosen_settings(args, protocol, sampling)
    side, f = protocol.size or defaults["H"], defaults["f"]
    per_size: dict[int, tuple[Setting, ...]] = {}
    work: dict[tuple[int, str], Work] = {}
    for size in numbers(args.sizes or str(side), "--sizes", SIZE_STEP):
        saved = count_work(unet, {s.key: s.config for s in settings}, size // f, size // f)
        work |= {(size, key): one for key, one in saved.items()}
        per_size[size] = tuple(s for s in settings if is_of_use(s, saved[s.key]))
        idle = [s.name for s in settings if s not in per_size[size]]
        if idle and process.is_first:
            print(f"At {size}x{size} these merge nothing and are left out: {', '.join(idle)}")
    n_seeds = args.n_seeds or protocol.n_seeds
    control_share = protocol.control_share if args.from_file is None else 1
    plan = Plan(per_size, tuple(prompts), n_seeds, sampling, control_share)
    return plan, scenes, work


def filled(plan: Plan, args: Arguments, pipeline: Pipeline) -> Plan:
    """The plan with as many pictures at a time as memory has room for, if none are asked for.

    A run that goes on keeps the number that it began with.
    """
    if args.n_samples is not None:
        return plan
    try:
        n_samples = json.loads((Path(args.outdir) / "about.json").read_text())["about"]["n_samples"]
    except (OSError, ValueError, KeyError, TypeError):
        from ldm.evaluation.appendix_f.experiment import pictures_together

        n_samples = pictures_together(pipeline, plan, max(plan.sizes))
    return replace(plan, sampling=replace(plan.sampling, n_samples=int(n_samples)))


def dry_run(plan: Plan, protocol: Protocol, args: Arguments) -> list[str]:
    """What would be drawn, what it takes, and txt2img commands that draw the same."""
    sampling = plan.sampling
    n_all = sum(len(b.pictures) * len(plan.settings_of(b)) for b in plan.batches())
    lines = [
        f"{protocol.title}: {len(plan.prompts)} prompts x {plan.n_seeds} seeds, {sampling.steps} "
        f"steps of {sampling.sampler}, guidance {sampling.scale:g}",
        f"{n_all} pictures, {n_all * (sampling.steps or 0)} calls of the U-Net for a picture and "
        "its guidance",
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


def speed_models(args: Arguments) -> list[str]:
    """Which models' speed is measured."""
    standard = "own" if args.quick else "own,sd1.5,sd2.1"
    found = words(standard if args.speed is None else args.speed, "--speed", may_be_empty=True)
    for name in found:
        if name not in SPEED_MODELS:
            raise InputError(f"--speed {name}: allowed is {', '.join(SPEED_MODELS)}")
    return found


DOCS = "configs/study/docs.yaml"
VOCABULARY = "ldm.demo.scenes.VOCABULARY"  # of a model that draws scenes
SPEED_MODELS = ("own", "sd1.5", "sd2.1")
AGAINST = ("tomesd", "todo")  # what differences are listed to


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
    """The settings to list differences to."""
    names = dict.fromkeys(s.name for settings in plan.settings.values() for s in settings)
    if text is None:
        return [name for name in AGAINST if name in names]
    found = words(text, "--against", may_be_empty=True)
    for name in found:
        if name not in names:
            raise InputError(f"--against {name}: the settings are {', '.join(names)}")
    return found


def is_of_use(setting: Setting, saved: Work) -> bool:
    """Whether a setting changes anything: it is a control, or the unmerged one, or saves work."""
    has_effect = saved.saved_attention > 0 or saved.saved_whole != 0
    return bool(setting.name == UNMERGED or setting.control or has_effect) or (
        setting.config.context == "trim"
    )


def command(argv: Sequence[str] | None) -> str:
    """This command, as it can be typed."""
    arguments: list[Any] = list(sys.argv[1:] if argv is None else argv)
    return shlex.join(["python", "scripts/appendix_f.py", *map(str, arguments)])
