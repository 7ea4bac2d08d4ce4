"""Merging in diffusers' real U-Nets, of small sizes, against ours on the same weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoint.diffusers_keys import unet_layers
from ldm.config import load_preset, preset_names
from ldm.errors import InputError
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome import adapters
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.decision import Decision
from tests.golden_util import fill_parameters

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -e .[test]")

# (configuration of ours, of diffusers') of one U-Net with the structure of each family
OURS = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "use_spatial_transformer": True,
    "context_dim": 16,
    "legacy": False,
}
THEIRS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,  # the number of heads, under the name that diffusers has
}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": ({**OURS, "num_heads": 2}, THEIRS),
    "sd2": (
        {**OURS, "num_head_channels": 16, "use_linear_in_transformer": True},
        {**THEIRS, "attention_head_dim": (2, 4), "use_linear_projection": True},
    ),
    "sdxl": (
        {
            **OURS,
            "num_head_channels": 16,
            "use_linear_in_transformer": True,
            "attention_resolutions": [2],
            "transformer_depth": 2,
            "num_classes": "sequential",
            "adm_in_channels": 6 * 8 + 24,
        },
        {
            **THEIRS,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 2,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        },
    ),
}
PRESETS = [name for name in preset_names() if name not in ("trim_context", "ibtm")]
SETTINGS = {
    **{name: load_preset(name) for name in PRESETS},
    "all_of_attn": {"ratio": 0.5, "apply_to": ["attn", "crossattn", "mlp"], "max_downsample": 8},
    "q_and_kv": {"ratio": 0.4, "apply_to": ["q", "kv"], "max_downsample": 2},
    "normed": {"method": "bipartite", "r": 9, "metric": "normed", "protect": 1},
    "keys": {"method": "kth", "k": 3, "apply_to": ["kv"], "metric": "keys", "max_downsample": 2},
    "keys_mean": {"ratio": 0.3, "metric": "keys_mean", "max_downsample": 2},
    "random": {"method": "random", "ratio": 0.5, "apply_to": ["block"], "max_downsample": 2},
    "block": {"ratio": 0.5, "apply_to": ["block"], "random": True, "max_downsample": 2},
    "not_proportional": {"ratio": 0.5, "proportional": False, "max_downsample": 2},
    "downsample": {"method": "downsample", "stride": [2, 2], "apply_to": ["kv"]},
    "similar": {"ratio": 0.7, "similarity": 0.3, "max_downsample": 2},
    "rules": {"rules": [{"min_tokens": 48, "ratio": 0.5}, {"min_tokens": 4, "ratio": 0.25}]},
    "steps": {"steps": [[0, 0.7], [1, 0]], "max_downsample": 2},
    "reuse": {"ratio": 0.5, "random": True, "reuse_steps": 2, "reuse_layers": True},
}


class Pair:
    """Our U-Net and diffusers', on the same weights."""

    def __init__(self, family: str) -> None:
        own, their = FAMILIES[family]
        self.ours = fill_parameters(UNetModel(**own), 0).eval().requires_grad_(False)
        self.theirs = diffusers.UNet2DConditionModel(**their).eval().requires_grad_(False)
        self.theirs.load_state_dict(converted(self.ours.state_dict()))
        self.is_sdxl = family == "sdxl"
        random = torch.Generator().manual_seed(1)
        # A batch of two, oblong, with an odd number of rows: nothing here is a square.
        self.x = torch.randn(2, 4, 7, 10, generator=random)
        self.context = torch.randn(2, 5, 16, generator=random)
        self.pooled = torch.randn(2, 24, generator=random)
        self.time_ids = torch.arange(12.0).view(2, 6) * 50

    @torch.no_grad()
    def run_ours(self, settings: dict, timesteps: list[float]) -> list[Tensor]:
        self.ours.tome.configure(ToMeConfig.from_mapping(settings))
        y = None
        if self.is_sdxl:
            times = self.theirs.add_time_proj(self.time_ids.flatten()).view(2, -1)
            y = torch.cat([self.pooled, times], dim=1)
        return [self.ours(self.x, torch.full((2,), t), self.context, y) for t in timesteps]

    @torch.no_grad()
    def run_theirs(self, timesteps: list[float]) -> list[Tensor]:
        return [self.call_theirs(t) for t in timesteps]

    def call_theirs(self, t: float) -> Tensor:
        extra = {"text_embeds": self.pooled, "time_ids": self.time_ids} if self.is_sdxl else None
        return self.theirs(
            self.x, t, encoder_hidden_states=self.context, added_cond_kwargs=extra
        ).sample


def converted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under diffusers' names."""
    theirs = {
        ours: name for name, ours in unet_layers({n.rpartition(".")[0] for n in weights}).items()
    }
    split = {name: name.rpartition(".") for name in weights}
    return {f"{theirs[split[n][0]]}.{split[n][2]}": tensor for n, tensor in weights.items()}


@pytest.fixture(scope="module")
def pairs() -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}
    return lambda family: made.setdefault(family, Pair(family))


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    pair = pairs(request.param)
    adapters.remove(pair.theirs)
    return pair


def reaching(settings: dict, pair: Pair) -> dict:
    """The settings, such that they reach SDXL's transformers, none of which is at full size."""
    return {**settings, "max_downsample": 2} if pair.is_sdxl else settings


def test_without_merging_both_are_equal(pair: Pair) -> None:
    for ours, theirs in zip(
        pair.run_ours({}, [700.0, 20.0]), pair.run_theirs([700, 20]), strict=True
    ):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_merging_is_that_of_our_own_unet(pair: Pair, name: str) -> None:
    settings = reaching(SETTINGS[name], pair)
    plain = pair.run_theirs([800])[0]
    merger = adapters.apply(pair.theirs, **settings)
    theirs = pair.run_theirs([800, 500, 100])
    report = merger.report()
    ours = pair.run_ours(settings, [800.0, 500.0, 100.0])
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(their, own, rtol=1e-3, atol=1e-4)
    assert report == pair.ours.tome.report()
    has_merged = "saved" in report
    assert has_merged == (not torch.equal(theirs[0], plain))


def test_every_kind_of_setting_merges(pairs: Callable[[str], Pair]) -> None:
    """So that the comparison above compares something."""
    pair, idle = pairs("sd1"), []
    for name, settings in SETTINGS.items():
        merger = adapters.apply(pair.theirs, **settings)
        pair.run_theirs([800])
        idle += [] if "saved" in merger.report() else [name]
    adapters.remove(pair.theirs)
    # Presets for pictures with more tokens than these.
    assert not set(idle) - set(PRESETS), idle


def traces(module: nn.Module) -> list[Any]:
    """Whatever a hook, a replaced method or a new attribute would show in."""
    return [
        (
            name,
            type(part),
            {k: copy.copy(v) if "hooks" in k else id(v) for k, v in vars(part).items()},
        )
        for name, part in module.named_modules()
    ]


def test_removing_leaves_no_trace(pair: Pair) -> None:
    before, out = traces(pair.theirs), pair.run_theirs([300])[0]
    adapters.apply(pair.theirs, **reaching({"ratio": 0.5, "apply_to": ["block"]}, pair))
    assert not torch.equal(pair.run_theirs([300])[0], out)
    adapters.remove(pair.theirs)
    assert traces(pair.theirs) == before
    assert torch.equal(pair.run_theirs([300])[0], out)
    adapters.remove(pair.theirs)  # and once more does nothing


def test_no_tensor_outlives_the_call(pair: Pair) -> None:
    adapters.apply(pair.theirs, **reaching({"ratio": 0.5, "apply_to": ["block"]}, pair))
    pair.run_theirs([300])
    blocks = [b for m in pair.theirs.modules() for b in getattr(m, "transformer_blocks", ())]
    states = [hook.__self__ for block in blocks for hook in block._forward_hooks.values()]
    assert len(states) == len(blocks) > 0
    assert all(s.x is None and s.merged is None and s.plans is None for s in states)


def test_applying_again_replaces(pair: Pair) -> None:
    strong = reaching({"ratio": 0.5, "max_downsample": 2}, pair)
    adapters.apply(pair.theirs, **strong)
    once = pair.run_theirs([300])[0]
    adapters.apply(pair.theirs, **reaching({"ratio": 0.1, "max_downsample": 2}, pair))
    adapters.apply(pair.theirs, **strong)
    assert torch.equal(pair.run_theirs([300])[0], once)


@pytest.mark.parametrize("settings", [{}, {"ratio": 0}, {"ratio": 0.5, "min_tokens": 10_000}])
def test_nothing_to_merge_is_bit_identical(pair: Pair, settings: dict) -> None:
    out = pair.run_theirs([300])[0]
    adapters.apply(pair.theirs, **reaching(settings, pair))
    assert torch.equal(pair.run_theirs([300])[0], out)


def test_a_run_begins_where_the_timestep_rises(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("sd1")
    adapters.apply(pair.theirs, ratio=0.5, random=True)
    first, second = pair.run_theirs([900, 500]), pair.run_theirs([900, 500])
    adapters.remove(pair.theirs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "settings", [{"ratio": 0.5, "random": True}, {"ratio": 0.5, "apply_to": ["block"]}]
)
def test_gradient_checkpointing_meets_the_same_plans(settings: dict) -> None:
    pair = Pair("sd1")
    pair.theirs.train().requires_grad_(True)
    grads = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            pair.theirs.enable_gradient_checkpointing()
        pair.theirs.zero_grad()
        merger = adapters.apply(pair.theirs, **settings)
        pair.call_theirs(400).square().mean().backward()
        assert "in 3 of 7 blocks" in merger.report()
        grads.append([p.grad.clone() for p in pair.theirs.parameters() if p.grad is not None])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def whole_pipeline(pair: Pair) -> tuple[Any, dict[str, Any]]:
    """A pipeline with their U-Net, and arguments for a short run of it."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=500, steps_offset=1, clip_sample=False)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,))
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, pair.theirs, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt_embeds": pair.context[:1],
        "negative_prompt_embeds": pair.context[1:],
        "latents": pair.x[:1],
        "height": 8,
        "width": 16,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    return pipe, arguments


def test_a_whole_pipeline(pairs: Callable[[str], Pair]) -> None:
    pipe, arguments = whole_pipeline(pairs("sd1"))
    plain = pipe(**arguments).images
    merger = adapters.apply(pipe, ratio=0.5, random=True)
    assert merger.n_timesteps == 500
    merged, again = pipe(**arguments).images, pipe(**arguments).images
    report = merger.report()
    adapters.remove(pipe)
    assert not torch.equal(merged, plain)
    assert torch.equal(merged, again)
    assert torch.equal(pipe(**arguments).images, plain)
    assert report.startswith("ToMe: grid 2x2 ratio=0.5 window=3 on attn: 70 -> 35 tokens")


def test_a_pipeline_tells_of_guidance(pairs: Callable[[str], Pair]) -> None:
    """Then queries are merged alike in both halves; a U-Net alone does not know of halves."""
    pipe, arguments = whole_pipeline(pairs("sd1"))
    groups: list[Tensor] = []  # of the queries of each block, (rows, N)

    def observe(_: int, blocks: list[Decision]) -> None:
        plans = [block.query_plan for block in blocks if block.query_plan is not None]
        groups.extend(p.groups.view(-1, p.n_tokens) % p.n_kept for p in plans)

    for place, guidance_scale, n_rows, are_alike in (
        (pipe, 7.5, 2, True),
        (pipe.unet, 7.5, 2, False),
        (pipe, 1.0, 1, True),
    ):
        groups.clear()
        merger = adapters.apply(place, ratio=0.5)
        merger.observer = observe
        pipe(**arguments, guidance_scale=guidance_scale)
        assert len(groups) == 3 * 3
        assert all(len(rows) == n_rows for rows in groups)
        assert all(torch.equal(rows[0], rows[-1]) for rows in groups) == are_alike
        assert merger.is_guided == (are_alike and n_rows == 2)
    adapters.remove(pipe)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0.9}, "ratio=0.9: method grid"),
        ({"raito": 0.5}, "no key 'raito'"),
        ({"ratio": 0.5, "context": "trim"}, "context='trim'"),
    ],
)
def test_settings_that_cannot_be_used(
    pairs: Callable[[str], Pair], settings: dict, words: str
) -> None:
    pair = pairs("sd1")
    before = traces(pair.theirs)
    with pytest.raises(InputError, match=words):
        adapters.apply(pair.theirs, **settings)
    assert traces(pair.theirs) == before


def test_settings_that_reach_no_block_of_sdxl(pairs: Callable[[str], Pair]) -> None:
    with pytest.raises(InputError, match=r"max_downsample=1.*give max_downsample=2 or more"):
        adapters.apply(pairs("sdxl").theirs, ratio=0.5)


def test_what_is_no_unet() -> None:
    with pytest.raises(InputError, match="Linear is neither a diffusers pipeline"):
        adapters.apply(nn.Linear(1, 1), ratio=0.5)
    with pytest.raises(InputError, match="SimpleNamespace is neither"):
        adapters.remove(SimpleNamespace(unet=None))


def test_a_unet_without_transformers() -> None:
    unet = diffusers.UNet2DModel(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    with pytest.raises(InputError, match="UNet2DModel has no transformers"):
        adapters.apply(unet, ratio=0.5)


def test_fused_projections_and_masks_are_refused() -> None:
    pair = Pair("sd1")
    pair.theirs.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        adapters.apply(pair.theirs, ratio=0.5)
    pair.theirs.unfuse_qkv_projections()
    adapters.apply(pair.theirs, ratio=0.5, max_downsample=8)
    with pytest.raises(InputError, match="attention_mask"):
        pair.theirs(pair.x, 1, pair.context, attention_mask=torch.ones(2, 70))


# --- what others do to a U-Net --------------------------------------------------------------------


class LiveLora(nn.Module):
    """A projection with a LoRA beside it, not fused into its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        random = torch.Generator().manual_seed(7)
        self.down = torch.randn(2, base.in_features, generator=random)
        self.up = torch.randn(base.out_features, 2, generator=random)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # as PEFT's layers have it: without the LoRA

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T

    def fused(self) -> nn.Linear:
        layer = copy.deepcopy(self.base)
        layer.weight = nn.Parameter(self.base.weight + self.up @ self.down, requires_grad=False)
        return layer


class Offloaded(nn.Linear):
    """A projection whose weight comes only when it computes, as with sequential offload."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.kept = [base.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.kept[0])


def self_attentions(unet: nn.Module) -> list[Any]:
    return [block.attn1 for m in unet.modules() for block in getattr(m, "transformer_blocks", ())]


@pytest.mark.parametrize("preset", ["fast", "ratio"])
def test_logits_are_computed_through_the_layers(preset: str) -> None:
    settings = {"ratio": 0.5} if preset == "ratio" else load_preset(preset)
    live, fused, offloaded = Pair("sd1"), Pair("sd1"), Pair("sd1")
    for attention, other, third in zip(
        *(self_attentions(p.theirs) for p in (live, fused, offloaded)), strict=True
    ):
        for name in ("to_q", "to_k"):
            lora = LiveLora(getattr(attention, name))
            setattr(attention, name, lora)
            setattr(other, name, lora.fused())
            setattr(third, name, Offloaded(lora.fused()))
    outs = []
    for pair in (live, fused, offloaded):
        merger = adapters.apply(pair.theirs, **{**settings, "min_tokens": 0, "max_downsample": 2})
        outs.append(pair.run_theirs([800])[0])
        assert "saved" in merger.report()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(outs[2], outs[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("is_training", [True, False])
def test_in_training_no_plan_is_another_batchs(is_training: bool) -> None:
    """Also where the loop never calls ``train()``."""
    unet = diffusers.UNet2DConditionModel(**THEIRS).train(is_training)
    merger = adapters.apply(unet, ratio=0.5, random=True, reuse_steps=4, max_downsample=2)
    plans = []
    for t in (10, 500, 200):
        unet(torch.randn(2, 4, 8, 8), t, torch.randn(2, 5, 16))
        plans.append(merger.last_decisions[0].plan)
    assert len({id(plan) for plan in plans}) == 3


def test_blocks_that_tomesd_has_changed_are_refused() -> None:
    tomesd = pytest.importorskip("tomesd")
    unet = diffusers.UNet2DConditionModel(**THEIRS)
    pipe = SimpleNamespace(unet=unet)
    for module in unet.modules():
        if type(module).__name__ == adapters.BLOCK:
            module.__class__ = tomesd.patch.make_diffusers_tome_block(type(module))
    with pytest.raises(InputError, match=r"ToMeBlock.*tomesd\.remove_patch"):
        adapters.apply(pipe, ratio=0.5)


def test_compiled_unets_are_compiled_anew(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("sd1")
    plain = pair.run_theirs([900])[0]
    adapters.apply(pair.theirs, ratio=0.5)
    merged = pair.run_theirs([900])[0]
    adapters.remove(pair.theirs)
    inner = pair.theirs
    try:
        pair.theirs = torch.compile(inner, backend="eager")
        pipe = type("Pipe", (), {"unet": pair.theirs, "scheduler": None})()
        assert torch.equal(pair.run_theirs([900])[0], plain)
        merger = adapters.apply(pipe, ratio=0.5)
        assert torch.equal(pair.run_theirs([900])[0], merged)
        assert "in 3 of 7 blocks" in merger.report()
        adapters.remove(pipe)
        assert torch.equal(pair.run_theirs([900])[0], plain)
        assert not inner._forward_hooks
        assert not inner._forward_pre_hooks
    finally:
        pair.theirs = inner
        adapters.remove(inner)
        torch._dynamo.reset()


processors = pytest.importorskip("diffusers.models.attention_processor")


class CrossFrameAttnProcessor(processors.AttnProcessor2_0):
    """A processor that is not one of diffusers' plain ones."""


def test_processors_that_may_look_at_the_tokens_are_refused() -> None:
    pair = Pair("sd1")
    adapters.apply(pair.theirs, ratio=0.5)
    pair.theirs.set_attn_processor(CrossFrameAttnProcessor())
    with pytest.raises(InputError, match=r"CrossFrameAttnProcessor: merging goes with AttnProc"):
        pair.run_theirs([300])
    with pytest.raises(InputError, match="CrossFrameAttnProcessor"):
        adapters.apply(pair.theirs, ratio=0.5)
    adapters.apply(pair.theirs, ratio=0.5, apply_to=["mlp"], metric="hidden")  # sees no attention
    pair.run_theirs([300])


def test_projections_fused_after_merging_was_applied_are_refused() -> None:
    pair = Pair("sd1")
    adapters.apply(pair.theirs, ratio=0.5)
    pair.theirs.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        pair.run_theirs([300])


@pytest.mark.parametrize("name", ["UNetMotionModel", "UNet3DConditionModel"])
def test_unets_whose_tokens_are_not_one_picture_are_refused(name: str) -> None:
    class Frames(diffusers.UNet2DConditionModel):
        pass

    real = getattr(diffusers, name)
    unet = real.__new__(real)
    nn.Module.__init__(unet)
    for part in ("down_blocks", "up_blocks"):
        setattr(unet, part, nn.ModuleList())
    unet.mid_block = Pair("sd1").theirs.mid_block
    with pytest.raises(InputError, match=f"{name}: merging knows UNet2DConditionModel alone"):
        adapters.apply(unet, ratio=0.5)
    own = Frames(**THEIRS)
    adapters.apply(own, ratio=0.5)


def test_a_run_begins_with_another_context(pairs: Callable[[str], Pair]) -> None:
    """One step a picture: the timestep never rises."""
    pair = pairs("sd1")
    other = pair.context.flip(1)
    settings = {"ratio": 0.5, "random": True, "reuse_steps": 10}

    def call(context: Tensor) -> Tensor:
        with torch.no_grad():
            return pair.theirs(pair.x, 999, encoder_hidden_states=context).sample

    adapters.apply(pair.theirs, **settings)
    alone = call(other)
    merger = adapters.apply(pair.theirs, **settings)
    first, second = call(pair.context), call(other)
    assert not torch.equal(first, second)
    assert torch.equal(second, alone)
    assert "in 3 of 7 blocks" in merger.report()
    adapters.remove(pair.theirs)


def test_a_loop_that_puts_its_context_together_for_each_step_is_one_run(
    pairs: Callable[[str], Pair],
) -> None:
    pair = pairs("sd1")
    merger = adapters.apply(pair.theirs, ratio=0.5, random=True)
    once = pair.run_theirs([900, 500])
    runs: list[int] = []
    merger.begin_run = lambda *_: runs.append(1)  # type: ignore[method-assign]
    with torch.no_grad():
        for t in (900, 500):
            pair.theirs(pair.x, t, encoder_hidden_states=pair.context.clone())
    assert len(runs) == 1
    assert len(once) == 2
    adapters.remove(pair.theirs)


def test_halves_are_a_pipelines_guidance_only_where_they_are_equal(
    pairs: Callable[[str], Pair],
) -> None:
    """Six rows of InstructPix2Pix, or another pipeline's call, are not two halves."""
    pipe, arguments = whole_pipeline(pairs("sd1"))
    merger = adapters.apply(pipe, ratio=0.5)
    pipe(**arguments, guidance_scale=7.5)
    assert merger.is_guided
    unet, context = pipe.unet, arguments["prompt_embeds"]
    three = torch.cat([pairs("sd1").x] * 3)
    with torch.no_grad():
        unet(three, 999, encoder_hidden_states=context.expand(6, -1, -1))
        assert not merger.is_guided
        unet(pairs("sd1").x, 999, encoder_hidden_states=context.expand(2, -1, -1))
        assert not merger.is_guided
    adapters.remove(pipe)


def test_hooks_keep_no_pipeline_alive() -> None:
    pair = Pair("sd1")
    pipe, _ = whole_pipeline(pair)
    before = len(pickle.dumps(pair.theirs))
    adapters.apply(pipe, ratio=0.5)
    pair.run_theirs([500])
    seen = weakref.ref(pipe)
    assert len(pickle.dumps(pair.theirs)) < 1.2 * before
    copied = pickle.loads(pickle.dumps(pair.theirs))
    with torch.no_grad():
        again = copied(pair.x, 500, encoder_hidden_states=pair.context).sample
    assert torch.equal(again, pair.run_theirs([500])[0])
    del pipe
    gc.collect()
    assert seen() is None
