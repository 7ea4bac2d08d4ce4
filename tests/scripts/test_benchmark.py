import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from ldm.errors import InputError
from ldm.evaluation.benchmark import program
from tests.tiny_models import tiny_config

ROOT = Path(__file__).parents[2]
V1 = "configs/stable-diffusion/v1-inference.yaml"
SCRIPT = ROOT / "scripts" / "benchmark.py"


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config()))
    return path


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def main(*arguments):
    program.main([str(argument) for argument in arguments])


def test_a_table_a_file_and_a_plot(tiny, tmp_path):
    out = tmp_path / "results"
    done = run(
        *("--models", tiny, "--sizes", "16,32", "--dtypes", "float32,bfloat16", "--device", "cpu"),
        *("--batch", 1, "--presets", "fast", "--ratios", "0.5", "--rounds", 1),
        *("--no-peers", "--outdir", out),
    )
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line.startswith("tiny, ")]
    assert titles == [
        f"tiny, {size}x{size}, batch 1, {dtype}, sdpa"
        for dtype in ("float32", "bfloat16")
        for size in (16, 32)
    ]
    assert "| fast, oracle |" in done.stdout
    assert "visit" in done.stderr  # the progress bar
    (path,) = out.glob("*.json")
    assert f"Results are in {path}" in done.stdout
    results = json.loads(path.read_text())
    assert len(results["rows"]) == 4 * 5
    assert all(row["median_ms"] > 0 and row["speedup"] > 0 for row in results["rows"])
    assert results["command"].startswith(f"python scripts/benchmark.py --models {tiny}")
    assert {"processor", "cores", "threads", "device"} <= set(results["machine"])
    assert {"python", "torch"} <= set(results["versions"])
    assert path.with_suffix(".png").exists() == (find_spec("matplotlib") is not None)


def test_einsum_and_nothing_but_ratios(tiny, tmp_path):
    done = run(
        *("--quick", "--models", tiny, "--sizes", 16, "--dtypes", "float32", "--device", "cpu"),
        *("--attention", "einsum", "--presets", "", "--ratios", "0.25,auto", "--rounds", 2),
        *("--no-oracles", "--no-peers", "--outdir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in found] == ["off", "ratio 0.25", "ratio auto"]
    assert {row["attention"] for row in found} == {"einsum"}
    assert [len(row["ms"]) for row in found] == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--models", "sdxl"], "--models sdxl: allowed is sd1.5, sd2.1, or a .yaml file"),
        (["--models", "none.yaml"], "there is no configuration 'none.yaml'"),
        (["--models", "configs/tome/fast.yaml"], "the configuration is no latent-diffusion model"),
        (["--models", ","], "--models: the list is empty"),
        (["--models", f"{V1},./{V1}"], "another model is called v1-inference, too"),
        (["--sizes", "512,100"], "--sizes 100: allowed are multiples of 8"),
        (["--sizes", "512,8200"], "--sizes 8200: allowed are multiples of 8 from 8 to 8192"),
        (["--batch", "0"], "--batch 0: allowed are whole numbers from 1"),
        (["--batch", "2000"], "--batch 2000: allowed are whole numbers from 1 to 1024"),
        (["--ratios", ",".join(f"0.{i}" for i in range(101, 202))], "--ratios: 101 entries"),
        (["--dtypes", "int8"], "--dtypes int8: allowed is auto, float32, bfloat16, float16"),
        (["--attention", "flash"], "--attention flash: allowed is sdpa, einsum"),
        (["--presets", "faster"], "there is no ToMe preset 'faster'; known presets: "),
        (["--presets", "trim_context"], "trim_context merges nothing, so there is nothing to"),
        (["--ratios", "0.8"], "ToMe ratio=0.8: "),
        (["--ratios", "half"], "ToMe ratio='half': must be auto or a number from 0 to below 1"),
        (["--ratios", "0"], "ratio 0 merges nothing, so there is nothing to measure"),
        (["--rounds", "0"], "--rounds 0: allowed is at least 1"),
        (["--rounds", "1001"], "--rounds 1001: allowed is at least 1, at most 1000"),
        (["--device", "tpu"], "--device tpu: allowed is auto, cpu, mps, cuda or cuda:NUMBER"),
        (["--device", "cpu", "--dtypes", "float16"], "dtype float16 is for GPUs; on the cpu use"),
        (["--outdir", "setup.py"], "--outdir setup.py: cannot write there"),
        (["--size", "512"], "unrecognized arguments: --size 512"),
    ],
)
def test_bad_values(arguments, complaint, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "ldm.evaluation.benchmark.suite.measure", None
    )  # nothing heavy comes before
    with pytest.raises(InputError) as error:
        main("--outdir", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    assert complaint in str(error.value)


def test_bad_values_end_the_program_with_one_line(tmp_path):
    done = run("--ratios", "2", "--outdir", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ToMe ratio=2: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_quick_is_small_and_flags_win(monkeypatch, tmp_path):
    scopes = []
    monkeypatch.setattr(
        "ldm.evaluation.benchmark.suite.measure", lambda scope, *_: scopes.append(scope)
    )
    main("--quick", "--device", "cpu", "--outdir", tmp_path)
    main("--quick", "--device", "cpu", "--outdir", tmp_path, "--rounds", 1, "--sizes", "1024")
    main("--device", "cpu", "--outdir", tmp_path)
    quick, changed, standard = scopes
    assert list(quick.models) == ["sd1.5"]
    assert list(quick.settings) == ["fast", "tomesd"]
    assert (quick.sizes, quick.rounds) == ([512], 3)
    assert (changed.sizes, changed.rounds) == ([1024], 1)
    assert list(standard.models) == ["sd1.5", "sd2.1"]
    assert list(standard.settings)[:3] == ["ratio 0.5", "ratio 0.75", "quality"]


def test_the_kernels_are_for_cuda(tiny, tmp_path, caplog, monkeypatch):
    scopes = []
    monkeypatch.setattr(
        "ldm.evaluation.benchmark.suite.measure", lambda scope, *_: scopes.append(scope)
    )
    main("--kernels", "--models", tiny, "--device", "cpu", "--outdir", tmp_path)
    assert not scopes[0].has_kernels
    assert "--kernels: the Triton kernels are for CUDA; their rows are left out" in caplog.text


@pytest.mark.slow  # it compiles
def test_the_suite_for_a_card_is_rehearsed_on_the_processor(tiny, tmp_path, capsys):
    flags = ("--models", tiny, "--sizes", "16", "--dtypes", "float32", "--batch", "2")
    main("--suite", "gpu", *flags, "--rounds", 1, "--device", "cpu", "--outdir", tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("tiny, 16x16, batch 2, float32, sdpa") == 3
    assert "| fast, compiled |" in printed
    assert "| ratio auto |" in printed
    assert ", graph |" not in printed
    assert ", kernels |" not in printed
    with pytest.raises(InputError, match="--suite and --quick"):
        main("--suite", "gpu", "--quick")


@pytest.mark.parametrize(
    "flags", [("--sizes", "768"), ("--dtypes", "float32"), ("--suite", "gpu"), ("--no-peers",)]
)
def test_what_counting_does_not_heed_is_refused(flags):
    with pytest.raises(InputError, match=f"counts at 512 and 1024 .*: leave out {flags[0]}$"):
        main("--count", *flags)


def test_counts_are_printed(tiny, capsys):
    main("--count", "--models", tiny, "--presets", "fast", "--ratios", "0.5")
    printed = capsys.readouterr().out
    assert "Operators dispatched with tiny in float16" in printed
    assert "| ratio 0.5 | " in printed
