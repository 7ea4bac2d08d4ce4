"""Transformer blocks of the U-Net, with token merging built in.

Names in the state dict, and their order, are those of CompVis/stable-diffusion and
Stability-AI/stablediffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import InputError
from ldm.modules.diffusionmodules.util import zero_module
from ldm.modules.tome import whole
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.plan import NOTHING, BlockPlans, MergePlan

BACKENDS = ("sdpa", "einsum")


class GEGLU(nn.Module):
    """Linear layer with a GELU gate: (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute a * gelu(gate), both projections of x."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them: (..., dim) -> (..., dim_out)."""

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: int = 4,
        glu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = dim * mult
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to each token."""
        return self.net(x)


class ContextLinear(nn.Linear):
    """A projection of the context, made once while `remember_context` is in force.

    In a sampling run the same tensor comes in at each step; it is told by its identity. With
    gradients, and in compiled code, nothing is remembered.
    """

    _remembers = False
    _last: tuple[Tensor, Tensor] | None = None  # a context and its projection

    def forward(self, context: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, C)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._remembers:
            return super().forward(context)
        last = self._last  # looked at once: another thread may replace it
        if last is None or last[0] is not context:
            last = self._last = context, super().forward(context)
        return last[1]


def remember_context(model: nn.Module, remembers: bool = True) -> None:
    """Let a model's `ContextLinear` layers forget what they know, and remember from now on or not.

    As long as they remember, nobody may change the weights, or a context in place.
    """
    for module in model.modules():
        if isinstance(module, ContextLinear):
            module._remembers, module._last = remembers, None


def remembered(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What the `ContextLinear` layers of a model know: contexts and their projections."""
    layers = (module for module in model.modules() if isinstance(module, ContextLinear))
    return [layer._last for layer in layers if layer._last is not None]


class CrossAttention(nn.Module):
    """Multi-head attention of x to a context, or to itself.

    Attributes:
        backend: ``sdpa``, PyTorch's fused attention, or ``einsum``, which holds all logits in
            float32; `set_attention_backend` sets it in a whole model.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        projection = nn.Linear if context_dim is None else ContextLinear
        context_dim = context_dim or query_dim
        self.heads = heads
        self.scale = dim_head**-0.5  # for others' attention, as upstream has it
        self.backend = "sdpa"
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = projection(context_dim, inner, bias=False)
        self.to_v = projection(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C) queries.
            context: (B, L, D) keys and values; None: x.
            mask: (B, ...) of L booleans for each row: False keeps a key from being attended to.
            bias: added to the logits, broadcast to (B, heads, N, L); with a mask or without
                merging any, else the same for all queries, (B, 1, 1, L).
        """
        context = x if context is None else context
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.heads)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if mask is not None:
            barred = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
            barred = barred.masked_fill(~mask.bool(), -torch.finfo(q.dtype).max).flatten(1)
            bias = barred[:, None, None] if bias is None else bias + barred[:, None, None]
        bias = None if bias is None else bias.to(q.dtype)
        if self.backend != "sdpa":
            out = einsum_attention(q, k, v, bias)
        elif mask is None and bias is not None and takes_channel(q):
            out = attend_by_channel(q, k, v, bias)
        elif has_slow_backward(q, k):
            out = attend_by_products(q, k, v, bias)
        else:
            out = F.scaled_dot_product_attention(q, k, v, bias)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


TILES = (32, 64, 96, 128, 192, 256)  # channels of a head that PyTorch's flash kernels round up to


def takes_channel(q: Tensor) -> bool:
    """Whether a bias of the keys is carried as one more channel, not as a mask.

    The flash kernel takes no mask. Of a head's channels it computes as many as its tile has, so 40,
    80 and 160 of them have room for one more at no cost; 64 have not. Elsewhere a mask costs
    nothing. (Tensors on meta, by which operators are counted, stand for a card.)
    """
    size = q.shape[3] + _n_more(q.shape[3])
    tile = next((tile for tile in TILES if q.shape[3] <= tile), 0)
    return q.device.type in ("cuda", "meta") and q.dtype != torch.float32 and size <= tile


def attend_by_channel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention with a bias for each key, as a product of further channels.

    With q' = [q, 1 / scale] and k' = [k, bias], the logits scale q' k'^T are scale q k^T + bias.
    1 / scale is the sum of two channels, so that it is exact enough in half types; zeros follow, up
    to a multiple of 8 channels.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, L, d).
        bias: (B, 1, 1, L).
    """
    d, more = q.shape[3], _n_more(q.shape[3])
    ones, zeros = further_channels(d, more, q.dtype, q.device)
    twice = bias.mT.expand(-1, k.shape[1], -1, 2)
    q = torch.cat([q, ones.expand(*q.shape[:3], -1)], 3)
    k = torch.cat([k, twice, zeros.expand(*k.shape[:3], -1)], 3)
    v = F.pad(v, (0, more))
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]


def _n_more(d: int) -> int:
    """How many channels make d a multiple of 8, at least two."""
    return (d + 2 + 7) // 8 * 8 - d


def further_channels(
    d: int, more: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What `attend_by_channel` adds to q, and zeros, kept; in compiled code constants."""
    return _further_channels(d, more, dtype, device)


@lru_cache(maxsize=32)
def _further_channels(
    d: int, more: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # such tensors would not do for gradients
        ones = torch.zeros(more, dtype=torch.float64)
        ones[0] = torch.tensor(d**0.5, dtype=torch.float64).to(dtype)
        ones[1] = d**0.5 - ones[0]
        return ones.to(dtype).to(device), torch.zeros(more - 2, dtype=dtype, device=device)


def einsum_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention by its definition, softmax(q k^T / sqrt(d) + bias) v, with logits in float32.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, L, d).
        bias: broadcast to (B, heads, N, L).

    Source: CompVis attention.py; the float32 logits are those of Stability-AI, without which
    float16 overflows.
    """
    logits = torch.einsum("bhnd,bhld->bhnl", q.float() * q.shape[-1] ** -0.5, k.float())
    if bias is not None:
        logits = logits + bias
    return torch.einsum("bhnl,bhld->bhnd", logits.softmax(dim=-1).to(v.dtype), v)


FEW_KEYS = 256


def has_slow_backward(q: Tensor, k: Tensor) -> bool:
    """Whether the gradient of PyTorch's fused attention takes longer than that of its definition.

    On processors, in bfloat16 and with few keys, it takes two to ten times as long (PyTorch 2.14);
    with 1024 keys it is level.
    """
    few = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= FEW_KEYS
    return few and torch.is_grad_enabled()


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention as two products and a softmax, with logits in the tensors' own type.

    In bfloat16 the gradients' rounding errors are up to twice those of the fused kernel.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, L, d).
        bias: broadcast to (B, heads, N, L).
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    return (logits if bias is None else logits + bias).softmax(dim=-1) @ v


def set_attention_backend(model: nn.Module, name: str) -> None:
    """Choose how every `CrossAttention` of a model computes.

    Raises:
        InputError: there is no such backend.
    """
    if name not in BACKENDS:
        raise InputError(f"attention {name!r} is not one of {', '.join(BACKENDS)}")
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.backend = name


def compile_blocks(model: nn.Module) -> None:
    """Let PyTorch compile every transformer block of a model, when it is first called.

    For each size and each configuration of merging that is met, blocks are compiled anew, some 10
    to 20 seconds for each of their shapes.
    """
    limits = torch._dynamo.config
    limits.cache_size_limit = max(256, limits.cache_size_limit)  # its name in all versions
    for made_once in (whole.geometry, further_channels):  # on the processor, and copied
        torch.compiler.assume_constant_result(made_once)
    for module in model.modules():
        if isinstance(module, BasicTransformerBlock):
            module.compile(dynamic=False)  # with sizes unknown, matching takes minutes to compile


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, and feed-forward, each added to its input."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        own_dim = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, own_dim, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(
        self, x: Tensor, context: Tensor | None = None, merging: Decision | None = None
    ) -> Tensor:
        """Transform tokens.

        Args:
            x: (B, N, C).
            context: (B, L, D); None: attn2 attends to the tokens themselves.
            merging: what is merged here.
        """
        recomputes = self.checkpoint and torch.is_grad_enabled()
        # Others' code may replace _forward by a function of upstream's two arguments.
        inputs: tuple[Any, ...] = (x, context)
        if merging is not None and merging.removed:
            normed = None if recomputes or merging.is_whole_block else self.norm1(x)
            if merging.plan is None:
                with torch.no_grad():
                    # Made here, so that the recomputation in the backward pass meets the same plan;
                    # detached, or the compiler takes this norm and the recomputed one for the same.
                    tokens = x.detach() if recomputes else x
                    metrics = merging.metrics_of(self.attn1, self.norm1, tokens, normed)
                    planner = merging.planner or plan_block
                    merging.plan, merging.query_plan = planner(merging, metrics)
            inputs = (x, context, merging.places, normed)
        if recomputes:
            return checkpoint(self._forward, *inputs, use_reentrant=False)
        return self._forward(*inputs)

    def _forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        plans: BlockPlans = NOTHING,
        normed: Tensor | None = None,
    ) -> Tensor:
        """`forward`, with plans that are made, and norm1 of x, if it is known."""
        if plans.block.is_identity:
            normed = self.norm1(x) if normed is None else normed
            return self._sublayers(x, normed, context, plans)
        merged = plans.block.merge(x)
        out = self._sublayers(merged, self.norm1(merged), context, plans)
        return x + plans.block.unmerge(out - merged)

    def _sublayers(
        self, x: Tensor, normed: Tensor, context: Tensor | None, plans: BlockPlans
    ) -> Tensor:
        if self.disable_self_attn:
            x = self.attn1(normed, context) + x
        else:
            x = _attend(self.attn1, normed, None, plans.q, plans.kv, plans) + x
        image = plans.crossattn
        x = _attend(self.attn2, self.norm2(x), context, image, image, plans) + x
        return plans.mlp.unmerge(self.ff(plans.mlp.merge(self.norm3(x)))) + x


def _attend(
    attention: CrossAttention,
    x: Tensor,
    context: Tensor | None,
    queries: MergePlan,
    keys: MergePlan,
    plans: BlockPlans,
) -> Tensor:
    """Attention with merged queries and, where it is self-attention, merged keys and values."""
    merged, context, bias = plans.for_attention(x, context, queries, keys)
    # Others' code may replace forward by a function of upstream's arguments, without a bias.
    more = {} if bias is None else {"bias": bias}
    return queries.unmerge(attention(merged, context, **more))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it.

    Args:
        in_channels: channels of the map.
        n_heads, d_head: of the attention.
        depth: number of blocks.
        dropout: in training.
        context_dim: channels of the context; a list has one for each block.
        disable_self_attn: the blocks' first attention is to the context as well.
        use_linear: the projections are linear layers (SD 2), not 1x1 convolutions (SD 1).
        use_checkpoint: recompute the blocks in the backward pass, to save memory.
        tome: decides what is merged; None merges nothing.
        downsample: by how much the map is smaller than the latents, a side.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
        tome: TokenMerger | None = None,
        downsample: int = 1,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        dims = context_dim if isinstance(context_dim, Sequence) else [context_dim] * depth
        self.use_linear = use_linear
        self.tome = tome or TokenMerger()
        self.downsample = downsample
        self.has_self_attention = not disable_self_attn
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.proj_in = (
            nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                n_heads,
                d_head,
                dropout,
                dims[i],
                checkpoint=use_checkpoint,
                disable_self_attn=disable_self_attn,
            )
            for i in range(depth)
        )
        self.proj_out = zero_module(
            nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Transform a feature map (B, C, h, w), attending to a context (B, L, D)."""
        h, w = x.shape[2:]
        tokens = self.norm(x)
        tokens = tokens if self.use_linear else self.proj_in(tokens)
        tokens = rearrange(tokens, "b c h w -> b (h w) c").contiguous()
        tokens = self.proj_in(tokens) if self.use_linear else tokens
        for block in self.transformer_blocks:
            merging = self.tome.block(tokens, (h, w), self.downsample, self.has_self_attention)
            tokens = block(tokens, context, merging)
        tokens = self.proj_out(tokens) if self.use_linear else tokens
        out = rearrange(tokens, "b (h w) c -> b c h w", h=h)
        return (out if self.use_linear else self.proj_out(out)) + x
