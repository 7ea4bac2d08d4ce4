"""Calls that are captured and replayed, with a recorder in place of CUDA graphs."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion import captures as module
from ldm.models.diffusion.captures import Captures, check_way
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import noise_predictor
from ldm.modules.attention import remembered
from ldm.modules.diffusionmodules.reuse import DeepReuse
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger
from tests.golden_util import fill_parameters
from tests.tiny_models import tiny_config

CPU = torch.device("cpu")


class Recorder:
    """Does the work again where a graph would be replayed, into the same tensor.

    The merger must not notice: what it counts is the caller's business.
    """

    def __init__(self, unet: Any) -> None:
        self.unet, self.n_recorded, self.n_replayed, self.n_released = unet, 0, 0, 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        output = work()
        self.n_recorded += 1

        def replay() -> None:
            self.n_replayed += 1
            tome, twin = self.unet.tome, copy.deepcopy(self.unet.tome)
            try:
                for module in self.unet.modules():
                    if hasattr(module, "tome"):
                        module.tome = twin
                output.copy_(work())
            finally:
                for module in self.unet.modules():
                    if hasattr(module, "tome"):
                        module.tome = tome

        return replay, output

    def release(self) -> None:
        self.n_released += 1


@pytest.fixture
def model() -> LatentDiffusion:
    module = LatentDiffusion(**tiny_config()["model"]["params"])
    return fill_parameters(module, 0).eval().requires_grad_(False)


def run(model: LatentDiffusion, keys: dict, captures: Captures | None) -> tuple[list[Tensor], str]:
    """Outputs of a run of five steps, and the line of the report."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator)
    unet = model.model.diffusion_model
    unet.tome.configure(ToMeConfig.from_mapping(keys))
    model.model.captures = captures
    denoise = noise_predictor(model, context[:1], context[1:], scale=3.0)
    outputs = []
    with torch.inference_mode():
        model.begin_run(is_guided=True)
        for t in (900, 700, 500, 300, 100):
            x = x - 0.1 * denoise(x, t, 0.5)
            outputs.append(x)
        report = unet.tome.report()
        model.end_run()
    model.model.captures = None
    return outputs, report


@pytest.mark.parametrize(
    ("keys", "n_recorded", "n_replayed"),
    [
        ({}, 1, 4),
        ({"ratio": 0.5}, 1, 4),
        ({"ratio": 0.75, "apply_to": ["kv"], "reuse_layers": True}, 1, 4),
        ({"steps": [[0, 0.5], [0.55, 0.5], [0.56, 0.25], [1, 0.25]]}, 2, 3),
        ({"steps": [[0, 0.5], [1, 0.0]]}, 0, 0),  # each call has another ratio
        ({"ratio": 0.5, "random": True}, 0, 0),
        ({"ratio": 0.5, "reuse_steps": 2}, 0, 0),
        ({"ratio": 0.5, "similarity": 0.5}, 0, 0),
    ],
    ids=str,
)
def test_a_run_is_the_same(
    model: LatentDiffusion, keys: dict, n_recorded: int, n_replayed: int
) -> None:
    expected, report = run(model, keys, None)
    recorder = Recorder(model.model.diffusion_model)
    captures = Captures(model.model.diffusion_model, recorder)
    for n_runs in (1, 2):
        found, said = run(model, keys, captures)
        assert said == report
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert recorder.n_recorded == n_recorded * n_runs
        assert recorder.n_replayed == n_replayed * n_runs
        assert recorder.n_released == n_runs or not n_recorded
    assert not captures._recorded


def test_other_shapes_and_weights_are_other_captures(model: LatentDiffusion) -> None:
    unet = model.model.diffusion_model
    recorder = Recorder(unet)
    captures = Captures(unet, recorder)
    context = torch.randn(1, 5, 16)
    with torch.no_grad():
        for side in (8, 12, 8, 12):
            x, t = torch.randn(1, 4, side, side), torch.tensor([500])
            assert torch.equal(captures(x, t, context), unet(x, t, context))
        assert recorder.n_recorded == 2
        captures.clear()
        fill_parameters(unet, 1)
        x = torch.randn(1, 4, 8, 8)
        for _ in range(2):
            assert torch.equal(captures(x, t, context), unet(x, t, context))
        assert recorder.n_recorded == 3
    captures(x.requires_grad_(), t, context).sum().backward()  # with gradients as ever
    assert x.grad is not None


def test_ways_that_there_are_not() -> None:
    with pytest.raises(InputError, match="'fast' is not one of auto, no, blocks, graph"):
        check_way("fast", CPU)
    with pytest.raises(InputError, match="no CUDA graphs on cpu"):
        check_way("graph", CPU)
    check_way("graph", torch.device("cuda"))


def test_what_captures_read_lives_as_long_as_they_do(model: LatentDiffusion) -> None:
    """A graph goes on reading the projections of its context, whatever comes in between."""
    unet = model.model.diffusion_model
    captures = Captures(unet, Recorder(unet))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    first, second = torch.randn(2, 1, 5, 16)
    with torch.inference_mode():
        model.begin_run()
        for context in (first, first, second):
            captures(x, t, context)
            if context is first:
                read = [weakref.ref(projected) for _, projected in remembered(unet)]
        assert read
        assert all(one() is not None for one in read)
        captures.clear()
        model.end_run()
    assert all(one() is None for one in read)


def test_no_plan_outlives_its_graph(model: LatentDiffusion) -> None:
    """It would keep the memory of all graphs from being given back."""
    unet = model.model.diffusion_model
    plans: list[weakref.ref] = []

    class Watched(Recorder):
        def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            recorded = super().__call__(work)
            plans.extend(weakref.ref(one.plan) for one in unet.tome.last_decisions if one.plan)
            return recorded

        def release(self) -> None:
            assert all(plan() is None for plan in plans)
            super().release()

    recorder = Watched(unet)
    run(model, {"ratio": 0.5}, Captures(unet, recorder))
    assert plans
    assert recorder.n_released == 1


def test_who_looks_at_the_plans_sees_each_call(model: LatentDiffusion) -> None:
    """A replay writes its plans after the call is noted, and in a capture nobody may read them."""
    unet = model.model.diffusion_model
    recorder = Recorder(unet)
    seen: list[int] = []
    unet.tome.observer = lambda number, _: seen.append(number)
    run(model, {"ratio": 0.5}, Captures(unet, recorder))
    unet.tome.observer = None
    assert seen == [0, 1, 2, 3, 4]
    assert recorder.n_recorded == 0


def test_another_network_is_not_replayed(model: LatentDiffusion) -> None:
    wrapper, unet = model.model, model.model.diffusion_model
    recorder = Recorder(unet)
    wrapper.captures = Captures(unet, recorder)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 16)
    twin = fill_parameters(copy.deepcopy(unet), 1)
    with torch.no_grad():
        wrapper.diffusion_model = twin
        for _ in range(3):
            assert torch.equal(model.apply_model(x, t, context), twin(x, t, context))
        wrapper.diffusion_model = unet
        for _ in range(3):
            assert torch.equal(model.apply_model(x, t, context), unet(x, t, context))
    assert recorder.n_replayed == 2


def test_a_graph_is_captured_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model's device, which need not be the current one, and on one stream of it."""
    log: list[str] = []
    current = [0]

    @contextmanager
    def logged(name: str) -> Iterator[None]:
        log.append(f"{name} on {current[0]}")
        try:
            yield
        finally:
            log.append(f"end of {name}")

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current[0] = 1
        yield
        current[0] = 0

    fakes = {
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: log.append("replay")),
        "graph_pool_handle": lambda: "pool",
        "current_device": lambda: current[0],
        "device_of": device_of,
        "stream": logged,
        "graph": lambda _, **where: logged(f"graph in {where['pool']}, {where['stream']}"),
        "empty_cache": lambda: log.append("given back"),
    }
    monkeypatch.setattr(module, "_stream", lambda device: f"stream of {device}")
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Tiny(torch.nn.Module):
        tome, reuse, control = TokenMerger(), DeepReuse(), None

        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return x + 1

    captures = Captures(Tiny())
    with torch.no_grad():
        for _ in range(3):
            captures(torch.zeros(1), torch.zeros(1))
    captures.clear()
    assert log == [
        "stream of 1 on 1",
        "graph in pool, stream of 1 on 1",
        "end of graph in pool, stream of 1",
        "end of stream of 1",
        *["replay"] * 2,
        "given back",
    ]
