"""Paint a part of a picture anew.

Checkpoints made for inpainting (9 input channels) are shown the mask and what surrounds it; with
any other, the surroundings are blended in at each step. Outside of the mask no pixel changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.cli import drawing, flags, options
from ldm.cli.jobs import Job
from ldm.cli.parser import Arguments, Parser
from ldm.cli.program import leaving_at_once, said_when_stopped
from ldm.cli.tome_flags import add_tome_flags
from ldm.errors import InputError, escaped
from ldm.images import Mask, Pixels, load_mask, load_rgb

EPILOG = """
examples:
  replace what is white in a mask:
    python scripts/inpaint.py --init-img photo.png --mask mask.png --prompt "a sailboat"
  every pair x.png, x_mask.png of a folder; results have the names of the pictures:
    python scripts/inpaint.py --indir pairs --outdir results --prompt "pine trees"

A mask is white on black, strokes on a transparent layer, or a picture with a hole erased in it.
"""


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    group = flags.add_prompt_flags(parser, has_file=False, usual="none")
    parser.set_defaults(prompt="")
    group.add_argument("--init-img", metavar="FILE", help="the picture")
    group.add_argument(
        "--mask",
        metavar="FILE",
        help="where to paint: a picture of the same size, white (or strokes on a transparent "
        "layer) where to paint",
    )
    group.add_argument("--indir", metavar="DIR", help="instead: a folder of x.png and x_mask.png")
    flags.add_picture_flag(group)
    flags.add_sampling_flags(parser)
    add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/inpaint-samples")
    flags.add_insight_flags(parser)
    return parser


def pairs(args: Arguments) -> list[tuple[Path, Path]]:
    """Pictures and their masks."""
    if args.indir is None:
        if args.init_img is None or args.mask is None:
            raise InputError("give --init-img and --mask, or --indir")
        return [(Path(args.init_img), Path(args.mask))]
    if args.init_img is not None or args.mask is not None or args.profile or args.skip_save:
        raise InputError(
            "--indir goes without --init-img and --mask, and without --profile and --skip_save"
        )
    if args.n_samples > 1 or args.n_iter > 1:
        raise InputError("--indir makes one picture of each pair: leave --n_samples and --n_iter 1")
    folder = Path(args.indir)
    if folder.resolve() == Path(args.outdir).resolve():
        raise InputError("--outdir is --indir: the results would replace the pictures")
    masks = sorted(folder.glob("*_mask.png"))
    if not masks:
        raise InputError(f"--indir {folder}: there is no x_mask.png in it")
    return [(mask.with_name(mask.name.removesuffix("_mask.png") + ".png"), mask) for mask in masks]


def load(init: Path, mask: Path, tell: bool = False) -> tuple[Pixels, Mask]:
    """A picture and its mask, of one size; log how much is painted, if it is to be told."""
    pixels, hole = load_rgb(init), load_mask(mask, tell)
    if pixels.shape[:2] != hole.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (hole.shape, pixels.shape)]
        raise InputError(f"{mask} is {sizes[0]}, but {init} is {sizes[1]}: make them one size")
    return pixels, hole


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = options.parse(build_parser(), argv)
    settings = options.settings(args)
    model = options.model_arguments(args)
    gallery = options.gallery(args)
    jobs = pairs(args)
    for job in jobs:
        load(*job, tell=True)

    with leaving_at_once():
        from ldm.pipeline import Pipeline

    drawing.tell_more(args)
    pipeline = Pipeline.from_checkpoint(**model, prompts=settings.prompts)
    if args.indir is None:
        ((init, mask),) = jobs
        canvas = drawing.Canvas(pipeline, gallery, args)
        todo, notes = [Job(settings, model["tome"])], _notes(init, mask)
        with canvas.pictures(todo, *load(init, mask), notes=notes) as pictures:
            for picture in pictures:
                canvas.save(picture)
        return
    progress = drawing.Progress(len(jobs))

    def finished() -> str:
        left = progress.n_pictures - progress.n_done
        return (
            f"{progress.n_done} of {progress.n_pictures} pictures are in {args.outdir}; move their "
            f"pairs out of {args.indir}, and the same command draws the other {left}"
        )

    with said_when_stopped(finished):
        for init, mask in jobs:
            for picture in pipeline.generate(
                settings,
                *load(init, mask),
                progress=progress.shows_steps,
                notes=_notes(init, mask),
            ):
                picture.save(Path(args.outdir) / init.name, not args.no_metadata)
                progress.step()
    print(f"Pictures are in {args.outdir}")


def _notes(init: Path, mask: Path) -> dict[str, str]:
    return {"init_img": escaped(init, 1000), "mask": escaped(mask, 1000)}
