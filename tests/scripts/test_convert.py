import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.checkpoint.files import INDEX, open_state_dict
from ldm.checkpoint.vae import find_vae
from ldm.errors import InputError

ROOT = Path(__file__).parents[2]
UNET = "model.diffusion_model."
WEIGHTS = {
    f"{UNET}out.2.weight": torch.randn(4, 3),
    f"{UNET}out.2.bias": torch.randn(4),
    "model_ema.diffusion_modelout2weight": torch.randn(4, 3),
    "model_ema.diffusion_modelout2bias": torch.randn(4),
    "model_ema.num_updates": torch.tensor(5),
    "model_ema.decay": torch.tensor(0.9999),
    "betas": torch.full((3,), 0.00085),
    "cond_stage_model.transformer.encoder.x": torch.randn(2, 2).t(),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(4)[None],
}
SD2 = {
    f"{UNET}input_blocks.0.0.weight": torch.zeros(1).expand(320, 4, 3, 3),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, 1024),
}


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "convert.py", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def convert(source, *arguments, **settings):
    from ldm.checkpoint.convert import convert

    return convert(source, *arguments, **settings)


def content(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def ckpt(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": WEIGHTS, "global_step": 3}, path)
    return path


def test_command(ckpt):
    done = run(ckpt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ckpt.with_suffix('.safetensors')}: ")
    tensors, metadata = content(ckpt.with_suffix(".safetensors"))
    assert metadata == {"format": "pt"}
    assert len(tensors) == len(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        ours = name.replace("transformer.encoder", "transformer.text_model.encoder")
        assert torch.equal(tensors[ours], tensor)
        assert tensors[ours].dtype == tensor.dtype


def test_the_name_of_a_folder_has_no_ending(tmp_path, monkeypatch):
    folder = tmp_path / "sd1.5"
    folder.mkdir()
    save_file({"model.diffusion_model.out.2.bias": torch.ones(4)}, folder / "all.safetensors")
    monkeypatch.chdir(folder)
    assert convert(folder) == tmp_path / "sd1.5.safetensors"
    assert convert(".", force=True) == tmp_path / "sd1.5.safetensors"
    assert find_vae(Path(".")) is None
    weights = {f"{UNET}out.2.bias": torch.ones(4)}
    torch.save(weights, tmp_path / "sd2.1.ckpt")
    assert convert(tmp_path / "sd2.1.ckpt", split=1) == tmp_path / "sd2.1"
    with pytest.raises(InputError, match=r"parts\.safetensors is no name for a folder"):
        convert(tmp_path / "sd2.1.ckpt", tmp_path / "parts.safetensors", split=1)


def test_a_configuration_that_stays_behind_is_told(ckpt, tmp_path, capsys):
    from ldm.checkpoint.program import main

    own = ckpt.with_suffix(".yaml")
    own.write_bytes((ROOT / "configs/stable-diffusion/v1-inference.yaml").read_bytes())
    main([str(ckpt)])
    assert "stays behind: copy" not in capsys.readouterr().out
    target = tmp_path / "other" / "sd1.5.safetensors"
    target.parent.mkdir()
    main([str(ckpt), "--output", str(target)])
    assert f"copy {own} to {target.with_suffix('.yaml')}\n" in capsys.readouterr().out


def test_command_refuses_in_one_line(ckpt, tmp_path):
    target = tmp_path / "there.safetensors"
    target.write_text("precious")
    done = run(ckpt, "--output", target)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "exists; give --force" in done.stderr
    assert target.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt", "there.safetensors"]


def test_force_overwrites(ckpt, tmp_path):
    target = tmp_path / "there.safetensors"
    target.write_text("old")
    assert convert(ckpt, target, force=True) == target
    assert len(content(target)[0]) == len(WEIGHTS)


def test_half_leaves_schedule_and_integers(ckpt):
    tensors, _ = content(convert(ckpt, half=True))
    name = f"{UNET}out.2.weight"
    assert torch.equal(tensors[name], WEIGHTS[name].half())
    assert tensors["betas"].dtype == torch.float32
    assert tensors["model_ema.decay"] == WEIGHTS["model_ema.decay"]  # as a half it would be 1
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert tensors[ids].dtype == torch.int64


def test_half_cannot_hold_everything(tmp_path):
    name = f"{UNET}out.2.weight"
    torch.save({name: torch.tensor([1.0, 7e4])}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"out\.2\.weight has numbers that are too large for half"):
        convert(tmp_path / "a.ckpt", half=True)
    tensors, _ = content(convert(tmp_path / "a.ckpt"))
    assert tensors[name].tolist() == [1.0, 7e4]


def test_ema_takes_the_place_of_the_weights(ckpt):
    tensors, _ = content(convert(ckpt, ema=True))
    for part in ("weight", "bias"):
        average = WEIGHTS[f"model_ema.diffusion_modelout2{part}"]
        assert torch.equal(tensors[f"{UNET}out.2.{part}"], average)
    assert not any(name.startswith("model_ema.") for name in tensors)


def test_ema_must_be_there_and_complete(tmp_path):
    torch.save({"x": torch.ones(1), "model_ema.num_updates": torch.tensor(1)}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="has no EMA weights"):
        convert(tmp_path / "a.ckpt", ema=True)
    partial = {k: v for k, v in WEIGHTS.items() if k != "model_ema.diffusion_modelout2bias"}
    torch.save(partial, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match=r"no average of 1 U-Net tensors: .*out\.2\.bias"):
        convert(tmp_path / "b.ckpt", ema=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]


@pytest.mark.parametrize(
    ("name", "parameterization", "stated"),
    [
        ("768-v-ema", None, "v"),
        ("512-base-ema", None, "epsilon"),
        ("unknown", "v", "v"),
        ("768-v-ema", "eps", "epsilon"),
        ("unknown", None, None),
    ],
)
def test_prediction_is_recorded(tmp_path, caplog, name, parameterization, stated):
    torch.save(SD2, tmp_path / f"{name}.ckpt")
    target = convert(tmp_path / f"{name}.ckpt", parameterization=parameterization)
    assert content(target)[1].get("modelspec.prediction_type") == stated
    assert ("--parameterization" in caplog.text) == (stated is None)


def test_metadata_are_kept(tmp_path):
    metadata = {"modelspec.title": "Hills", "prediction_type": "v_prediction"}
    save_file({n: t.contiguous() for n, t in SD2.items()}, tmp_path / "a.safetensors", metadata)
    target = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", half=True)
    expected = {**metadata, "format": "pt", "modelspec.prediction_type": "v"}
    assert content(target)[1] == expected


def test_of_two_spellings_the_one_that_is_loaded_is_written(tmp_path):
    name = f"{UNET}out.2.bias"
    for order in ((name, f"module.{name}"), (f"module.{name}", name)):
        values = {name: torch.ones(4), f"module.{name}": torch.zeros(4)}
        torch.save({one: values[one] for one in order}, tmp_path / "m.ckpt")
        path = convert(tmp_path / "m.ckpt", force=True)
        assert torch.equal(content(path)[0][name], torch.ones(4))


def test_tensors_that_share_memory(tmp_path):
    both = torch.arange(10.0)
    torch.save({"a": both[:6], "b": both[3:], "c": both}, tmp_path / "m.ckpt")
    tensors, _ = content(convert(tmp_path / "m.ckpt"))
    assert torch.equal(tensors["a"], both[:6])
    assert torch.equal(tensors["b"], both[3:])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("out.ckpt", r"is no \.safetensors file"),
        ("nowhere/out.safetensors", "there is no folder"),
    ],
)
def test_bad_targets(ckpt, tmp_path, target, message):
    with pytest.raises(InputError, match=message):
        convert(ckpt, tmp_path / target)


def test_nothing_is_left_of_a_failed_write(ckpt, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        Path(path).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.checkpoint.convert.save_file", fail)
    with pytest.raises(InputError, match=r"cannot be written.*No space left"):
        convert(ckpt)
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_folder_with_files_of_limited_size(tmp_path):
    weights = {f"{UNET}layer{i}.weight": torch.randn(100, 500) for i in range(4)}
    weights |= {"first_stage_model.x": torch.randn(3), "betas": torch.zeros(3)}
    source = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights}, source)
    folder = convert(source, half=True, split=0.35)
    assert folder == tmp_path / "model"
    files = sorted(folder.glob("*.safetensors"))
    assert [path.stem for path in files] == ["first_stage", "unet-1", "unet-2"]
    assert all(path.stat().st_size <= 0.35e6 for path in files)
    stored = {k: v for path in files for k, v in content(path)[0].items()}
    assert set(stored) == set(weights) - {"betas"}
    assert all(torch.equal(stored[k], weights[k].half()) for k in stored)
    with pytest.raises(InputError, match="exists; give --force"):
        convert(source, split=0.35)
    assert set(open_state_dict(folder)) == set(stored)


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """Fewer files than before, and a stop midway: never a folder of two models."""
    for name, width in (("a", 900), ("b", 300)):
        weights = {f"{UNET}layer{i}.weight": torch.randn(100, width) for i in range(3)}
        torch.save(weights, tmp_path / f"{name}.ckpt")
    folder = convert(tmp_path / "a.ckpt", tmp_path / "m", split=0.4)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def stop(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("ldm.checkpoint.convert.save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "b.ckpt", folder, split=0.15, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    convert(tmp_path / "b.ckpt", folder, split=1, force=True)
    assert sorted(path.name for path in folder.iterdir()) == [INDEX, "unet.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt", "m"]
    (folder / "README").touch()
    with pytest.raises(InputError, match=r"holds other files, too \(README\)"):
        convert(tmp_path / "b.ckpt", folder, split=1, force=True)


def test_the_mode_is_that_of_any_new_file(ckpt):
    mask = os.umask(0)
    os.umask(mask)
    assert convert(ckpt).stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    "tensor", [torch.eye(4).to_sparse(), torch.empty(4, 3, device="meta"), torch.ones(4, 3) + 0j]
)
@pytest.mark.parametrize("name", [f"{UNET}out.2.weight", "other"])
def test_what_is_no_table_of_numbers_is_named(tmp_path, tensor, name):
    torch.save({**WEIGHTS, name: tensor}, tmp_path / "m.ckpt")
    if name == "other" and tensor.is_complex():
        assert content(convert(tmp_path / "m.ckpt"))[0]["other"].is_complex()
        return
    with pytest.raises(InputError, match=f"{name} is "):
        convert(tmp_path / "m.ckpt")


@pytest.mark.parametrize("split", [0.0, -1.0, float("nan"), float("inf")])
def test_the_size_of_files_is_a_size(ckpt, split):
    with pytest.raises(InputError, match="give the megabytes of a file"):
        convert(ckpt, split=split)
