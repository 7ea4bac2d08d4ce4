"""Small models with the structure of Stable Diffusion's, and files of them as people have them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from safetensors.torch import save_file

from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.plan import BlockPlans, MergePlan
from ldm.util import instantiate_from_config
from tests.golden_util import fill_parameters

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 16,
    "legacy": False,
}
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    },
}
OPEN_CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {
        "layer": "penultimate",
        "text_config": {"width": 16, "heads": 2, "layers": 3, "embed_dim": 16},
    },
}


def tiny_config(version: int = 1, inpainting: bool = False, **params: Any) -> dict[str, Any]:
    """The configuration of a small model: f = 2, 4 latent channels, pictures of 16 x 16.

    Args:
        version: 1 or 2, as in Stable Diffusion 1 and 2.
        inpainting: with 9 input channels.
        params: further entries of ``model.params``.
    """
    heads = {"num_heads": 2}
    if version == 2:
        heads = {"num_head_channels": 16, "use_linear_in_transformer": True}
    unet = {**UNET, **heads, "in_channels": 9 if inpainting else 4}
    config = {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "timesteps": 1000,
                "image_size": 8,
                "channels": 4,
                "conditioning_key": "hybrid" if inpainting else "crossattn",
                "scale_factor": 0.18215,
                "use_ema": False,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": unet,
                },
                "first_stage_config": FIRST_STAGE,
                "cond_stage_config": OPEN_CLIP if version == 2 else CLIP,
                **params,
            },
        },
        "defaults": {"H": 16, "W": 16, "steps": 2},
    }
    return copy.deepcopy(config)


def tiny_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict for the configuration, filled by the rule of the reference vectors."""
    model = fill_parameters(instantiate_from_config(config["model"]), seed)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def files(folder: Path) -> list[str]:
    """The files in a folder and below, by their paths from there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_safetensors(
    path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write the weights flat."""
    save_file({name: t.contiguous() for name, t in weights.items()}, path, dict(metadata or {}))
    return path


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]], **metadata: str) -> Path:
    """Write a float16 safetensors file of zeros that takes no room on the disk, however large."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        span = [offset, offset + size]
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": span}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


def quiet_trainer(n_steps: int, **kwargs: Any) -> Trainer:
    """A trainer on the CPU that writes nothing and shows nothing."""
    return Trainer(
        max_steps=n_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def partition(plan: MergePlan) -> torch.Tensor:
    """For each token the first one of its group, (B, N)."""
    assert plan.groups is not None
    groups = plan.groups.view(-1, plan.n_tokens)
    return (groups[:, :, None] == groups[:, None]).int().argmax(2)


def planned(decision: Decision, tokens: torch.Tensor) -> BlockPlans:
    """Plans by comparing the tokens themselves; as logits of one head where those are wanted."""
    if decision.removed and decision.plan is None:
        metrics = [
            tokens[:, :, None] if kind.endswith("_logits") else tokens for kind in decision.metrics
        ]
        decision.plan, decision.query_plan = plan_block(decision, metrics)
    return decision.places
