"""What is installed is what is imported, and the package carries what it needs."""

import ast
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import yaml

import ldm
from ldm.cli import commands

ROOT = Path(__file__).parents[1]
# import name -> distribution, where they differ
DISTRIBUTIONS = {
    **{"PIL": "pillow", "open_clip": "open_clip_torch", "yaml": "pyyaml"},
    "starlette": "gradio",
    "uvicorn": "gradio",
    "triton": "torch",  # whose wheels for Linux require it; elsewhere nothing imports it
}


def setup_arguments(monkeypatch) -> dict:
    recorded: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: recorded.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return recorded


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!\[ ]", requirement)[0].lower().replace("-", "_")


def imported(folder: str) -> set[str]:
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"ldm", "scripts"}


def test_environment_lists_what_setup_requires(monkeypatch):
    required = setup_arguments(monkeypatch)["install_requires"]
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(pip) == sorted([*required, "-e ."])


def test_every_import_is_required(monkeypatch):
    arguments = setup_arguments(monkeypatch)
    required = {name_of(r) for r in arguments["install_requires"]}
    extras = arguments["extras_require"]
    optional = {name_of(r) for extra in ("bench", "evaluation", "web") for r in extras[extra]}
    for name in imported("ldm") | imported("scripts"):
        distribution = DISTRIBUTIONS.get(name, name).lower()
        assert distribution in required | optional, f"{name} is imported but not required"
    for name in required:
        wanted = {DISTRIBUTIONS.get(n, n).lower() for n in imported("ldm") | imported("scripts")}
        assert name in wanted, f"{name} is required but not imported"


def test_the_package_carries_configurations_and_demo_model(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    done = subprocess.run(
        [*command, "--build-lib", str(tmp_path / "lib")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "ldm"
    for folder in ("configs", "models/demo"):
        files = [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()]
        assert files
        for path in files:
            assert (built / "shipped" / path).read_bytes() == (ROOT / path).read_bytes()
    code = "import ldm.config as c; print(c.find_config('configs/demo/unet.yaml'))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "lib", capture_output=True, text=True
    )
    assert found.stdout.strip() == str(built / "shipped/configs/demo/unet.yaml")


def test_demo_model_is_small_enough():
    sizes = [p.stat().st_size for p in (ROOT / "models/demo").rglob("*.safetensors")]
    assert max(sizes) < 16e6
    assert sum(sizes) <= 40e6


def test_the_gate_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^pip install.*pytest.*$", readme, flags=re.M)) == 1
    gate = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for check in ("README.md", '".[dev]"', "ruff check .", "ruff format --check .", '"mypy"'):
        assert check in gate


def test_the_checkers_are_pinned(monkeypatch):
    dev = setup_arguments(monkeypatch)["extras_require"]["dev"]
    pinned = dict(requirement.split("==") for requirement in dev if "==" in requirement)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    revisions = {repo["repo"].rsplit("/", 1)[1]: repo["rev"] for repo in hooks["repos"]}
    assert {"ruff", "mypy"} <= pinned.keys()
    assert revisions["ruff-pre-commit"] == f"v{pinned['ruff']}"


def test_console_commands_open_programs(monkeypatch):
    arguments = setup_arguments(monkeypatch)
    assert arguments["version"] == ldm.__version__
    opened, names = [], []
    for entry in arguments["entry_points"]["console_scripts"]:
        name, _, place = entry.partition(" = ")
        module, _, function = place.partition(":")
        assert module == commands.__name__
        command = getattr(commands, function)
        assert command.func is commands.run_program
        opened += command.args
        names.append(name)
    assert names == [
        *("sd-txt2img", "sd-img2img", "sd-inpaint", "sd-webui", "sd-convert", "sd-train"),
        "sd-benchmark",
    ]
    assert len(opened) == len(names)
    for module in opened:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.stem)
def test_scripts_are_thin_doors(script):
    text = script.read_text(encoding="utf-8")
    assert "sys.path" not in text
    assert len(text.splitlines()) <= 10
    (module,) = re.findall(r'run_program\("(.+)"\)', text)
    assert importlib.util.find_spec(module), module
