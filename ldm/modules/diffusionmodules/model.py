"""Encoder and decoder of the first stage (CompVis diffusionmodules/model.py).

Module names are state-dict names. Group norms have 32 groups, as upstream, unless ``ddconfig`` says
otherwise, and eps 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.strips import in_strips


def normalize(channels: int, n_groups: int) -> nn.GroupNorm:
    """Group norm as everywhere in the first stage; ``channels`` is a multiple of ``n_groups``."""
    return nn.GroupNorm(n_groups, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class Upsample(nn.Module):
    """Nearest neighbour x2, then a convolution: (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample."""

        def layer(x: Tensor) -> Tensor:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

        return in_strips(layer, x, scale=2)


def silu(x: Tensor) -> Tensor:
    """SiLU of a map that nothing else needs, in its place where no gradient does."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Downsample(nn.Module):
    """A strided convolution that pads right and bottom only: (B, C, h, w) -> (B, C, h//2, w//2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample."""
        return in_strips(lambda x: self.conv(F.pad(x, (0, 1, 0, 1))), x, scale=0.5)


class ResnetBlock(nn.Module):
    """Two convolutions around a skip, which is a 1x1 convolution where the channels change."""

    def __init__(
        self, in_channels: int, out_channels: int, n_groups: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = normalize(in_channels, n_groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = normalize(out_channels, n_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""

        def second(h: Tensor, x: Tensor) -> Tensor:
            h = self.conv2(self.dropout(silu(h)))
            return h.add_(self.nin_shortcut(x) if self.has_shortcut else x)

        h = in_strips(lambda x: self.conv1(silu(x)), x, norm=self.norm1)
        return in_strips(second, h, x, norm=self.norm2)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int, n_groups: int) -> None:
        super().__init__()
        self.norm = normalize(channels, n_groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        normed = self.norm(x)
        q, k, v = (
            rearrange(layer(normed), "b c h w -> b 1 (h w) c").contiguous()
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(attended)


class Middle(nn.Module):
    """Residual block, attention, residual block, at the coarsest resolution."""

    def __init__(self, channels: int, n_groups: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, n_groups, dropout)
        self.attn_1 = AttnBlock(channels, n_groups)
        self.block_2 = ResnetBlock(channels, channels, n_groups, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if the level has any.

    Last comes what changes the size: ``downsample`` in the encoder, ``upsample`` in the decoder;
    at the end of these it is the identity. Both call the layers one by one. A level that called
    them would have its input in memory until its end, as the caller holds it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_blocks: int,
        n_groups: int,
        dropout: float,
        has_attn: bool,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, n_groups, dropout)
            for i in range(n_blocks)
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, n_groups) for _ in range(n_blocks * has_attn)
        )

    def layers(self) -> Iterator[nn.Module]:
        """(B, C_in, h, w) -> (B, C_out, new h, new w), in order."""
        for i, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[i]
        *_, resize = self.children()
        yield resize


class Encoder(nn.Module):
    """Pictures to the parameters of their latents.

    Args (upstream's ``ddconfig``):
        ch: channels at full resolution; ``ch_mult`` multiplies them at each level.
        num_res_blocks: residual blocks of a level.
        attn_resolutions: picture sizes, counted down from ``resolution``, with attention.
        in_channels: 3.
        z_channels: channels of the latents; twice as many come out with ``double_z``.
        norm_groups: ours; upstream always has 32. A group of a single channel loses the picture's
            mean colour, so a first stage with few channels needs fewer groups.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        in_channels: int,
        z_channels: int,
        resolution: int,
        num_res_blocks: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        double_z: bool = True,
        attn_type: str = "vanilla",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        _check_attn_type(attn_type)
        self.conv_in = conv3x3(in_channels, ch)
        widths = [ch, *(ch * m for m in ch_mult)]
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(
                widths[i],
                widths[i + 1],
                num_res_blocks,
                norm_groups,
                dropout,
                has_attn=resolution // 2**i in attn_resolutions,
            )
            is_last = i == len(ch_mult) - 1
            level.downsample = nn.Identity() if is_last else Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1], norm_groups, dropout)
        self.norm_out = normalize(widths[-1], norm_groups)
        self.conv_out = conv3x3(widths[-1], (2 if double_z else 1) * z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures in [-1, 1], (B, 3, H, W) -> (B, 2*z_channels, H/f, W/f)."""
        h = self.conv_in(x)
        for level in cast("Iterable[Level]", self.down):
            for layer in level.layers():
                h = layer(h)
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to pictures; the arguments are those of :class:`Encoder`.

    A level has one block more than in the encoder. ``up.0`` is full resolution and runs last.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        in_channels: int,
        z_channels: int,
        resolution: int,
        num_res_blocks: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        double_z: bool = True,
        attn_type: str = "vanilla",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        _check_attn_type(attn_type)
        widths = [ch * m for m in ch_mult]
        self.conv_in = conv3x3(z_channels, widths[-1])
        self.mid = Middle(widths[-1], norm_groups, dropout)
        self.up = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(
                widths[min(i + 1, len(ch_mult) - 1)],
                widths[i],
                num_res_blocks + 1,
                norm_groups,
                dropout,
                has_attn=resolution // 2**i in attn_resolutions,
            )
            level.upsample = Upsample(widths[i]) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = normalize(widths[0], norm_groups)
        self.conv_out = conv3x3(widths[0], out_ch)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> pictures, about [-1, 1], (B, 3, h*f, w*f)."""
        h = self.mid(self.conv_in(z))
        for level in reversed(cast("Sequence[Level]", self.up)):
            for layer in level.layers():
                h = layer(h)
        return in_strips(lambda h: self.conv_out(silu(h)), h, norm=self.norm_out)


def _check_attn_type(attn_type: str) -> None:
    # Upstream's memory-efficient variants have the parameters of "vanilla"; all run as one here.
    if attn_type not in ("vanilla", "vanilla-xformers"):
        raise ValueError(f"attn_type {attn_type!r} is not supported; use 'vanilla'")
