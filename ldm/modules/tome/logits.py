"""Tokens compared by what attention makes of them: their logits with a sample of tokens.

A group of keys is exact for attention where every query gives all of them the same logit, so the
distance between two keys is taken over the logits that a few queries, spread over the picture,
give them; likewise for queries, over their logits with a few keys. The sampled logits are products
of the tokens with ``W_k^T q`` (or ``W_q^T k``), so the keys (queries) of all tokens need not be
known; and their softmax says how much a key is attended to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.tome.matching import pieces

_SIDE = 4  # rows and columns of tokens in the sample; more gained nothing on 1024 tokens


def sampled_tokens(size: tuple[int, int], device: torch.device) -> Tensor:
    """Numbers of tokens spread evenly over h * w of them, (R,)."""
    y, x = (
        (2 * torch.arange(min(_SIDE, n), device=device) + 1) * n // (2 * min(_SIDE, n))
        for n in size
    )
    return (y[:, None] * size[1] + x).flatten()


def sampled_logits(x: Tensor, asking: Tensor, asked: Tensor, heads: int, sample: Tensor) -> Tensor:
    """Attention logits of every token with the sampled tokens, less their mean over tokens.

    Args:
        x: (B, N, C) input of the attention.
        asking: (heads * d, C) weight of the projection of the sampled tokens.
        asked: (heads * d, C) weight of the projection of all tokens.
        heads: of the attention.
        sample: (R,) token numbers.

    Returns:
        (B, N, heads, R).
    """
    asking, asked = asking.to(x.dtype), asked.to(x.dtype)
    few = F.linear(x.index_select(1, sample), asking)  # (B, R, heads d)
    few = few.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)  # (B, heads, d, R)
    each = asked.unflatten(0, (heads, -1)).transpose(1, 2)  # (heads, C, d)
    directions = torch.matmul(each, few * few.shape[2] ** -0.5)  # (B, heads, C, R)
    directions = directions.transpose(1, 2).flatten(2)  # (B, C, heads R)
    mean = x.mean(1, keepdim=True) @ directions
    return torch.baddbmm(mean, x, directions, beta=-1).unflatten(2, (heads, -1))


def attention_received(logits: Tensor) -> Tensor:
    """The most attention that any of the sampled tokens pays to each token.

    Args:
        logits: (B, N, heads, R).

    Returns:
        (B, N) float32: the largest share of attention, relative to the mean over tokens, averaged
        over the heads.
    """
    received = []
    for rows in pieces(len(logits), 2 * logits[0].numel()):
        share = logits[rows].float().softmax(1).amax(3)  # (B, N, heads)
        received.append((share / share.mean(1, keepdim=True)).mean(2))
    return torch.cat(received)
