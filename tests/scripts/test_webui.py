import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.images import read_settings
from ldm.web import program as webui
from tests.browser import Browser, chromium

SCRIPT = Path(__file__).parents[2] / "scripts" / "webui.py"


def test_help_takes_no_torch():
    code = "import sys, runpy; sys.argv = ['webui.py', '--help']\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit: print({'torch', 'gradio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert "--share" not in done.stdout


def test_without_gradio_one_line_says_what_to_install(run_program, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name)
    )
    assert run_program(webui, "--outdir", tmp_path) == 2
    assert capsys.readouterr().err == 'error: the page needs gradio: pip install -e ".[web]"\n'


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", 0], "--port 0: allowed is 1 to 65535"),
        (["--ckpt", "nothing.ckpt"], "nothing.ckpt: there is no such file"),
        (["--steps", 0], "steps 0: allowed is 1 to 1000"),
        (["--share"], "--share is unknown: nothing takes its place"),
    ],
)
def test_bad_flags_end_before_anything_is_loaded(run_program, capsys, tmp_path, flags, message):
    assert run_program(webui, "--outdir", tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def server(tiny_checkpoint, tmp_path):
    """The page's address, served by a process of its own."""
    pytest.importorskip("gradio")
    chromium()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "--ckpt", str(tiny_checkpoint), "--device", "cpu"]
    command += ["--dtype", "float32", "--outdir", str(tmp_path / "out"), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--prompt", "a house"], stdout=subprocess.PIPE, text=True, env=environment
    )
    address = f"http://127.0.0.1:{port}/"
    for line in process.stdout:
        if address in line:
            break
    yield address
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "The page is closed" in rest
    assert not list(tmp_path.glob("ldm-webui-*"))


def test_the_page_works_in_a_browser(server, tmp_path):
    samples = tmp_path / "out" / "samples"
    with Browser(tmp_path, width=1100) as browser:
        says = "document.querySelector('#status').innerText"
        browser.open(server)
        browser.wait("document.querySelector('#draw')")

        browser.type("#seed input", "7")
        browser.type("#steps input", "3")
        browser.click("#draw")
        browser.wait(f"{says}.includes('Without merging')")
        assert read_settings(samples / "00000.png")["seed"] == 7

        browser.type("#ratio input[type=number]", "0.5")
        line = "document.querySelector('.tome-line').innerText"
        browser.wait(f"{line}.includes('grid 2x2 ratio=0.5')")
        browser.click("#compare input")
        browser.click("#draw")
        browser.wait(f"{says}.includes('64 -> 32 tokens')")
        browser.wait(f"{says}.includes('Without merging')")
        ratios = [read_settings(samples / f"0000{i}.png")["tome"]["ratio"] for i in (1, 2)]
        assert ratios == [0.5, None]
        browser.wait("document.querySelectorAll('#wipe img').length >= 2")
        browser.wait("document.querySelectorAll('#gallery img').length === 3")

        browser.type("#steps input", "1000")
        browser.click("#draw")
        browser.wait(f"{says}.includes('step ')")
        browser.click("#stop")
        browser.wait(f"{says}.includes('Stopped')")
        assert len(list(samples.iterdir())) == 3

        browser.type("#W input", "0")
        browser.click("#draw")
        browser.wait(f"{says}.includes('error: W 0: allowed is a number of pixels above 0')")

        browser.type("#seed input", "1")
        browser.choose_file("#dropped input[type=file]", samples / "00001.png")
        browser.wait(f"{says}.includes('These are the settings of 00001.png')")
        browser.wait("document.querySelector('#steps input').value === '3'")
        browser.wait("document.querySelector('#seed input').value === '7'")

        browser.click("#send")
        browser.wait("document.querySelector('#init img')")

        assert browser.errors == []
        hosts = [r for r in browser.requests if not r.startswith((server, "data:", "blob:"))]
        assert [r for r in hosts if r != "about:blank"] == []

        for width in (1100, 390):
            browser.resize(width, 800)
            assert browser.run("document.documentElement.scrollWidth - innerWidth") <= 0

        for path in ("/etc/passwd", "..%2F..%2Fetc%2Fpasswd", str(SCRIPT), f"{tmp_path}/tiny.yaml"):
            status = f"fetch('{server}gradio_api/file={path}').then(answer => answer.status)"
            assert browser.run(status) in (403, 404), path
        own = f"{server}gradio_api/file={samples / '00000.png'}"
        assert browser.run(f"fetch('{own}').then(answer => answer.status)") == 200
