"""What the tensors of one layer in a LoRA file add to its weight, for each kind of file.

All tensors have their stored shapes; a result has the rows of the weight, and its columns flattened
or not. On the ``meta`` device the same functions tell whether the shapes fit.

Sources: Hu et al. 2021 (arXiv 2106.09685) for LoRA; Yeh et al. 2023 (arXiv 2309.14859) for LoCon,
LoHa and LoKr; Liu et al. 2024 (arXiv 2402.09353) for DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]  # by role

# kind -> the roles of its tensors: all of these, and any of those
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "LoRA": ({"down", "up"}, {"mid"}),
    "LoHa": ({"w1_a", "w1_b", "w2_a", "w2_b"}, {"t1", "t2"}),
    "LoKr": (set(), {"k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b", "k_t2"}),
    "difference": ({"diff"}, set()),
    "bias": ({"bias"}, set()),
}
BESIDE = {"alpha", "dora", "magnitude"}
"""Roles that say how strong a change is."""


def kind_of(roles: set[str]) -> str | None:
    """The kind of change that has tensors of these roles; None where some are missing or odd."""
    roles = roles - BESIDE
    for kind, (needed, others) in KINDS.items():
        if roles and needed <= roles <= needed | others:
            is_whole = kind != "LoKr" or all(
                f"k{i}" in roles or {f"k{i}_a", f"k{i}_b"} <= roles for i in (1, 2)
            )
            return kind if is_whole else None
    return None


def rank_of(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank by which alpha is divided; None for a change that has none."""
    role = {"LoRA": ["down"], "LoHa": ["w1_b"], "LoKr": ["k2_b", "k1_b"]}.get(kind, [])
    return next((shapes[name][0] for name in role if shapes.get(name)), None)


def delta(kind: str, t: Tensors) -> Tensor:
    """What a change adds to the weight at scale 1."""
    if kind == "LoRA":
        if "mid" in t:
            return _tucker(t["mid"], t["up"].flatten(1).T, t["down"].flatten(1))
        return t["up"].flatten(1) @ t["down"].flatten(1)
    if kind == "LoHa":
        halves = (
            _tucker(t[f"t{i}"], t[f"w{i}_a"], t[f"w{i}_b"])
            if f"t{i}" in t
            else t[f"w{i}_a"] @ t[f"w{i}_b"]
            for i in (1, 2)
        )
        return math.prod(halves)  # type: ignore[return-value]
    if kind == "LoKr":
        first = t["k1"] if "k1" in t else t["k1_a"] @ t["k1_b"]
        if "k2" in t:
            second = t["k2"]
        elif "k_t2" in t:
            second = _tucker(t["k_t2"], t["k2_a"], t["k2_b"])
        else:
            second = t["k2_a"] @ t["k2_b"]
        first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
        return torch.kron(first.contiguous(), second.contiguous())  # it takes no other strides
    return t["diff" if kind == "difference" else "bias"]


def decomposed(changed: Tensor, t: Tensors) -> Tensor:
    """DoRA: a changed weight (out, in, ...) with the lengths that the file keeps apart.

    The lengths belong to rows, or, where they are (1, in, ...), to columns.
    """
    if "magnitude" in t:  # PEFT's, of rows, in one of several shapes
        length = t["magnitude"].reshape(-1, *[1] * (changed.ndim - 1))
    else:
        length = t["dora"].reshape(*t["dora"].shape, *[1] * (changed.ndim - t["dora"].ndim))
    is_of_rows = length.shape[0] == changed.shape[0]
    axes = [axis for axis in range(changed.ndim) if axis != (0 if is_of_rows else 1)]
    norm = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
    return changed * (length / norm.clamp(min=torch.finfo(torch.float32).tiny))


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Core (p, q, ...), a (p, out), b (q, in) -> (out, in, ...)."""
    return torch.einsum("p q ..., p o, q i -> o i ...", core, a, b)
