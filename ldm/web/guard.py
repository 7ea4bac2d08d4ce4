"""Keeps the page to itself: no request of it, or on behalf of it, goes to another host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import unquote

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

# What a browser may load for the page. Its own scripts are partly inline and made as it runs.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; "
    "form-action 'self'"
)


class Guard:
    """ASGI middleware around the page's server.

    Args:
        app: the server.
        hosts: names under which it may be asked, without ports; None: any. A page elsewhere whose
            own name was made to point to this machine is refused so.
    """

    def __init__(self, app: App, hosts: tuple[str, ...] | None = None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse what would reach out, and add the policy to what is answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", POLICY.encode())]
                policy.append((b"referrer-policy", b"no-referrer"))
                message["headers"] = [*message.get("headers", ()), *policy]
            await send(message)

        if self._is_refused(scope):
            headers = [(b"content-type", b"text/plain")]
            await send_with_policy(
                {"type": "http.response.start", "status": 403, "headers": headers}
            )
            await send({"type": "http.response.body", "body": b"refused"})
            return
        await self.app(scope, receive, send_with_policy)

    def _is_refused(self, scope: Message) -> bool:
        path = unquote(scope["path"])
        if "/proxy=" in path or ("/file=" in path and "://" in path):
            return True
        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        host = named.rpartition(":")[0] if named.rpartition(":")[2].isdigit() else named
        return self.hosts is not None and host not in self.hosts
