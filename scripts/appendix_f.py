"""Draw the same pictures with many settings of Token Merging, and measure what each one costs.

The same noise and the same prompts for all settings; every picture is compared with the unmerged
one. What is finished stays: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import options
from ldm.distributed import Process
from ldm.errors import InputError
from ldm.evaluation.plan import (
    CONTROLS,
    Plan,
    Setting,
    control_setting,
    preset_settings,
    read_settings,
    unique,
)
from ldm.evaluation.protocols import PROTOCOLS, Protocol, quick
from ldm.settings import SAMPLERS, SIZE_STEP, Settings

EPILOG = """
examples:
  a first impression, with the demo model:
    python scripts/appendix_f.py --quick
  the experiment on the demo model, at two sizes:
    python scripts/appendix_f.py --sizes 128,256
  what it would draw, and with which commands:
    python scripts/appendix_f.py --dry-run
  settings of your own, against two presets:
    python scripts/appendix_f.py --settings mine.yaml --presets tomesd,todo --against tomesd
  a checkpoint by the published protocol, on eight GPUs:
    torchrun --nproc-per-node 8 scripts/appendix_f.py --protocol tomesd --ckpt sd-v1-5.safetensors

A file for --settings names each setting and gives its keys, those of configs/tome, for example:
    kv 3/4, 5x5 cells: {preset: balanced, window: 5}
    all tokens of a cell: {method: grid, ratio: 0.75, apply_to: [kv], proportional: true}
    random pairs, 3/4: {control: random, ratio: 0.75}
Controls are: again, rounding, none, random, drop. Settings that merge nothing at a size are left
out there.

Written are OUTDIR/table.csv and table.json (every setting, with 95 % bootstrap intervals over the
prompts), pictures.csv (every picture's measures) and the pictures.
"""


def build_parser() -> options.Parser:
    """All flags."""
    parser = options.Parser(__doc__, EPILOG)
    group = parser.add_argument_group("the experiment")
    add = group.add_argument
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="demo: prompts of held-out scenes (default with the demo model); tomesd: two pictures "
        "for each ImageNet class, 50 steps of PLMS, guidance 7.5, 512x512 (default otherwise)",
    )
    add("--quick", action="store_true", help="few settings, prompts and steps: some minutes")
    add("--dry-run", action="store_true", help="say what would be drawn, and draw nothing")
    add("--table-only", action="store_true", help="draw nothing; make the table of what is there")
    add("--from-file", metavar="FILE", help="prompts of your own, one a line")
    add("--n_prompts", type=int, metavar="N", help="use the first N prompts (demo: 32)")
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
        default="",
        metavar="NAME,...",
        help="settings whose differences to all others are listed, for the same noise",
    )
    group = parser.add_argument_group("how to draw (defaults come from protocol and model)")
    add = group.add_argument
    add("--ddim_steps", "--steps", type=int, dest="steps", metavar="N", help="sampling steps")
    add("--sampler", choices=SAMPLERS, help="how noise is removed")
    add("--scale", type=float, help="guidance")
    add("--seed", type=int, default=42, help="of the first picture (default: 42)")
    add(
        "--n_samples",
        type=int,
        default=1,
        metavar="N",
        help="pictures at a time (default: 1); more are faster, and lose more where the run is "
        "stopped",
    )
    options.add_model_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    process = Process.from_environment()
    args.device = process.device(args.device)
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: allowed is 0 or more, so that a run can be resumed")
    asked = {name: getattr(args, name) for name in ("steps", "sampler", "scale")}
    sampling = Settings(seed=args.seed, n_samples=args.n_samples, **asked)
    for name in ("n_prompts", "n_seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: allowed is at least 1")
    given = options.read_prompts(args.from_file) if args.from_file else None
    model = options.model_arguments(args)
    options.check_writable(args.outdir)

    from ldm.checkpoint import default_checkpoint, inspect_checkpoint
    from ldm.evaluation.work import saved_work, unet_outline

    path = model["path"] or default_checkpoint()[0]
    info = inspect_checkpoint(path, model["config"], model["parameterization"], model["ema"])
    is_demo = info.defaults.get("vocabulary") == VOCABULARY
    protocol = PROTOCOLS[args.protocol or ("demo" if is_demo else "tomesd")]
    if args.quick:
        protocol = quick(protocol)
    settings = chosen_settings(args, protocol)
    asked = {name: getattr(protocol, name) for name in asked}
    sampling = sampling.filled({k: v for k, v in asked.items() if v is not None})
    sampling = sampling.filled(info.defaults)
    n_seeds = args.n_seeds or protocol.n_seeds
    scenes = None
    if given is not None:
        prompts = given[: args.n_prompts]
    else:
        texts, scenes = protocol.prompts(args.n_prompts or protocol.n_prompts)
        prompts = tuple(texts)
    default_size = protocol.size or info.defaults["H"]
    f = info.defaults["f"]
    unet = unet_outline(info.config)
    per_size = {}
    for size in options.numbers(args.sizes or str(default_size), "--sizes", SIZE_STEP):
        shares = {s.key: saved_work(unet, s.config, size // f, size // f) for s in settings}
        per_size[size] = tuple(s for s in settings if is_of_use(s, shares[s.key]))
        idle = [s.name for s in settings if s not in per_size[size]]
        if idle and process.is_first:
            print(f"At {size}x{size} these merge nothing and are left out: {', '.join(idle)}")
    plan = Plan(per_size, prompts, n_seeds, sampling)
    names = {s.name for group in per_size.values() for s in group}
    against = options.words(args.against, "--against", may_be_empty=True)
    for name in against:
        if name not in names:
            raise InputError(f"--against {name}: the settings are {', '.join(sorted(names))}")

    import torch

    from ldm.evaluation.attributes import load_classifier
    from ldm.evaluation.files import write_text
    from ldm.evaluation.measures import ClassifierFeatures, Judge
    from ldm.evaluation.store import Store
    from ldm.evaluation.summary import (
        picture_rows,
        read,
        summarize,
        table_csv,
        table_json,
        to_csv,
    )
    from ldm.evaluation.sweep import Sweep
    from ldm.pipeline import Pipeline

    with process.joined():
        pipeline = Pipeline.from_checkpoint(**{**model, "tome": False})
        pipeline.model.first_stage_model.float()  # its rounding would hide small differences
        about = {
            **{k: v for k, v in pipeline.about(sampling, "", 0).items() if k not in OF_PICTURE},
            "n_seeds": n_seeds,
        }
        if about["device"] == "cpu":
            about["threads"] = torch.get_num_threads()
        store = Store(args.outdir)
        if process.is_first:
            store.claim(about, prompts)
            store.remove_leftovers()
        process.wait()
        classifier = load_classifier() if scenes is not None else None
        judge = Judge(classifier, ClassifierFeatures(classifier) if classifier else None)
        if not args.table_only:
            Sweep(pipeline, plan, store, judge, scenes, process).run()
        process.wait()
        results = read(plan, store, process, 0)
        if not process.is_first:
            return
        entries = summarize(plan, results, unet, f, {}, against)
        outdir = Path(args.outdir)
        write_text(outdir / "table.csv", table_csv(entries))
        document = {"about": about, "command": command(argv), "table": table_json(entries)}
        write_text(outdir / "table.json", json.dumps(document, indent=1) + "\n")
        write_text(outdir / "pictures.csv", to_csv(list(picture_rows(plan, store))))
        print(f"The table is {outdir / 'table.csv'}")


VOCABULARY = "ldm.data.scenes.VOCABULARY"  # of a model that draws scenes
# What differs from picture to picture.
OF_PICTURE = {"prompt", "seed", "n_iter", "H", "W", "strength", "tome", "fixed_code", "rng"}


def chosen_settings(args: argparse.Namespace, protocol: Protocol) -> tuple[Setting, ...]:
    """All settings that the flags name, the unmerged one first."""
    presets, ratios = list(protocol.presets), list(protocol.ratios)
    if args.settings is not None:
        presets, ratios = [], []
    if args.presets is not None:
        presets = options.words(args.presets, "--presets", may_be_empty=True)
    if args.ratios is not None:
        ratios = [
            options.share(word, "--ratios")
            for word in options.words(args.ratios, "--ratios", may_be_empty=True)
        ]
    found = [] if args.no_controls else [control_setting(name) for name in CONTROLS]
    found += preset_settings(presets, ratios)
    if args.settings is not None:
        found += read_settings(args.settings)
    return unique(found)


def is_of_use(setting: Setting, saved: float) -> bool:
    """Whether a setting changes anything: it is a control, or the unmerged one, or saves work."""
    is_reference = setting.key == Setting("").key
    return bool(is_reference or setting.control or saved > 0 or setting.config.context == "trim")


def command(argv: Sequence[str] | None) -> str:
    """This command, as it can be typed."""
    arguments: list[Any] = list(sys.argv[1:] if argv is None else argv)
    return shlex.join(["python", "scripts/appendix_f.py", *map(str, arguments)])


if __name__ == "__main__":
    options.run(main)
