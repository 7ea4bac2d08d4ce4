"""The presets, each against its definition written out, and the memory that matching takes.

Where `test_unet` has published numbers of a variant, it compares with those.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.tome.config import ToMeConfig, overlay
from ldm.modules.tome.merger import TokenMerger
from tests.golden_util import fill_parameters

ROOT = Path(__file__).parents[3]
H, W, C, HEADS = 12, 16, 16, 2
N = H * W


@pytest.fixture
def block() -> BasicTransformerBlock:
    return fill_parameters(BasicTransformerBlock(C, HEADS, C // HEADS, context_dim=5), 0).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, N, C, generator=torch.Generator().manual_seed(1))


CONTEXT = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(2))


def run(
    block: BasicTransformerBlock, x: Tensor, name: str, is_guided: bool = False, **keys: Any
) -> Tensor:
    """The block with a preset, whose thresholds ``keys`` fit to these few tokens."""
    preset = yaml.safe_load((ROOT / "configs" / "tome" / f"{name}.yaml").read_text())
    merger = TokenMerger(ToMeConfig.from_mapping(overlay(preset, keys)))
    merger.is_guided = is_guided
    merging = merger.block(x, (H, W), 1)
    assert merging.removed > 0
    return block(x, CONTEXT, merging)


def averaging(metric: Tensor, src: list[int], dst: list[int]) -> Tensor:
    """(B, n, N): row j is the mean of destination j and the sources most similar to it."""
    unit = F.normalize(metric, dim=-1)
    best = (unit[:, src] @ unit[:, dst].mT).argmax(-1)
    matrix = torch.zeros(len(metric), len(dst), metric.shape[1])
    for row in range(len(metric)):
        matrix[row, range(len(dst)), dst] = 1
        matrix[row, best[row], src] = 1
    return matrix / matrix.sum(-1, keepdim=True)


def rest(block: BasicTransformerBlock, x: Tensor, attended: Tensor) -> Tensor:
    """What follows self-attention."""
    x = x + attended
    x = x + block.attn2(block.norm2(x), CONTEXT)
    return x + block.ff(block.norm3(x))


def head_mean(keys: Tensor) -> Tensor:
    return (keys[..., : C // 2] + keys[..., C // 2 :]) / 2


@pytest.mark.parametrize(
    ("name", "k"), [("birch_kth", 4), ("kv_full_keys", 4), ("birch_schedule", 5)]
)
def test_kth(block: BasicTransformerBlock, x: Tensor, name: str, k: int) -> None:
    schedule = {"k": f"tokens//{N // k}"} if name == "birch_schedule" else {}
    found = run(block, x, name, min_tokens=100, **schedule)
    normed = block.norm1(x)
    keys = block.attn1.to_k(normed)
    dst = list(range(k - 1, N, k))
    src = [i for i in range(N) if i not in dst]
    merge = averaging(keys if name == "kv_full_keys" else head_mean(keys), src, dst)
    expected = rest(block, x, block.attn1(normed, merge @ normed))
    torch.testing.assert_close(found, expected)


def test_kv_cap(block: BasicTransformerBlock, x: Tensor) -> None:
    found = run(block, x, "kv_cap", max_tokens=50)
    order = torch.rand(1, N, generator=torch.Generator().manual_seed(0)).argsort(1)[0].tolist()
    normed = block.norm1(x)
    merge = averaging(head_mean(block.attn1.to_k(normed)), order[: N - 50], order[N - 50 :])
    torch.testing.assert_close(found, rest(block, x, block.attn1(normed, merge @ normed)))


@pytest.mark.parametrize("name", ["tomesd", "comfy_q"])
def test_grid(block: BasicTransformerBlock, x: Tensor, name: str) -> None:
    """With all sources merged, so that their order does not matter."""
    found = run(block, x, name, ratio=0.75)
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(4, (H // 2, W // 2), generator=generator).flatten().tolist()
    corners = [y * W + x for y in range(0, H, 2) for x in range(0, W, 2)]
    dst = [corner + j // 2 * W + j % 2 for corner, j in zip(corners, choice, strict=True)]
    src = [i for i in range(N) if i not in dst]
    normed = block.norm1(x)
    merge = averaging(x if name == "tomesd" else normed, src, dst)
    keys = merge @ normed if name == "tomesd" else normed
    attended = (merge > 0).float().mT @ block.attn1(merge @ normed, keys)
    torch.testing.assert_close(found, rest(block, x, attended))


@pytest.mark.parametrize(("stride", "n"), [(2, 2), (4, 3)])
def test_todo_large(block: BasicTransformerBlock, x: Tensor, stride: int, n: int) -> None:
    rules = [{"min_tokens": 10 if n == 3 else 10_000, "stride": [4, 4]}]
    found = run(block, x, "todo_large", rules=rules)
    normed = block.norm1(x)
    picture = normed.mT.reshape(2, C, H, W)
    small = F.interpolate(picture, size=(H // stride, W // stride), mode="nearest-exact")
    expected = rest(block, x, block.attn1(normed, small.flatten(2).mT))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "stride", "reach"), [("quality", 2, 4), ("balanced", 4, 4), ("fast", 4, 1)]
)
def test_ours(block: BasicTransformerBlock, x: Tensor, name: str, stride: int, reach: int) -> None:
    """Keys averaged to which a few queries give like logits, and attention that counts them."""
    found = run(block, x, name)
    normed = block.norm1(x)
    q, k = (
        layer(normed).view(2, N, HEADS, -1).transpose(1, 2)
        for layer in (block.attn1.to_q, block.attn1.to_k)
    )
    asking = [y * W + x for y in (1, 4, 7, 10) for x in (2, 6, 10, 14)]
    logits = k @ q[:, :, asking].mT * (C // HEADS) ** -0.5  # (B, heads, N, 16)
    logits_of_all_heads = logits.transpose(1, 2).flatten(2)
    y, x_ = torch.arange(N) // W // stride, torch.arange(N) % W // stride
    dst = [i for i in range(N) if i // W % stride == 0 and i % W % stride == 0]
    far = ((y[:, None] - y[dst]).abs() > reach) | ((x_[:, None] - x_[dst]).abs() > reach)
    apart = torch.cdist(logits_of_all_heads, logits_of_all_heads[:, dst])
    best = apart.masked_fill(far, torch.inf).argmin(-1)
    best[:, dst] = torch.arange(len(dst))
    share = logits.softmax(2).amax(3)  # the most that any of the queries pays, (B, heads, N)
    weight = (share / share.mean(2, keepdim=True)).mean(1)
    groups = F.one_hot(best, len(dst)).float().mT
    small = groups * weight[:, None] @ normed / (groups @ weight[..., None])
    size = groups.sum(-1)
    expected = rest(block, x, block.attn1(normed, small, bias=size.log()[:, None, None]))
    torch.testing.assert_close(found, expected)


MEMORY = """
import resource, torch
from ldm.config import load_preset
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merge import plan_block, plan_grid, plan_kth
from ldm.modules.tome.decision import Decision

block = BasicTransformerBlock(320, 8, 40, context_dim=768).bfloat16()

def plans(h, w, **keys):
    x, config = metric[:, : h * w], ToMeConfig.from_mapping(keys)
    decision = Decision(config, (h, w), config.removed(h, w), 320)
    return plan_block(decision, decision.metrics_of(block.attn1, block.norm1, x, x))

metric = torch.empty(2, 256 * 256, 320, dtype=torch.bfloat16).normal_(1)
plans(64, 64, ratio=0.5)  # libraries are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{call}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in KiB there")
@pytest.mark.parametrize(
    "call",
    [
        "plan_grid(metric, (256, 256), (2, 2), 32768, window=3)",
        "plan_grid(metric, (256, 256), (4, 4), 61440, window=3)",
        "plan_grid(metric[..., :16].contiguous(), (256, 256), (2, 2), 32768)",
        "plan_kth(metric, 64)",
        "plans(256, 256, ratio=0.5)",
        "plans(256, 256, **load_preset('quality'))",
        "plans(256, 256, **load_preset('balanced'))",
    ],
)
def test_matching_65536_tokens_takes_little_memory(call: str) -> None:
    """At most 100 MB; the scores of all pairs would take gigabytes."""
    script = MEMORY.format(call=call)
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert float(out.stdout) < 100
