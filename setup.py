"""Installation; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Read, not imported: a fresh environment has no torch yet.
INIT = (ROOT / "ldm" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0]
COMMANDS = ("txt2img", "img2img", "inpaint", "webui", "convert", "train", "benchmark")
SHIPPED = (
    "configs",
    "models/demo",
)  # carried by the package, so that the Python API works anywhere


class BuildWithShippedFiles(build_py):
    """Put configurations and demo model below the package where it is not run from a checkout."""

    def run(self) -> None:
        """Copy modules, then the shipped files to ``ldm/shipped/``."""
        super().run()
        if getattr(self, "editable_mode", False):
            return
        for folder in SHIPPED:
            for path in sorted((ROOT / folder).rglob("*")):
                if path.is_file():
                    target = Path(self.build_lib) / "ldm" / "shipped" / path.relative_to(ROOT)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(path), str(target))


WEB = ["gradio>=6.0"]
# diffusers and tomesd: merging in their U-Nets, and by their functions, is compared with ours.
TEST = [
    *("pytest>=8", "hypothesis>=6.100", "diffusers>=0.30", "tomesd>=0.1.3"),
    "scipy>=1.11",
    "webuiapi>=0.9",  # written for A1111's web UI; asks ours
    *WEB,
]

setup(
    name="stable-diffusion-tome",
    version=VERSION,
    description="Stable Diffusion 1.x and 2.x with token merging built into the attention",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={
        "ldm.evaluation": ["*.html"],
        "ldm.evaluation.appendix_f": ["*.html"],
        "ldm.web": ["*.css", "*.js"],
    },
    cmdclass={"build_py": BuildWithShippedFiles},
    entry_points={"console_scripts": [f"sd-{name} = ldm.cli.commands:{name}" for name in COMMANDS]},
    install_requires=[
        "torch>=2.5",
        "pytorch-lightning>=2.2",
        "omegaconf>=2.3",
        "PyYAML>=6.0",  # comes with omegaconf, but is imported by its own name
        "einops>=0.7",
        "transformers>=4.40",
        "open_clip_torch>=2.24",
        "kornia>=0.7",
        "pillow>=10.1",
        "numpy>=1.26",
        "safetensors>=0.4",
        "torchmetrics>=1.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "web": WEB,  # scripts/webui.py
        "bench": ["diffusers>=0.30", "tomesd>=0.1.3", "matplotlib>=3.8"],
        # plots as PNG files; FID and CLIP scores, as torchmetrics has them
        "evaluation": ["matplotlib>=3.8", "torch-fidelity>=0.3"],
        "dev": [
            *TEST,
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-tqdm",
            "types-PyYAML",
            "pre-commit>=3.7",
        ],
    },
)
