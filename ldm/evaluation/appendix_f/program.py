"""Draw the same pictures with many settings of Token Merging, and measure what each one costs.

The same noise and the same prompts for all settings; every picture is compared with the unmerged
one. What is finished stays: the same command goes on where it was stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import flags, options
from ldm.cli.parser import Arguments, Parser
from ldm.cli.program import said_when_stopped
from ldm.config import load_config
from ldm.distributed import Process
from ldm.errors import InputError
from ldm.evaluation.appendix_f.plan import CONTROLS, Plan
from ldm.evaluation.appendix_f.protocols import PRESETS, PROTOCOLS, RATIOS, quick
from ldm.evaluation.appendix_f.wanted import (
    SPEED_MODELS,
    check,
    chosen_against,
    dry_run,
    filled,
    make_plan,
    speed_models,
)
from ldm.settings import SAMPLERS

if TYPE_CHECKING:  # torch comes only after the flags are checked
    from ldm.pipeline import Pipeline

DOCS = "configs/study/docs.yaml"
VOCABULARY = "ldm.demo.scenes.VOCABULARY"  # of a model that draws scenes

EPILOG = """
examples:
  a first impression, with the demo model:
    python scripts/appendix_f.py --quick
  the experiment on the demo model, at two sizes:
    python scripts/appendix_f.py --sizes 256,512
  what it would draw, with which commands, how long it takes and how much disk:
    python scripts/appendix_f.py --dry-run
  settings of your own, against two presets:
    python scripts/appendix_f.py --settings mine.yaml --presets tomesd,todo --against tomesd
  a checkpoint by the published protocol, on eight GPUs:
    torchrun --nproc-per-node 8 scripts/appendix_f.py --protocol tomesd --ckpt sd-v1-5.safetensors

A file for --settings names each setting and gives its keys, those of configs/tome, for example:
    kv 3/4, 5x5 cells: {preset: quality, window: 5}
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
        help="make the tables and pictures of README and docs that a file lists (default: "
        f"{DOCS}); with --quick a rehearsal, which leaves them alone",
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
    add(
        "--presets",
        metavar="NAME,...",
        help=f"of configs/tome, or files of your own (demo: {', '.join(PRESETS)}; tomesd: "
        "appendix_f, tomesd)",
    )
    add(
        "--ratios",
        metavar="RATIO,...",
        help="also draw each preset at these ratios, where its method can have them (demo: "
        f"{', '.join(map(str, RATIOS[1:]))}; tomesd: those of the published tables)",
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
    names = ("config", "parameterization", "ema", "vae")
    info = inspect_checkpoint(path, **{name: model[name] for name in names})
    is_demo = info.defaults.get("vocabulary") == VOCABULARY
    protocol = PROTOCOLS[args.protocol or ("demo" if is_demo else "tomesd")]
    if args.quick:
        protocol = quick(protocol)
    unet = unet_outline(info.config)
    plan, scenes, work = make_plan(args, protocol, info.defaults, unet, process)
    against = chosen_against(args.against, plan)
    has_features = args.fid_weights is not None or scenes is not None  # the demo's classifier
    if args.fid_reference is not None and not has_features:
        raise InputError("--fid-reference: FID needs --fid-weights, too")

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
    if not has_features and process.is_first:
        print("There is no FID without --fid-weights and --fid-reference; both may be given later")
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


def command(argv: Sequence[str] | None) -> str:
    """This command, as it can be typed."""
    arguments: list[Any] = list(sys.argv[1:] if argv is None else argv)
    return shlex.join(["python", "scripts/appendix_f.py", *map(str, arguments)])
