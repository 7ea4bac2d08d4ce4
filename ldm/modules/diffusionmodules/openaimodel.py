"""The denoising U-Net of Stable Diffusion 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.reuse import N_SHALLOW, DeepReuse
from ldm.modules.diffusionmodules.util import (
    checkpoint,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, then a 3x3 convolution.

    Deviation: upstream always doubles, which fails where the level above has an odd size. Here the
    caller names the size; for even sizes that is the double, for odd ones the double less one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)  # state-dict name

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Enlarge x, (B, C, h, w), to (B, C, *size)."""
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2: (B, C, h, w) to (B, C, ceil(h/2), ceil(w/2))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)  # state-dict name

    def forward(self, x: Tensor) -> Tensor:
        """Halve the size of x, rounding up."""
        return self.op(x)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with the time embedding in between, plus the input.

    Args:
        channels: of the input.
        emb_channels: length of the time embedding.
        dropout: rate before the second convolution.
        out_channels: of the output.
        use_scale_shift_norm: the embedding scales and shifts the second normalisation instead of
            being added before it.
        use_checkpoint: recompute the block in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        # The four attributes below, and their order, are state-dict names.
        self.in_layers = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels),
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: features, (B, channels, h, w).
            emb: time embedding, (B, emb_channels).

        Returns:
            Features, (B, out_channels, h, w).
        """
        return checkpoint(self._forward, x, emb, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands each layer the side inputs that it takes."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """Apply the layers.

        Args:
            x: features, (B, C, h, w).
            emb: time embedding, (B, E), for residual blocks.
            context: (B, L, context_dim), for transformers.
            size: what an upsampler enlarges to.
        """
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Predict the noise (or v) of a latent picture, given the diffusion step and a context.

    All state-dict names and shapes are those of CompVis/stable-diffusion and
    Stability-AI/stablediffusion, as are the arguments, which therefore include some without effect.

    Args:
        image_size: no effect; any latent size works.
        in_channels: of the latent, with whatever is concatenated to it (4; 9 for inpainting).
        model_channels: width of the first level; a multiple of 32.
        out_channels: of the prediction.
        num_res_blocks: residual blocks a level; one number, or one for each level.
        attention_resolutions: downsampling factors at which the blocks have a transformer.
        dropout: rate inside the residual blocks.
        channel_mult: width of each level in units of model_channels.
        conv_resample: only True is supported.
        dims: only 2 is supported.
        num_classes: None, or how ``y`` enters: a number of classes, "continuous" for a single real
            number, "sequential" for a vector of length adm_in_channels.
        use_checkpoint: recompute the blocks in the backward pass.
        use_fp16: no effect: the model computes in the type of its weights. Cast it with ``.to()``.
        use_bf16: no effect, likewise.
        num_heads: attention heads of every transformer; or give num_head_channels.
        num_head_channels: channels of a head; the number of heads follows.
        num_heads_upsample: no effect.
        use_scale_shift_norm: see ResBlock.
        resblock_updown: only False is supported.
        use_new_attention_order: no effect.
        use_spatial_transformer: only True is supported.
        transformer_depth: blocks of a transformer.
        context_dim: channels of the context.
        n_embed: only None is supported.
        legacy: where num_head_channels does not divide the width, widen the heads to fill it.
        disable_self_attentions: for each level, whether its first attention reads the context.
        num_attention_blocks: for each level, how many of its residual blocks have a transformer.
        disable_middle_self_attn: like disable_self_attentions, for the middle block.
        use_linear_in_transformer: the transformers' projections are linear layers (SD 2).
        adm_in_channels: length of ``y`` for num_classes "sequential".
        tome_config: what to merge, as in the table of the README; None merges nothing.
        reuse_deep: compute the deep blocks in one of so many calls of a run; see DeepReuse.

    Attributes:
        reuse: what is kept for that.
        control: where set, called with x, timesteps and context: what is added to the result of
            each input block before it meets the output blocks, and to the middle block's.
        skip_widths: channels of the input blocks' results.
        tome: the token merger that all transformers share; not part of the state dict.

    Raises:
        InputError: an argument has a value that is not supported, or that contradicts another.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        tome_config: Mapping[str, Any] | None = None,
        reuse_deep: int = 1,
    ) -> None:
        super().__init__()
        _require("use_spatial_transformer", use_spatial_transformer, True)
        _require("conv_resample", conv_resample, True)
        _require("resblock_updown", resblock_updown, False)
        _require("dims", dims, 2)
        _require("n_embed", n_embed, None)
        if context_dim is None:
            raise InputError("UNetModel: use_spatial_transformer needs context_dim")
        if num_heads == -1 and num_head_channels == -1:
            raise InputError("UNetModel: set num_heads or num_head_channels")
        if num_heads == 0 or num_head_channels == 0:
            raise InputError("UNetModel: num_heads and num_head_channels cannot be 0")
        n_levels = len(channel_mult)
        n_blocks = (
            [num_res_blocks] * n_levels if isinstance(num_res_blocks, int) else num_res_blocks
        )
        self_attention_off = disable_self_attentions or [False] * n_levels
        for name, values in (
            ("num_res_blocks", n_blocks),
            ("num_attention_blocks", num_attention_blocks),
            ("disable_self_attentions", self_attention_off),
        ):
            if values is not None and len(values) != n_levels:
                raise InputError(
                    f"UNetModel: {name} has {len(values)} entries, channel_mult has {n_levels}"
                )

        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.reuse = DeepReuse(reuse_deep)
        self.control: Callable[[Tensor, Tensor, Tensor | None], Sequence[Tensor]] | None = None
        self.tome = TokenMerger(ToMeConfig.from_mapping(tome_config))
        emb_channels = 4 * model_channels

        def residual(ch_in: int, ch_out: int) -> ResBlock:
            return ResBlock(
                ch_in, emb_channels, dropout, ch_out, use_scale_shift_norm, use_checkpoint
            )

        def transformer(channels: int, level: int, no_self_attn: bool) -> SpatialTransformer:
            n_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            if not 1 <= n_heads <= channels:
                raise InputError(
                    f"UNetModel: num_heads {num_heads} and num_head_channels {num_head_channels} "
                    f"give {n_heads} heads to {channels} channels"
                )
            is_filled = legacy or num_head_channels == -1
            return SpatialTransformer(
                channels,
                n_heads,
                channels // n_heads if is_filled else num_head_channels,
                depth=transformer_depth,
                context_dim=context_dim,
                disable_self_attn=no_self_attn,
                use_linear=use_linear_in_transformer,
                use_checkpoint=use_checkpoint,
                tome=self.tome,
                downsample=2**level,
            )

        def has_transformer(level: int, i: int) -> bool:
            is_counted = num_attention_blocks is None or i < num_attention_blocks[level]
            return is_counted and 2**level in attention_resolutions

        # The attributes below, their order and their nesting are state-dict names.
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if num_classes is not None:
            self.label_emb = _label_embedding(num_classes, emb_channels, adm_in_channels)

        ch = model_channels
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))]
        )
        skip_channels = [ch]
        for level, mult in enumerate(channel_mult):
            for i in range(n_blocks[level]):
                layers: list[nn.Module] = [residual(ch, mult * model_channels)]
                ch = mult * model_channels
                if has_transformer(level, i):
                    layers.append(transformer(ch, level, self_attention_off[level]))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(ch)
            if level < n_levels - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch)))
                skip_channels.append(ch)

        self.middle_block = TimestepEmbedSequential(
            residual(ch, ch),
            transformer(ch, n_levels - 1, disable_middle_self_attn),
            residual(ch, ch),
        )

        self.skip_widths = tuple(skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(n_blocks[level] + 1):
                layers = [residual(ch + skip_channels.pop(), mult * model_channels)]
                ch = mult * model_channels
                if has_transformer(level, i):
                    layers.append(transformer(ch, level, self_attention_off[level]))
                if level and i == n_blocks[level]:
                    layers.append(Upsample(ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(ch),
            nn.SiLU(),
            zero_module(nn.Conv2d(ch, out_channels, 3, padding=1)),
        )
        deep = (self.input_blocks[N_SHALLOW:], self.middle_block, self.output_blocks[:-N_SHALLOW])
        self._n_deep_transformers = sum(
            isinstance(module, BasicTransformerBlock) for part in deep for module in part.modules()
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which the model computes."""
        return next(self.parameters()).dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise (or v).

        Args:
            x: noisy latents, (B, in_channels, h, w), any h and w.
            timesteps: diffusion steps, (B,), 0 to 999; fractions are allowed.
            context: text embedding, (B, L, context_dim).
            y: only with num_classes: class numbers (B,), one real number each (B, 1), or vectors
                (B, adm_in_channels).

        Returns:
            The prediction, (B, out_channels, h, w), in the type of x.

        Raises:
            ValueError: y is missing though the model has num_classes, or the other way round.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                f"y is {'missing' if y is None else 'given'}, but num_classes is "
                f"{self.num_classes!r}"
            )
        if torch.is_grad_enabled():  # in training, which some loops begin without train()
            self.tome.begin_batch()
        self.tome.begin_call(x.shape[-2], x.shape[-1], timesteps)
        dtype = self.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        if y is not None:
            emb = emb + self.label_emb(y.to(dtype) if y.is_floating_point() else y)
        if context is not None:
            context = context.to(dtype)

        # What is deep comes from the last call, where that is reused.
        skips: list[Tensor] = []
        h = x.to(dtype)
        for block in self.input_blocks[:N_SHALLOW]:
            h = block(h, emb, context)
            skips.append(h)
        deep = self.reuse.begin_call(x)
        added = [] if self.control is None else self.control(x, timesteps, context)
        if deep is None:
            for block in self.input_blocks[N_SHALLOW:]:
                h = block(h, emb, context)
                skips.append(h)
            h = self.middle_block(h, emb, context)
            if added:
                h = h + added[-1].to(dtype)
        for i, residual in zip(range(len(skips)), added, strict=False):
            skips[i] = skips[i] + residual.to(dtype)
        if deep is None:
            for block in self.output_blocks[:-N_SHALLOW]:
                h, size = _joined(h, skips)
                h = block(h, emb, context, size)
            self.reuse.keep(x, h)
        else:
            h = deep
            self.tome.skip(self._n_deep_transformers)
        for block in self.output_blocks[-N_SHALLOW:]:
            h, size = _joined(h, skips)
            h = block(h, emb, context, size)
        self.tome.end_call()
        out = self.out(h).to(x.dtype)
        self.tome.note_guidance(out)
        return out


def _joined(h: Tensor, skips: list[Tensor]) -> tuple[Tensor, torch.Size | None]:
    """Features with the last skip taken from the list, and the next one's size, if there is one."""
    h = torch.cat([h, skips.pop()], dim=1)
    return h, skips[-1].shape[-2:] if skips else None


def _require(name: str, value: object, supported: object) -> None:
    """Refuse a value of an argument that has a single supported one."""
    if value != supported:
        raise InputError(f"UNetModel: {name}={value!r} is not supported, only {supported!r} is")


def _label_embedding(num_classes: int | str, dim: int, adm_in_channels: int | None) -> nn.Module:
    """The layer that embeds ``y``; see UNetModel's num_classes."""
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, dim)
    if num_classes == "continuous":
        return nn.Linear(1, dim)
    if num_classes != "sequential":
        raise InputError(
            f"UNetModel: num_classes={num_classes!r} is neither a number, 'continuous' nor "
            "'sequential'"
        )
    if adm_in_channels is None:
        raise InputError("UNetModel: num_classes='sequential' needs adm_in_channels")
    layers = nn.Sequential(nn.Linear(adm_in_channels, dim), nn.SiLU(), nn.Linear(dim, dim))
    return nn.Sequential(layers)  # upstream nests it twice: label_emb.0.0, label_emb.0.2
