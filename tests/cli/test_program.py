"""How programs end, in processes of their own."""

import os
import signal
import subprocess
import sys

import pytest

from ldm.cli.program import run, said_when_stopped
from ldm.errors import InputError, OutOfMemory

WAIT = """
import sys, time
from ldm.cli.program import run, said_when_stopped
def main():
    with said_when_stopped(lambda: "2 of 3 pictures are in out"):
        print("begun", flush=True)
        time.sleep(60)
"""


def python(code, **options):
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-c", code], **options)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("number", "word", "code"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "ended", 143),
        (signal.SIGHUP, "ended", 129),
    ],
)
def test_a_stopped_program_says_what_is_finished(number, word, code):
    process = python(WAIT + "run(main)")
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert errors == f"{word}: 2 of 3 pictures are in out\n"
    assert process.returncode == code


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_program_can_be_stopped_while_it_imports(tmp_path, number, code):
    (tmp_path / "slow.py").write_text("print('begun', flush=True)\nimport time; time.sleep(60)\n")
    start = "from ldm.cli.program import run_program; run_program('slow')"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = python(start, env={**os.environ, "PYTHONPATH": path})
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (errors.count("\n"), process.returncode) == (1, code)
    assert errors.endswith(": nothing was begun\n")


def test_a_reader_that_leaves_and_a_full_disk_stop_nothing(tmp_path):
    many = "def main():\n    for i in range(20000): print('line', i)\n    open('done', 'w')\n"
    code = f"from ldm.cli.program import run\n{many}run(main)"
    process = python(code, cwd=tmp_path)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            process = python(code, cwd=tmp_path, stdout=full)
        assert "standard output cannot be written (No space left" in process.communicate()[1]
        assert process.returncode == 0


def test_an_ascii_terminal_shows_what_it_can():
    code = "from ldm.cli.program import run\nrun(lambda: print('\\xfcn \\u65e5'))"
    process = python(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.communicate() == ("\\xfcn \\u65e5\n", "")


@pytest.mark.parametrize(
    ("error", "shown", "code"),
    [
        (InputError("a\nb \x1b[31m"), "error: a\\nb \\x1b[31m\n", 2),
        (InputError("x" * 5000), "error: " + "x" * 990 + "...\n", 2),
        (MemoryError(), "error: there is not enough memory: try n_samples 1", 3),
        (OutOfMemory("lower it"), "error: there is not enough memory: lower it\n", 3),
        (RuntimeError("could not create a primitive"), "error: there is not enough memory", 3),
        (KeyboardInterrupt(), "interrupted\n", 130),
    ],
)
def test_each_end_is_one_line_and_a_code(capsys, error, shown, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    told = capsys.readouterr().err
    assert (end.value.code, told.count("\n")) == (code, 1)
    assert told.startswith(shown)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_streams_and_signals_are_as_before():
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)
    run(lambda: None)
    assert before == (sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt) as stop, said_when_stopped(lambda: "so far"):
        raise KeyboardInterrupt
    assert stop.value.args == ("so far",)


def test_training_keeps_all_kernels_of_a_step():
    code = (
        "import os, sys, types; from ldm.cli import program; stand_in = types.ModuleType('x');"
        "stand_in.main = lambda: print(os.environ.get('ONEDNN_PRIMITIVE_CACHE_CAPACITY'));"
        "sys.modules['ldm.training.run'] = sys.modules['other'] = stand_in;"
        "[program.run_program(name) for name in ('ldm.training.run', 'other')]"
    )
    assert python(code).communicate()[0] == "None\n128\n"
