"""Draw pictures of a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import flags
from ldm.cli.jobs import read_jobs
from ldm.cli.prompt_loop import prompt_loop
from ldm.distributed import ALONE, Process
from ldm.errors import InputError
from ldm.settings import Settings

EPILOG = """
examples:
  four pictures of the demo model, with half of the tokens merged:
    python scripts/txt2img.py --prompt "the sea at sunset" --n_samples 4 --tome-ratio 0.5
  a checkpoint of your own, larger and with another sampler:
    python scripts/txt2img.py --ckpt model.safetensors --H 768 --W 512 --dpm_solver --steps 20
  twice as large in a second pass, where merging helps most:
    python scripts/txt2img.py --hires_scale 2 --tome-hires-ratio 0.5
  a picture for each line of a file:
    python scripts/txt2img.py --from-file prompts.txt --negative_prompt "blurry"
  or with settings of its own, which are flags by their names, in JSON:
    {"prompt": "the sea at dawn", "steps": 40, "tome": {"ratio": 0.4}}
  the same on eight GPUs, under the same numbers:
    torchrun --nproc-per-node 8 scripts/txt2img.py --from-file prompts.txt
  prompt after prompt, with the model loaded once:
    python scripts/txt2img.py --interactive

Pictures land in OUTDIR/samples/00000.png and on, all of a run in OUTDIR/grid-0000.png.
"""


def build_parser() -> flags.Parser:
    """All flags."""
    parser = flags.Parser(__doc__, EPILOG)
    group = flags.add_prompt_flags(parser)
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts, one after the other; !help there says what can be set",
    )
    flags.add_sampling_flags(parser)
    flags.add_hires_flags(parser)
    flags.add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/txt2img-samples")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.interactive and (args.prompt is not None or args.from_file is not None):
        raise InputError("--interactive asks for prompts: leave out --prompt and --from-file")
    jobs = read_jobs(parser, args)
    model = flags.model_arguments(args)
    gallery = flags.gallery(args)
    process = Process.from_environment()
    if process.n_processes > 1 and args.rng == "upstream":
        raise InputError("--rng upstream is one stream of noise: it cannot be shared by processes")
    if process.n_processes > 1 and args.interactive:
        raise InputError("--interactive is for a single process: start it without torchrun")
    model["device"] = process.device(model["device"])

    from ldm.pipeline import Pipeline

    with process.joined():
        pipeline = Pipeline.from_checkpoint(**model)
        batches = [job.settings.filled(pipeline.defaults).batches() for job in jobs]
        if process.n_processes > 1:  # every picture gets the number that it has without the others
            first = gallery.next_number
            sizes = [len(batch) for run in batches for batch in run]
            gallery.numbers = (first + number for number in process.share_numbers(sizes))
            gallery.has_grid = False
            process.wait()  # until all have looked which numbers are free

        def draw(settings: Settings, share: Process = ALONE) -> None:
            drawn = pipeline.generate(settings, progress=process.is_first, process=share)
            for picture in drawn:
                path = gallery.add(picture)
                if args.interactive:
                    print(f"Saved {path}")

        if args.interactive:
            gallery.has_grid = False
            prompt_loop(parser, args, pipeline.set_tome, draw)
        else:
            # what cannot be used is said before anything is drawn
            merging = [pipeline.tome_config(job.tome) for job in jobs]
            n_before = 0
            for job, run, config in zip(jobs, batches, merging, strict=True):
                pipeline.set_tome(config)
                draw(job.settings, process.after(n_before))
                n_before += len(run)
    gallery.close()
    print(f"Pictures are in {args.outdir}")


if __name__ == "__main__":
    flags.run(main)
