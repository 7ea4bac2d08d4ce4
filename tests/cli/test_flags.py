import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import img2img, inpaint, options, txt2img
from ldm.cli.program import run
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeWish

ROOT = Path(__file__).parents[2]


def parse(*argv):
    return txt2img.build_parser().parse_args(argv)


# --- spelling ---------------------------------------------------------------------------------


def test_upstream_s_command_line_means_what_it_meant():
    argv = (
        "--prompt x --outdir o --skip_grid --skip_save --ddim_steps 20 --plms --fixed_code "
        "--n_iter 2 --H 256 --W 128 --C 4 --f 8 --n_samples 3 --n_rows 4 --scale 5 "
        "--config c.yaml --ckpt m.ckpt --seed 1 --precision full"
    )
    args = parse(*argv.split())
    settings = options.settings(args)
    assert (settings.prompt, settings.steps, settings.sampler) == ("x", 20, "plms")
    assert (settings.n_iter, settings.n_samples, settings.seed) == (2, 3, 1)
    assert (settings.H, settings.W, settings.C, settings.f) == (256, 128, 4, 8)
    assert (settings.scale, settings.fixed_code) == (5.0, True)
    assert (args.outdir, args.skip_grid, args.skip_save, args.n_rows) == ("o", True, True, 4)
    assert (args.config, args.ckpt, args.precision) == ("c.yaml", "m.ckpt", "full")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--ddim_steps", "7"], ["--steps", "7"]),
        (["--dpm_solver"], ["--dpm"]),
        (["--from-file", "f"], ["--from_file", "f"]),
        (["--from-file", "f"], ["--from_file=f"]),
        (["--n_samples", "2"], ["--n-samples", "2"]),
        (["--tome-apply-to", "kv"], ["--tome_apply_to", "kv"]),
        (["--plms"], ["--sampler", "plms"]),
    ],
)
def test_spellings_that_mean_the_same(one, other):
    assert parse(*one) == parse(*other)


def test_a_value_that_looks_like_a_flag_s_name_is_left_alone():
    assert parse("--prompt=a-b_c=d").prompt == "a-b_c=d"


def test_what_the_model_decides_is_left_open():
    settings = options.settings(parse())
    for name in ("prompt", "steps", "sampler", "scale", "H", "W", "C", "f"):
        assert getattr(settings, name) is None
    assert (settings.n_samples, settings.n_iter, settings.seed) == (1, 1, 42)
    assert (settings.negative_prompt, settings.rng) == ("", "image")


DRAWING = ("--tome-ratio", "--tome-preset", "--no-tome", "--negative_prompt")


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        *((name, DRAWING) for name in ("txt2img", "img2img", "inpaint", "webui", "tome_grid")),
        *(("convert", ("--half",)), ("benchmark", ("--quick",)), ("appendix_f", ("--dry-run",))),
        ("train", ("key.path=value",)),
    ],
)
def test_help_comes_at_once_as_torch_is_not_imported(program, flags):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{program}.py', '--help']\n"
        f"try: runpy.run_path('scripts/{program}.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for flag in (*flags, "examples:"):
        assert flag in done.stdout


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--steps many", "invalid int value: 'many'"),
        ("--sampler spam", "invalid choice: 'spam'"),
        ("--plms --schedule karras", "schedule karras needs one of the samplers euler, euler_a"),
        ("--seed", "expected one argument"),
        ("--control x.png", "--controlnet FILE and --control PICTURE need each other"),
        ("--control_canny", "--control_canny and --control_strength need --controlnet"),
        ("--laion400m", "--laion400m is unknown: that model is not supported"),
        ("--steps 0", "steps 0: allowed is 1 to 1000"),
        ("--H 0", "H 0: allowed is 1 to 16384"),
        ("--plms --dpm_solver", "argument --dpm_solver/--dpm: not allowed with argument --plms"),
        ("--plms --sampler ddim", "argument --sampler: not allowed with argument --plms"),
        ("--plms --ddim_eta 1", "eta 1 needs the ddim sampler"),
        ("--from-file missing.txt", "missing.txt: cannot be read"),
        ("--repeat 2", "--repeat goes with --from-file"),
        ("--ckpt missing.ckpt", "--ckpt missing.ckpt: there is no such file"),
        ("--config missing.yaml", "there is no configuration 'missing.yaml'"),
        ("--device tpu", "--device tpu: allowed is auto, cpu, mps, cuda or cuda:NUMBER"),
        ("--precision full --dtype bfloat16", "leave out --dtype bfloat16"),
        ("--tome-ratio 1", "--tome-ratio 1: must be auto or a number from 0 to below 1"),
        ("--tome-ratio=-0.1", "--tome-ratio -0.1: must be auto or a number"),
        ("--tome-ratio half", "--tome-ratio half: must be auto or a number"),
        ("--tome-method pool", "--tome-method pool: must be one of bipartite"),
        ("--tome-stride 2", "--tome-stride 2: must be two whole numbers"),
        ("--tome-preset nonsense", "there is no ToMe preset 'nonsense'; known presets"),
        ("--no-tome --tome-ratio 0.5", "leave out the other --tome flags"),
        ("--hires_scale 9", "hires_scale 9.0: allowed is 1 (off) to 8"),
        ("--tome-hires-ratio 2", "--tome-hires-ratio 2: must be auto or a number"),
        ("--no-tome --tome-hires-ratio 0.5", "leave out the other --tome flags"),
        ("--outdir=", "--outdir: an empty text is no file or folder"),
        ("--lora=", "--lora: an empty text is no file or folder"),
        ("--ckpt=", "--ckpt: an empty text is no file or folder"),
        ("--n_rows -1", "--n_rows -1: allowed is 0 to"),
        ("--outdir /dev/null/x", "--outdir /dev/null/x: cannot write there"),
    ],
)
def test_bad_flags_are_one_clear_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(lambda: txt2img.main(argv.split()))
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rng upstream", "--rng upstream is one stream of noise"),
        ("--interactive", "--interactive is for a single process"),
        ("--n_samples 4096 --n_iter 1000", "processes share at most 1000000 pictures"),
    ],
)
def test_what_processes_cannot_share_is_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        txt2img.main(argv.split())
    assert list(tmp_path.iterdir()) == []


def test_outdir_is_checked_without_a_trace(tmp_path):
    options.gallery(parse("--outdir", str(tmp_path / "a" / "b")))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write there"):
        options.gallery(parse("--outdir", str(tmp_path / "file" / "b")))


def test_outdir_that_leads_nowhere_is_found_before_anything_is_drawn(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for outdir in ("link", "link/b"):
        with pytest.raises(InputError, match=r"cannot write there \(.*link is a link to nothing"):
            options.gallery(parse("--outdir", str(tmp_path / outdir)))
    (tmp_path / "samples").touch()
    with pytest.raises(InputError, match="samples: cannot write there"):
        options.gallery(parse("--outdir", str(tmp_path)))
    options.gallery(parse("--outdir", str(tmp_path), "--skip_save"))


# --- prompts and Token Merging ----------------------------------------------------------------


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a house\n\n# a comment\n  two hills \n", encoding="utf-8")
    assert options.read_prompts(path) == ("a house", "two hills")
    assert options.read_prompts(path, 2) == ("a house", "a house", "two hills", "two hills")
    settings = options.settings(parse("--from-file", str(path), "--repeat", "2", "--prompt", "x"))
    assert len(settings.prompt) == 4


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# nothing\n"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"p\.txt: there is no prompt"):
        options.read_prompts(tmp_path / "p.txt")


def test_tome_flags_become_the_keys_of_the_yaml():
    argv = (
        "--tome-method grid --tome-ratio 0.5 --tome-stride 2 4 --tome-random "
        "--tome-apply-to kv mlp --tome-max-downsample 2 --tome-similarity -0.5 "
        "--tome-proportional false"
    )
    assert options.wishes(parse(*argv.split())).tome.keys == {
        "method": "grid",
        "ratio": 0.5,
        "stride": [2, 4],
        "random": True,
        "apply_to": ["kv", "mlp"],
        "max_downsample": 2,
        "similarity": -0.5,
        "proportional": False,
    }


def test_flags_win_over_the_preset(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("method: kth\nk: 4\nmax_downsample: 2\n")
    loaded = options.wishes(parse("--tome-preset", str(preset))).tome
    assert loaded.keys == {"method": "kth", "k": 4, "max_downsample": 2}
    changed = options.wishes(parse("--tome-preset", str(preset), "--tome-k", "2")).tome
    assert changed.keys == {"method": "kth", "k": 2, "max_downsample": 2}


def test_the_second_pass_has_flags_of_its_own():
    argv = "--tome-hires window=5,ratio=0.2 --tome-hires-ratio 0.6 --tome-ratio 0.3"
    expected = {"ratio": 0.3, "hires": {"window": 5, "ratio": 0.6}}
    assert options.wishes(parse(*argv.split())).tome.keys == expected
    settings = options.settings(parse("--hires_scale", "2", "--hires_steps", "9"))
    assert (settings.hires_scale, settings.hires_steps) == (2, 9)


def test_without_tome_flags_the_yaml_decides_and_no_tome_overrules_it():
    assert options.wishes(parse()).tome == ToMeWish()
    assert options.wishes(parse("--no-tome")).tome == ToMeWish(is_off=True)


def test_precision_full_is_float32():
    assert options.model_arguments(parse("--precision", "full"))["dtype"] == "float32"
    assert options.model_arguments(parse())["dtype"] == "auto"


def test_loras_and_embeddings_are_files_with_a_weight_or_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b.pt", "c:2"):
        (tmp_path / name).touch()
    flags = ["--lora", "a.safetensors:0.6", "--lora", "b.pt", "--lora", "c:2", "--lora", "c:2:-1"]
    loras = options.model_arguments(parse(*flags, "--embedding", "b.pt"))["loras"]
    assert [(path.name, weight) for path, weight in loras] == [
        ("a.safetensors", 0.6),
        ("b.pt", 1.0),
        ("c:2", 1.0),
        ("c:2", -1.0),
    ]
    assert options.model_arguments(parse("--embedding", "b.pt"))["embeddings"] == [Path("b.pt")]
    named = options.model_arguments(parse("--embedding", "b.pt:my cat", "--vae", "b.pt"))
    assert (named["embeddings"], named["vae"]) == ([(Path("b.pt"), "my cat")], Path("b.pt"))
    for given, words in [
        (["--lora", "none.pt:0.5"], "--lora none.pt:0.5: there is no such file"),
        (["--lora", "b.pt:much"], "--lora b.pt:much: the weight 'much' is not a number"),
        (["--embedding", "none.pt"], "--embedding none.pt: there is no such file"),
        (["--embedding", "b.pt:"], "--embedding b.pt:: give a word"),
        (["--embedding=--"], "--embedding=--: '--' is not a value"),
        (["--vae", "none.pt"], "--vae none.pt: there is no such file"),
    ]:
        with pytest.raises(InputError, match=words):
            options.model_arguments(parse(*given))


def test_all_programs_take_the_shared_flags():
    shared = ["--seed", "1", "--tome-ratio", "0.5", "--steps", "3", "--dtype", "float32"]
    for program, own in ((txt2img, []), (img2img, ["--init-img", "x"]), (inpaint, [])):
        args = program.build_parser().parse_args([*shared, *own])
        assert options.settings(args).steps == 3
