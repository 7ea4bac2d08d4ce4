"""The tomesd package's documented call works on our model, as on upstream's."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.pipeline import Pipeline

tomesd = pytest.importorskip("tomesd", reason="needs tomesd: pip install -e .[test]")


@pytest.fixture
def pipeline(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", dtype="float32")


def test_signatures_are_upstreams() -> None:
    names = [*inspect.signature(BasicTransformerBlock._forward).parameters]
    assert names[:3] == ["self", "x", "context"]
    names = [*inspect.signature(CrossAttention.forward).parameters]
    assert names[:4] == ["self", "x", "context", "mask"]


def test_patched_drawn_and_taken_off(pipeline: Pipeline) -> None:
    def draw() -> np.ndarray:
        return pipeline.txt2img("hills", seed=1, steps=2, scale=3.0)[0].pixels

    plain = draw()
    tomesd.apply_patch(pipeline.model, ratio=0.5)
    assert not np.array_equal(draw(), plain)
    tomesd.remove_patch(pipeline.model)
    assert np.array_equal(draw(), plain)
    unet = pipeline.model.model.diffusion_model
    assert any(type(module) is BasicTransformerBlock for module in unet.modules())
    assert not unet._forward_pre_hooks


@torch.no_grad()
def test_it_merges_as_ours_does(pipeline: Pipeline) -> None:
    """Its default, where nothing is random, against ours with the same metric and destinations."""
    unet = pipeline.model.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator)
    t = torch.tensor([500, 500])
    plain = unet(x, t, context)
    tomesd.apply_patch(pipeline.model, ratio=0.5, use_rand=False)
    theirs = unet(x, t, context)
    tomesd.remove_patch(pipeline.model)
    pipeline.set_tome({"ratio": 0.5, "metric": "hidden", "window": None, "proportional": False})
    torch.testing.assert_close(unet(x, t, context), theirs)
    assert not torch.allclose(theirs, plain)


def test_attention_of_others_may_take_its_place(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As prompt-to-prompt and the web UIs do it: a function of upstream's arguments."""

    def forward(
        self: CrossAttention,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            rearrange(t, "b n (h d) -> (b h) n d", h=self.heads)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = (q @ k.mT * self.scale).softmax(-1)
        return self.to_out(rearrange(weights @ v, "(b h) n d -> b n (h d)", h=self.heads))

    def draw() -> np.ndarray:
        return pipeline.txt2img("hills", seed=1, steps=2, scale=3.0)[0].pixels

    for tome in (False, {"ratio": 0.5, "proportional": False}):
        pipeline.set_tome(tome)
        own = draw().astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(CrossAttention, "forward", forward)
            assert np.abs(draw() - own).max() <= 1


def test_a_mask_bars_keys() -> None:
    attention = CrossAttention(8, heads=2, dim_head=4)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    expected = attention(x, context[:, [0, 1, 3]])
    torch.testing.assert_close(attention(x, context, mask), expected)
