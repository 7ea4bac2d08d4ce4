import asyncio

import pytest

from ldm.web.guard import Guard


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(path, host="127.0.0.1:7860", hosts=("127.0.0.1", "localhost")):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(app, hosts)(scope, None, send))
    return sent[0]


def test_the_policy_goes_with_every_answer():
    for path in ("/", "/proxy=http://x/"):
        assert b"default-src 'self'" in dict(ask(path)["headers"])[b"content-security-policy"]


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("/", "127.0.0.1:7860", 200),
        ("/", "localhost", 200),
        ("/", "elsewhere.example:7860", 403),
        ("/gradio_api/file=/tmp/x.png", "127.0.0.1", 200),
        ("/gradio_api/file=http://elsewhere.example/x", "127.0.0.1", 403),
        ("/gradio_api/file=http%3A%2F%2Felsewhere.example/x", "127.0.0.1", 403),
        ("/gradio_api/proxy=http://elsewhere.example/x", "127.0.0.1", 403),
    ],
)
def test_what_would_reach_out_is_refused(path, host, status):
    assert ask(path, host)["status"] == status


def test_a_page_for_others_may_be_asked_by_any_name():
    assert ask("/", "elsewhere.example", hosts=None)["status"] == 200
