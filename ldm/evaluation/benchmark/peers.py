"""Other ways to run the same U-Net: diffusers, with its default attention, and tomesd in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError

PACKAGES = ("diffusers", "tomesd")
TOMESD_MAX_RATIO = 0.75  # tomesd merges into one token of four


def installed() -> list[str]:
    """Which of the peers' packages can be imported."""
    return [name for name in PACKAGES if find_spec(name) is not None]


def diffusers_unet(params: Mapping[str, Any], unet: nn.Module) -> Any:
    """The same U-Net as a diffusers model, on the very tensors of ours, so at no memory.

    Every weight is one of ours of the same shape. Which of them is of no account here: weights are
    random, and only time and memory are compared.

    Args:
        params: of our U-Net's configuration.
        unet: ours.

    Raises:
        ImportError: diffusers is not there, or lacks something that it needs.
        InputError: its model of this configuration has other weights.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        peer: Any = UNet2DConditionModel(**diffusers_config(params))
    pool = defaultdict(list)
    for name, parameter in unet.named_parameters():
        pool[_kind(name, parameter)].append(parameter.data)
    try:
        weights = {name: pool[_kind(name, p)].pop() for name, p in peer.named_parameters()}
    except IndexError:
        raise InputError("its U-Net of this configuration has other weights") from None
    peer.load_state_dict(weights, assign=True)
    return peer.eval().requires_grad_(False)


def diffusers_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel for those of a UNetModel of Stable Diffusion 1 or 2."""
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    has_attention = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)]
    head_width = params.get("num_head_channels", -1)
    heads = params.get("num_heads") if head_width == -1 else [w // head_width for w in widths]
    return {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": tuple(widths),
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "attention_head_dim": heads,  # the number of heads, under the name that diffusers has
        "cross_attention_dim": params["context_dim"],
        "use_linear_projection": params.get("use_linear_in_transformer", False),
    }


@contextmanager
def diffusers_step(
    peer: Any, x: Tensor, context: Tensor, tomesd_ratio: float = 0.0
) -> Iterator[Callable[[Tensor], Any]]:
    """A step of the diffusers model as a function of the timesteps (B,), with or without tomesd."""
    if tomesd_ratio:
        import tomesd

        tomesd.apply_patch(peer, ratio=tomesd_ratio)
    try:
        yield lambda timesteps: peer(x, timesteps, context, return_dict=False)
    finally:
        if tomesd_ratio:
            tomesd.remove_patch(peer)


def _kind(name: str, parameter: Tensor) -> tuple[object, ...]:
    """What tells apart weights that cannot stand for each other."""
    return (*parameter.shape, name.rpartition(".")[2])
