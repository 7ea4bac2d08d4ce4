"""Matching and merging against the published implementations' numbers, and their properties."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from ldm.modules.tome.merge import (
    bipartite_soft_matching,
    bipartite_soft_matching_random2d,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)
from tests.golden_util import load_golden

GOLDEN, METADATA = load_golden("merge")
CASES = json.loads(METADATA["cases"])


def matching(case: str):
    """The pair of a golden case, from its name."""
    metric = GOLDEN["metric"]
    kind, *words = case.split("_")
    number = {word[0]: int(word[1:]) for word in words if word[1:].isdigit()}
    if kind == "bipartite":
        return bipartite_soft_matching(metric, number["r"], "cls" in words, "distill" in words)
    if kind == "kth":
        return kth_bipartite_soft_matching(metric, number["k"])
    if kind == "random":
        torch.manual_seed(int(words[-1].removeprefix("seed")))
        return random_bipartite_soft_matching(metric, number["r"])
    sx, sy = map(int, words[0].split("x"))
    generator = None
    if kind == "gridrand":
        generator = torch.Generator().manual_seed(int(words[-1].removeprefix("seed")))
    return bipartite_soft_matching_random2d(
        metric, 8, 8, sx, sy, number["r"], no_rand=generator is None, generator=generator
    )


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    merge, unmerge = matching(case)
    payload, size = GOLDEN["x"], GOLDEN["size"]
    is_ordered = not case.startswith("grid")
    names = [name for name in GOLDEN if name.startswith(case + ".")]
    assert names
    results = {
        "merged": merge(payload),
        "merged_sum": merge(payload, mode="sum"),
        "unmerged": unmerge(merge(payload)),
        "source": merge_source(merge, payload),
        "wavg": merge_wavg(merge, payload, size)[0],
        "wavg_size": merge_wavg(merge, payload, size)[1],
    }
    for name in names:
        result, expected = results[name.split(".")[1]], GOLDEN[name]
        if not is_ordered and not name.endswith(".unmerged"):
            result, expected = sort_tokens(result), sort_tokens(expected)
        torch.testing.assert_close(result, expected, msg=lambda text, name=name: f"{name}: {text}")


def sort_tokens(x: Tensor) -> Tensor:
    """Tokens in the order of their channels, for results whose order is free."""
    order = [sorted(range(x.shape[1]), key=lambda i, row=row: row[i].tolist()) for row in x]
    return torch.stack([row[o] for row, o in zip(x, order, strict=True)])
