"""Measure whether the demo model learned its scenes, and whether its attention matters.

Writes a JSON report and a grid of pictures of held-out prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.options import check_writable
from ldm.cli.parser import Parser, number, whole
from ldm.cli.program import leaving_at_once
from ldm.demo.scenes import ATTRIBUTES
from ldm.errors import InputError
from ldm.util import written_whole

EPILOG = """
examples:
  the shipped model, in some twenty minutes on two cores:
    python scripts/check_demo.py
  a quick look:
    python scripts/check_demo.py --n_prompts 24 --n_controls 8 --steps 15
  scenes with stars, which are rare:
    python scripts/check_demo.py --only sky=stars --n_prompts 24 --n_controls 0
"""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(__doc__, EPILOG)
    add = parser.add_argument
    add("--ckpt", metavar="PATH", help="a model trained on the scenes (default: the shipped demo)")
    add("--outdir", default="outputs/check_demo", metavar="DIR", help="default: %(default)s")
    add(
        "--n_prompts",
        type=whole(1, 100_000),
        default=200,
        help="held-out prompts (default: %(default)s)",
    )
    add("--only", metavar="NAME=VALUE", help="scenes with this attribute, such as sky=stars")
    add(
        "--n_controls",
        type=whole(0, 100_000),
        default=32,
        help="prompts for the controls; 0: none (default: %(default)s)",
    )
    add(
        "--n_frechet",
        type=whole(0, 100_000),
        default=0,
        help="pictures for the Fréchet distance, such as 2000; 0: none (default: %(default)s)",
    )
    add("--pixels", type=whole(64, 4096), help="a side (default: the model's own size)")
    add(
        "--rows",
        type=whole(0, 100),
        default=0,
        metavar="N",
        help="also draw renders, reconstructions and samples of N captions in three rows",
    )
    add(
        "--config", metavar="YAML", help="the model's configuration (default: found by its weights)"
    )
    add("--classifier", metavar="PATH", help="the judge's weights (default: the shipped ones)")
    add("--steps", type=whole(1, 1000), default=25, help="of DDIM (default: %(default)s)")
    add("--scale", type=number(-1000, 1000), default=2.0, help="of guidance (default: %(default)s)")
    add(
        "--cache_dir",
        metavar="PATH",
        help="where renders and samples are kept, so that the next check or one that was stopped "
        "need not make them again; whoever changes how the model draws deletes samples-*.npy there "
        "(default: OUTDIR)",
    )
    return parser


def read_attribute(text: str) -> tuple[str, str]:
    """An attribute of the scenes and one of its values."""
    name, _, value = text.partition("=")
    if name not in ATTRIBUTES:
        raise InputError(f"--only {text}: allowed is NAME=VALUE with {', '.join(ATTRIBUTES)}")
    if value not in ATTRIBUTES[name]:
        raise InputError(f"--only {text}: {name} can be {', '.join(ATTRIBUTES[name])}")
    return name, value


def main(argv: Sequence[str] | None = None) -> None:
    """Check, print, write."""
    args = build_parser().parse_args(argv)
    only = read_attribute(args.only) if args.only else None
    check_writable(args.outdir)
    if args.cache_dir:
        check_writable(args.cache_dir, "--cache_dir")

    with leaving_at_once():
        from ldm.checkpoint.load import load_model
        from ldm.config import shipped
        from ldm.demo.check import check, rows
        from ldm.demo.classifier import load_classifier
        from ldm.device import choose_device, choose_dtype
        from ldm.images import make_grid, save_image, to_pixels

    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    path = args.ckpt or shipped("models/demo")
    model = load_model(path, args.config, dtype=dtype, device=device)
    model.first_stage_model.float()
    f = model.first_stage_model.f
    pixels = args.pixels or model.image_size * f
    if pixels % f:
        raise InputError(f"--pixels {pixels}: give a multiple of {f}")
    report, pictures = check(
        model,
        load_classifier(args.classifier),
        args.n_prompts,
        args.steps,
        args.scale,
        pixels // f,
        n_controls=args.n_controls,
        only=only,
        cache_dir=args.cache_dir or args.outdir,
        n_frechet=args.n_frechet,
    )
    outdir = Path(args.outdir)
    save_image(make_grid(to_pixels(pictures[:48]), n_columns=8), outdir / "held_out.png")
    if args.rows:
        drawn = rows(model, pixels, args.rows, args.steps, args.scale)
        save_image(make_grid(to_pixels(drawn), n_columns=args.rows), outdir / "rows.png")
    with written_whole(outdir / "report.json", "w") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    print(f"Written to {outdir}")
