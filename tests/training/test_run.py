"""The training program on tiny models: what it does, and what it refuses."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import nn

from ldm.config import load_config
from ldm.errors import InputError, OutOfMemory
from ldm.training.check import check_object, check_sections
from ldm.training.checkpoints import newest_checkpoint
from ldm.training.flags import as_bool
from ldm.training.run import main
from ldm.training.trainer import trainer_settings
from tests.tiny_models import tiny_config, tiny_weights
from tests.training.toy import diffusion_config, pictures, toy_config, train, write

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"


@pytest.fixture
def config(tmp_path):
    stage = yaml.safe_load((SCRIPT.parents[1] / "configs/demo/crops.yaml").read_text())
    ddconfig = stage["model"]["params"]["ddconfig"]
    ddconfig |= {"ch": 8, "ch_mult": [1, 1], "resolution": 16}
    stage["model"]["base_learning_rate"] = 1e-4
    loss = {"target": "ldm.models.autoencoder.ReconstructionLoss"}  # no classifier is trained here
    stage["model"]["params"]["lossconfig"] = loss
    pictures = {"n_pictures": 8, "size": 16, "crop": None}
    data = stage["data"]["params"]
    data["batch_size"] = 2
    for split in ("train", "validation"):
        data[split]["params"] |= {**pictures, "cache_dir": None}
    stage["lightning"]["trainer"] |= {"max_steps": 2, "precision": "32-true", "accelerator": "cpu"}
    stage["lightning"]["trainer"] |= {"val_check_interval": 1, "enable_progress_bar": False}
    stage["lightning"]["modelcheckpoint"] = {"params": {"every_n_train_steps": 1}}
    stage["lightning"]["callbacks"]["image_logger"]["params"]["batch_frequency"] = 2
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(stage))
    return path


def run_of(folder):
    (run,) = folder.iterdir()
    return run


def test_trains_logs_and_resumes(config, tmp_path, capsys):
    logs = tmp_path / "logs"
    arguments = ["--base", str(config), "--logdir", str(logs)]
    main([*arguments, "--train", "--name", "tiny", "--scale_lr", "false"])
    run = run_of(logs)
    assert run.name.endswith("_tiny")
    assert "Learning rate: 1.00e-04" in capsys.readouterr().out
    assert len(list((run / "configs").glob("*-project.yaml"))) == 1
    assert list((run / "images" / "train").glob("reconstructions_gs-000002_*.png"))
    assert list((run / "images" / "val").glob("inputs_gs-*.png"))
    first = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert first["global_step"] == 2

    # four steps are an epoch: the run goes on in the middle of one and ends in the next
    change = "model.base_learning_rate=0.002"
    main(["--resume", str(run), "--train", "--max_steps", "5", change])
    second = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert second["global_step"] == 5
    changed = [
        not torch.equal(first["state_dict"][name], second["state_dict"][name])
        for name in first["state_dict"]
    ]
    assert any(changed)
    stored = sorted((run / "configs").glob("*-project.yaml"))[-1]
    assert yaml.safe_load(stored.read_text())["model"]["base_learning_rate"] == 0.002


def test_without_train_the_configuration_is_shown(config, tmp_path, capsys):
    main(["--base", str(config), "--logdir", str(tmp_path / "logs"), "model.params.x=7"])
    shown = capsys.readouterr().out
    assert "x: 7" in shown
    assert "add --train to train" in shown
    assert not (tmp_path / "logs").exists()


MODEL = "model.params.unet_config.params."
NO_RUN = [  # what a user may type or write -> what the line says
    ([], "nothing to train: give --base YAML"),
    (["--resume", "nowhere"], "--resume nowhere: there is no such folder"),
    (["--name", "a", "--resume", "b"], "exclude each other"),
    (["--base", "missing.yaml"], "missing.yaml"),
    (["--base", "TOY", "--max_steps", "0"], "max_steps 0: allowed is"),
    (["--base", "TOY", "--seed", "-1"], "--seed.*allowed is 0 to"),
    (["--base", "TOY", "--name", "../x"], "--name '../x': allowed are"),
    (["--base", "TOY", "--precision", "12"], "precision 12: allowed.* 64-true, 16, 32, 64, bf16$"),
    (["--base", "TOY", "--nonsense", "1"], "unrecognized arguments: --nonsense"),
    (["--base", "TOY", "--finetune_from", ""], "--finetune_from: an empty text is no file"),
    (["--base", "TOY", "--resume", ""], "--resume: an empty text is no file"),
    (["--base", ""], "--base: an empty text is no file"),
    (["--base", "TOY", "--finetune_from", "none.ckpt"], "none.ckpt': there is no such file"),
    (["--base", "TOY", "--scale_lr", "maybe"], "neither true nor false"),
    (["--base", "TOY", "--allow-module", "a b"], "not the name of a Python module"),
    (["--base", "TOY", "extra=1"], "the configuration has no key 'extra'; it has model, data"),
    (["--base", "TOY", "data.params.batch_size=0"], "batch_size 0: allowed is 1 to 65536"),
    (["--base", "TOY", "data.params.batch_size=9"], "batch_size 9: the training set has 7"),
    (["--base", "TOY", "data.params.batch_size=two"], "batch_size 'two': must be a whole number"),
    (["--base", "TOY", "data.params.bath_size=2"], "data.params has no key 'bath_size'"),
    (["--base", "TOY", "data.params.train.params.folder=none"], "none: there is no such folder"),
    (["--base", "TOY", "data.params.train=null"], "data.params.train is missing"),
    (["--base", "TOY", "model.target=os.system"], "model: target 'os.system' is not in ldm"),
    (["--base", "TOY", "model.target=torch.nn.Identity"], "a Identity cannot be trained"),
    (["--base", "TOY", "model.params.embed_dim=0"], "embed_dim 0: allowed is 1"),
    (["--base", "TOY", "model.params.ddconfig.in_channels=5"], "the model cannot take what"),
    (["--base", "TOY", "model.params.image_key=jpg"], "gives no 'jpg', which the model reads"),
    (["--base", "TOY", "model.params.monitor=val/los"], "monitor 'val/los': choose from"),
    (["--base", "TOY", "model.base_learning_rate=0"], "base_learning_rate 0: allowed is"),
    (
        ["--base", "TOY", "model.params.lossconfig.params.kl_weight=-1"],
        "kl_weight -1: allowed is 0",
    ),
    (["--base", "TOY", "model.base_learning_rate=fast"], "base_learning_rate 'fast': must be"),
    (["--base", "TOY", "lightning.trainer.max_step=3"], "no setting 'max_step'"),
    (["--base", "TOY", "lightning.trainer=3"], "lightning.trainer 3: must be"),
    (["--base", "TOY", "lightning.modelcheckpoint.params.mode=up"], "mode 'up'|lightning.modelch"),
    (["--base", "TOY", "lightning.callbacks.x.target=ldm.data.folder.FolderPictures"], "no Callba"),
    (
        [
            *("--base", "TOY", "lightning.callbacks.x.params.monitor=val/los"),
            "lightning.callbacks.x.target=pytorch_lightning.callbacks.EarlyStopping",
        ],
        "callbacks.x.params.monitor 'val/los': choose from .*val/loss",
    ),
    (
        [
            *("--base", "TOY", "lightning.callbacks.x.target=main.ImageLogger"),
            "lightning.callbacks.x.params.log_images_kwargs.ddim_eta=-1",
        ],
        "log_images_kwargs.ddim_eta -1: allowed is 0 to 1",
    ),
    (["--base", "TOY", "--accelerator", "gpu"], "lightning.trainer"),
    (["--base", "TOY", "--val_check_interval", "99"], "training cannot begin.*less than or equal"),
]


@pytest.mark.parametrize(("arguments", "message"), NO_RUN)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path):
    toy = write(tmp_path / "toy.yaml", toy_config(pictures(tmp_path / "pictures")))
    given = [str(toy) if argument == "TOY" else argument for argument in arguments]
    with pytest.raises(InputError, match=message) as caught:
        main([*given, "--train", "--logdir", str(tmp_path / "logs")])
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "logs").glob("*"))


def test_runs_have_a_folder_with_a_name():
    with pytest.raises(InputError, match="--logdir: an empty text is no file or folder"):
        main(["--base", "x.yaml", "--train", "--logdir="])


def test_a_missing_section_is_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {target: torch.nn.Identity}\n")
    with pytest.raises(InputError, match="no section 'data'"):
        main(["--base", str(path), "--train"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"disc_num_layers": 3}, "Kernel size"), ({"disc_in_channels": 1}, "1 channels")],
)
def test_a_discriminator_that_begins_late_is_tried_before_the_run(tmp_path, changes, message):
    config = toy_config(pictures(tmp_path / "pictures"))
    params = {"disc_start": 50001, "disc_num_layers": 1, "perceptual_weight": 0, **changes}
    target = "ldm.modules.losses.LPIPSWithDiscriminator"
    config["model"]["params"]["lossconfig"] = {"target": target, "params": params}
    with pytest.raises(InputError, match=f"the model cannot take .*{message}"):
        train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    params.update(disc_num_layers=1, disc_in_channels=3)
    train(write(tmp_path / "toy.yaml", config), tmp_path / "logs", "--max_steps", "1")


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("T", True), ("0", False)])
def test_upstreams_spellings_of_truth(text, value):
    assert as_bool(text) is value


def test_upstreams_configurations_and_commands(tmp_path, capsys, caplog):
    caplog.set_level("INFO", "ldm")
    config = diffusion_config(pictures(tmp_path / "pictures"))
    config["model"]["params"] |= {"monitor": "val/loss_simple_ema", "log_every_t": 200}
    config["data"]["params"] |= {"wrap": True, "num_val_workers": 0}
    config["lightning"] |= {
        "find_unused_parameters": False,
        "logger": {"target": "pytorch_lightning.loggers.TestTubeLogger", "params": {"name": "x"}},
        "trainer": {
            "benchmark": True,
            "accelerator": "ddp",
            "gpus": "0,",
            "max_epochs": 1000,
            "precision": 32,
            "num_sanity_val_steps": 0,
            "accumulate_grad_batches": 1,
            "weights_summary": None,
            "progress_bar_refresh_rate": 0,
            "track_grad_norm": 2,
        },
        "modelcheckpoint": {"params": {"every_n_train_steps": 2, "save_top_k": -1}},
        "callbacks": {
            "metrics_over_trainsteps_checkpoint": {"params": {"every_n_train_steps": 1}},
            "learning_rate_logger": {"params": {"logging_interval": "step"}},
            "cuda_callback": {},
            "image_logger": {
                "target": "main.ImageLogger",
                "params": {
                    "batch_frequency": 2,
                    "max_images": 4,
                    "clamp": True,
                    "increase_log_steps": False,
                    "rescale": True,
                    "disabled": False,
                    "log_on_batch_idx": False,
                    "log_first_step": True,
                    "log_all_val": True,
                    "log_images_kwargs": {
                        "N": 4,
                        "ddim_steps": 2,
                        "use_ema_scope": False,
                        "inpaint": False,
                        "quantize_denoised": False,
                        "plot_progressive_rows": False,
                        "plot_diffusion_rows": False,
                        "plot_denoise_rows": False,
                        "unconditional_guidance_scale": 3.0,
                        "unconditional_guidance_label": [""],
                    },
                },
            },
        },
    }
    weights = tmp_path / "weights.ckpt"
    params = config["model"]["params"]
    torch.save({"state_dict": tiny_weights(tiny_config())}, weights)
    flags = ["--gpus", "0,", "--num_nodes", "1", "--actual_resume", str(weights), "--no_test"]
    flags += ["-p", "mine", "--max_steps", "2", "--scale_lr", "False", "-n", "up"]
    run = train(write(tmp_path / "up.yaml", config), tmp_path / "logs", *flags)
    assert "Learning rate: 1.00e-03" in capsys.readouterr().out
    said = " ".join(caplog.messages)
    assert "there is no GPU here" in said or torch.cuda.is_available()
    assert "track_grad_norm" in said
    assert "--project has no meaning here" in said
    assert "--debug" not in said
    assert "TestTubeLogger" in said
    drawn = {path.name.split("_gs-")[0] for path in (run / "images" / "train").iterdir()}
    assert drawn == {"inputs", "reconstruction", "samples", "samples_cfg_scale_3.00"}
    steps = {path.name.split("gs-")[1][:6] for path in (run / "images" / "train").iterdir()}
    assert steps == {"000001", "000002"}
    weights_of_steps = sorted((run / "checkpoints" / "trainstep_checkpoints").iterdir())
    names = [f"epoch=000000-step=00000000{step}.ckpt" for step in (1, 2)]
    assert [path.name for path in weights_of_steps] == names
    assert "optimizer_states" not in torch.load(weights_of_steps[1], weights_only=True)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    # the average begins with the weights of the file, not with those of the constructor
    name = "model.diffusion_model.out.2.weight"
    near = torch.load(weights, weights_only=True)["state_dict"][name]
    assert (state["model_ema.diffusion_modelout2weight"] - near).abs().max() < 0.01
    assert params["use_ema"]

    weights.unlink()  # a run needs what it began with no more, and may be moved
    moved = run.rename(tmp_path / "moved")
    main(["--resume", str(moved), "--train", "--max_steps", "3"])
    assert "passed over" not in " ".join(caplog.messages)
    assert newest_checkpoint(moved) == (moved / "checkpoints" / "last.ckpt", 3)


def test_too_little_memory_says_what_to_lower(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")

    toy = write(tmp_path / "toy.yaml", toy_config(pictures(tmp_path / "pictures")))
    for place in ("ldm.models.autoencoder.AutoencoderKL.forward", "pytorch_lightning.Trainer.fit"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OutOfMemory, match=r"lower data\.params\.batch_size") as caught:
                train(toy, tmp_path / "logs")
        assert caught.value.exit_code == 3
        assert not list((tmp_path / "logs").glob("*"))


def test_a_step_on_a_processor_finds_the_memory_of_the_one_before(tmp_path, monkeypatch):
    happened = []

    @contextmanager
    def kept(device):
        happened.append(device.type)
        yield
        happened.append("given back")

    monkeypatch.setattr("ldm.training.fit.reused_memory", kept)
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: happened.append("fit"))
    train(write(tmp_path / "toy.yaml", toy_config(pictures(tmp_path / "pictures"))), tmp_path)
    assert happened == ["cpu", "fit", "given back"]


def test_training_needs_nothing_of_unix(tmp_path):
    """What Windows lacks: the modules resource and fcntl, and SIGUSR1."""
    toy = write(tmp_path / "toy.yaml", toy_config(pictures(tmp_path / "pictures"), max_steps=1))
    code = f"""
import signal, sys
sys.modules["resource"] = sys.modules["fcntl"] = None
warning = signal.SIGUSR1
del signal.SIGUSR1
import ldm.training.stop
signal.SIGUSR1 = warning  # Lightning wants it where the system is not Windows
from ldm.training.run import main
from ldm.training.trainer import trainer_settings
main(["--base", {str(toy)!r}, "--train", "--logdir", {str(tmp_path / "logs")!r}])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (run_of(tmp_path / "logs") / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("name", ["crops", "unet", "text", "classifier"])
def test_the_shipped_configurations_pass_the_check(name):
    config = load_config(f"configs/demo/{name}.yaml")
    check_sections(config)
    check_object(config["model"], "model", nn.Module)
    check_object(config["data"], "data", pl.LightningDataModule)
    assert trainer_settings(config["lightning"]["trainer"], lambda: 0)


@pytest.mark.parametrize("base", ["stable-diffusion/v1-inference", "demo/unet"])
def test_the_document_s_example_trains_a_checkpoint_further(base, tmp_path):
    document = (SCRIPT.parents[1] / "docs/training.md").read_text()
    example = yaml.safe_load(document.split("```yaml\n")[1].split("```")[0])
    (bucket,) = example["data"]["params"]["train"]["params"]["buckets"]
    assert bucket["params"] == {"folder": "photos", "size": 512}
    bucket["params"] = {"folder": str(pictures(tmp_path / "photos")), "size": 16}
    example["data"]["params"]["num_workers"] = 0
    shipped = yaml.safe_load((SCRIPT.parents[1] / f"configs/{base}.yaml").read_text())
    tiny = tiny_config()
    for key in ("unet_config", "first_stage_config", "cond_stage_config"):
        shipped["model"]["params"][key] = tiny["model"]["params"][key]
    torch.save(tiny_weights(tiny), tmp_path / "tiny.ckpt")
    files = [write(tmp_path / "model.yaml", shipped), write(tmp_path / "photos.yaml", example)]
    flags = ["--finetune_from", tmp_path / "tiny.ckpt", "--logdir", tmp_path / "logs"]
    flags += ["--max_steps", 2, "--accelerator", "cpu", "--precision", "32-true"]
    main(["--train", "--base", *map(str, [*files, *flags]), "--enable_progress_bar", "false"])
    state = torch.load(run_of(tmp_path / "logs") / "checkpoints/last.ckpt", weights_only=False)
    assert state["global_step"] == 2
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(4e-5)


def test_upstreams_autoencoder_configuration_trains(tmp_path):
    config = toy_config(pictures(tmp_path / "pictures"))
    config["model"]["base_learning_rate"] = 4.5e-6
    loss = {"disc_start": 1, "kl_weight": 0.000001, "disc_weight": 0.5}
    loss |= {"disc_num_layers": 1, "disc_channels": 8, "perceptual_weight": 0.0}  # small
    config["model"]["params"] |= {
        "monitor": "val/rec_loss",
        "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss},
    }
    config["data"]["params"]["wrap"] = True
    config["lightning"]["modelcheckpoint"] = None
    config["lightning"]["trainer"] |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    image_logger = {"batch_frequency": 1000, "max_images": 8, "increase_log_steps": True}
    config["lightning"]["callbacks"] = {
        "image_logger": {"target": "main.ImageLogger", "params": image_logger}
    }
    run = train(write(tmp_path / "kl.yaml", config), tmp_path / "logs")
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert len(state["optimizer_states"]) == 2
    steps = [one["step"].item() for one in state["optimizer_states"][1]["state"].values()]
    assert set(steps) == {3}  # the discriminator begins one step later
    metrics = next(run.rglob("metrics.csv")).read_text()
    assert "train/disc_loss" in metrics


def test_a_step_of_several_batches_is_drawn_once(tmp_path):
    config = toy_config(pictures(tmp_path / "pictures", 8), max_steps=2, accumulate_grad_batches=2)
    config["lightning"]["callbacks"] = {"image_logger": {"params": {"batch_frequency": 1}}}
    config["data"]["params"].pop("validation")
    run = train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    drawn = sorted(path.name for path in (run / "images" / "train").glob("inputs*"))
    assert drawn == [f"inputs_gs-{n:06}_e-000000_b-{2 * n - 1:06}.png" for n in (1, 2)]
