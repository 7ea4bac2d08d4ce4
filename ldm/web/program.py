"""A page in the browser: draw, redraw, and see what merging tokens changes."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import flags, options
from ldm.cli.parser import Parser, whole
from ldm.cli.program import leaving_at_once, said_when_stopped
from ldm.cli.tome_flags import add_tome_flags
from ldm.errors import InputError
from ldm.images import Gallery

EPILOG = """
examples:
  the demo model, at http://127.0.0.1:7860:
    python scripts/webui.py
  a checkpoint of your own, beside those in models/:
    python scripts/webui.py --ckpt ../sd-v1-4.safetensors --tome-preset balanced
  what the page shows at first, and what it has no field for:
    python scripts/webui.py --steps 30 --sampler euler_a --lora ink.safetensors:0.8

Flags are the fields' first values. Only this machine can open the page; --host 0.0.0.0 lets in
everybody who can reach the machine, without a password. The page asks no other host for anything.
Pictures land in OUTDIR/samples/00000.png and on.
"""


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    group = parser.add_argument_group("the page")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    add(
        "--port", type=whole(1, 65535), metavar="N", help="default: the first free one from 7860 on"
    )
    add("--outdir", default="outputs/webui", metavar="DIR", help="default: %(default)s")
    flags.add_strength_flag(flags.add_prompt_flags(parser, has_file=False))
    flags.add_sampling_flags(parser)
    flags.add_hires_flags(parser)
    add_tome_flags(parser)
    flags.add_model_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    options.wishes(args).check()
    model = {**options.model_arguments(args), "tome": None}  # each job has its own
    options.check_writable(args.outdir)
    if importlib.util.find_spec("gradio") is None:
        raise InputError('the page needs gradio: pip install -e ".[web]"')
    with tempfile.TemporaryDirectory(prefix="ldm-webui-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

        with leaving_at_once():
            from ldm.web.models import find_models
            from ldm.web.page import Page
            from ldm.web.runner import Runner

        models = find_models(model.pop("path"))
        runner = Runner(models, model, Gallery(Path(args.outdir), has_grid=False))
        for _ in runner.load(next(iter(models))):
            pass
        page = Page(runner, args)
        address = page.serve(args.host, args.port)
        print(f"The page is at {address} (Ctrl+C ends it)", flush=True)
        try:
            with said_when_stopped(lambda: "the page is closed"):
                threading.Event().wait()
        finally:
            page.close()
