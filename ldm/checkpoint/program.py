"""Convert a checkpoint to a flat .safetensors file: no code in it, and quick to load.

Pickled code in the source is never executed. Metadata are kept, and what the U-Net predicts is
recorded in them, so that the result is recognised under any name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.cli.parser import Parser
from ldm.cli.program import leaving_at_once, said_when_stopped

EPILOG = """
examples:
  models/sd-v1-4.ckpt -> models/sd-v1-4.safetensors:
    python scripts/convert.py models/sd-v1-4.ckpt
  half the size, with the averaged weights:
    python scripts/convert.py sd-v1-4-full-ema.ckpt --half --ema --output sd-v1-4.safetensors
"""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(__doc__, EPILOG)
    add = parser.add_argument
    add("source", metavar="CHECKPOINT", help=".ckpt, .safetensors, or a folder of the latter")
    add("--output", metavar="PATH", help="default: the source's name with .safetensors")
    add("--half", action="store_true", help="store weights as float16")
    add(
        "--ema", action="store_true", help="store the U-Net's averaged weights in place of the last"
    )
    add(
        "--parameterization",
        choices=("eps", "v"),
        help="what the U-Net predicts, if neither metadata nor name of the source say",
    )
    add(
        "--split",
        type=float,
        metavar="MB",
        help="write a folder with files for each component, of at most so many megabytes",
    )
    add("--force", action="store_true", help="overwrite an existing file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one file and say what was written."""
    args = build_parser().parse_args(argv)
    with leaving_at_once():
        from ldm.checkpoint.convert import convert  # takes torch
        from ldm.checkpoint.files import stem_of
        from ldm.checkpoint.sidecar import config_beside

    with said_when_stopped(lambda: "nothing was written"):
        target = convert(
            args.source,
            args.output,
            args.half,
            args.ema,
            args.parameterization,
            args.force,
            args.split,
        )
    files = [target] if target.is_file() else sorted(target.glob("*.safetensors"))
    for file in files:
        print(f"{file}: {file.stat().st_size / 2**20:.0f} MiB")
    own = config_beside(Path(args.source))
    if own is not None and config_beside(target) is None:
        place = target.with_name(f"{stem_of(target)}.yaml")
        print(f"Its configuration stays behind: copy {own} to {place}")
