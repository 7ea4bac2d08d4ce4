"""The text halves of CLIP and OpenCLIP: transformers that see what stands before each token.

Written here because importing transformers and open_clip takes longer than drawing a small picture;
names and results are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def _embedding(n: int, width: int) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.empty(n, width), freeze=False)


def _draw(weight: Tensor, std: float) -> None:
    """Normal values; none on the meta device, where drawing imports torch's compiler: seconds."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class _ClipLayer(nn.Module):
    """Attention and two linear layers, each normalised before and added to its input."""

    def __init__(self, width: int, inner: int, heads: int, act: str) -> None:
        super().__init__()
        self.heads = heads
        self.act = ACTIVATIONS[act]
        # The names below are state-dict names.
        names = ("k_proj", "v_proj", "q_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        normed = self.layer_norm1(x)
        q, k, v = (
            rearrange(self.self_attn[name](normed), "b l (h d) -> b h l d", h=self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["out_proj"](rearrange(out, "b h l d -> b l (h d)"))
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class ClipText(nn.Module):
    """CLIP's text model, as transformers has it.

    Args:
        config: in the names of transformers' CLIPTextConfig.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, n_layers = config["hidden_size"], config["num_hidden_layers"]
        inner, heads = config["intermediate_size"], config["num_attention_heads"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": _embedding(config["vocab_size"], width),
                "position_embedding": _embedding(config["max_position_embeddings"], width),
            }
        )
        layers = (_ClipLayer(width, inner, heads, config["hidden_act"]) for _ in range(n_layers))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width)
        deep = width**-0.5 * (2 * n_layers) ** -0.5
        spread = {"embedding": 0.02, "out_proj": width**-0.5, "fc1": (2 * width) ** -0.5}
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = next((s for part, s in spread.items() if name.endswith(part)), deep)
                _draw(module.weight, std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, n_skipped: int = 0) -> Tensor:
        """Token ids, (B, L), to embeddings, (B, L, C), without the last n_skipped layers."""
        positions: Any = self.embeddings["position_embedding"]
        x = self.embeddings["token_embedding"](ids) + positions.weight[: ids.shape[1]]
        layers: Any = self.encoder["layers"]
        for layer in layers[: len(layers) - n_skipped]:
            x = layer(x)
        return self.final_layer_norm(x)


class _OpenClipLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        # The names below are state-dict names.
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor, causal: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C); causal: added to the logits, (L, L)."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=causal)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClipText(nn.Module):
    """The text half of an open_clip model.

    Args:
        config: in the names of open_clip's ``text_cfg``, and ``embed_dim``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, n_layers = config["width"], config["layers"]
        self.token_embedding = _embedding(config["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.empty(config["context_length"], width))
        layers = [_OpenClipLayer(width, config["heads"]) for _ in range(n_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(layers)})
        self.ln_final = nn.LayerNorm(width)
        # Neither of these is used for drawing, but checkpoints have both.
        self.text_projection = nn.Parameter(torch.empty(width, config["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        shallow, deep = width**-0.5, width**-0.5 * (2 * n_layers) ** -0.5
        _draw(self.token_embedding.weight, 0.02)
        _draw(self.positional_embedding, 0.01)
        _draw(self.text_projection, shallow)
        for layer in layers:
            mlp: Any = layer.mlp
            _draw(layer.attn.in_proj_weight, shallow)
            _draw(layer.attn.out_proj.weight, deep)
            _draw(mlp["c_fc"].weight, (2 * width) ** -0.5)
            _draw(mlp["c_proj"].weight, deep)

    def forward(self, ids: Tensor, n_skipped: int = 0) -> Tensor:
        """Token ids, (B, L), to embeddings, (B, L, C), without the last n_skipped layers."""
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        causal = torch.full((length, length), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        layers: Any = self.transformer["resblocks"]
        for layer in layers[: len(layers) - n_skipped]:
            x = layer(x, causal)
        return self.ln_final(x)
