"""Paint a part of a picture anew.

Checkpoints made for inpainting (9 input channels) are shown the mask and what surrounds it; with
any other, the surroundings are blended in at each step. Outside of the mask no pixel changes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import flags
from ldm.errors import InputError
from ldm.images import Mask, Pixels, load_mask, load_rgb

EPILOG = """
examples:
  replace what is white in a mask:
    python scripts/inpaint.py --init-img photo.png --mask mask.png --prompt "a sailboat"
  every pair x.png, x_mask.png of a folder; results have the names of the pictures:
    python scripts/inpaint.py --indir pairs --outdir results --prompt "pine trees"
"""


def build_parser() -> flags.Parser:
    """All flags."""
    parser = flags.Parser(__doc__, EPILOG)
    group = flags.add_prompt_flags(parser, has_file=False)
    parser.set_defaults(prompt="")
    group.add_argument("--init-img", metavar="FILE", help="the picture")
    group.add_argument(
        "--mask", metavar="FILE", help="a picture of its shape, white where to paint"
    )
    group.add_argument("--indir", metavar="DIR", help="instead: a folder of x.png and x_mask.png")
    flags.add_sampling_flags(parser)
    flags.add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/inpaint-samples")
    return parser


def pairs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Pictures and their masks."""
    if args.indir is None:
        if args.init_img is None or args.mask is None:
            raise InputError("give --init-img and --mask, or --indir")
        return [(Path(args.init_img), Path(args.mask))]
    if args.init_img is not None or args.mask is not None:
        raise InputError("--indir goes without --init-img and --mask")
    if args.n_samples > 1 or args.n_iter > 1:
        raise InputError("--indir makes one picture of each pair: leave --n_samples and --n_iter 1")
    folder = Path(args.indir)
    if folder.resolve() == Path(args.outdir).resolve():
        raise InputError("--outdir is --indir: the results would replace the pictures")
    masks = sorted(folder.glob("*_mask.png"))
    if not masks:
        raise InputError(f"--indir {folder}: there is no x_mask.png in it")
    return [(mask.with_name(mask.name.removesuffix("_mask.png") + ".png"), mask) for mask in masks]


def load(init: Path, mask: Path) -> tuple[Pixels, Mask]:
    """A picture and its mask, of one size."""
    pixels, hole = load_rgb(init), load_mask(mask)
    if pixels.shape[:2] != hole.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (hole.shape, pixels.shape)]
        raise InputError(f"{mask} is {sizes[0]}, but {init} is {sizes[1]}: make them one size")
    return pixels, hole


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    settings = flags.settings(args)
    model = flags.model_arguments(args)
    gallery = flags.gallery(args)
    jobs = pairs(args)
    for job in jobs:
        load(*job)

    from ldm.pipeline import Pipeline

    pipeline = Pipeline.from_checkpoint(**model)
    for init, mask in jobs:
        notes = {"init_img": str(init), "mask": str(mask)}
        for picture in pipeline.generate(settings, *load(init, mask), progress=True, notes=notes):
            if args.indir is None:
                gallery.add(picture)
            else:
                picture.save(Path(args.outdir) / init.name, not args.no_metadata)
    gallery.close()
    print(f"Pictures are in {args.outdir}")


if __name__ == "__main__":
    flags.run(main)
