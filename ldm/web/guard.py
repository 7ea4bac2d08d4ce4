"""Keeps the page to itself: who may ask, under which name, from which page; and for what."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from starlette.responses import PlainTextResponse

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
# What a browser may load for the page. Its own scripts are partly inline and made as it runs.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; "
    "form-action 'self'"
)


class Guard:
    """ASGI middleware around the page's server.

    Args:
        app: the server.
        hosts: names under which it may be asked, without ports. A page elsewhere whose own name
            was made to point to this machine is refused so.
        any_address: whether it may also be asked by any number (IPv4 or IPv6), which no name that
            points elsewhere can be.
        auth: ``user:password`` that everybody has to give (HTTP Basic), or None.
    """

    def __init__(
        self, app: App, hosts: tuple[str, ...], any_address: bool = False, auth: str | None = None
    ) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.any_address = any_address
        self.auth = auth

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse what is not meant, and add the policy to what is answered."""
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", POLICY.encode())]
                policy.append((b"referrer-policy", b"same-origin"))
                policy.append((b"x-content-type-options", b"nosniff"))
                message["headers"] = [*message.get("headers", ()), *policy]
            await send(message)

        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        reason = self._reason(scope, headers)
        if reason is not None:
            await PlainTextResponse(f"refused: {reason}", 403)(scope, receive, send_with_policy)
        elif not self._knows(headers.get(b"authorization", "")):
            ask = {"www-authenticate": 'Basic realm="Stable Diffusion", charset="UTF-8"'}
            answer = PlainTextResponse("user and password, please", 401, ask)
            await answer(scope, receive, send_with_policy)
        else:
            await self.app(scope, receive, send_with_policy)

    def _reason(self, scope: Message, headers: dict[bytes, str]) -> str | None:
        """Why a request is refused; None where it is not."""
        path = unquote(scope["path"])
        if "/proxy=" in path or ("/file=" in path and "://" in path):
            return "other hosts are not asked"
        host = headers.get(b"host", "")
        if not self._is_own(host):
            return "this machine is not known by that name (--allow-host NAME)"
        if scope["method"] in SAFE:
            return None
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "it comes from another page"
        if headers.get(b"sec-fetch-site", "none") not in ("same-origin", "none"):
            return "it comes from another page"
        return None

    def _is_own(self, host: str) -> bool:
        name = host.lower()
        if name.rpartition(":")[2].isdigit() and not name.endswith("]"):
            name = name.rpartition(":")[0]
        if name.rstrip(".") in self.hosts:
            return True
        return self.any_address and _is_number(name)

    def _knows(self, given: str) -> bool:
        if self.auth is None:
            return True
        kind, _, code = given.partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            words = base64.b64decode(code, validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(words, self.auth.encode())


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
