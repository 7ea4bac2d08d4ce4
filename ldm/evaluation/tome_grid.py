"""Draw a picture with several ways of merging tokens, side by side.

Below each stand the time that it took and how far it is from the picture without merging.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import flags, options
from ldm.cli.lists import words
from ldm.cli.parser import Arguments, Parser
from ldm.cli.program import said_when_stopped
from ldm.cli.tome_flags import add_tome_flags
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeWish

if TYPE_CHECKING:  # torch comes only after the flags are checked
    from ldm.images import Picture, Pixels
    from ldm.pipeline import Pipeline
    from ldm.settings import Settings

RATIOS = "0.25,0.5,0.75"
MOST_PICTURES = 1000  # all of them are in memory
CELL_SIDE = 256  # pixels that the longer side of a shown picture has at least

EPILOG = """
examples:
  how much can be merged, in the form that plain --tome-ratio takes:
    python scripts/tome_grid.py --prompt "a red house at noon" --ratios 0.25,0.5,0.75
  the same of keys and values only, and published ways of merging:
    python scripts/tome_grid.py --ratios 0.5,0.75 --tome-apply-to kv
    python scripts/tome_grid.py --presets tomesd,todo,balanced --n_samples 3

The first column is the picture without merging. Further pictures (--n_samples, --from-file) take a
row each. Times are those of the whole run by the number of its pictures, after a warm-up of one
step. Written are OUTDIR/grid-0000.png and grid-0000.json, and with txt2img's numbering every
picture of its own in OUTDIR/samples.
"""


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    flags.add_prompt_flags(parser)
    group = parser.add_argument_group(
        "what to compare", "Other Token Merging flags hold for all; they win over the presets."
    )
    group.add_argument(
        "--ratios",
        metavar="R,R",
        help=f"values of --tome-ratio (default, without --presets: {RATIOS})",
    )
    group.add_argument("--presets", metavar="NAME,NAME", help="values of --tome-preset")
    flags.add_sampling_flags(parser)
    add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/tome-grid")
    return parser


def columns(args: Arguments) -> dict[str, ToMeWish]:
    """Name and Token Merging settings of each column but the first.

    Raises:
        InputError: a ratio or preset cannot be used, or is there twice by another flag.
    """
    if args.no_tome:
        raise InputError("--no-tome: there would be nothing to compare")
    for given, flag, single in (
        (args.ratios, "--ratios", args.tome_ratio),
        (args.presets, "--presets", args.tome_preset),
    ):
        if given is not None and single is not None:
            raise InputError(f"{flag} {given}: leave out --tome-{flag[2:-1]}, which says the same")
    ratios = RATIOS if args.ratios is None and args.presets is None else args.ratios
    found: dict[str, ToMeWish] = {}
    for text, name in ((ratios, "tome_ratio"), (args.presets, "tome_preset")):
        for value in words(text or "", f"--{name[5:]}s", may_be_empty=True):
            tome = options.wishes(Arguments(**{**vars(args), name: value})).tome
            if tome.keys.get("ratio") != 0:  # the picture without merging is there anyhow
                title = f"ratio {value}" if name == "tome_ratio" else Path(value).stem
                if title in found:
                    raise InputError(f"--presets {value}: another one is called {title}, too")
                found[title] = tome
    if not found:
        raise InputError(f"--ratios {args.ratios}: there would be nothing to compare")
    return found


def draw(pipeline: Pipeline, settings: Settings) -> tuple[list[Picture], float]:
    """All pictures of a run, and the seconds that one of them took."""
    start = time.perf_counter()
    pictures = list(pipeline.generate(settings, progress=True))
    return pictures, (time.perf_counter() - start) / len(pictures)


def compare(pictures: Sequence[Picture], reference: Sequence[Picture]) -> list[dict[str, float]]:
    """Distance of each picture from the one without merging: PSNR in dB, and SSIM."""
    import numpy as np
    import torch

    from ldm.evaluation.appendix_f.distances import psnr, ssim
    from ldm.images import to_unit

    these, those = (
        torch.from_numpy(to_unit(np.stack([one.pixels for one in group])))
        for group in (pictures, reference)
    )
    pairs = zip(psnr(these, those).tolist(), ssim(these, those).tolist(), strict=True)
    return [{"psnr_db": round(a, 3), "ssim": round(b, 5)} for a, b in pairs]


def cell(picture: Picture, column: dict[str, Any], i: int) -> Pixels:
    """The i-th picture of a column, large enough to be seen, with its label."""
    from ldm.images import fit, label

    height, width = picture.pixels.shape[:2]
    zoom = -(-CELL_SIDE // max(height, width))
    lines = [column["name"], f"{column['seconds_per_picture']:.2f} s", ""]
    if column["pictures"]:
        away = column["pictures"][i]
        lines[2] = f"PSNR {away['psnr_db']:.1f} dB, SSIM {away['ssim']:.3f}"
        if away["psnr_db"] == 100:
            lines[2] = "the same picture"
    return label(fit(picture.pixels, zoom * height, zoom * width), lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    settings = options.settings(args)
    ways = columns(args)
    if settings.n_pictures * (len(ways) + 1) > MOST_PICTURES:
        raise InputError(
            f"--n_samples {args.n_samples}, --n_iter {args.n_iter}: with {len(ways) + 1} columns "
            f"there would be more than {MOST_PICTURES} pictures, which is the limit for a grid"
        )
    model = options.model_arguments(args)
    gallery = dataclasses.replace(options.gallery(args), has_grid=False)

    from ldm.images import Picture, make_grid
    from ldm.numbered import Numbers
    from ldm.pipeline import Pipeline

    pipeline = Pipeline.from_checkpoint(**model)
    # what cannot be used is said before anything is drawn
    everything = {"no merging": pipeline.tome_config(False)}
    everything |= {name: pipeline.tome_config(way) for name, way in ways.items()}
    merger = pipeline.model.model.diffusion_model.tome
    report: list[dict[str, Any]] = []
    runs: list[list[Picture]] = []

    def finished() -> str:
        done = f"the pictures of {len(runs)} of {len(everything)} columns are in {args.outdir}"
        return f"{done}; the same command draws all of them again"

    with said_when_stopped(finished):
        for name, way in everything.items():
            pipeline.set_tome(way)
            if not runs:
                draw(pipeline, dataclasses.replace(settings, steps=1, n_iter=1))
            pictures, seconds = draw(pipeline, settings)
            column = {
                "name": name,
                "seconds_per_picture": round(seconds, 3),
                "pictures": compare(pictures, runs[0]) if runs else [],
                "report": merger.report(),
                "tome": dataclasses.asdict(merger.config),
            }
            for picture in pictures:
                gallery.add(picture)
            runs.append(pictures)
            report.append(column)

    cells = [
        cell(picture, column, i)
        for i, row in enumerate(zip(*runs, strict=True))
        for picture, column in zip(row, report, strict=True)
    ]
    made = {key: value for key, value in runs[0][0].settings.items() if key != "tome"}
    prompts = [{"prompt": one.settings["prompt"], "seed": one.settings["seed"]} for one in runs[0]]
    about = {"settings": made, "pictures": prompts, "columns": report}
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    grids = Numbers(gallery.folder, "grid-{:04}.png")
    tables = Numbers(gallery.folder, "grid-{:04}.json")
    table = tables.save(
        lambda path: path.write_bytes(text.encode()), number=max(grids.next, tables.next)
    )
    if not args.skip_grid:
        grid = Picture(make_grid(cells, args.n_rows or len(runs)), made)
        number = int(table.stem.removeprefix("grid-"))
        # under the table's number, unless another program was quicker
        place = grids.save(lambda path: grid.write(path, gallery.has_settings), number)
        print(f"The pictures are in {place}")
    print(f"The numbers are in {table}")
