"""What only a card can show: run with ``pytest -m gpu tests/test_gpu.py``.

The processor's float32 is the measure of everything here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config import load_config, load_preset, preset_names
from ldm.evaluation.benchmark.unets import build_unet
from ldm.models.diffusion.captures import Captures
from ldm.modules.attention import BasicTransformerBlock, attend_by_channel
from ldm.modules.tome import whole
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merge import plan_grid
from ldm.pipeline import Pipeline
from ldm.settings import SAMPLERS
from tests.golden_util import fill_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
HALF = [torch.float16, torch.bfloat16]
# The largest mean difference of a block's output, of standard deviation 1, in each type.
BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
SETTINGS = {"off": {}, "ratio 0.5": {"ratio": 0.5}, **{n: load_preset(n) for n in preset_names()}}


def run_block(keys: dict[str, Any], device: str, dtype: torch.dtype) -> Tensor:
    """A block with 1024 tokens, on a device; the same weights and inputs everywhere."""
    from ldm.modules.tome.merger import TokenMerger

    block = fill_parameters(BasicTransformerBlock(80, 2, 40, context_dim=16), 0).eval()
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(2, n, c, generator=generator) for n, c in ((1024, 80), (7, 16)))
    merger = TokenMerger(ToMeConfig.from_mapping(keys))
    merger.is_guided = True
    merger.begin_call(32, 32, torch.tensor([500, 500]))
    block, x, context = (one.to(device, dtype) for one in (block, x, context))
    with torch.no_grad():
        return block(x, context, merger.block(x, (32, 32), 1)).float().cpu()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", HALF)
def test_each_setting_is_near_the_processor(name: str, dtype: torch.dtype) -> None:
    keys = {**SETTINGS[name]}
    exact, found = run_block(keys, "cpu", torch.float32), run_block(keys, "cuda", dtype)
    assert found.isfinite().all()
    assert (found - exact).abs().mean() <= 2 * BOUNDS[dtype] * exact.std()
    assert torch.equal(found, run_block(keys, "cuda", dtype))


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("r", [1500, 3072])
def test_the_groups_are_those_of_the_processor(window: int | None, r: int) -> None:
    metric = torch.randn(2, 64 * 64, 16, generator=torch.Generator().manual_seed(0))
    expected = plan_grid(metric, (64, 64), (2, 2), r, None, window)
    found = whole.plan_grid(metric.cuda(), (64, 64), (2, 2), r, None, window)
    x = torch.randn(2, 64 * 64, 3)
    back = found.unmerge(found.merge(x.cuda())).cpu()
    is_same = torch.isclose(back, expected.unmerge(expected.merge(x)), atol=1e-5).all(2)
    assert is_same.float().mean() > 0.999  # but for ties in another order of sums


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("side", "stride", "window", "r"), [(64, 4, 3, 4096), (64, 2, 9, 4096), (63, 2, 3, 1500)]
)
def test_the_kernels_make_the_groups_and_means_of_pytorch(
    dtype: torch.dtype, side: int, stride: int, window: int, r: int
) -> None:
    kernels = pytest.importorskip("ldm.modules.tome.kernels", reason="there is no package triton")
    generator = torch.Generator("cuda").manual_seed(0)
    metric = torch.randn(2, side * side, 128, generator=generator, device="cuda").to(dtype)
    x = torch.randn(2, side * side, 320, generator=generator, device="cuda").to(dtype)
    draw = torch.randint(stride**2, (side // stride,) * 2, generator=generator, device="cuda")
    args = metric, (side, side), (stride, stride), r, draw, window, True
    found, expected = kernels.plan_grid(*args), whole.plan_grid(*args)
    back, same_back = (plan.unmerge(plan.merge(x)) for plan in (found, expected))
    is_same = torch.isclose(back, same_back, atol=1e-2, rtol=1e-2).all(2)
    assert is_same.float().mean() > 0.995  # but for ties in another order of sums
    again = kernels.plan_grid(*args)
    assert torch.equal(again.groups, found.groups)
    assert torch.equal(again.merge(x), found.merge(x))


@pytest.mark.parametrize("name", ["fast", "balanced", "quality", "ratio 0.5"])
def test_a_block_with_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ldm.modules.tome.kernels", reason="there is no package triton")
    exact = run_block({**SETTINGS[name]}, "cpu", torch.float32)
    monkeypatch.setenv("TOME_MATCHING", "triton")
    found = run_block({**SETTINGS[name]}, "cuda", torch.float16)
    assert (found - exact).abs().mean() <= 2 * BOUNDS[torch.float16] * exact.std()
    assert torch.equal(found, run_block({**SETTINGS[name]}, "cuda", torch.float16))


@pytest.mark.parametrize("dtype", HALF)
def test_a_bias_as_a_channel_takes_the_flash_kernel(dtype: torch.dtype) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(2, 8, n, 40, device="cuda", dtype=dtype) for n in (512, 96, 96))
    bias = torch.randint(1, 60, (2, 1, 1, 96), device="cuda").log().to(dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = attend_by_channel(q, k, v, bias)
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.float() for t in (q, k, v, bias)))
    assert (found - exact).abs().mean() < BOUNDS[dtype]


def draw(
    path: Path,
    compile: str,
    sampler: str = "ddim",
    device: str = "cuda",
    dtype: str = "float16",
    **tome: Any,
) -> np.ndarray:
    pipeline = Pipeline.from_checkpoint(path, device=device, dtype=dtype, compile=compile)
    pipeline.set_tome(tome or False)
    return pipeline.txt2img("hills", seed=1, steps=6, scale=3.0, sampler=sampler)[0].pixels


def levels_apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.parametrize(("dtype", "levels"), [("float16", 1), ("bfloat16", 4)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_near_the_processor_and_makes_the_same_bytes_twice(
    tiny_checkpoint: Path, sampler: str, dtype: str, levels: float
) -> None:
    exact = draw(tiny_checkpoint, "no", sampler, "cpu", "float32", ratio=0.5)
    first = draw(tiny_checkpoint, "no", sampler, "cuda", dtype, ratio=0.5)
    assert levels_apart(first, exact) <= levels
    assert np.array_equal(first, draw(tiny_checkpoint, "no", sampler, "cuda", dtype, ratio=0.5))


def test_compiled_blocks_make_nearly_the_same_pixels(tiny_checkpoint: Path) -> None:
    tome = {"ratio": 0.5, "window": 3}
    compiled = draw(tiny_checkpoint, "blocks", **tome)
    assert levels_apart(compiled, draw(tiny_checkpoint, "no", **tome)) <= 1


@pytest.mark.parametrize("tome", [{}, {"ratio": 0.5}, {"ratio": 0.75, "apply_to": ["kv"]}], ids=str)
def test_graphs_make_the_same_pixels(tiny_checkpoint: Path, tome: dict) -> None:
    assert np.array_equal(
        draw(tiny_checkpoint, "graph", **tome), draw(tiny_checkpoint, "no", **tome)
    )


@torch.inference_mode()
def test_a_graph_is_the_call_that_it_replays_and_gives_its_memory_back() -> None:
    config = load_config("configs/stable-diffusion/v1-inference.yaml")
    unet = build_unet(config, torch.float16, torch.device("cuda"))
    unet.tome.configure(ToMeConfig.from_mapping(load_preset("fast")))
    x = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.float16)
    context = torch.randn(2, 77, 768, device="cuda", dtype=torch.float16)
    t = torch.tensor([500, 500], device="cuda")
    expected = unet(x, t, context)
    torch.cuda.empty_cache()
    reserved = [torch.cuda.memory_reserved()]
    captures = Captures(unet)
    for _ in range(2):
        for _ in range(4):
            assert torch.equal(captures(x, t, context), expected)
        captures.clear()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] <= reserved[0] + 2**27  # libraries keep room for the stream of captures
    assert reserved[2] <= reserved[1] + 2**24


def test_a_graph_with_the_kernels(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ldm.modules.tome.kernels", reason="there is no package triton")
    monkeypatch.setenv("TOME_MATCHING", "triton")
    tome = {"ratio": 0.75, "apply_to": ["kv"]}
    assert np.array_equal(
        draw(tiny_checkpoint, "graph", **tome), draw(tiny_checkpoint, "no", **tome)
    )


@torch.inference_mode()
def test_memory_at_2048_is_less_with_merging() -> None:
    config = load_config("configs/stable-diffusion/v1-inference.yaml")
    unet = build_unet(config, torch.float16, torch.device("cuda"))
    x = torch.randn(2, 4, 256, 256, device="cuda", dtype=torch.float16)
    context = torch.randn(2, 77, 768, device="cuda", dtype=torch.float16)
    peaks = []
    for keys in ({}, load_preset("fast")):
        unet.tome.configure(ToMeConfig.from_mapping(keys))
        torch.cuda.reset_peak_memory_stats()
        unet(x, torch.tensor([500, 500], device="cuda"), context)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0] + 2**30
