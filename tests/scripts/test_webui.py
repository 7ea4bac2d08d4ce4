import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.images import read_settings
from ldm.web import program
from tests.browser import Browser, chromium

SCRIPT = Path(__file__).parents[2] / "scripts" / "webui.py"
SAYS = "document.querySelector('#status').innerText"


def test_help_takes_no_torch():
    code = "import sys, runpy; sys.argv = ['webui.py', '--help']\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit: print({'torch', 'gradio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert "--share" not in done.stdout
    assert "of the first picture (default: -1); -1: any" in " ".join(done.stdout.split())


def test_without_gradio_one_line_says_what_to_install(run_program, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name)
    )
    assert run_program(program, "--outdir", tmp_path) == 2
    assert capsys.readouterr().err == 'error: the page needs gradio: pip install -e ".[web]"\n'


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", 0], "--port 0: allowed is 1 to 65535"),
        (["--host", "999.1.1.1"], "--host '999.1.1.1': this machine has no such address"),
        (["--auth", "secret"], "--auth: allowed is USER:PASSWORD"),
        (["--api"], "--api needs --auth USER:PASSWORD"),
        (["--ckpt", "nothing.ckpt"], "nothing.ckpt: there is no such file"),
        (["--steps", 0], "steps 0: allowed is 1 to 1000"),
        (["--share"], "--share"),
    ],
)
def test_bad_flags_end_before_anything_is_loaded(run_program, capsys, tmp_path, flags, message):
    assert run_program(program, "--outdir", tmp_path, *flags) == 2
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
        [*command, "--prompt", "a house"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    address = f"http://127.0.0.1:{port}/"
    for line in process.stdout:
        if address in line:
            break
    yield address
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[0]
    assert rest.endswith("ended: the page is closed\n")
    assert "Traceback" not in rest
    assert process.returncode == 143
    assert not list(tmp_path.glob("ldm-*"))


@pytest.fixture
def browser(server, tmp_path):
    with Browser(tmp_path, width=1100) as made:
        open_page(made, server)
        yield made
        assert made.errors == []
        hosts = [r for r in made.requests if not r.startswith((server, "data:", "blob:"))]
        assert [r for r in hosts if r != "about:blank"] == []


def open_page(browser, address):
    """Open it, and wait until its form is filled."""
    browser.open(address)
    browser.wait("document.querySelector('#seed input') && !document.documentElement.inert")


def fill(browser, **fields):
    for name, value in fields.items():
        browser.type(f"#{name} input", str(value))


def draw(browser, says):
    """Click, and wait for what the page then says of a job that was not there before."""
    before = browser.run("ldm.newest()")
    browser.click("#draw")
    browser.wait(f"ldm.newest() > {before} && {SAYS}.includes({says!r})")


def test_the_page_draws_compares_and_reads_pictures(browser, server, tmp_path):
    samples = tmp_path / "out" / "samples"
    fill(browser, seed=7, steps=3)
    draw(browser, "Without merging")
    assert read_settings(samples / "00000.png")["seed"] == 7

    browser.type("#ratio input[type=number]", "0.5")
    browser.wait("document.querySelector('.tome-line').innerText.includes('grid 2x2 ratio=0.5')")
    browser.click("#compare input")
    draw(browser, "Without merging")
    assert "64 -> 32 tokens" in browser.run(SAYS)
    ratios = [read_settings(samples / f"0000{i}.png")["tome"]["ratio"] for i in (1, 2)]
    assert ratios == [0.5, None]
    browser.wait("document.querySelectorAll('#wipe img').length === 2")
    browser.wait("document.querySelectorAll('#gallery img').length === 3")

    fill(browser, W=0)
    browser.click("#draw")
    browser.wait(f"{SAYS}.includes('error: Width 0: allowed is ')")

    fill(browser, seed=1)
    browser.choose_file("#dropped input[type=file]", samples / "00001.png")
    browser.wait(f"{SAYS}.includes('These are the settings of 00001.png')")
    browser.wait("document.querySelector('#steps input').value === '3'")
    browser.wait("document.querySelector('#seed input').value === '7'")

    browser.click("#any-seed")
    browser.wait("document.querySelector('#seed input').value === '-1'")
    browser.click("#same-seed")
    browser.wait("document.querySelector('#seed input').value === '7'")

    browser.click("#send")
    browser.wait("document.querySelector('#init img')")
    browser.click("#compare input")
    browser.key("Enter", control=True)
    browser.wait(f"ldm.newest() === 3 && {SAYS}.includes('00003.png')")
    assert "init_img" in read_settings(samples / "00003.png")

    for width in (1100, 390):
        browser.resize(width, 800)
        assert browser.run("document.documentElement.scrollWidth - innerWidth") <= 0

    for path in ("/etc/passwd", "..%2F..%2Fetc%2Fpasswd", str(SCRIPT), f"{tmp_path}/tiny.yaml"):
        for route in ("gradio_api/file=", "live/picture/", "live/about/"):
            status = f"fetch('{server}{route}{path}').then(answer => answer.status)"
            assert browser.run(status) in (403, 404), path
    browser.errors.clear()  # those refusals


def test_jobs_outlive_the_page(browser, server, tmp_path):
    fill(browser, seed=5, steps=1000)
    browser.click("#draw")
    browser.wait(f"{SAYS}.includes('step ')")
    for seed in (6, 7):
        fill(browser, seed=seed)
        browser.click("#draw")
        browser.wait(f"{SAYS}.includes('(seed {seed})')")

    open_page(browser, server)
    browser.wait(f"{SAYS}.includes('step ') && {SAYS}.includes('2 waiting')")
    browser.wait("document.querySelector('#view img')?.src.includes('live/preview/')")
    browser.wait("document.querySelector('#steps input')?.value === '1000'")

    browser.click("#waiting button")  # the first in line
    browser.wait(f"!{SAYS}.includes('(seed 6)')")
    browser.click("#stop")
    browser.wait(f"{SAYS}.includes('Seed 7')")
    browser.click("#stop")
    browser.wait(f"{SAYS}.includes('Stopped')")
    assert not (tmp_path / "out" / "samples").exists()
    left = [path for path in tmp_path.glob("ldm-webui-*/**/*") if path.is_file()]
    assert left == []  # neither previews nor anything else


def test_a_part_of_a_picture_is_painted_and_a_grid_compares(browser, tmp_path):
    fill(browser, steps=2)
    draw(browser, "Without merging")
    browser.click("#send-paint")
    browser.wait("document.querySelector('#brush') && !document.querySelector('#brush').hidden")
    browser.wait("document.querySelector('#brush-mask').getBoundingClientRect().width > 100")
    browser.drag("#brush-mask", (0.1, 0.5), (0.9, 0.5))
    draw(browser, "00001.png")
    browser.wait("document.querySelectorAll('#gallery img').length === 2")

    tab = "[...document.querySelectorAll('#tabs [role=tab]')]"
    browser.run(f"{tab}.find(one => one.innerText.includes('Compare')).click()")
    browser.type("#rows textarea, #rows input", "none, quality")
    draw(browser, "grid-0000.png")
    assert (tmp_path / "out" / "grid-0000.png").exists()
