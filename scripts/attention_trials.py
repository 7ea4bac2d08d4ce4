"""Compare ways to merge keys and values by the error of recorded self-attention."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import options
from ldm.errors import InputError

EPILOG = """
examples:
  on the demo model, with cells of 2x2 and 4x4 tokens:
    python scripts/attention_trials.py
  on pictures of 4096 tokens:
    python scripts/attention_trials.py --size 256 --n_prompts 2

Each number is how far the output of self-attention at full resolution is above its error, in dB.
Matching is within 3x3 cells where nothing else is said.
"""


def main() -> None:
    """Draw, record, and print a table."""
    parser = options.Parser(__doc__, EPILOG)
    add = parser.add_argument
    add("--size", type=int, metavar="PIXELS", help="side of the pictures (default: the model's)")
    add("--n_prompts", type=int, default=4, metavar="N", help="pictures (default: 4)")
    add("--strides", default="2,4", metavar="N,...", help="sides of the cells (default: 2,4)")
    options.add_model_flags(parser)
    args = parser.parse_args()
    options.at_least(1, args, "n_prompts")
    try:
        strides = [int(text) for text in args.strides.split(",")]
    except ValueError:
        raise InputError(f"--strides {args.strides}: allowed are whole numbers") from None
    arguments = options.model_arguments(args) | {"tome": False}

    from tqdm import tqdm

    from ldm.evaluation.attention_trials import error, recording, trials
    from ldm.evaluation.demo import captions_of, draw, held_out_scenes
    from ldm.pipeline import Pipeline

    pipeline = Pipeline.from_checkpoint(**arguments)
    model, defaults = pipeline.model, pipeline.defaults
    side = (args.size or defaults["H"]) // defaults["f"]
    prompts = captions_of(held_out_scenes(args.n_prompts))
    n_steps = 25
    with recording(model.model.diffusion_model, {3, 8, 14, 20}) as kept:
        seeds = list(range(len(prompts)))
        draw(model, prompts, seeds, n_steps, defaults["scale"], side, show="recording")
    print("| " + " | ".join(["dB", *(f"{s}x{s} cells" for s in strides)]) + " |")
    print("|---" * (len(strides) + 1) + "|")
    columns = [trials(stride) for stride in strides]
    for name in tqdm(columns[0], desc="trials"):
        values = [f"{error(kept, column[name]):.1f}" for column in columns]
        tqdm.write("| " + " | ".join([name, *values]) + " |")


if __name__ == "__main__":
    options.run(main)
