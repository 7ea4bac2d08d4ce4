"""Serves the page, what it asks for while jobs run, and the API."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from ldm.errors import InputError
from ldm.web.address import listener, own_names
from ldm.web.guard import LOOPBACK, Guard
from ldm.web.uploads import MOST

HERE = Path(__file__).parent


class Server:
    """A server in a thread.

    Args:
        blocks: the page.
        routes: besides it.
        host: where to listen.
        port: likewise.
        allowed: further names under which it may be asked.
        auth: ``user:password``, or None.
    """

    def __init__(
        self,
        blocks: gr.Blocks,
        routes: Sequence[Route],
        host: str,
        port: int,
        allowed: Sequence[str] = (),
        auth: str | None = None,
    ) -> None:
        guard = Middleware(
            Guard,
            hosts=own_names(host, list(allowed)),
            any_address=host not in LOOPBACK,
            auth=auth,
        )
        app = Starlette(routes=list(routes), middleware=[guard])
        font, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
        script = (HERE / "page.js").read_text(encoding="utf-8")
        gr.mount_gradio_app(
            app,
            blocks,
            path="/",
            server_name=host,
            server_port=port,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            max_file_size=MOST,
            theme=gr.themes.Default(font=font, font_mono=mono),
            css=(HERE / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{script}</script>",
        )
        self._socket = listener(host, port)
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        self.address = f"http://{name}:{port}/"
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True, name="server")

    def start(self) -> None:
        """Begin to answer.

        Raises:
            InputError: the server does not start.
        """
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise InputError(f"the server at {self.address} does not start")
            time.sleep(0.01)

    def close(self) -> None:
        """Answer nobody any more; answers under way are broken off without a word."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def _run(self) -> None:
        sockets: list[socket.socket] = [self._socket]
        self._server.run(sockets=sockets)
