"""Make the demo model from nothing: renders, classifier, first stage, text encoder, U-Net, check.

Stopped at any moment, the same command goes on where it was; at most three minutes of training
are lost.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.parser import Parser, number
from ldm.cli.program import leaving_at_once, said_when_stopped
from ldm.demo.recipe import Recipe, alone, check_hours, check_output, check_state

EPILOG = """
examples:
  on a machine without a GPU, at low priority:
    python scripts/make_demo.py
  on a GPU, in pieces of ten minutes (until it says that the model is finished):
    python scripts/make_demo.py --minutes-per-call 9
  what there is so far, as a model folder:
    python scripts/make_demo.py --export so_far
"""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(__doc__, EPILOG)
    add = parser.add_argument
    add(
        "--state",
        metavar="DIR",
        default=".demo",
        help="what is kept between calls (default: %(default)s)",
    )
    add(
        "--output",
        metavar="DIR",
        default="models/demo",
        help="the finished model (default: %(default)s)",
    )
    add(
        "--hours",
        type=float,
        help="of training in all, on a CPU of all cores together (default: the recipe's)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add(
        "--minutes-per-call",
        type=number(0.1, 1e6),
        default=math.inf,
        metavar="M",
        help="stop after so many",
    )
    add("--export", metavar="DIR", help="write the model as far as it is, and end")
    add("--recipe", metavar="YAML", default="configs/demo/recipe.yaml", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check, train what is left, finish."""
    args = build_parser().parse_args(argv)
    recipe = Recipe.load(args.recipe)
    if args.hours is not None:
        check_hours(args.hours)
    if args.export:
        check_output(args.export, "--export")
    elif recipe.writes_model:
        check_output(args.output, "--output")
    state = Path(args.state).absolute()
    check_state(state, recipe.disk_gb)
    with leaving_at_once():
        from ldm.demo.finish import choose, export_so_far, finish
        from ldm.demo.stages import run_stages

    device = choose(args.device)
    if args.export:
        export_so_far(recipe, state, device, Path(args.export))
        return
    if device == "cpu":
        os.nice(recipe.nice)
    hours = args.hours or (recipe.hours if device == "cpu" else recipe.hours_cuda)
    go_on = f"the same command goes on from {state}"
    with alone(state) as lock, said_when_stopped(lambda: go_on):
        is_done = run_stages(recipe, state, device, hours, args.minutes_per_call * 60, lock)
        if not is_done:
            print(f"Not finished: {go_on}")
            return
        if recipe.writes_model:
            finish(recipe, state, device, Path(args.output))
        print(f"Finished: {args.output if recipe.writes_model else state / 'weights'}")
