"""Ways to merge keys and values, compared by the error of recorded self-attention.

A picture is drawn without merging, and queries, keys and values of the attention at full
resolution are kept. Each trial then groups keys and values in its way; its error is that of the
attention's output. It takes a minute where drawing pictures takes hours, and holds what was tried
and is not part of the program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.modules.attention import SpatialTransformer
from ldm.modules.tome.logits import sampled_tokens


@dataclass(frozen=True)
class Recording:
    """One self-attention.

    Attributes:
        q, k, v: (B, heads, N, d).
        hidden: the block's input, (B, N, C).
        size: h, w of the tokens.
        attended: this attention's result in the model's previous call, (B, N, C).
        predicted: what the model gave in that call, (B, N, channels); its rows are the two halves
            of guidance.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    size: tuple[int, int]
    attended: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Trial:
    """One way to merge keys and values.

    Attributes:
        stride: rows and columns of a cell, in which one token is a destination.
        window: a token looks at the destinations of so many cells a side; None at all; 0 at its
            own cell's, which is averaging without looking.
        metric: hidden, keys, whitened (keys, so that distances are mean differences of logits
            over all queries), logits (with 16 queries), or what is known from the model's
            previous call: ``attended`` or ``predicted``.
        by_distance: compare distances, not cosines.
        destination: ``first`` of its cell, the most ``attended``, the one where both halves of
            guidance differ most (``guided``), or ``adaptive``: the tenth of the cells of twice
            the stride that are least alike inside has 16 destinations, the most alike four tenths
            have one.
        refined: how often groups are made anew around their means.
        mean: plain; normed (as long as the members are on average); attended (weighted by the
            attention received, the most of 16 queries), or that ``per_head``, or by the
            ``average`` of the 16 queries.
        bias: none, log (of the size), or variance (the same, corrected to second order for the
            spread of the keys).
    """

    stride: int = 2
    window: int | None = 3
    metric: str = "logits"
    by_distance: bool = True
    destination: str = "first"
    refined: int = 0
    mean: str = "attended"
    bias: str = "log"


def trials(stride: int) -> dict[str, Trial]:
    """What is compared, for one size of cells."""

    def trial(**changes: Any) -> Trial:
        return Trial(**{"stride": stride, **changes})

    plain = {"metric": "keys", "by_distance": False, "mean": "plain"}
    return {
        "cells averaged": trial(window=0, mean="plain"),
        "hidden, cosine, 9x9": trial(**plain | {"metric": "hidden", "window": 9}),
        "keys, cosine": trial(**plain),
        "keys, cosine, sizes not counted": trial(**plain, bias="none"),
        "keys, cosine, sizes and spread counted": trial(**plain, bias="variance"),
        "keys, cosine, 9x9": trial(**plain, window=9),
        "keys, distance": trial(**plain | {"by_distance": True}),
        "keys, distance, refined": trial(**plain | {"by_distance": True}, refined=1),
        "whitened keys": trial(metric="whitened", mean="plain"),
        "logits": trial(mean="plain"),
        "logits, norm-preserving mean": trial(mean="normed"),
        "logits, mean by average attention": trial(mean="average"),
        "logits, mean by attention, each head": trial(mean="per_head"),
        "logits, mean by attention": trial(),
        "the same, most attended destination": trial(destination="attended"),
        "the same, most guided destination": trial(destination="guided"),
        "the same, cells of three sizes": trial(destination="adaptive"),
        "the same, by the last attention's result": trial(metric="attended"),
        "the same, by the last prediction": trial(metric="predicted"),
        "the same, refined": trial(refined=1),
        "the same, 5x5": trial(window=5),
        "the same, 9x9": trial(window=9),
        "the same, everywhere": trial(window=None),
    }


@contextmanager
def recording(unet: Any, calls: set[int]) -> Iterator[list[Recording]]:
    """Keep the self-attention at full resolution of some of a U-Net's calls.

    Args:
        unet: a UNetModel that merges nothing.
        calls: their numbers, from 1: each trial may look at the call before.

    Yields: a list that grows as the U-Net is called.
    """
    kept: list[Recording] = []
    n_calls = -1
    last: dict[Any, Tensor] = {}  # what each module gave when it was last called

    def count(*_: Any) -> None:
        nonlocal n_calls
        n_calls += 1

    def remember(module: Any, _: Any, output: Tensor) -> None:
        last[module] = output.float()

    def keep(transformer: SpatialTransformer, block: Any, arguments: tuple[Any, ...]) -> None:
        if n_calls in calls and transformer.downsample == 1:
            hidden, attention = arguments[0], block.attn1
            normed = block.norm1(hidden)
            q, k, v = (
                rearrange(layer(normed), "b n (h d) -> b h n d", h=attention.heads).float()
                for layer in (attention.to_q, attention.to_k, attention.to_v)
            )
            predicted = rearrange(last[unet], "b c h w -> b (h w) c")
            size = arguments[2].size
            kept.append(Recording(q, k, v, hidden.float(), size, last[attention], predicted))

    hooks = [unet.register_forward_pre_hook(count), unet.register_forward_hook(remember)]
    for module in unet.modules():
        if isinstance(module, SpatialTransformer):
            for block in module.transformer_blocks:

                def hook(block: Any, arguments: Any, transformer: Any = module) -> None:
                    keep(transformer, block, arguments)

                hooks.append(block.register_forward_pre_hook(hook))
                hooks.append(block.get_submodule("attn1").register_forward_hook(remember))
    try:
        yield kept
    finally:
        for hook_ in hooks:
            hook_.remove()


@torch.no_grad()
def error(recordings: list[Recording], trial: Trial) -> float:
    """How far the attention's output is above its error, in dB: 10 log10(|out|^2 / |error|^2)."""
    ratios = []
    for one in recordings:
        expected = F.scaled_dot_product_attention(one.q, one.k, one.v)
        wrong = (merged_attention(one, trial) - expected).square().sum((1, 2, 3))
        ratios.append(wrong / expected.square().sum((1, 2, 3)))
    return -10 * math.log10(torch.cat(ratios).mean().clamp(min=1e-12).item())


def merged_attention(one: Recording, trial: Trial) -> Tensor:
    """Attention with merged keys and values, (B, heads, N, d)."""
    logits = _logits(one)
    received = logits.softmax(2)  # (B, heads, N, R)
    weight = {"average": received.mean(3)}.get(trial.mean, received.amax(3))
    weight = weight / weight.mean(2, keepdim=True)
    shared = weight.mean(1)
    metric = _metric(one, trial.metric, logits)
    groups = _groups(one, trial, metric, shared)
    if trial.mean in ("plain", "normed"):
        weight = torch.ones_like(weight)
    elif trial.mean != "per_head":
        weight = shared[:, None].expand_as(weight)
    spread = F.one_hot(groups).float()[:, None]  # (B, 1, N, n)
    size = spread.sum(2)
    share = spread.mT * weight[:, :, None]
    share = share / share.sum(3, keepdim=True).clamp(min=1e-12)
    k, v = share @ one.k, share @ one.v
    if trial.mean == "normed":
        k, v = (_lengthened(mean, x, share) for mean, x in ((k, one.k), (v, one.v)))
    bias = torch.where(size > 0, 0.0 if trial.bias == "none" else size.log(), -math.inf)
    if trial.bias == "variance":
        apart = one.k - spread @ k
        second = one.q.mT @ one.q / one.q.shape[2] / one.q.shape[3]
        bias = bias + (share @ (apart @ second * apart).sum(3, keepdim=True))[..., 0] / 2
    bias = bias[:, :, None].expand(-1, one.q.shape[1], one.q.shape[2], -1)
    return F.scaled_dot_product_attention(one.q, k, v, bias)


def _logits(one: Recording) -> Tensor:
    few = one.q[:, :, sampled_tokens(one.size, one.q.device)]
    return one.k @ few.mT * one.q.shape[3] ** -0.5


def _metric(one: Recording, name: str, logits: Tensor) -> Tensor:
    """What is compared, (B, N, C)."""
    if name in ("hidden", "attended", "predicted"):
        return getattr(one, name)
    if name == "logits":
        return rearrange(logits, "b h n r -> b n (h r)")
    keys = one.k
    if name == "whitened":
        second = one.q.mT @ one.q / one.q.shape[2]
        keys = keys @ torch.linalg.cholesky(second + 1e-4 * torch.eye(second.shape[-1]))
    return rearrange(keys, "b h n d -> b n (h d)")


def _groups(one: Recording, trial: Trial, metric: Tensor, attended: Tensor) -> Tensor:
    """The group of each token, (B, N)."""
    (h, w), stride = one.size, trial.stride
    rows, columns = h // stride, w // stride
    y, x = torch.arange(h * w) // w // stride, torch.arange(h * w) % w // stride
    cell = y * columns + x
    if trial.window == 0:
        return cell.expand(len(metric), -1)
    members = rearrange(
        torch.arange(h * w).view(h, w), "(r s) (c t) -> (r c) (s t)", s=stride, t=stride
    )
    chosen = torch.zeros(len(metric), len(members), 1, dtype=torch.long)
    importance = {"attended": attended, "guided": _guidance(one.predicted)}.get(trial.destination)
    if importance is not None:
        chosen = importance[:, members].argmax(2, keepdim=True)
    targets = members.expand(len(metric), -1, -1).gather(2, chosen)[..., 0]
    if trial.destination == "adaptive":
        targets = _adaptive(metric, one.size, stride)
    centres = metric.gather(1, targets[..., None].expand(-1, -1, metric.shape[2]))
    reach = max(rows, columns) if trial.window is None else trial.window // 2
    far = (y[:, None] - y[targets][:, None]).abs() > reach  # (B, N, destinations)
    far |= (x[:, None] - x[targets][:, None]).abs() > reach
    there = torch.arange(targets.shape[1])

    def nearest(centres: Tensor) -> Tensor:
        if trial.by_distance:
            return torch.cdist(metric, centres).masked_fill(far, math.inf).argmin(2)
        alike = F.normalize(metric, dim=2) @ F.normalize(centres, dim=2).mT
        return alike.masked_fill(far, -math.inf).argmax(2)

    groups = nearest(centres).scatter(1, targets, there.expand(len(metric), -1))
    for _ in range(trial.refined):
        spread = F.one_hot(groups, len(there)).float()
        size = spread.sum(1)[..., None]
        centres = torch.where(size > 0, spread.mT @ metric / size.clamp(min=1), centres)
        groups = nearest(centres)
    return groups


def _guidance(predicted: Tensor) -> Tensor:
    """How far the two halves of guidance are apart at each token, (B, N)."""
    half, other = predicted.chunk(2)
    return (half - other).norm(dim=2).repeat(2, 1)


def _adaptive(metric: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Destinations, as many as cells, spread by how unlike the tokens are, (B, destinations)."""
    (h, w), wide = size, 2 * stride
    inside = rearrange(torch.arange(h * w).view(h, w), "(r s) (c t) -> (r c) (s t)", s=wide, t=wide)
    spread = metric[:, inside].var(2).sum(2)  # (B, cells of twice the stride)
    n_fine = max(1, len(inside) // 10)
    order = spread.argsort(1, descending=True)
    places = {}
    for n_each in (1, 2, 4):
        step = wide // n_each
        corners = torch.arange(0, wide, step)
        places[n_each] = inside[:, (corners[:, None] * wide + corners).flatten()]
    parts = (
        places[4][order[:, :n_fine]],
        places[2][order[:, n_fine : len(inside) - 4 * n_fine]],
        places[1][order[:, len(inside) - 4 * n_fine :]],
    )
    return torch.cat([part.flatten(1) for part in parts], 1)


def _lengthened(mean: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """A group's mean, made as long as its members are on average."""
    return F.normalize(mean, dim=3) * (share @ x.norm(dim=3, keepdim=True))
