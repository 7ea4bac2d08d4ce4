"""How many steps each sampler needs: distance to the picture that very many steps give.

The same noise for all. Samplers without randomness of their own approach the same picture, so that
of many DDIM steps is what the others are compared with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import options

SAMPLERS = ("ddim", "plms", "dpm_solver", "euler", "dpmpp_2m")  # those that draw no noise
EPILOG = """
examples:
  the demo model, in a quarter of an hour on two cores:
    python scripts/compare_samplers.py --dtype float32
  two samplers on a checkpoint:
    python scripts/compare_samplers.py --ckpt sd-v1-5.safetensors --prompt "a lighthouse" \\
        --samplers plms,dpm_solver

Each number is the PSNR of the pictures in dB, higher is nearer, with its 95 % bootstrap interval
over the pictures.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, compare, and print a table."""
    parser = options.Parser(__doc__, EPILOG)
    add = parser.add_argument
    add("--prompt", help="what to draw (default: the demo's held-out scenes)")
    add("--n_pictures", type=int, default=12, metavar="N", help="pictures of each (default: 12)")
    add("--n_samples", type=int, default=4, metavar="N", help="pictures at a time (default: 4)")
    add("--seed", type=int, default=42, help="of the first picture (default: 42)")
    add("--scale", type=float, help="guidance (default: the model's)")
    add("--samplers", default=",".join(SAMPLERS), metavar="NAME,...", help="default: %(default)s")
    add("--steps", default="5,10,20,50", metavar="N,...", help="default: %(default)s")
    add("--reference", type=int, default=250, metavar="N", help="steps of the picture aimed at")
    options.add_model_flags(parser)
    args = parser.parse_args(argv)
    options.at_least(1, args, "n_pictures", "n_samples", "reference")
    samplers = options.choices(args.samplers, "--samplers", SAMPLERS)
    all_steps = options.numbers(args.steps, "--steps")
    arguments = options.model_arguments(args) | {"tome": False}

    import torch
    from tqdm import tqdm

    from ldm.evaluation.demo import captions_of, held_out_scenes
    from ldm.evaluation.metrics import bootstrap, psnr
    from ldm.images import to_unit
    from ldm.pipeline import Pipeline

    pipeline = Pipeline.from_checkpoint(**arguments)
    n = args.n_pictures
    prompts = [args.prompt] * n if args.prompt else captions_of(held_out_scenes(n))
    n_calls = args.reference + len(samplers) * sum(all_steps)
    with tqdm(total=n_calls * n, desc="steps", unit="step") as bar:

        def draw(sampler: str, steps: int) -> torch.Tensor:
            pictures = pipeline.txt2img(
                prompts,
                sampler=sampler,
                steps=steps,
                scale=args.scale,
                seed=args.seed,
                n_samples=args.n_samples,
            )
            bar.update(steps * n)
            return torch.stack([torch.from_numpy(to_unit(one.pixels)) for one in pictures])

        aim = draw("ddim", args.reference)
        rows = []
        for sampler in samplers:
            found = [bootstrap(psnr(draw(sampler, steps), aim)) for steps in all_steps]
            rows.append([sampler, *(f"{e.mean:.1f} [{e.low:.1f}, {e.high:.1f}]" for e in found)])
    print(f"| steps | {' | '.join(map(str, all_steps))} |")
    print("|---" * (len(all_steps) + 1) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    options.run(main)
