"""Draw pictures of a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import options

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

Pictures land in OUTDIR/samples/00000.png and on, all of a run in OUTDIR/grid-0000.png.
"""


def build_parser() -> options.Parser:
    """All flags."""
    parser = options.Parser(__doc__, EPILOG)
    options.add_prompt_flags(parser)
    options.add_sampling_flags(parser)
    options.add_hires_flags(parser)
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

    from ldm.pipeline import Pipeline

    pipeline = Pipeline.from_checkpoint(**model)
    for picture in pipeline.generate(settings, progress=True):
        gallery.add(picture)
    gallery.close()
    print(f"Pictures are in {args.outdir}")


if __name__ == "__main__":
    options.run(main)
