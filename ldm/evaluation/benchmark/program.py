"""Measure what Token Merging gives on this machine: time and memory of one U-Net step.

Models have the shapes of Stable Diffusion 1.5 and 2.1 and random weights, so no checkpoint is
needed. All settings of a table are measured in turn (A B C A B C ...), and medians are shown.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli.flags import DTYPES
from ldm.cli.lists import at_least, choices, numbers, words
from ldm.cli.options import check_device, check_writable
from ldm.cli.parser import Arguments, Parser
from ldm.cli.tome_flags import parse_flag
from ldm.config import load_config, load_preset, model_defaults
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig
from ldm.settings import SIZE_STEP

MODELS = {
    "sd1.5": "configs/stable-diffusion/v1-inference.yaml",
    "sd2.1": "configs/stable-diffusion/v2-inference-v.yaml",
}
BACKENDS = ("sdpa", "einsum")
# What a flag is where it is not given.
STANDARD = {
    "models": "sd1.5,sd2.1",
    "sizes": "auto",
    "dtypes": "auto",
    "attention": "sdpa",
    "batch": "2",
    "presets": "quality,balanced,fast,tomesd,todo",
    "ratios": "0.5,0.75",
    "rounds": 5,
}
QUICK = {
    **STANDARD,
    "models": "sd1.5",
    "sizes": "512",
    "presets": "fast,tomesd",
    "ratios": "",
    "rounds": 3,
}
# What `--suite gpu` measures, one after the other: by estimate, some ten minutes a model.
_CARD = {**STANDARD, "dtypes": "float16", "presets": "fast", "rounds": 3, "no_oracles": True}
_ONE = {**_CARD, "models": "sd1.5", "sizes": "512,1024", "ratios": "", "no_peers": True}
GPU_SUITE = [
    {**_CARD, "sizes": "512,768,1024,2048", "batch": "2,8", "ratios": "0.5,auto", "graphs": True},
    {**_ONE, "compile": True},
    {**_ONE, "presets": "fast,quality", "graphs": True, "kernels": True},
]
CPU_SIZES = "512"
GPU_SIZES = "512,768,1024,2048"
MOST_PIXELS, MOST_ROWS, MOST_ROUNDS = 8192, 1024, 1000
# Flags that mean nothing to --count.
ONLY_MEASURED = (
    *("suite", "sizes", "dtypes", "attention", "batch", "rounds", "no_oracles", "compile"),
    *("graphs", "kernels", "no_peers", "upstream"),
)

logger = logging.getLogger(__name__)

EPILOG = """
examples:
  a few settings at one size:
    python scripts/benchmark.py --quick
  every setting at one size, in two precisions:
    python scripts/benchmark.py --models sd1.5 --sizes 1024 --dtypes float32,bfloat16
  against upstream's own way to compute, einsum attention in float32:
    python scripts/benchmark.py --models sd1.5 --sizes 512 --presets fast --upstream

The oracle of a setting is the same U-Net on as many tokens, with matching, merging and unmerging
left out: what a perfect implementation would reach. With `pip install -e ".[bench]"` diffusers
is measured as well, with and without tomesd, and a plot is drawn.
"""


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few settings at 512x512, for a first impression")
    add(
        "--suite",
        choices=("gpu",),
        help="what is to be known of a card: sizes, batches, graphs, compiled blocks, peers, in "
        "float16 (on a processor, where graphs are left out, a rehearsal)",
    )
    add(
        "--models",
        metavar="NAME,...",
        help=f"{', '.join(MODELS)}, or the .yaml of a model (default: {STANDARD['models']})",
    )
    add(
        "--sizes",
        metavar="PIXELS,...",
        help=f"sides of the pictures (default: {CPU_SIZES} on the cpu, else {GPU_SIZES})",
    )
    add(
        "--dtypes",
        metavar="TYPE,...",
        help=f"{', '.join(DTYPES)} (default: auto, the type that pictures are drawn in)",
    )
    add("--attention", metavar="NAME,...", help=f"{', '.join(BACKENDS)} (default: sdpa)")
    add("--batch", metavar="N,...", help="rows in a step; guidance takes 2 (default: 2)")
    add(
        "--presets",
        metavar="NAME,...",
        help=f"of configs/tome, or files of your own (default: {STANDARD['presets']})",
    )
    add(
        "--ratios",
        metavar="RATIO,...",
        help=f"settings of plain --tome-ratio; auto is one, too (default: {STANDARD['ratios']})",
    )
    add(
        "--count",
        action="store_true",
        help="measure no time: count the operators of a block and of a step, on any machine, at "
        "512 and 1024 pixels in float16",
    )
    add("--rounds", type=int, metavar="N", help="measurements of each (default: 5)")
    add("--device", default="auto", help="auto (default), cpu, mps, cuda or cuda:1")
    add("--no-oracles", action="store_true", help="leave the oracles out")
    add("--compile", action="store_true", help="measure everything with compiled blocks, too")
    add("--graphs", action="store_true", help="measure everything as CUDA graphs, too")
    add("--kernels", action="store_true", help="measure windows with the Triton kernels, too")
    add("--no-peers", action="store_true", help="leave diffusers and tomesd out")
    add(
        "--upstream",
        action="store_true",
        help="compare with upstream's own way to compute: einsum attention in float32, nothing "
        "tuned, and what attention, layout and type gain on the way to ours; its weights then "
        "count in the memory of every row",
    )
    add("--outdir", default="outputs/benchmark", metavar="DIR", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    if args.suite and args.quick:
        raise InputError("--suite and --quick both say what is measured: leave one out")
    idle = [f"--{name.replace('_', '-')}" for name in ONLY_MEASURED if getattr(args, name)]
    if args.count and idle:
        raise InputError(
            "--count measures no time, and counts at 512 and 1024 pixels in float16: leave out "
            f"{', '.join(idle)}"
        )
    command = shlex.join(
        ["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)]
    )
    for defaults in GPU_SUITE if args.suite else [QUICK if args.quick else STANDARD]:
        given = {
            k: value for k, value in vars(args).items() if not (value is None or value is False)
        }
        _run(Arguments(**{**vars(args), **defaults, **given}), command)


def _run(args: Arguments, command: str) -> None:
    """Measure, or count, what the arguments say."""
    at_least(1, args, "rounds", most=MOST_ROUNDS)
    check_device(args.device)
    models: dict[str, dict[str, Any]] = {}
    for name in words(args.models, "--models"):
        title, config = read_model(name)
        if title in models:
            raise InputError(f"--models {name}: another model is called {title}, too; rename it")
        models[title] = config
    sizes = (
        numbers(args.sizes, "--sizes", SIZE_STEP, most=MOST_PIXELS)
        if args.sizes != "auto"
        else None
    )
    batches = numbers(args.batch, "--batch", most=MOST_ROWS)
    dtypes = choices(args.dtypes, "--dtypes", DTYPES)
    backends = choices(args.attention, "--attention", BACKENDS)
    settings = read_settings(args.ratios, args.presets)

    if args.count:
        from ldm.evaluation.benchmark.counts import table

        for name, config in models.items():
            print(f"Operators dispatched with {name} in float16, views not counted:\n")
            print(table(config, settings))
        return

    from ldm.device import choose_device, choose_dtype  # takes torch

    device = choose_device(args.device)
    if sizes is None:
        sizes = numbers(CPU_SIZES if device.type == "cpu" else GPU_SIZES, "--sizes")
    types = {str(choose_dtype(name, device)).removeprefix("torch."): None for name in dtypes}
    check_writable(args.outdir)

    from ldm.evaluation.benchmark.suite import Scope, measure

    if args.kernels and device.type != "cuda":
        logger.warning("--kernels: the Triton kernels are for CUDA; their rows are left out")
    scope = Scope(
        models=models,
        sizes=sizes,
        dtypes=list(types),
        backends=backends,
        batches=batches,
        settings=settings,
        rounds=args.rounds,
        has_oracles=not args.no_oracles,
        has_compiled=args.compile,
        has_graphs=args.graphs and device.type == "cuda",
        has_kernels=args.kernels and device.type == "cuda",
        has_peers=not args.no_peers,
        has_upstream=args.upstream,
    )
    measure(scope, device, Path(args.outdir), command)


def read_model(name: str) -> tuple[str, dict[str, Any]]:
    """What a model is called in the table, and its configuration, by its name or file."""
    if name not in MODELS and not name.endswith((".yaml", ".yml")):
        raise InputError(f"--models {name}: allowed is {', '.join(MODELS)}, or a .yaml file")
    config = load_config(MODELS.get(name, name))
    model_defaults(config)  # complains where it is no latent-diffusion model
    return (name if name in MODELS else Path(name).stem), config


def read_settings(ratios: str, presets: str) -> dict[str, ToMeConfig]:
    """The checked settings, by the names that the table shows."""
    found = {}
    for text in words(ratios, "--ratios", may_be_empty=True):
        found[f"ratio {text}"] = ToMeConfig.from_mapping({"ratio": parse_flag("ratio", text)})
    for name in words(presets, "--presets", may_be_empty=True):
        found[name] = ToMeConfig.from_mapping(load_preset(name))
    for name, config in found.items():
        if config.is_off:
            raise InputError(f"{name} merges nothing, so there is nothing to measure")
    return found
