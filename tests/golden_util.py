"""The reference vectors of tests/golden: reading them, and the rule that fills the weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read ``tests/golden/<name>.safetensors``: its tensors and its metadata."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def load_golden_keys(family: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names (below ``prefix``, in the stored order) and shapes of a checkpoint's tensors.

    Args:
        family: ``sd1`` or ``sd2``.
        prefix: only names that begin so are returned, without it.
    """
    entries = json.loads((GOLDEN / f"state_dict_{family}.json").read_text())
    return {
        name.removeprefix(prefix): tuple(shape)
        for name, (shape, _) in entries.items()
        if name.startswith(prefix)
    }


@torch.no_grad()
def fill_parameters(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter the value that the rule in tests/golden/README.md prescribes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim == 0:
            continue
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value /= parameter[0].numel() ** 0.5
        else:
            value = 0.1 * value + (1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(value)
    return module
