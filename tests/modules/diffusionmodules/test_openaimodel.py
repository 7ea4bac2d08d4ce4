"""The U-Net against the published ones' names, shapes and outputs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch

from ldm.errors import InputError
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from tests.golden_util import fill_parameters, load_golden, load_golden_keys
from tests.tiny_models import UNET

TINY: dict[str, Any] = {**UNET, "num_heads": 4, "context_dim": 24}
FULL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "use_checkpoint": True,
    "legacy": False,
}
SD1 = {**FULL, "num_heads": 8, "context_dim": 768}
SD2 = {
    **FULL,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
    "use_fp16": True,
}
UPSCALER_X4 = {
    **SD2,
    "num_classes": 1000,
    "in_channels": 7,
    "model_channels": 256,
    "attention_resolutions": [2, 4, 8],
    "channel_mult": [1, 2, 2, 4],
    "disable_self_attentions": [True, True, True, False],
    "num_heads": 8,
    "num_head_channels": -1,
}


def build_on_meta(**arguments: Any) -> UNetModel:
    with torch.device("meta"):
        return UNetModel(**arguments)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def inputs(h: int, w: int, batch: int = 2, channels: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, h, w, generator=generator)
    context = torch.randn(batch, 7, 24, generator=generator)
    return x, torch.tensor([981.0, 1.0])[:batch], context


@pytest.fixture(scope="module")
def tiny() -> UNetModel:
    return fill_parameters(UNetModel(**TINY), seed=11).eval()


@pytest.mark.parametrize(("family", "arguments"), [("sd1", SD1), ("sd2", SD2)])
def test_names_shapes_and_order_are_the_checkpoints(family: str, arguments: dict) -> None:
    expected = load_golden_keys(family, "model.diffusion_model.")
    found = shapes(build_on_meta(**arguments))
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("arguments", [SD1, SD2])
def test_inpainting_differs_in_the_first_convolution_alone(arguments: dict) -> None:
    plain = shapes(build_on_meta(**arguments))
    inpainting = shapes(build_on_meta(**{**arguments, "in_channels": 9}))
    assert inpainting["input_blocks.0.0.weight"] == (320, 9, 3, 3)
    assert {**inpainting, "input_blocks.0.0.weight": (320, 4, 3, 3)} == plain


def test_the_x4_upscaler_has_the_published_names_and_shapes() -> None:
    lines = sorted(f"{name} {s}" for name, s in shapes(build_on_meta(**UPSCALER_X4)).items())
    assert len(lines) == 687
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith("856d94ad8c4b2134")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_output_equals_upstreams(family: str) -> None:
    golden, metadata = load_golden(f"unet_{family}")
    model = fill_parameters(
        UNetModel(**json.loads(metadata["config"])), int(metadata["fill_seed"])
    ).eval()
    with torch.no_grad():
        y = model(golden["x"], golden["timesteps"], golden["context"])
    torch.testing.assert_close(y, golden["y"], rtol=0, atol=2e-5)


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every transformer that a U-Net builds from now on."""
    built: list[dict[str, Any]] = []

    def record(channels: int, n_heads: int, d_head: int, **options: Any) -> torch.nn.Module:
        built.append({"channels": channels, "n_heads": n_heads, "d_head": d_head, **options})
        return torch.nn.Identity()

    monkeypatch.setattr(openaimodel, "SpatialTransformer", record)
    return built


@pytest.mark.parametrize(
    ("arguments", "heads"),
    [
        (SD1, {320: (8, 40), 640: (8, 80), 1280: (8, 160)}),
        (SD2, {320: (5, 64), 640: (10, 64), 1280: (20, 64)}),
    ],
)
def test_heads(
    arguments: dict, heads: dict[int, tuple[int, int]], transformers: list[dict[str, Any]]
) -> None:
    build_on_meta(**arguments)
    assert len(transformers) == 16
    assert {t["channels"]: (t["n_heads"], t["d_head"]) for t in transformers} == heads


def test_legacy_widens_heads_that_do_not_fill_the_width() -> None:
    arguments = {**TINY, "num_heads": -1, "num_head_channels": 24}
    kept = shapes(build_on_meta(**arguments))
    widened = shapes(build_on_meta(**{**arguments, "legacy": True}))
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert kept[name] == (24, 24)
    assert widened[name] == (32, 32)


@pytest.mark.parametrize("size", [(17, 23), (1, 5), (16, 25)])
def test_any_latent_size_works(tiny: UNetModel, size: tuple[int, int]) -> None:
    with torch.no_grad():
        y = tiny(*inputs(*size))
    assert y.shape == (2, 4, *size)
    assert y.isfinite().all()


def test_sizes_are_odd_at_every_level_of_a_deep_model() -> None:
    model = UNetModel(**{**TINY, "channel_mult": [1, 1, 1, 1], "attention_resolutions": [8]})
    fill_parameters(model, seed=11)
    with torch.no_grad():
        assert model(*inputs(17, 23)).shape == (2, 4, 17, 23)


def test_an_untrained_model_predicts_zero() -> None:
    with torch.no_grad():
        assert not UNetModel(**TINY)(*inputs(8, 8)).any()


def test_residual_block_starts_as_its_skip() -> None:
    x, emb = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
    assert torch.equal(ResBlock(32, 8, 0.0, 32)(x, emb), x)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_the_step_enters_the_residual_block(scale_shift: bool) -> None:
    block = fill_parameters(ResBlock(32, 8, 0.0, 64, use_scale_shift_norm=scale_shift), seed=11)
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = block(x, torch.zeros(1, 8)), block(x, torch.ones(1, 8))
    assert first.shape == (1, 64, 4, 4)
    assert not torch.allclose(first, second)


def test_scale_shift_norm_is_the_published_formula() -> None:
    block = fill_parameters(ResBlock(32, 8, 0.0, 32, use_scale_shift_norm=True), seed=11)
    generator = torch.Generator().manual_seed(0)
    x, emb = torch.randn(2, 32, 4, 4, generator=generator), torch.randn(2, 8, generator=generator)
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    norm, *rest = block.out_layers
    h = norm(block.in_layers(x)) * (1 + scale) + shift
    for layer in rest:
        h = layer(h)
    torch.testing.assert_close(block(x, emb), x + h)


def test_checkpointed_gradients_equal_plain_ones(tiny: UNetModel) -> None:
    gradients = []
    for use_checkpoint in (False, True):
        model = UNetModel(**TINY, use_checkpoint=use_checkpoint)
        model.load_state_dict(tiny.state_dict())
        model(*inputs(8, 8)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_computes_in_the_type_of_the_weights(tiny: UNetModel, dtype: torch.dtype) -> None:
    model = UNetModel(**TINY)
    model.load_state_dict(tiny.state_dict())
    model.to(dtype)
    seen = []
    model.middle_block.register_forward_hook(lambda *arguments: seen.append(arguments[-1].dtype))
    x, t, context = inputs(8, 8)
    with torch.no_grad():
        y, expected = model(x, t, context), tiny(x, t, context)
    assert seen == [dtype]
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.25)


def test_half_precision_flags_change_nothing() -> None:
    flagged = UNetModel(**TINY, use_fp16=True, use_bf16=True)
    assert {parameter.dtype for parameter in flagged.parameters()} == {torch.float32}
    with torch.no_grad():
        assert flagged(*inputs(8, 8)).dtype == torch.float32


def test_channels_last_gives_the_same(tiny: UNetModel) -> None:
    model = UNetModel(**TINY)
    model.load_state_dict(tiny.state_dict())
    model.to(memory_format=torch.channels_last)
    x, t, context = inputs(9, 8)
    with torch.no_grad():
        y = model(x.contiguous(memory_format=torch.channels_last), t, context)
        torch.testing.assert_close(y, tiny(x, t, context), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "names", "y"),
    [
        ({"num_classes": 3}, {"weight"}, torch.tensor([0, 2])),
        ({"num_classes": "continuous"}, {"weight", "bias"}, torch.tensor([[0.1], [0.9]])),
        (
            {"num_classes": "sequential", "adm_in_channels": 5},
            {"0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"},
            torch.tensor([[0.0], [1.0]]).expand(2, 5),
        ),
    ],
)
def test_classes(arguments: dict, names: set[str], y: torch.Tensor) -> None:
    model = fill_parameters(UNetModel(**TINY, **arguments), seed=11).eval()
    found = {n.removeprefix("label_emb.") for n in shapes(model) if n.startswith("label_emb.")}
    assert found == names
    x, t, context = inputs(8, 8)
    with torch.no_grad():
        assert not torch.allclose(model(x, t, context, y), model(x, t, context, y.flip(0)))
    with pytest.raises(ValueError, match="y is missing"):
        model(x, t, context)


def test_classes_for_a_model_without_them(tiny: UNetModel) -> None:
    with pytest.raises(ValueError, match="y is given"):
        tiny(*inputs(8, 8), torch.tensor([0, 1]))


def test_transformers_share_the_merger_and_know_their_level(
    transformers: list[dict[str, Any]],
) -> None:
    model = build_on_meta(**TINY, tome_config={"ratio": 0.5})
    assert [t["downsample"] for t in transformers] == [1, 2, 2, 2, 2, 1, 1]
    assert all(t["tome"] is model.tome for t in transformers)


def test_the_merger_is_no_part_of_the_state_dict() -> None:
    model = build_on_meta(**TINY, tome_config={"ratio": 0.5})
    assert shapes(model) == shapes(build_on_meta(**TINY))
    assert not list(model.buffers())


def test_the_merger_is_told_the_size_and_step_of_each_call(
    tiny: UNetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(tiny.tome, "begin_call", lambda *arguments: calls.append(arguments))
    x, t, context = inputs(6, 10)
    with torch.no_grad():
        tiny(x, t, context)
    ((h, w, timesteps),) = calls
    assert (h, w) == (6, 10)
    assert timesteps is t


def test_blocks_of_each_level_can_be_set_apart() -> None:
    arguments = {**TINY, "num_res_blocks": [2, 1], "num_attention_blocks": [1, 0]}
    names = shapes(build_on_meta(**arguments))
    transformers = {n.split(".norm.")[0] for n in names if n.endswith(".norm.weight")}
    assert transformers == {"input_blocks.1.1", "middle_block.1", "output_blocks.2.1"}


def test_self_attention_can_be_disabled() -> None:
    arguments = {**TINY, "disable_self_attentions": [True, False], "disable_middle_self_attn": True}
    found = shapes(build_on_meta(**arguments))
    block = "transformer_blocks.0.attn1.to_k.weight"
    assert found[f"input_blocks.1.1.{block}"] == (32, 24)
    assert found[f"input_blocks.3.1.{block}"] == (64, 64)
    assert found[f"middle_block.1.{block}"] == (64, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_spatial_transformer": False}, "use_spatial_transformer=False is not supported"),
        ({"dims": 3}, "dims=3 is not supported, only 2 is"),
        ({"resblock_updown": True}, "resblock_updown=True"),
        ({"conv_resample": False}, "conv_resample=False"),
        ({"n_embed": 8}, "n_embed=8"),
        ({"context_dim": None}, "needs context_dim"),
        ({"num_heads": -1}, "set num_heads or num_head_channels"),
        ({"num_heads": 0}, "num_heads and num_head_channels cannot be 0"),
        ({"num_heads": 33}, "num_heads 33 .* give 33 heads to 32 channels"),
        ({"num_heads": -1, "num_head_channels": 64}, "num_head_channels 64 give 0 heads to 32"),
        ({"num_res_blocks": [1]}, "num_res_blocks has 1 entries, channel_mult has 2"),
        ({"num_attention_blocks": [1]}, "num_attention_blocks has 1 entries"),
        ({"disable_self_attentions": [True]}, "disable_self_attentions has 1 entries"),
        ({"num_classes": "many"}, "num_classes='many'"),
        ({"num_classes": "sequential"}, "needs adm_in_channels"),
        ({"tome_config": {"ratoi": 0.5}}, "ratoi"),
    ],
)
def test_unusable_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_on_meta(**{**TINY, **arguments})


# --- reuse of deep features -------------------------------------------------------------------


def reusing_unet(every, tome=None):
    unet = UNetModel(**TINY, tome_config=tome, reuse_deep=every)
    return fill_parameters(unet, seed=2).eval()


def run_of(unet, n_calls=5):
    """The outputs of a run's calls, each for a step of its own."""
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24)
    unet.tome.begin_run()
    unet.reuse.begin_run()
    steps = range(900, 900 - 10 * n_calls, -10)
    outputs = [unet(x + t / 5000, torch.tensor([t, t]), context) for t in steps]
    unet.reuse.end_run()
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("tome", [None, {"ratio": 0.5}, {"ratio": 0.5, "reuse_steps": 4}])
def test_deep_features_are_computed_in_every_nth_call(tome):
    torch.manual_seed(0)
    whole = run_of(reusing_unet(1))
    torch.manual_seed(0)
    unet = reusing_unet(3, tome)
    calls = {"middle": 0, "first": 0, "last": 0}

    def count(name):
        def add(*_):
            calls[name] += 1

        return add

    unet.middle_block.register_forward_hook(count("middle"))
    unet.input_blocks[1].register_forward_hook(count("first"))
    unet.output_blocks[-1].register_forward_hook(count("last"))
    outputs = run_of(unet)
    assert calls == {"middle": 2, "first": 5, "last": 5}
    if tome is None:
        equal = [torch.equal(a, b) for a, b in zip(outputs, whole, strict=True)]
        assert equal == [True, False, False, True, False]
        assert (outputs[1] - whole[1]).abs().mean() < (whole[1] - whole[4]).abs().mean() * 5


@torch.no_grad()
def test_a_reused_call_is_the_shallow_blocks_on_the_features_before():
    unet = reusing_unet(2)
    seen = []
    unet.output_blocks[-2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first, second = run_of(unet, 2)
    n_skip = unet.input_blocks[1][0].out_layers[-1].out_channels
    assert torch.equal(seen[0][:, :-n_skip], seen[1][:, :-n_skip])
    assert not torch.equal(seen[0][:, -n_skip:], seen[1][:, -n_skip:])
    assert not torch.equal(first, second)


@torch.no_grad()
def test_nothing_is_reused_outside_of_a_run_or_for_another_shape():
    unet = reusing_unet(9)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.randn(2, 7, 24)
    outside = [unet(x, t, context), unet(x, t + 90, context)]
    unet.reuse.begin_run()
    assert torch.equal(unet(x, t, context), outside[0])
    reused = unet(x, t + 90, context)
    assert not torch.equal(reused, outside[1])
    assert torch.equal(unet(x[:1], t[:1] + 90, context[:1]), unet(x[:1], t[:1] + 90, context[:1]))
    unet.reuse.begin_run()
    assert torch.equal(unet(x, t + 90, context), outside[1])


@torch.no_grad()
def test_merged_blocks_keep_their_places_where_deep_ones_are_left_out():
    unet = reusing_unet(2, {"ratio": 0.5, "reuse_steps": 9, "random": False})
    plans = []
    unet.tome.observer = lambda call, blocks: plans.append([block.plan for block in blocks])
    run_of(unet, 2)
    whole, shallow = plans
    assert len(shallow) == 3 < len(whole)
    assert [id(p) for p in shallow] == [id(whole[0]), id(whole[-2]), id(whole[-1])]
