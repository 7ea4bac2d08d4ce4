"""The accelerators' shape of matching: the same groups as on processors, in few operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.config import load_preset
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import noise_predictor
from ldm.modules.attention import BasicTransformerBlock, compile_blocks
from ldm.modules.tome import whole
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block, plan_grid
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.plan import MergePlan
from tests.golden_util import fill_parameters
from tests.tiny_models import partition, tiny_config


def tokens(n_rows: int, n: int, kind: str = "plain") -> Tensor:
    x = torch.randn(n_rows, n, 6, generator=torch.Generator().manual_seed(n))
    if kind != "plain":
        holes = torch.rand(n_rows, n, generator=torch.Generator().manual_seed(1)) < 0.3
        x[holes] = float(kind)
    return x


@pytest.mark.parametrize("window", [None, 1, 3, 5, 99])
@pytest.mark.parametrize(
    ("size", "stride"),
    [((8, 8), (2, 2)), ((7, 9), (2, 2)), ((12, 10), (4, 4)), ((1, 11), (2, 2)), ((9, 5), (3, 2))],
)
@pytest.mark.parametrize("kind", ["plain", "nan", "inf", "0"])
@pytest.mark.parametrize("by_distance", [False, True])
def test_the_groups_are_those_of_processors(
    size: tuple[int, int], stride: tuple[int, int], window: int | None, kind: str, by_distance: bool
) -> None:
    n = size[0] * size[1]
    metric = tokens(2, n, kind)
    if by_distance and kind == "0":  # of equal destinations rounding takes one
        metric = metric + 0.01 * tokens(2, n)
    rows, columns = size[0] // min(stride[0], size[0]), size[1] // min(stride[1], size[1])
    n_choices = min(stride[0], size[0]) * min(stride[1], size[1])
    drawn = torch.randint(n_choices, (rows, columns), generator=torch.Generator().manual_seed(2))
    for r in (n // 3, n):
        if kind != "plain" and r < n:  # which of those that are similar to nothing go is free
            continue
        for draw in (None, drawn):
            expected = plan_grid(metric, size, stride, r, draw, window, None, by_distance)
            found = whole.plan_grid(metric, size, stride, r, draw, window, by_distance)
            assert torch.equal(partition(found), partition(expected))
            assert found.n_kept == expected.n_kept
            assert torch.equal(found.sizes.sort().values, expected.sizes.sort().values)


@pytest.mark.parametrize("kind", ["nan", "0"])
@pytest.mark.parametrize("window", [None, 3])
def test_what_is_similar_to_nothing_goes_last(kind: str, window: int | None) -> None:
    metric = tokens(1, 64, kind)
    bad = ~metric.norm(dim=2).gt(0)[0]
    plan = whole.plan_grid(metric, (8, 8), (2, 2), 20, None, window)
    alone = plan.sizes.flatten()[plan.groups] == 1
    assert plan.n_kept == 44
    assert alone[bad].all()


def test_halves_that_are_tied_and_rows_that_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 4, 36, 2, 3, generator=generator)
    for r in (15, 27):
        found = whole.plan_attention(keys, queries, (6, 6), (2, 2), r, None, 3, is_tied=True)
        expected = plan_grid(keys.flatten(2), (6, 6), (2, 2), r, None, 3, None, True)
        assert torch.equal(partition(found[0]), partition(expected))
        both = torch.cat(queries.chunk(2), 3).flatten(2)
        expected = plan_grid(both, (6, 6), (2, 2), r, None, 3, None, True).repeated(2)
        assert torch.equal(partition(found[1]), partition(expected))
        alone = whole.plan_grid(queries.flatten(2), (6, 6), (2, 2), r, None, 3, True, is_tied=True)
        assert torch.equal(partition(alone), partition(expected))
        x = torch.randn(4, 36, 5)
        for plan in (*found, alone):
            mean = expected if plan is not found[0] else None
            merged = plan.merge(x)
            assert merged.shape == (4, 36 - r, 5)
            if mean is not None:
                torch.testing.assert_close(plan.unmerge(merged), mean.unmerge(mean.merge(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 3])
def test_types(dtype: torch.dtype, window: int | None) -> None:
    metric = 1 + 0.05 * tokens(2, 64)
    expected = plan_grid(metric.to(dtype), (8, 8), (2, 2), 48, None, window)
    found = whole.plan_grid(metric.to(dtype), (8, 8), (2, 2), 48, None, window)
    same = (partition(found) == partition(expected)).float().mean()
    assert same == 1 if dtype in (torch.float32, torch.float64) else same > 0.85


def test_matching_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = tokens(2, 18 * 20)
    for window in (None, 3):
        for by_distance in (False, True):
            args = (metric, (18, 20), (2, 2), 99, None, window, by_distance)
            expected = whole.plan_grid(*args)
            with monkeypatch.context() as patch:
                patch.setattr(whole, "_piece", lambda device: 5000)
                assert torch.equal(whole.plan_grid(*args).groups, expected.groups)


SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "ratio 0.5": ({"ratio": 0.5}, 75),
    **{name: (load_preset(name), 40) for name in ("fast", "balanced", "quality")},
    "tomesd": (load_preset("tomesd"), 35),
    "todo": (load_preset("todo"), 8),
}


def decision(keys: dict[str, Any], x: Tensor, side: int, is_guided: bool = True) -> Decision:
    merger = TokenMerger(ToMeConfig.from_mapping(keys))
    merger.is_guided = is_guided
    merger.begin_call(side, side, torch.tensor([500] * len(x)))
    return merger.block(x, (side, side), 1)


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("is_guided", [False, True])
def test_a_block_is_the_same(name: str, is_guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fill_parameters(BasicTransformerBlock(16, 2, 8, context_dim=5), 0).eval()
    x, context = torch.randn(2, 144, 16), torch.randn(2, 7, 5)
    expected = module(x, context, decision(SETTINGS[name][0], x, 12, is_guided))
    monkeypatch.setenv("TOME_MATCHING", "whole")
    chosen = decision(SETTINGS[name][0], x, 12, is_guided)
    assert chosen.is_whole
    torch.testing.assert_close(module(x, context, chosen), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, module(x, context))


class Operators(TorchDispatchMode):
    """Counts what is dispatched, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        returns = [r.alias_info for r in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returns):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("side", "dtype"), [(64, torch.float16), (128, torch.float32)])
def test_few_operators(
    name: str, side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many more than a block without merging has."""
    monkeypatch.setenv("TOME_MATCHING", "whole")
    module = BasicTransformerBlock(16, 2, 8, context_dim=5).to(dtype).eval()
    x = torch.randn(2, side * side, 16).to(dtype)
    context = torch.randn(2, 7, 5).to(dtype)
    keys, limit = SETTINGS[name]
    module(x, context, decision(keys, x, side))  # so that what is kept is there
    counts = []
    for config in ({}, keys):
        with Operators() as operators:
            module(x, context, decision(config, x, side))
        counts.append(len(operators.names))
    assert counts[1] - counts[0] <= limit


def test_weights_are_added_in_a_fixed_order_on_accelerators() -> None:
    """Whatever made the plan; the processor's index_add_ goes through the tokens in order."""
    groups = torch.tensor([[0, 1, 0, 2, 1, 1], [2, 2, 1, 0, 0, 1]])
    weights = torch.rand(2, 6)
    plan = MergePlan.from_groups(groups, 3)
    with Operators() as operators:
        MergePlan.from_groups(groups.to("meta"), 3).weighted(weights.to("meta"))
    n_added = sum("index_add" in name for name in operators.names)
    assert n_added == 1  # the counts: whole numbers
    total = torch.nn.functional.embedding_bag(
        plan.members, weights.view(-1, 1), plan.starts, mode="sum"
    )
    torch.testing.assert_close(
        weights.flatten() / total[plan.groups, 0], plan.weighted(weights).shares
    )


# --- no host in the loop -------------------------------------------------------------------------


class NoHost(TorchDispatchMode):
    """Refuses whatever makes the host wait for the device, or copies between the two."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not any(waiting in name for waiting in self.WAITING), name
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, Tensor) and t.ndim]
        assert len({t.device for t in tensors}) <= 1, name
        return out


NO_HOST: list[dict[str, Any]] = [
    {},
    *(keys for keys, _ in SETTINGS.values()),
    {"steps": [[0, 0.5], [1, 0.1]]},
    {"method": "random", "ratio": 0.5},
    {"ratio": "auto", "min_tokens": 4, "random": True},
    {"method": "kth", "k": 4, "apply_to": ["kv"]},
    {"method": "bipartite", "ratio": 0.5, "apply_to": ["attn", "crossattn", "mlp"]},
    {"ratio": 0.5, "apply_to": ["block"], "reuse_steps": 2},
]


@torch.no_grad()
@pytest.mark.parametrize("keys", NO_HOST, ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_host_in_a_step(keys: dict, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta every copy to or from the processor shows; on the processor all values are there."""
    monkeypatch.setenv("TOME_MATCHING", "whole")
    with torch.device(device):
        model = LatentDiffusion(**tiny_config()["model"]["params"])
        x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    unet = model.model.diffusion_model.eval()
    unet.tome.configure(ToMeConfig.from_mapping(keys))
    denoise = noise_predictor(model, context, context.clone(), scale=3.0)
    model.begin_run(is_guided=True)
    denoise(x, 900, 0.1)  # what is kept is made
    with NoHost():
        for t in (800, 700.5):
            denoise(x, t, 0.2)
    model.end_run()


def test_the_guard_against_the_host_works() -> None:
    with NoHost(), pytest.raises(AssertionError):
        torch.ones(1).item()
    with NoHost(), pytest.raises(AssertionError):
        torch.ones(3).nonzero()
    with NoHost(), pytest.raises(AssertionError):
        torch.ones(3).to("meta")


def test_compiled_blocks_make_no_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made on the processor, for which every call of them would wait."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def compile_(module: Any, **options: Any) -> None:
        module._compiled_call_impl = torch.compile(
            module._call_impl, backend=backend, fullgraph=True, **options
        )

    torch._dynamo.reset()
    monkeypatch.setenv("TOME_MATCHING", "whole")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    block = BasicTransformerBlock(16, 2, 8, context_dim=5, checkpoint=False)
    block = fill_parameters(block, 0).eval()
    x, context = torch.randn(2, 35, 16), torch.randn(2, 3, 5)
    merger = TokenMerger(ToMeConfig.from_mapping({"ratio": 0.5, "window": 3}))
    outputs = []
    with torch.no_grad():
        for compiles in (False, True):
            if compiles:
                compile_blocks(block)
            merger.begin_call(5, 7, torch.tensor([500, 500]))
            outputs.append(block(x, context, merger.block(x, (5, 7), 1)))
    torch.testing.assert_close(*outputs)
    assert len(graphs) == 1
    assert not any("nonzero" in str(node.target) for node in graphs[0].graph.nodes)
    # Nor do they ask a card how much memory is free.
    sized = torch.compile(whole._piece, backend="eager", fullgraph=True)
    assert sized(torch.device("cuda")) == 2**30


@pytest.mark.parametrize("by_distance", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_autocast_does_not_match(is_whole: bool, by_distance: bool) -> None:
    keys = {"ratio": 0.75, "window": 3} | ({} if by_distance else {"metric": "hidden"})
    config = ToMeConfig.from_mapping(keys)
    shape = (2, 256, 2, 8) if by_distance else (2, 256, 16)
    metrics = [1 + 0.1 * torch.randn(shape) for _ in range(1 + by_distance)]
    plans = []
    for is_on in (False, True):
        decision = Decision(config, (16, 16), 192, is_whole=is_whole)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            plans += [plan_block(decision, metrics)]
    for one, other in zip(*plans, strict=True):
        assert torch.equal(one.groups, other.groups)
