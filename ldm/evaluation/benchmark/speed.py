"""How long one step of a U-Net takes under each setting, measured side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ldm.device import memory_format, returned_memory, reused_memory
from ldm.errors import is_out_of_memory
from ldm.evaluation.benchmark.breakdown import PARTS, breakdown, synchronize
from ldm.evaluation.benchmark.memory import Peak, peak_memory
from ldm.evaluation.benchmark.oracle import oracle
from ldm.evaluation.benchmark.peers import diffusers_step
from ldm.evaluation.benchmark.unets import UNets, context_width
from ldm.models.diffusion.captures import Captures
from ldm.modules.attention import set_attention_backend
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome import backend
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger

N_TIMESTEPS = 1000
CONTEXT_LENGTH = 77  # tokens of a prompt
MIN_SECONDS = 0.3  # a shorter step is measured several times in a row
MAX_REPEATS = 20
UPSTREAM = "upstream's way"  # the name of its row
# On the way from there to ours, one thing after the other; what is left then is the type. Each has
# its attention, and whether layout and memory are ours.
UPSTREAM_STEPS = {
    UPSTREAM: ("einsum", False),
    "the same, fused attention": ("sdpa", False),
    "and our layout": ("sdpa", True),
}
N_EXTRA_ROUNDS = 2  # before those that count: one to warm up, one for the breakdown

Step = Callable[[Tensor], Any]  # one call of a U-Net, given the timesteps (B,)


@dataclass(frozen=True)
class Case:
    """What all settings have in common that are compared with each other.

    Attributes:
        model: a name.
        size: pixels a side.
        batch: rows; guidance takes two for each picture.
        dtype: of weights and activations.
        attention: sdpa or einsum.
    """

    model: str
    size: int
    batch: int
    dtype: str
    attention: str


@dataclass
class Row:
    """What was measured of one setting.

    Attributes:
        case: where.
        name: of the setting.
        kind: off (no merging), ours, oracle, compiled, graph, kernels or both (all of the row with
            that name), or peer.
        config: what was merged.
        ms: milliseconds of a step, one entry for each round.
        peak_mib: peak memory of a step; None where the system does not tell.
        shares: share of a step spent in match, merge and unmerge.
        report: the ``ToMe:`` line.
        error: why there is nothing.
    """

    case: Case
    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    report: str = ""
    error: str = ""


@dataclass
class Contender:
    """A setting, ready to be measured.

    Attributes:
        row: where its results go.
        apply: puts it in force for as long as the context lasts.
        timesteps: of the calls that make a round.
        repeats: how often a round goes through them.
    """

    row: Row
    apply: Callable[[], AbstractContextManager[Step]]
    timesteps: list[Tensor]
    repeats: int = 1

    def seconds(self, step: Step, device: torch.device) -> float:
        """Measure one round; seconds of a single call."""
        synchronize(device)
        start = perf_counter()
        for _ in range(self.repeats):
            for timesteps in self.timesteps:
                step(timesteps)
        synchronize(device)
        return (perf_counter() - start) / (self.repeats * len(self.timesteps))


def contenders(
    case: Case,
    unets: UNets,
    latent_size: int,
    settings: Mapping[str, ToMeConfig],
    tomesd_ratios: Sequence[float] = (),
    has_oracles: bool = True,
    has_graphs: bool = False,
    has_kernels: bool = False,
) -> list[Contender]:
    """Everything to be compared in one case; no merging comes first.

    Args:
        case: which.
        unets: built for it.
        latent_size: h and w.
        settings: ours, by name.
        tomesd_ratios: run tomesd in diffusers' U-Net at these ratios, too.
        has_oracles: add the oracle of each of our settings.
        has_graphs: add the CUDA graphs of ours that there are; see `repeats`.
        has_kernels: add the Triton kernels where they can match.
    """
    set_attention_backend(unets.ours, case.attention)
    if unets.compiled is not None:
        set_attention_backend(unets.compiled, case.attention)
    weight = next(unets.ours.parameters())
    generator = torch.Generator(weight.device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)

    x = noise(case.batch, unets.ours.in_channels, latent_size, latent_size)
    context = noise(case.batch, CONTEXT_LENGTH, context_width(unets.ours))
    once = _timesteps(ToMeConfig(), x)

    def ours(name: str, kind: str, config: ToMeConfig, unet: UNetModel = unets.ours) -> Contender:
        apply = partial(_merging, unet, x, context, config, kind)
        return Contender(Row(case, name, kind, asdict(config)), apply, _timesteps(config, x))

    found = []
    for name, config in {"off": ToMeConfig(), **settings}.items():
        found.append(ours(name, "off" if config.is_off else "ours", config))
        if has_oracles and not config.is_off:
            found.append(ours(name, "oracle", config))
        if unets.compiled is not None:
            found.append(ours(name, "compiled", config, unets.compiled))
        is_graph = has_graphs and repeats(config)
        if is_graph:
            found.append(ours(name, "graph", config))
        if has_kernels and backend.takes_kernels(config):
            found.append(ours(name, "kernels", config))
            if is_graph:
                found.append(ours(name, "kernels, graph", config))
    if unets.diffusers is not None and case.attention == "sdpa":
        for ratio in (0.0, *tomesd_ratios):
            row = Row(case, f"diffusers, tomesd {ratio:g}" if ratio else "diffusers", "peer")
            row.config["ratio"] = ratio
            apply = partial(diffusers_step, unets.diffusers, x, context, ratio)
            found.append(Contender(row, apply, once))
    if unets.upstream is not None:
        for name, way in UPSTREAM_STEPS.items():
            apply = partial(_upstreams_way, unets.upstream, unets.ours, x, context, *way)
            found.append(Contender(Row(case, name, "peer"), apply, once))
    return found


def repeats(config: ToMeConfig) -> bool:
    """Whether calls with a configuration are alike, so that a graph can stand for them."""
    return TokenMerger(config).call_key() is not None


@torch.inference_mode()
def compare(found: Sequence[Contender], unet: UNetModel, rounds: int) -> Iterator[str]:
    """Measure contenders in turn, A B C A B C, and fill their rows as it goes.

    Args:
        found: the contenders; those without room in memory, and those whose packages, compilers or
            drivers fail, are left out with the reason in their row.
        unet: the model that ours run in.
        rounds: how often each is measured, after one call to warm up.

    Yields:
        The name of a setting, after each of ``rounds + N_EXTRA_ROUNDS`` visits to it.
    """
    device = next(unet.parameters()).device
    with reused_memory():
        for round_ in range(-N_EXTRA_ROUNDS, rounds):
            for contender in found:
                if not contender.row.error:
                    _visit(contender, round_, unet, device)
                yield contender.row.name


def _visit(contender: Contender, round_: int, unet: UNetModel, device: torch.device) -> None:
    with _failures_noted(contender.row):
        if round_ == -2:
            _warm_up(contender, device)
        elif round_ == -1:
            _break_down(contender, unet, device)
        else:
            _measure(contender, device)


def _warm_up(contender: Contender, device: torch.device) -> None:
    is_graph = contender.row.kind.endswith("graph")
    peak = Peak()
    # A graph takes its memory when it is captured, and none that is counted when it is replayed.
    with peak_memory(device) if is_graph else nullcontext(peak) as peak, contender.apply() as step:
        if contender.row.kind == "compiled":
            step(contender.timesteps[0])  # compiles
        with nullcontext(peak) if is_graph else peak_memory(device) as peak:
            seconds = contender.seconds(step, device)
        if device.type != "cpu":  # where a first call sets much up
            seconds = contender.seconds(step, device)
    contender.row.peak_mib = peak.mib
    contender.repeats = max(1, min(MAX_REPEATS, round(MIN_SECONDS / seconds)))


def _break_down(contender: Contender, unet: UNetModel, device: torch.device) -> None:
    if contender.row.kind != "ours":
        return
    with contender.apply() as step, breakdown(unet, device) as parts:
        total = contender.seconds(step, device) * contender.repeats * len(contender.timesteps)
        contender.row.shares = {part: parts[part] / total for part in PARTS}
        contender.row.report = unet.tome.report()


def _measure(contender: Contender, device: torch.device) -> None:
    with contender.apply() as step:
        contender.row.ms.append(1000 * contender.seconds(step, device))


@contextmanager
def _merging(
    unet: UNetModel, x: Tensor, context: Tensor, config: ToMeConfig, kind: str
) -> Iterator[Step]:
    """A step of our U-Net with a configuration in force."""
    unet.tome.configure(config)
    captures = Captures(unet)
    way = os.environ.get("TOME_MATCHING")
    if kind.startswith("kernels"):
        os.environ["TOME_MATCHING"] = "triton"
    try:
        if kind.endswith("graph"):
            for timesteps in _timesteps(config, x)[:1] * 2:  # the second one is captured
                captures(x, timesteps, context)
            yield lambda timesteps: captures(x, timesteps, context)
        else:
            with oracle(unet) if kind == "oracle" else nullcontext():
                yield lambda timesteps: unet(x, timesteps, context)
    finally:
        captures.clear()
        unet.tome.configure(ToMeConfig())
        os.environ.pop("TOME_MATCHING", None)
        if way is not None:
            os.environ["TOME_MATCHING"] = way


@contextmanager
def _upstreams_way(
    upstream: UNetModel,
    unet: UNetModel,
    x: Tensor,
    context: Tensor,
    attention: str,
    has_our_layout: bool,
) -> Iterator[Step]:
    """A step as upstream computes it: in float32, and each block of memory new from the system.

    Then one of ours, so that the next setting finds memory kept as ever.

    Args:
        upstream: as upstream has it.
        unet: ours.
        x: latents.
        context: of the text.
        attention: sdpa in place of upstream's einsum.
        has_our_layout: convolutions and memory are as in ours.
    """
    latents, text = x.float(), context.float()
    layout = memory_format(unet.dtype, x.device) if has_our_layout else torch.contiguous_format
    upstream.to(memory_format=layout)
    set_attention_backend(upstream, attention)
    with nullcontext() if has_our_layout else returned_memory():
        yield lambda timesteps: upstream(latents, timesteps, text)
    unet(x, _timesteps(ToMeConfig(), x)[0], context)


def _timesteps(config: ToMeConfig, x: Tensor) -> list[Tensor]:
    """Timesteps that stand for a whole run: one, unless plans are kept or the ratio changes."""
    has_schedule = any(c.steps for c in (config, *config.rules))
    n_calls = max(config.reuse_steps, 10 if has_schedule else 1)
    progress = [(i + 0.5) / n_calls for i in range(n_calls)]
    return [torch.full((len(x),), N_TIMESTEPS * (1 - p), device=x.device) for p in progress]


@contextmanager
def _failures_noted(row: Row) -> Iterator[None]:
    """Note in the row that memory did not suffice, or that others' code failed, and go on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if is_out_of_memory(error):
            row.error = "out of memory"
        elif row.kind not in ("off", "ours", "oracle"):  # not ours: packages, compilers, drivers
            row.error = f"{type(error).__name__}: {text}"[:200]
        else:
            raise
