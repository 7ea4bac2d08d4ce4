"""The Triton kernels make the groups and means of PyTorch's operators, under the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config import load_preset, preset_names
from ldm.errors import InputError
from ldm.evaluation.benchmark.counts import count_block
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.tome import backend, merge, since, whole
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.plan import MergePlan
from ldm.pipeline import Pipeline
from tests.golden_util import fill_parameters
from tests.tiny_models import partition

if find_spec("triton") is None:
    pytest.skip("there is no package triton for this platform", allow_module_level=True)
from ldm.modules.tome import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, at NaN
WINDOWED = [
    name
    for name in preset_names()
    if backend.takes_kernels(ToMeConfig.from_mapping(load_preset(name)))
]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def both(metric: Tensor, *args: Any) -> tuple[MergePlan, MergePlan]:
    """The plan of the kernels, and that of PyTorch's operators."""
    found, expected = kernels.plan_grid(metric, *args), whole.plan_grid(metric, *args)
    assert isinstance(found, kernels.NearPlan)
    assert not isinstance(expected, kernels.NearPlan)
    assert found.n_kept == expected.n_kept
    return found, expected


@pytest.mark.parametrize(
    ("size", "stride", "window", "r", "n_rows", "is_drawn", "by_distance"),
    [
        ((4, 4), (2, 2), 3, 16, 2, False, True),
        ((4, 4), (2, 2), 3, 5, 2, True, False),
        ((5, 7), (2, 2), 3, 35, 1, True, True),
        ((7, 5), (2, 3), 3, 11, 1, False, True),
        ((9, 6), (4, 2), 1, 54, 1, True, False),
        ((5, 5), (2, 2), 1, 9, 1, False, True),  # those beyond the last whole cell look back
        ((12, 3), (1, 2), 5, 36, 1, False, False),
        ((1, 11), (2, 2), 3, 11, 1, False, True),
        ((18, 18), (4, 4), 9, 324, 1, False, True),
        ((4, 70), (2, 2), 3, 280, 1, True, True),  # more than one program's tokens
    ],
)
def test_the_groups_are_those_of_pytorch(
    size: tuple[int, int],
    stride: tuple[int, int],
    window: int,
    r: int,
    n_rows: int,
    is_drawn: bool,
    by_distance: bool,
) -> None:
    metric = tokens(n_rows, size[0] * size[1], 5)
    sides = [min(s, n) for s, n in zip(stride, size, strict=True)]
    shape = [n // s for s, n in zip(sides, size, strict=True)]
    draw = torch.randint(sides[0] * sides[1], shape, device=DEVICE) if is_drawn else None
    found, expected = both(metric, size, stride, r, draw, window, by_distance)
    assert torch.equal(partition(found), partition(expected))
    if r == metric.shape[1]:
        assert torch.equal(found.groups, expected.groups)


@pytest.mark.parametrize("kind", ["nan", "inf", "0"])
@pytest.mark.parametrize("by_distance", [False, True])
def test_what_is_similar_to_nothing(kind: str, by_distance: bool) -> None:
    metric = tokens(1, 24, 3)
    metric[0, [0, 2, 3, 9, 13, 20]] = float(kind)
    args = (4, 6), (2, 2), 24, None, 3
    found, expected = both(metric, *args, by_distance)
    assert torch.equal(found.groups, expected.groups)
    plain = merge.plan_grid(metric, *args, None, by_distance)
    assert torch.equal(partition(found), partition(plain))
    if not (by_distance and kind == "0"):  # where zero is a place like any other
        ranked = kernels.plan_grid(metric, (4, 6), (2, 2), 8, None, 3, by_distance)
        sizes = ranked.unmerge(ranked.sizes[..., None])[0, :, 0]
        assert (sizes[[3, 9, 13, 20]] == 1).all()


@pytest.mark.parametrize("by_distance", [False, True])
def test_of_equal_destinations_the_first_is_taken(by_distance: bool) -> None:
    metric = torch.ones(1, 36, 2, device=DEVICE)
    metric[0, ::5] = torch.tensor([1.0, -1.0], device=DEVICE)
    found, _ = both(metric, (6, 6), (2, 2), 36, None, 3, by_distance)
    expected = merge.plan_grid(metric, (6, 6), (2, 2), 36, None, 3, None, by_distance)
    assert torch.equal(partition(found), partition(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    metric = tokens(1, 16, 40).to(dtype)
    found, expected = both(metric, (4, 4), (2, 2), 16, None, 3, True)
    assert torch.equal(found.groups, expected.groups)
    x = tokens(1, 16, 70, seed=1).to(dtype)  # more than one program's channels
    merged = found.merge(x)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected.merge(x))


def test_means_sums_and_sizes() -> None:
    found, expected = both(tokens(2, 20, 3), (4, 5), (2, 2), 20, None, 3, False)
    x, weights = tokens(2, 20, 6, seed=1), tokens(2, 20, seed=2).abs()
    weights[0, 3], weights[1, 5] = float("nan"), -1
    assert torch.equal(found.sizes, expected.sizes)
    assert torch.equal(found.log_size(), expected.log_size())
    merged = found.merge(x)
    assert torch.equal(merged, found.merge(x))
    torch.testing.assert_close(merged, expected.merge(x))
    torch.testing.assert_close(found.merge(x, "sum"), expected.merge(x, "sum"))
    heavy = found.weighted(weights)
    torch.testing.assert_close(heavy.merge(x), expected.weighted(weights).merge(x))
    assert torch.equal(found.unmerge(merged), expected.unmerge(merged))
    with pytest.raises(ValueError, match="this plan is for tensors of shape"):
        found.merge(x[:1])


def test_what_the_kernels_do_not_add_up_is_added_up_in_order() -> None:
    found, expected = both(tokens(1, 16, 3), (4, 4), (2, 2), 16, None, 3, False)
    x = tokens(1, 16, 4, seed=1)
    for mode in ("amax", "prod"):
        assert torch.equal(found.merge(x, mode), expected.merge(x, mode))
    assert torch.equal(found.merge(x.long()), expected.merge(x.long()))
    assert torch.equal(found.merge(x.double()), expected.merge(x.double()))
    norm = since.NormPlan.of(found)
    assert torch.equal(norm.merge(x), since.NormPlan.of(expected).merge(x))
    weights = tokens(1, 16, seed=2).abs()
    gradients = []
    for plan in (found, expected):
        leaf = x.clone().requires_grad_()
        plan.weighted(weights).merge(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("r", [6, 16])
def test_halves_that_are_tied(r: int) -> None:
    queries = tokens(2, 16, 2, 3)
    expected = whole.plan_grid(queries.flatten(2), (4, 4), (2, 2), r, None, 3, True, is_tied=True)
    both = torch.cat(queries.chunk(2), 3).flatten(2)
    found = kernels.plan_grid(both, (4, 4), (2, 2), r, None, 3, True, n_copies=2)
    assert torch.equal(partition(found), partition(expected))
    x = tokens(2, 16, 3)
    back = expected.unmerge(expected.merge(x))
    torch.testing.assert_close(found.unmerge(found.merge(x)), back)


@torch.no_grad()
@pytest.mark.parametrize("name", [*WINDOWED, "ratio 0.5"])
def test_a_block_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = load_preset(name) if name in WINDOWED else {"ratio": 0.5}
    config = ToMeConfig.from_mapping({**keys, "min_tokens": 0})
    side = 2 * config.stride[0]
    module = fill_parameters(BasicTransformerBlock(16, 2, 8, context_dim=5), 0).eval().to(DEVICE)
    x, context = tokens(2, side * side, 16), tokens(2, 7, 5)
    outs = []
    for way in ("whole", "triton"):
        monkeypatch.setenv("TOME_MATCHING", way)
        merger = TokenMerger(config)
        merger.is_guided = True
        merger.begin_call(side, side, torch.tensor([500, 500]))
        decision = merger.block(x, (side, side), 1)
        outs.append(module(x, context, decision))
        assert isinstance(decision.plan, kernels.NearPlan) == (way == "triton")
        assert isinstance(decision.query_plan, kernels.NearPlan) == (way == "triton")
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_the_presets_with_windows() -> None:
    assert {"fast", "balanced", "quality"} <= {*WINDOWED}


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ldm.modules.tome import kernels

def compile(kernel, pointers, constants):
    names = {name: "i32" for name in kernel.arg_names}
    names |= pointers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, names, constants)
    for capability in (80, 90):  # those that docs/performance.md names
        assert triton.compile(source, GPUTarget("cuda", capability, 32)).asm["cubin"]

sizes = {"SY": 2, "SX": 2, "REACH": 4, "CHANNELS": 32}
compile(
    kernels._match_kernel,
    {"metric": "*fp16", "draw": "*i64", "to": "*i64", "score": "*fp32"},
    {**sizes, "BY_DISTANCE": True, "RANKS": True, "IS_DRAWN": True, "TOKENS": 32, "CELLS": 16},
)
compile(
    kernels._reduce_kernel,
    {"x": "*fp16", "weights": "*fp32", "groups": "*i64", "leads": "*i64", "out": "*fp16"},
    {**sizes, "IS_MEAN": True, "IS_WEIGHTED": True, "TOKENS": 64},
)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's compiler is for Linux")
def test_they_compile_for_a_card(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses; the latter needs no card."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parents[3],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- choosing them -------------------------------------------------------------------------------


def test_a_way_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not backend.is_chosen(cpu)
    monkeypatch.setenv("TOME_MATCHING", "triton")
    assert backend.is_chosen(cuda)
    assert backend.is_chosen(torch.device("meta"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for device in (cpu, torch.device("mps")):
        with pytest.raises(InputError, match=f"^TOME_MATCHING=triton: for CUDA, not for {device}"):
            backend.is_chosen(device)
    monkeypatch.setenv("TOME_MATCHING", "trition")
    with pytest.raises(InputError, match=r"^TOME_MATCHING='trition': allowed is whole or triton"):
        backend.is_chosen(cuda)
    monkeypatch.setenv("TOME_MATCHING", "triton")
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    backend._refuse_or_pass.cache_clear()
    with pytest.raises(InputError, match=r"^TOME_MATCHING=triton: there is no package triton here"):
        backend.is_chosen(cuda)
    backend._refuse_or_pass.cache_clear()


def test_it_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOME_MATCHING", "fused")
    with pytest.raises(InputError, match=r"^TOME_MATCHING='fused'"):
        Pipeline.from_checkpoint(tmp_path / "none.safetensors", device="cpu")


@torch.no_grad()
@pytest.mark.parametrize(
    "keys",
    [
        {"method": "kth", "k": 4},
        {"ratio": 0.5, "window": None},
        {"ratio": 0.75, "window": 17},
        {"ratio": 0.5, "similarity": 0.1},
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_said_and_done(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = fill_parameters(BasicTransformerBlock(16, 2, 8, context_dim=5), 0).eval()
    x, context = torch.randn(2, 16, 16), torch.randn(2, 7, 5)
    outs = []
    backend._say.cache_clear()
    for way in ("whole", "triton"):
        monkeypatch.setenv("TOME_MATCHING", way)
        for _ in range(2):
            merger = TokenMerger(ToMeConfig.from_mapping(keys))
            merger.begin_call(4, 4, torch.tensor([500, 500]))
            outs.append(module(x, context, merger.block(x, (4, 4), 1)))
    assert torch.equal(outs[0], outs[2])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("TOME_MATCHING=triton is for method grid with a window of up to 15")


def test_a_launch_counts_as_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    added = {}
    for way in ("whole", "triton"):
        monkeypatch.setenv("TOME_MATCHING", way)
        plain = count_block(ToMeConfig(), 64)
        for name in ("fast", "balanced", "quality", "ratio 0.5"):
            keys = load_preset(name) if name in WINDOWED else {"ratio": 0.5}
            added[name, way] = count_block(ToMeConfig.from_mapping(keys), 64) - plain
    print(added)
    assert all(added[name, "triton"] < n for (name, way), n in added.items() if way == "whole")
    assert added["fast", "triton"] <= 21
