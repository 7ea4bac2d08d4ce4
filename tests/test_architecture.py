"""The import rules of the package: one direction, and heavy libraries behind few doors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each layer may import those before it. A module belongs to the layer with the longest match.
LAYERS = [
    [
        *("ldm.errors", "ldm.text", "ldm.checkpoint.files", "ldm.checkpoint.pickles"),
        # what names and metadata say
        *("ldm.checkpoint.keys", "ldm.checkpoint.prediction", "ldm.checkpoint.vae"),
    ],
    ["ldm.util", "ldm.modules.tome", "ldm.models.diffusion.schedule", "ldm.lr_scheduler"],
    ["ldm.numbered"],
    ["ldm.modules", "ldm.images", "ldm.demo.scenes", "ldm.demo.landscape", "ldm.demo.drawing"],
    [  # samplers know a model by its protocol alone; the model draws samples to show its progress
        "ldm.models.diffusion.guidance",
        "ldm.models.diffusion.sampler",
        "ldm.models.diffusion.ddim",
        "ldm.models.diffusion.plms",
        "ldm.models.diffusion.dpm_solver",
        "ldm.models.diffusion.euler",
        "ldm.models.diffusion.heun",
        "ldm.models.diffusion.dpmpp_sde",
        "ldm.models.diffusion.unipc",
        "ldm.models.diffusion.lcm",
    ],
    ["ldm.models", "ldm.models.diffusion.ddpm", "ldm.data"],
    ["ldm.config", "ldm.checkpoint", "ldm.addons"],
    ["ldm.infotext"],
    ["ldm.cli"],
    ["ldm.training"],
    ["ldm.canvas", "ldm.control", "ldm.sampling", "ldm.remarks"],
    ["ldm.loaded"],
    ["ldm.pipeline"],
    ["ldm.checkpoint.program", "ldm.cli.drawing"],
    ["ldm.cli.txt2img", "ldm.cli.img2img", "ldm.cli.inpaint"],
    ["ldm.demo"],
    ["ldm.evaluation", "ldm.demo.check", "ldm.demo.quality", "ldm.demo.check_program"],
    ["ldm.demo.finish", "ldm.demo.make"],
    ["ldm.web"],
]
# library -> the modules and packages that may import it
DOORS = {
    "omegaconf": {"ldm.util"},
    "pytorch_lightning": {"ldm.training"},
    "PIL": {"ldm.images", "ldm.demo.signs"},
    "argparse": {"ldm.cli", "ldm.training"},
    "gradio": {"ldm.web"},
    "starlette": {"ldm.web"},
    "uvicorn": {"ldm.web"},
    "transformers": {"ldm.evaluation.appendix_f.networks"},
    "open_clip": {"ldm.evaluation.appendix_f.protocols"},
    "triton": {"ldm.modules.tome.kernels"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "ldm").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> int:
    matches = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if f"{module}.".startswith(f"{prefix}.")
    ]
    return max(matches)[1] if matches else 0


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module):
    own = layer(module)
    known = modules()
    for name in imports(modules()[module]) & set(known):
        if name in (
            "ldm",
            "ldm.models",
            "ldm.modules",
            "ldm.data",
            "ldm.models.diffusion",
            "ldm.demo",
            "ldm.cli",
            "ldm.checkpoint",
        ):
            continue  # a package's own docstring
        assert layer(name) <= own, f"{module} imports {name}, which belongs to a later layer"


@pytest.mark.parametrize("module", modules())
def test_heavy_libraries_stay_behind_their_doors(module):
    used = {name.split(".")[0] for name in imports(modules()[module])}
    for library, allowed in DOORS.items():
        is_allowed = any(f"{module}.".startswith(f"{door}.") for door in allowed)
        assert library not in used or is_allowed, f"{module} imports {library}"


@pytest.mark.parametrize(
    "module", [name for name in modules() if name.startswith("ldm.modules.tome")]
)
def test_tome_needs_torch_and_errors_alone(module):
    for name in imports(modules()[module]):
        top = name.split(".")[0]
        allowed = top in sys.stdlib_module_names or top == "torch"
        allowed |= name.startswith(("ldm.errors", "ldm.modules.tome")) or name == "ldm.modules"
        allowed |= name.startswith("triton") and module == "ldm.modules.tome.kernels"
        assert allowed, f"{module} imports {name}"


def test_drawing_needs_no_trainer():
    code = """
import sys
import ldm.pipeline, ldm.cli.txt2img, ldm.cli.img2img, ldm.cli.inpaint
from ldm.pipeline import Pipeline
Pipeline.from_checkpoint(device="cpu", dtype="float32").txt2img("hills", steps=1)
print(*sorted(name for name in sys.modules if "." not in name))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"pytorch_lightning", "lightning", "torchmetrics", "gradio", "diffusers"}
    assert not loaded & {"transformers", "open_clip", "torchvision", "kornia", "sympy"}


def test_importing_the_package_is_silent_and_draws_nothing():
    names = ", ".join(repr(name) for name in modules())
    code = f"""
import importlib, random, socket
def refuse(*a, **k): raise AssertionError("network use at import")
socket.socket.connect = refuse
import numpy as np, torch
# these draw at import; what counts is what we draw
import gradio, pytorch_lightning, torchvision
before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
for name in [{names}]:
    importlib.import_module(name)
after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
assert before == after, "importing drew a random number"
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
