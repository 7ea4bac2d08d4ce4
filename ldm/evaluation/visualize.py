"""Draw pictures, and over them which tokens were merged into which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import flags, options
from ldm.cli.drawing import Progress
from ldm.cli.lists import numbers
from ldm.cli.parser import Parser
from ldm.cli.program import said_when_stopped
from ldm.cli.tome_flags import add_tome_flags
from ldm.errors import InputError

if TYPE_CHECKING:  # torch comes only after the flags are checked
    from torch import Tensor

    from ldm.evaluation.merge_map import MergeMap
    from ldm.images import Picture
    from ldm.models.diffusion.sampler import Sampler

EPILOG = """
examples:
  half of the tokens of the demo model merged, as tomesd does it:
    python scripts/visualize_tome.py --tome-preset tomesd
  chosen steps and blocks, of a checkpoint of your own:
    python scripts/visualize_tome.py --ckpt model.safetensors --prompt "a lighthouse" \\
        --tome-ratio 0.5 --vis-steps 0,10,20 --vis-blocks 0,1,15

Pictures land in OUTDIR/samples as with txt2img. For each there is OUTDIR/map-00000.html, to be
opened in a browser; map-00000-blockBB-stepSSS.png for each chosen block and step; and
map-00000-blockBB-strip.png, a row of steps. Steps are calls of the model, blocks its transformer
blocks in the order in which they run; both are counted from 0.
"""


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    flags.add_prompt_flags(parser)
    flags.add_sampling_flags(parser)
    add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/visualize-tome")
    group = parser.add_argument_group("what to look at")
    group.add_argument(
        "--vis-steps", metavar="N,N", help="steps (default: the first, the middle and the last)"
    )
    group.add_argument(
        "--vis-blocks",
        metavar="N,N",
        help="blocks (default: the first of those that merge at the largest number of tokens)",
    )
    return parser


def chosen(text: str | None, flag: str) -> list[int]:
    """The numbers in a flag's list, rising, none twice; none at all where it is not given.

    Raises:
        InputError: they are not whole numbers of at least 0.
    """
    return [] if text is None else sorted({*numbers(text, flag, least=0)})


def check_range(found: Sequence[int], n: int, flag: str, what: str) -> None:
    """Raise InputError where one of the chosen numbers is not below n."""
    if found and found[-1] >= n:
        raise InputError(f"{flag} {found[-1]}: the {what} are numbered from 0 to {n - 1}")


def refuse_reuse(every: int | None) -> None:
    """Raise InputError where some steps leave out blocks, of which there would be no maps."""
    if every is not None and every > 1:
        raise InputError(
            f"--reuse_deep {every}: steps that leave blocks out have no maps of these; give 1"
        )


def count_calls(sampler: Sampler) -> int:
    """How often the model is called in a run of the sampler's steps; twice a step by some."""
    import torch

    from ldm.models.diffusion.sampler import Run

    times: list[float] = []

    def denoise(x: Tensor, t: float, alpha_bar: float) -> Tensor:
        times.append(t)
        return x

    run = Run(denoise, lambda sigma: torch.zeros(1, 1, 1, 1), lambda x, c: x)
    for _ in sampler.iterate(torch.zeros(1, 1, 1, 1), sampler.steps[::-1], run):
        pass
    return len(times)


def write(
    picture: Picture,
    calls: Sequence[Sequence[MergeMap]],
    steps: Sequence[int],
    blocks: Sequence[int],
    report: str,
    outdir: Path,
    has_settings: bool,
) -> Path:
    """Write maps, strips and the page of one picture.

    Args:
        picture: what was drawn.
        calls: its maps, for each model call and block.
        steps: of which a map of its own is written.
        blocks: likewise.
        report: the line that says what was merged.
        outdir: where.
        has_settings: write the settings into the PNG files.

    Returns: the page's path.
    """
    from ldm.evaluation.merge_map import draw_map, draw_strip, strip_steps
    from ldm.evaluation.merge_page import merge_page
    from ldm.images import Picture, Pixels, label
    from ldm.numbered import Numbers

    shown = sorted({*steps, *strip_steps(len(calls))})

    def save(name: str, pixels: Pixels) -> None:
        Picture(pixels, picture.settings).save(outdir / f"{page.stem}-{name}.png", has_settings)

    made = picture.settings
    about = (
        f"{made['W']}x{made['H']}, seed {made['seed']}, {len(calls)} steps of {made['sampler']}, "
        f"guidance {made['scale']:g}. {report}"
    )
    maps = [(step, block, calls[step][block]) for block in blocks for step in shown]
    text = merge_page(picture.pixels, maps, made["prompt"], about)
    page = Numbers(outdir, "map-{:05}.html").save(lambda path: path.write_bytes(text.encode()))
    for block in blocks:
        for step in steps:
            one = calls[step][block]
            title = f"step {step} of {len(calls)}, block {block}, {one.size[1]}x{one.size[0]}"
            drawn = label(draw_map(picture.pixels, one), [title, one.describe()])
            save(f"block{block:02}-step{step:03}", drawn)
        strip = {step: calls[step][block] for step in shown}
        save(f"block{block:02}-strip", draw_strip(picture.pixels, strip))
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    settings = options.settings(args)
    model = options.model_arguments(args)
    gallery = options.gallery(args)
    steps = chosen(args.vis_steps, "--vis-steps")
    blocks = chosen(args.vis_blocks, "--vis-blocks")
    refuse_reuse(settings.reuse_deep)
    if args.no_tome:
        raise InputError("--no-tome: there would be nothing to see")

    from ldm.evaluation.benchmark.unets import transformer_blocks
    from ldm.evaluation.merge_map import Recorder, default_block, default_steps
    from ldm.pipeline import Pipeline
    from ldm.sampling import SAMPLERS

    pipeline = Pipeline.from_checkpoint(**model)
    unet = pipeline.model.model.diffusion_model
    if unet.tome.config.is_off:
        raise InputError("nothing is merged: give --tome-ratio 0.5 or --tome-preset tomesd")
    refuse_reuse(settings.reuse_deep or unet.reuse.every)
    settings = settings.filled(pipeline.defaults)
    sampler = SAMPLERS[settings.sampler or "ddim"](pipeline.model)
    sampler.make_schedule(settings.steps or 1)
    check_range(steps, count_calls(sampler), "--vis-steps", "steps of this run")
    check_range(blocks, len(transformer_blocks(unet)), "--vis-blocks", "blocks of this model")

    recorder = Recorder(unet.tome)
    places = ((i, len(batch)) for batch in settings.batches() for i in range(len(batch)))
    pictures = pipeline.generate(settings, progress=True)
    progress = Progress(settings.n_pictures)

    def finished() -> str:
        done = f"{progress.n_done} of {progress.n_pictures} pictures are in {args.outdir}"
        return f"{done}; the same command draws all of them again"

    with said_when_stopped(finished):
        for picture, place in zip(pictures, places, strict=True):
            calls = recorder.maps(*place)
            page = write(
                picture,
                calls,
                steps or default_steps(len(calls)),
                blocks or [default_block(calls)],
                unet.tome.report(),
                gallery.folder,
                gallery.has_settings,
            )
            gallery.add(picture)
            print(f"Open {page}")
            progress.step()
    gallery.close()
