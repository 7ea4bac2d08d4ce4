import asyncio
import base64

import pytest

from ldm.web.guard import LOOPBACK, Guard


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(path="/", host="127.0.0.1:7860", method="GET", kind="http", guard=None, **headers):
    sent = []

    async def send(message):
        sent.append(message)

    named = [(b"host", host.encode())]
    named += [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": kind, "path": path, "headers": named, "method": method}
    asyncio.run((guard or Guard(app, LOOPBACK))(scope, None, send))
    return sent[0]


def test_the_policy_goes_with_every_answer():
    for path in ("/", "/proxy=http://x/"):
        assert b"default-src 'self'" in dict(ask(path)["headers"])[b"content-security-policy"]


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("/", "127.0.0.1:7860", 200),
        ("/", "localhost", 200),
        ("/", "LOCALHOST.:7860", 200),
        ("/", "[::1]:7860", 200),
        ("/", "elsewhere.example:7860", 403),
        ("/", "192.168.1.5:7860", 403),
        ("/", "", 403),
        ("/gradio_api/file=/tmp/x.png", "127.0.0.1", 200),
        ("/gradio_api/file=http://elsewhere.example/x", "127.0.0.1", 403),
        ("/gradio_api/file=http%3A%2F%2Felsewhere.example/x", "127.0.0.1", 403),
        ("/gradio_api/proxy=http://elsewhere.example/x", "127.0.0.1", 403),
    ],
)
def test_what_would_reach_out_is_refused(path, host, status):
    assert ask(path, host)["status"] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.168.1.5:7860", 200),
        ("[fe80::1]:7860", 200),
        ("own.example", 200),
        ("elsewhere.example", 403),
        ("192.168.1.5.elsewhere.example", 403),
        ("1", 403),
    ],
)
def test_a_page_for_others_is_asked_by_number_or_own_name(host, status):
    guard = Guard(app, (*LOOPBACK, "own.example"), any_address=True)
    assert ask(host=host, guard=guard)["status"] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://127.0.0.1:7860", "sec_fetch_site": "same-origin"}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 403),
        ({"origin": "http://elsewhere.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
    ],
)
def test_only_the_page_itself_changes_anything(headers, status):
    for method in ("POST", "DELETE"):
        assert ask(method=method, **headers)["status"] == status
    assert ask(**headers)["status"] == 200


def test_a_password_is_asked_of_everybody():
    guard = Guard(app, LOOPBACK, auth="me:it's:späť")

    def basic(text):
        return "Basic " + base64.b64encode(text.encode()).decode()

    assert ask(guard=guard, authorization=basic("me:it's:späť"))["status"] == 200
    for given in (basic("me:other"), basic(""), "Basic !", "Bearer x", "Basic", ""):
        answer = ask(guard=guard, authorization=given)
        assert answer["status"] == 401
        assert b"www-authenticate" in dict(answer["headers"])


def test_other_protocols_are_not_spoken():
    assert ask(kind="websocket")["type"] == "websocket.close"
