"""Transformer blocks, alone and with tokens merged in them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.errors import InputError
from ldm.modules import attention
from ldm.modules.attention import (
    BasicTransformerBlock,
    ContextLinear,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
    attend_by_channel,
    attend_by_products,
    einsum_attention,
    has_slow_backward,
    remember_context,
    set_attention_backend,
    takes_channel,
)
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.match import metric_of
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.plan import MergePlan
from tests.golden_util import fill_parameters, load_golden_keys

H, W, C, HEADS = 6, 8, 16, 2
N = H * W
CONFIGS: list[dict[str, Any]] = [
    {"ratio": 0.5},
    {"ratio": 0.75, "window": None, "proportional": False},
    {"ratio": 0.75, "apply_to": ["kv"]},
    {"ratio": 0.75, "apply_to": ["kv", "q"], "metric": "keys_mean", "random": True},
    {"method": "bipartite", "ratio": 0.4, "apply_to": ["attn", "crossattn", "mlp"]},
    {"method": "bipartite", "ratio": 0.5, "apply_to": ["kv"], "metric": "normed", "protect": 2},
    {"method": "kth", "k": 4, "apply_to": ["kv"], "metric": "keys_mean"},
    {"method": "random", "max_tokens": 9, "apply_to": ["q"]},
    {"method": "downsample", "stride": [2, 3], "apply_to": ["kv"]},
    {"ratio": 0.5, "apply_to": ["block"]},
    {"ratio": 0.5, "apply_to": ["block"], "metric": "keys"},
    {"ratio": 0.5, "similarity": 0.1},
]


def block(**arguments: Any) -> BasicTransformerBlock:
    module = BasicTransformerBlock(C, HEADS, C // HEADS, context_dim=5, **arguments)
    return fill_parameters(module, 0).eval()


def inputs(n_rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_rows, N, C, generator=generator)
    return x, torch.randn(n_rows, 7, 5, generator=generator)


def merging(config: dict[str, Any], x: Tensor) -> Decision:
    return TokenMerger(ToMeConfig.from_mapping(config)).block(x, (H, W), 1)


# --- without merging -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "use_linear", "dim"), [("sd1", False, 768), ("sd2", True, 1024)]
)
def test_names_and_shapes_are_those_of_checkpoints(family: str, use_linear: bool, dim: int) -> None:
    with torch.device("meta"):
        heads = 5 if use_linear else 8
        module = SpatialTransformer(
            320, heads, 320 // heads, context_dim=dim, use_linear=use_linear
        )
    expected = load_golden_keys(family, "model.diffusion_model.input_blocks.1.1.")
    found = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert list(found.items()) == list(expected.items())


def test_block_is_its_equations() -> None:
    module, (x, context) = block(), inputs()

    def attend(attention: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        out = []
        for i in range(HEADS):
            part = slice(i * C // HEADS, (i + 1) * C // HEADS)
            logits = q[..., part] @ k[..., part].mT * (C // HEADS) ** -0.5
            out.append(logits.softmax(-1) @ v[..., part])
        return attention.to_out(torch.cat(out, -1))

    expected = x + attend(module.attn1, module.norm1(x), module.norm1(x))
    expected = expected + attend(module.attn2, module.norm2(expected), context)
    a, gate = module.ff.net[0].proj(module.norm3(expected)).chunk(2, -1)
    expected = expected + module.ff.net[2](a * F.gelu(gate))
    torch.testing.assert_close(module(x, context), expected)


def test_feed_forward_without_gate() -> None:
    module = FeedForward(4, 6, mult=3)
    x = torch.randn(2, 4)
    assert next(iter(module.state_dict())) == "net.0.0.weight"
    torch.testing.assert_close(module(x), module.net[2](F.gelu(module.net[0][0](x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_backends_agree(dtype: torch.dtype, has_bias: bool) -> None:
    module, (x, _) = block().attn1.to(dtype), inputs()
    bias = torch.randn(2, 1, 1, N) if has_bias else None
    fused = module(x.to(dtype), bias=bias)
    set_attention_backend(module, "einsum")
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        module(x.to(dtype), bias=bias), fused, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("d", [40, 64, 80, 160, 20])
def test_a_bias_as_a_channel_is_that_as_a_mask(d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    q, k, v = (torch.randn(2, 2, n, d, generator=generator) for n in (9, 7, 7))
    bias = torch.randint(1, 300, (2, 1, 1, 7), generator=generator).float().log()
    exact = F.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(attend_by_channel(q, k, v, bias), exact, rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):  # as near as with the mask
        half = [x.to(dtype) for x in (q, k, v, bias)]
        of_mask = (F.scaled_dot_product_attention(*half).float() - exact).abs().mean()
        of_channel = (attend_by_channel(*half).float() - exact).abs().mean()
        assert of_channel < 1.2 * of_mask
    bias[:, :, :, 2] = -1e4  # a group without tokens
    exact = F.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(attend_by_channel(q, k, v, bias), exact, rtol=1e-5, atol=1e-5)


def test_a_channel_is_taken_where_the_kernel_has_room_for_it() -> None:
    def takes(d: int, device: str, dtype: torch.dtype = torch.float16) -> bool:
        shape, kind = torch.Size((2, 8, 9, d)), torch.device(device)
        return takes_channel(SimpleNamespace(shape=shape, device=kind, dtype=dtype))

    assert [d for d in (32, 40, 64, 80, 96, 128, 160, 256, 512) if takes(d, "cuda")] == [
        40,
        80,
        160,
    ]
    assert not takes(40, "cpu")
    assert not takes(40, "cuda", torch.float32)  # which has no flash kernel


def test_training_in_bfloat16_takes_products_where_there_are_few_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 32, generator=generator) for n in (64, 77, 77))
    bias = torch.randn(2, 1, 1, 77, generator=generator)

    def gradients(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return list(torch.autograd.grad(attend(*tensors, bias.to(dtype)).square().sum(), tensors))

    exact = gradients(F.scaled_dot_product_attention, torch.float32)
    fused = gradients(F.scaled_dot_product_attention, torch.bfloat16)
    ours = gradients(attend_by_products, torch.bfloat16)
    for a, b, c in zip(exact, fused, ours, strict=True):
        assert (b - a).norm() < 0.01 * a.norm()
        assert (c - a).norm() < 0.02 * a.norm()  # its logits are rounded, the kernel's are not

    half, keys = q.bfloat16(), k.bfloat16()
    assert has_slow_backward(half, keys)
    assert not has_slow_backward(q, k)
    assert not has_slow_backward(half, keys.repeat(1, 1, 4, 1))
    with torch.no_grad():
        assert not has_slow_backward(half, keys)


def test_einsum_attention_does_not_overflow_in_half() -> None:
    q = torch.full((1, 1, 2, 64), 100.0, dtype=torch.float16)
    assert einsum_attention(q, q, q).isfinite().all()


def test_backend_is_set_everywhere_or_refused() -> None:
    module = SpatialTransformer(32, 2, 16, depth=2, context_dim=5)
    set_attention_backend(module, "einsum")
    found = [m.backend for m in module.modules() if isinstance(m, CrossAttention)]
    assert found == ["einsum"] * 4
    with pytest.raises(InputError, match=r"'flash'.*sdpa, einsum"):
        set_attention_backend(module, "flash")


@pytest.mark.parametrize("use_linear", [False, True])
def test_transformer_adds_to_its_input(use_linear: bool) -> None:
    module = SpatialTransformer(32, 2, 8, depth=2, context_dim=5, use_linear=use_linear)
    x, context = torch.randn(2, 32, 3, 5), torch.randn(2, 7, 5)
    assert torch.equal(module(x, context), x)  # the last projection begins at zero
    fill_parameters(module, 0)
    tokens = module.norm(x)
    if use_linear:
        tokens = module.proj_in(tokens.flatten(2).mT)
    else:
        tokens = module.proj_in(tokens).flatten(2).mT
    for inner in module.transformer_blocks:
        tokens = inner(tokens, context)
    if use_linear:
        out = module.proj_out(tokens).mT.reshape(x.shape)
    else:
        out = module.proj_out(tokens.mT.reshape(2, 16, 3, 5))
    torch.testing.assert_close(module(x, context), out + x)


def test_disabled_self_attention_attends_to_the_context() -> None:
    module, (x, context) = block(disable_self_attn=True), inputs()
    assert module.attn1.to_k.in_features == 5
    assert not torch.equal(module(x, context), module(x, context + 1))
    # and tokens of the picture are merged in what is left only
    transformer = SpatialTransformer(
        32,
        2,
        16,
        context_dim=5,
        disable_self_attn=True,
        tome=TokenMerger(ToMeConfig.from_mapping({"ratio": 0.5})),
    )
    merger = transformer.tome
    tokens = torch.randn(2, N, 32)
    for places, removed in ((["attn"], 0), (["attn", "mlp"], N // 2), (["crossattn"], N // 2)):
        merger.configure(ToMeConfig.from_mapping({"ratio": 0.5, "apply_to": places}))
        assert merger.block(tokens, (H, W), 1, has_self_attention=False).removed == removed
    merger.configure(ToMeConfig.from_mapping({"ratio": 0.5, "apply_to": "mlp", "metric": "keys"}))
    assert merger.block(tokens, (H, W), 1, has_self_attention=False).removed == 0
    assert transformer(torch.randn(2, 32, H, W), torch.randn(2, 7, 5)).shape == (2, 32, H, W)


# --- the context in a run ------------------------------------------------------------------------


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The contexts of which keys or values were computed, in order."""
    seen: list[Tensor] = []
    plain = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if isinstance(self, ContextLinear):
            seen.append(x)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return seen


@torch.no_grad()
def test_a_context_is_projected_once_while_it_is_remembered(projected: list[Tensor]) -> None:
    module, (x, context) = block(), inputs()
    expected = [module(x, context), module(x + 1, context)]
    assert len(projected) == 4
    remember_context(module)
    assert torch.equal(module(x, context), expected[0])
    assert torch.equal(module(x + 1, context), expected[1])
    assert len(projected) == 4 + 2
    assert torch.equal(module(x, context.clone()), expected[0])  # another tensor
    assert len(projected) == 4 + 2 + 2
    half = copy.deepcopy(module).bfloat16()
    assert half(x.bfloat16(), context.bfloat16()).dtype == torch.bfloat16
    fill_parameters(module, 1)
    remember_context(module, False)
    assert not torch.equal(module(x, context), expected[0])  # the new weights
    assert all(m._last is None for m in module.modules() if isinstance(m, ContextLinear))


def test_training_remembers_no_context(projected: list[Tensor]) -> None:
    module, (x, context) = block(checkpoint=False), inputs()
    remember_context(module)
    for _ in range(2):
        module(x, context).sum().backward()
        assert module.attn2.to_k.weight.grad.abs().max() > 0
        module.zero_grad()
    assert len(projected) == 4


def test_self_attention_remembers_nothing(projected: list[Tensor]) -> None:
    module, (x, context) = block(), inputs()
    assert not isinstance(module.attn1.to_k, ContextLinear)
    with torch.no_grad():
        module(x, context)
    assert all(seen is context for seen in projected)


# --- with merging --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_block_with_merging_is_its_equations(config: dict[str, Any]) -> None:
    """Merging as matrix products, one averaging matrix per picture."""
    module, (x, context) = block(), inputs()
    found = module(x, context, merge := merging(config, x))
    plan, places = merge.plan, merge.config.apply_to

    def matrices(plan: MergePlan) -> tuple[Tensor, Tensor]:
        groups = plan.groups.view(2, N) - torch.arange(2)[:, None] * plan.n_kept
        spread = F.one_hot(groups, plan.n_kept).float()  # (B, N, n): unmerge
        weights = 1 if plan.shares is None else plan.shares.view(2, 1, N)
        average = spread.mT * weights
        return average / average.sum(2, keepdim=True), spread  # (B, n, N): merge

    average, spread = matrices(plan)
    of_queries = matrices(merge.query_plan or plan)
    if config["method"] == "downsample" if "method" in config else False:
        average = F.one_hot(plan.chosen.view(2, -1) - torch.arange(2)[:, None] * N, N).float()
    identity = torch.eye(N).expand(2, -1, -1)
    bias = spread.sum(1).log()[:, None, None] if merge.config.proportional else None

    def at(*names: str) -> tuple[Tensor, Tensor]:
        return (average, spread) if {*names} & {*places} else (identity, identity)

    def sublayers(x: Tensor, q: tuple, kv: tuple, cross: tuple, mlp: tuple, bias: Any) -> Tensor:
        normed = module.norm1(x)
        x = x + q[1] @ module.attn1(q[0] @ normed, kv[0] @ normed, bias=bias)
        x = x + cross[1] @ module.attn2(cross[0] @ module.norm2(x), context)
        return x + mlp[1] @ module.ff(mlp[0] @ module.norm3(x))

    if places == ("block",):
        small = average @ x
        inner = (torch.eye(plan.n_kept),) * 2
        expected = x + spread @ (sublayers(small, inner, inner, inner, inner, bias) - small)
    else:
        kv = at("kv", "attn")
        bias = bias if kv[0] is average else None
        q = of_queries if {"q", "attn"} & {*places} else (identity, identity)
        expected = sublayers(x, q, kv, at("crossattn"), at("mlp"), bias)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, module(x, context))


def test_metrics() -> None:
    module, (x, _) = block(), inputs()
    normed = module.norm1(x)
    keys = module.attn1.to_k(normed)
    mean = torch.stack(keys.split(C // HEADS, -1)).mean(0)
    expected = {"hidden": x, "normed": normed, "keys": keys, "keys_mean": mean}
    sample = [y * W + x for y in spread_out(H) for x in spread_out(W)]
    q, k = (
        rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in (module.attn1.to_q(normed), keys)
    )
    scale = (C // HEADS) ** -0.5
    for kind, logits in {
        "key_logits": scale * k @ q[:, :, sample].mT,
        "query_logits": scale * q @ k[:, :, sample].mT,
    }.items():
        expected[kind] = rearrange(logits - logits.mean(2, keepdim=True), "b h n r -> b n h r")
    for kind, metric in expected.items():
        found = metric_of(module.attn1, kind, x, normed, (H, W))
        torch.testing.assert_close(found, metric)


def spread_out(n: int) -> list[int]:
    """Four positions in the middles of the quarters of a row of n."""
    return [int((i + 0.5) / 4 * n) for i in range(4)]


def test_self_attention_of_a_block_without_context() -> None:
    """Without a context attn2 is self-attention, and is merged as that."""
    module = fill_parameters(BasicTransformerBlock(C, HEADS, C // HEADS), 0).eval()
    x, _ = inputs()
    config = {"method": "kth", "k": 4, "apply_to": ["crossattn"]}
    found = module(x, merging=(merge := merging(config, x)))
    plan = merge.plan
    expected = x + module.attn1(module.norm1(x))
    small = plan.merge(module.norm2(expected))
    expected = expected + plan.unmerge(module.attn2(small, bias=plan.log_size()))
    expected = expected + module.ff(module.norm3(expected))
    torch.testing.assert_close(found, expected)


def test_counting_merged_tokens_is_exact_for_equal_tokens() -> None:
    """Attention over copies of a few tokens = attention over these few, counted."""
    module, (x, context) = block(), inputs()
    picture = x.view(2, H, W, C)[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = picture.reshape(2, N, C)
    x = torch.where(torch.arange(N)[:, None] < 2 * W, x[:, :1], x)  # one larger group
    exact = module(x, context)
    counted = {"ratio": 0.75, "apply_to": ["kv"], "window": None}
    torch.testing.assert_close(module(x, context, merging(counted, x)), exact)
    uncounted = module(x, context, merging({**counted, "proportional": False}, x))
    assert not torch.allclose(uncounted, exact)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_with_checkpointing_are_those_without(config: dict[str, Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        module, (x, context) = block(checkpoint=checkpointing), inputs()
        x.requires_grad_()
        out = module(x, context, merging(config, x))
        (out**2).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert gradients[0][0].abs().min() > 0


def test_the_recomputation_makes_no_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = attention.plan_block
    monkeypatch.setattr(attention, "plan_block", lambda *args: made.append(1) or make(*args))
    module, (x, context) = block(checkpoint=True), inputs()
    module(x, context, merging({"ratio": 0.5, "random": True}, x)).sum().backward()
    assert len(made) == 1


class _ForbidOnMps(TorchDispatchMode):
    """Refuses operators that fail on Apple's devices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        assert "scatter_reduce" not in name
        assert not (name == "gather" and args[0].shape[-1] == 1), args[0].shape
        assert all(t.dtype != torch.float64 for t in tensors), name
        return out


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_operators_that_fail_on_mps_are_not_used(config: dict[str, Any]) -> None:
    module, (x, context) = block(checkpoint=True), inputs()
    with _ForbidOnMps():
        merger = TokenMerger(ToMeConfig.from_mapping(config))
        merger.begin_call(H, W, torch.tensor([500, 500]))
        module(x, context, merger.block(x, (H, W), 1)).sum().backward()
        merger.end_call()


def test_the_guard_against_those_operators_works() -> None:
    with _ForbidOnMps(), pytest.raises(AssertionError):
        torch.zeros(3, 1).gather(0, torch.zeros(1, 1, dtype=torch.long))
    with _ForbidOnMps(), pytest.raises(AssertionError):
        torch.zeros(3).scatter_reduce(0, torch.tensor([0]), torch.ones(1), "sum")
    with _ForbidOnMps(), pytest.raises(AssertionError):
        torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if "similarity" not in c and c.get("method") != "random"], ids=str
)
def test_compiles_as_one_graph(config: dict[str, Any]) -> None:
    torch._dynamo.reset()
    module, (x, context) = block(), inputs()
    backend = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    merger = TokenMerger(ToMeConfig.from_mapping(config))
    with torch.no_grad():
        for call in range(3):
            remember_context(module, remembers=call > 0)  # changes no compiled code
            merger.begin_run()
            merger.begin_call(H, W, torch.tensor([900 - call]))
            plain = merger.block(x, (H, W), 1)
            expected = module(x, context, plain)
            merger.begin_run()
            out = compiled(x, context, merger.block(x, (H, W), 1))
            torch.testing.assert_close(out, expected)
    assert backend.frame_count == 1


def test_compiles_with_checkpointing() -> None:
    torch._dynamo.reset()
    gradients = []
    for compiles in (False, True):
        module, (x, context) = block(checkpoint=True), inputs()
        module = torch.compile(module, fullgraph=True, backend="aot_eager") if compiles else module
        x.requires_grad_()
        module(x, context, merging({"ratio": 0.5, "apply_to": ["kv"]}, x)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_keeps_no_parameter_and_can_be_copied() -> None:
    merger = TokenMerger(ToMeConfig.from_mapping({"ratio": 0.5, "random": True}))
    module = SpatialTransformer(32, 2, 16, context_dim=5, tome=merger)
    assert not any("tome" in name for name in module.state_dict())
    x, context = torch.randn(2, 32, H, W), torch.randn(2, 7, 5)
    merger.begin_call(H, W, torch.tensor([1]))
    module(x, context)
    twin = copy.deepcopy(module)
    assert twin.tome is not merger
    assert isinstance(twin.transformer_blocks, nn.ModuleList)
    torch.testing.assert_close(twin(x, context), module(x, context))


def test_heads_come_first_in_a_channel() -> None:
    """Channel c of q, k and v belongs to head c // d."""
    module = CrossAttention(4, heads=2, dim_head=2)
    with torch.no_grad():
        module.to_out[0].weight.copy_(torch.eye(4))
        module.to_out[0].bias.zero_()
    x = torch.randn(1, 3, 4)
    out = rearrange(module(x), "b n (h d) -> b h n d", h=2)
    q, k, v = (linear(x)[..., :2] for linear in (module.to_q, module.to_k, module.to_v))
    torch.testing.assert_close(out[:, 0], (q @ k.mT / 2**0.5).softmax(-1) @ v)
