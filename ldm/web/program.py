"""A page in the browser: draw, redraw, and see what merging tokens changes."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli import flags, options
from ldm.cli.parser import Arguments, Parser, whole
from ldm.cli.program import leaving_at_once, said_when_stopped
from ldm.cli.tome_flags import add_tome_flags
from ldm.errors import InputError
from ldm.images import Gallery
from ldm.web.address import ANYWHERE, free_port, lan_address

EPILOG = """
examples:
  the demo model, at http://127.0.0.1:7860:
    python scripts/webui.py
  a checkpoint of your own, beside those in models/:
    python scripts/webui.py --ckpt ../sd-v1-4.safetensors --tome-preset balanced
  for others on your network, with a password:
    python scripts/webui.py --host 0.0.0.0 --auth me:secret

Flags are the fields' first values. Beside --ckpt, the flags --config, --parameterization and --ema
are about that checkpoint, not about the others of models/. Only this machine can open the page,
unless --host says otherwise. The page asks no other host for anything. Pictures land in
OUTDIR/samples/00000.png and on. LoRAs and embeddings of models/lora and models/embeddings can be
named in a prompt. Prompts are read as with --long_prompt and --emphasis.
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
    add("--auth", metavar="USER:PASSWORD", help="everybody has to give these")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="with --host: another name under which the page may be opened; again for several",
    )
    add(
        "--api",
        action="store_true",
        help="also answer programs written for the web UIs, at /sdapi/v1 (needs --auth)",
    )
    add("--outdir", default="outputs/webui", metavar="DIR", help="default: %(default)s")
    flags.add_strength_flag(flags.add_prompt_flags(parser, has_file=False))
    flags.add_sampling_flags(parser)
    flags.add_hires_flags(parser)
    add_tome_flags(parser)
    flags.add_model_flags(parser)
    parser.set_defaults(seed=-1, emphasis=True, long_prompt=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    port = _checked(args)
    options.wishes(args).check()
    model = {**options.model_arguments(args), "tome": None}  # each job has its own
    for folder in (args.outdir, str(Path(args.outdir) / "samples")):
        options.check_writable(folder)
    if importlib.util.find_spec("gradio") is None:
        raise InputError('the page needs gradio: pip install -e ".[web]"')
    with tempfile.TemporaryDirectory(prefix="ldm-webui-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        _serve(args, model, port)


def _checked(args: Arguments) -> int:
    """Check the page's own flags; returns the port."""
    user, colon, password = (args.auth or "a:b").partition(":")
    if not (user and colon and password):
        raise InputError("--auth: allowed is USER:PASSWORD")
    if args.api and args.auth is None:
        raise InputError("--api needs --auth USER:PASSWORD")
    return free_port(args.host, args.port)


def _serve(args: Arguments, model: dict[str, Any], port: int) -> None:
    with leaving_at_once():
        from ldm.web.api import Api
        from ldm.web.desk import Desk
        from ldm.web.form import Base
        from ldm.web.live import Live
        from ldm.web.models import find_models
        from ldm.web.page import Page
        from ldm.web.pictures import Pictures
        from ldm.web.queue import Queue
        from ldm.web.report import Report
        from ldm.web.runner import Runner
        from ldm.web.server import Server
        from ldm.web.task import Task

    path = model.pop("path")
    models = find_models(None if path is None else str(path))
    first = next(iter(models))
    own = None if path is None else first
    runner = Runner(models, model, Gallery(Path(args.outdir), has_grid=False), own)
    runner.load(first)
    queue: Queue[Task, Report] = Queue(runner.work)
    desk, pictures = Desk(runner, queue), Pictures(Path(args.outdir))
    base = Base.from_arguments(args)
    live = Live(queue, pictures)
    page = Page(desk, base, live)
    routes = live.routes()
    if args.api:
        routes += Api(desk, base, pictures).routes()
    server = Server(page.blocks, routes, args.host, port, args.allow_host, args.auth)
    server.start()
    _say(args, server.address, port)
    try:
        with said_when_stopped(lambda: "the page is closed"):
            threading.Event().wait()
    finally:
        queue.close()
        server.close()


def _say(args: Arguments, address: str, port: int) -> None:
    if args.host in ANYWHERE:
        address = f"http://127.0.0.1:{port}/"
        own = lan_address()
        if own is not None:
            print(f"Others on your network can open http://{own}:{port}/")
        if args.auth is None:
            print(
                "warning: everybody who can reach this machine can use the page, see its pictures "
                "and delete them; --auth USER:PASSWORD lets in only those who know it"
            )
    print(f"The page is at {address} (Ctrl+C ends it)", flush=True)
