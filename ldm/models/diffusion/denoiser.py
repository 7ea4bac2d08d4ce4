"""The denoising network, and how a conditioning reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.models.diffusion.captures import Captures
from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")


class DiffusionWrapper(nn.Module):
    """The denoising network, and how a conditioning reaches it.

    Args:
        diff_model_config: ``target`` and ``params`` of the network.
        conditioning_key: ``concat`` joins it to the input's channels, ``crossattn`` makes it the
            attention's context, ``adm`` a class embedding; ``hybrid`` is concat and crossattn,
            ``hybrid-adm`` and ``crossattn-adm`` likewise; None is without.

    Raises:
        InputError: the key is none of these.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            names = ", ".join(str(key) for key in CONDITIONING_KEYS)
            raise InputError(f"conditioning_key {conditioning_key!r}: choose from {names}")
        self.conditioning_key = conditioning_key
        # state-dict name
        self.diffusion_model = instantiate_from_config(diff_model_config, nn.Module)
        self.captures: Captures | None = None  # calls of the network go through it, if it is there

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """Output of the network.

        Args:
            x: noisy latents, (B, C, h, w).
            t: steps, (B,).
            c_concat: further channels, each (B, *, h, w).
            c_crossattn: contexts, each (B, L, width), joined along L; for ``adm`` the first one
                is the class.
            c_adm: class or vector, for the keys that end in -adm.

        Raises:
            ValueError: a part that the conditioning key needs is missing.
        """
        network: Any = self.diffusion_model
        if self.captures is not None and self.captures.unet is network:  # and not put in its place
            network = self.captures
        key = self.conditioning_key
        if key is None:
            return network(x, t)
        if "concat" in key or "hybrid" in key:
            x = torch.cat([x, *_given("c_concat", c_concat, key)], dim=1)
        if key == "concat":
            return network(x, t)
        crossattn = _given("c_crossattn", c_crossattn, key)
        if key == "adm":
            return network(x, t, y=crossattn[0])
        # One context stays the tensor that it is, so that the network can know it again.
        context = crossattn[0] if len(crossattn) == 1 else torch.cat(list(crossattn), dim=1)
        if key.endswith("-adm"):
            return network(x, t, context=context, y=_given("c_adm", c_adm, key))
        return network(x, t, context=context)


def _given(name: str, value: Any, key: str) -> Any:
    if value is None:
        raise ValueError(f"conditioning_key {key!r} needs {name}")
    return value
