"""Draw pictures of a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import options
from ldm.distributed import Process
from ldm.errors import InputError

EPILOG = """
examples:
  four pictures of the demo model, with half of the tokens merged:
    python scripts/txt2img.py --prompt "the sea at sunset" --n_samples 4 --tome-ratio 0.5
  a checkpoint of your own, larger and with another sampler:
    python scripts/txt2img.py --ckpt model.safetensors --H 768 --W 512 --dpm_solver --steps 20
  a picture for each line of a file:
    python scripts/txt2img.py --from-file prompts.txt --negative_prompt "blurry"
  the same on eight GPUs, under the same numbers:
    torchrun --nproc-per-node 8 scripts/txt2img.py --from-file prompts.txt

Pictures land in OUTDIR/samples/00000.png and on, all of a run in OUTDIR/grid-0000.png.
"""


def build_parser() -> options.Parser:
    """All flags."""
    parser = options.Parser(__doc__, EPILOG)
    options.add_prompt_flags(parser)
    options.add_sampling_flags(parser)
    options.add_tome_flags(parser)
    options.add_model_flags(parser)
    options.add_output_flags(parser, "outputs/txt2img-samples")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    settings = options.settings(args)
    model = options.model_arguments(args)
    gallery = options.gallery(args)
    process = Process.from_environment()
    if process.n_processes > 1 and settings.rng == "upstream":
        raise InputError("--rng upstream is one stream of noise: it cannot be shared by processes")
    model["device"] = process.device(model["device"])

    from ldm.pipeline import Pipeline

    with process.joined():
        pipeline = Pipeline.from_checkpoint(**model)
        if process.n_processes > 1:  # every picture gets the number that it has without the others
            first = gallery.next_number
            sizes = [len(batch) for batch in settings.batches()]
            gallery.numbers = (first + number for number in process.share_numbers(sizes))
            gallery.has_grid = False
            process.wait()  # until all have looked which numbers are free
        for picture in pipeline.generate(settings, progress=process.is_first, process=process):
            gallery.add(picture)
    gallery.close()
    print(f"Pictures are in {args.outdir}")


if __name__ == "__main__":
    options.run(main)
