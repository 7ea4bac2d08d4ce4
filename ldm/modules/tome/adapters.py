"""Token merging in diffusers' pipelines: put on in one call, taken off in another.

    merger = adapters.apply(pipe, ratio=0.5)  # of Stable Diffusion 1, 2 or XL
    pipe("a red house on snowy hills")
    print(merger.report())
    adapters.remove(pipe)

All is done by forward hooks, so no method, class or weight of the U-Net changes. The hooks know
what diffusers' plain attention processors do. Others, which may look at the tokens, or tell
self-attention by its missing context, are refused by name: when merging is applied, and at each
call. diffusers itself is not imported.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.plan import BlockPlans, MergePlan

HANDLES = "_tome_handles"  # of a U-Net: what takes the hooks off again
UNET = "UNet2DConditionModel"  # the one class whose tokens are the positions of one picture
BLOCK = "BasicTransformerBlock"  # the class of its transformer blocks
# Processors that only compute attention: merged tokens are to them tokens like any others.
PLAIN_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def apply(pipe_or_unet: Any, **settings: Any) -> TokenMerger:
    """Merge tokens in a diffusers pipeline, or U-Net, from now on; replaces earlier settings.

    A run begins, with the same random numbers as the last, where the U-Net gets another context, or
    the timestep rises; or call ``begin_run`` of the result. With gradient checkpointing, each
    forward pass is to be followed by its backward pass. A compiled U-Net is compiled anew.

    Args:
        pipe_or_unet: of Stable Diffusion 1, 2 or XL. Only a pipeline tells whether a batch has the
            two halves of guidance, whose queries are merged alike.
        settings: the keys of ``tome_config``, such as ratio, method and apply_to; the U-Net does
            not know the prompt, so ``context`` can only be full, and there is no ``hires``.

    Returns:
        The merger, for its ``report`` and ``warnings``.

    Raises:
        InputError: a setting cannot be used, or this is no such U-Net, or it has attention
            processors that merging does not know.
    """
    config = ToMeConfig.from_mapping(settings)
    if config.context != "full":
        raise InputError(f"ToMe context={config.context!r}: a diffusers U-Net allows only full")
    if any(one.method == "guided" for one in (config, *config.rules)):
        raise InputError("ToMe method guided needs our own U-Net, whose predictions it looks at")
    if config.hires is not None:
        raise InputError("ToMe hires: a diffusers U-Net has no second pass; apply it anew for one")
    unet = _unet_of(pipe_or_unet)
    transformers = list(_transformers(unet))
    _refuse_misfits(unet, transformers, config)
    remove(unet)
    scheduler = getattr(pipe_or_unet, "scheduler", None)
    n_timesteps = 1000 if scheduler is None else scheduler.config.num_train_timesteps
    merger = TokenMerger(config, n_timesteps)
    handles = [
        unet.register_forward_pre_hook(_Calls(merger, pipe_or_unet).begin, with_kwargs=True),
        unet.register_forward_hook(partial(_end_call, merger)),
    ]
    for transformer, downsample in transformers:
        blocks = [_Block(block, merger, downsample) for block in transformer.transformer_blocks]
        enter = partial(_enter_transformer, blocks)
        handles.append(transformer.register_forward_pre_hook(enter, with_kwargs=True))
        handles += [handle for block in blocks for handle in block.hook()]
    setattr(unet, HANDLES, handles)
    _forget_compiled()
    return merger


def remove(pipe_or_unet: Any) -> None:
    """Merge nothing any more, and leave no trace; does nothing where nothing was applied."""
    handles = _unet_of(pipe_or_unet).__dict__.pop(HANDLES, ())
    for handle in handles:
        handle.remove()
    if handles:
        _forget_compiled()


# --- the U-Net ----------------------------------------------------------------------------------


def _unet_of(pipe_or_unet: Any) -> Any:
    unet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    unet = getattr(unet, "_orig_mod", unet)  # inside of what torch.compile returns
    parts = ("down_blocks", "mid_block", "up_blocks")
    if not isinstance(unet, nn.Module) or not all(hasattr(unet, part) for part in parts):
        raise InputError(
            f"{type(pipe_or_unet).__name__} is neither a diffusers pipeline with a U-Net nor one"
        )
    return unet


def _forget_compiled() -> None:
    """Have everything compiled anew: code that is there already does not look for new hooks."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _transformers(unet: Any) -> Iterator[tuple[Any, int]]:
    """The transformers of a U-Net, with by how much each is smaller than the latents, a side."""
    downsample = 1
    for block in filter(None, (*unet.down_blocks, unet.mid_block, *unet.up_blocks)):
        for module in block.modules():
            if hasattr(module, "transformer_blocks"):
                yield module, downsample
        if getattr(block, "downsamplers", None):
            downsample *= 2
        elif getattr(block, "upsamplers", None):
            downsample //= 2


def _refuse_misfits(unet: Any, transformers: list[tuple[Any, int]], config: ToMeConfig) -> None:
    """Raise InputError for U-Nets of another kind, and where the settings reach no block."""
    name = type(unet).__name__
    if not transformers:
        raise InputError(f"{name} has no transformers, so there are no tokens to merge")
    if UNET not in {kind.__name__ for kind in type(unet).__mro__}:
        raise InputError(
            f"{name}: merging knows {UNET} alone; tokens of others are not one picture"
        )
    for block in (
        block for transformer, _ in transformers for block in transformer.transformer_blocks
    ):
        kind = getattr(block, "norm_type", type(block).__name__)
        if kind != "layer_norm":
            raise InputError(
                f"{name} has transformer blocks of the kind {kind!r}; merging knows those of "
                "Stable Diffusion 1, 2 and XL"
            )
        if type(block).__name__ != BLOCK:
            raise InputError(
                f"{name} has transformer blocks that something else has changed "
                f"({type(block).__name__}); take that off first, as with tomesd.remove_patch"
            )
        if getattr(block, "fuser", None) is not None:
            raise InputError(f"{name} has gated attention (GLIGEN), which merging does not know")
        for entry in (config, *config.rules):
            for attention in _touched(block, entry.apply_to):
                _refuse_processor(attention)
    first = min(downsample for _, downsample in transformers)
    reach = max(entry.max_downsample for entry in (config, *config.rules))
    if reach < first and not config.is_off:
        raise InputError(
            f"ToMe max_downsample={reach}: this U-Net has no transformer at a downsampling "
            f"below {first}; give max_downsample={first} or more"
        )


def _touched(block: Any, places: tuple[str, ...]) -> Iterator[Any]:
    """The attention layers of a block that see merged tokens."""
    if {"kv", "q", "attn", "block"} & {*places}:
        yield block.attn1
    if {"crossattn", "block"} & {*places} and block.attn2 is not None:
        yield block.attn2


def _refuse_processor(attention: Any) -> None:
    processor = attention.processor
    name = type(processor).__name__
    if name not in PLAIN_PROCESSORS or type(processor).__module__.split(".")[0] != "diffusers":
        way_out = "; call unfuse_qkv_projections() first" if "Fused" in name else ""
        known = ", ".join(sorted(PLAIN_PROCESSORS))
        raise InputError(
            f"attention processor {name}: merging goes with {known} of diffusers alone{way_out}"
        )


class _Calls:
    """Tells a merger of each call of the U-Net, and which of them make up a run.

    A run is a sequence of calls with one context, of falling timesteps. A pipeline's guidance
    counts where it is that pipeline's call: where the two halves of the latents are equal.
    """

    def __init__(self, merger: TokenMerger, pipe_or_unet: Any) -> None:
        self.merger = merger
        self.pipe: Callable[[], Any] = weakref.ref(pipe_or_unet)
        self.last = float("-inf")
        self.context: Tensor | None = None
        self.n_rows = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: the pipeline, and a run that is under way."""
        fresh = {"pipe": _nobody, "last": float("-inf"), "context": None, "n_rows": 0}
        return {**vars(self), **fresh}

    def begin(self, unet: nn.Module, args: Args, kwargs: Kwargs) -> None:
        latents = _get(args, kwargs, 0, "sample")
        timesteps = torch.as_tensor(_get(args, kwargs, 1, "timestep")).float().reshape(-1)
        context = _get(args, kwargs, 2, "encoder_hidden_states")
        now = float(timesteps.mean())
        # In training timesteps come in any order, and there are no runs.
        is_new = not torch.is_grad_enabled() and self._is_new_run(now, context)
        if is_new:
            self.merger.begin_run()
        if is_new or len(latents) != self.n_rows:
            self.merger.is_guided = self._is_guided(latents)
        self.last, self.context, self.n_rows = now, context, len(latents)
        if torch.is_grad_enabled():  # in training, which some loops begin without train()
            self.merger.begin_batch()
        h, w = latents.shape[-2:]
        self.merger.begin_call(h, w, timesteps)

    def _is_new_run(self, now: float, context: Tensor | None) -> bool:
        if now > self.last or context is None or self.context is None:
            return now > self.last or context is not self.context
        if context is self.context:
            return False
        # Some loops put the same context together anew for each step.
        is_same = context.shape == self.context.shape and context.device == self.context.device
        return not (is_same and now < self.last and torch.equal(context, self.context))

    def _is_guided(self, latents: Tensor) -> bool:
        # The pipeline has no such attribute before its first run.
        if not getattr(self.pipe(), "do_classifier_free_guidance", False) or len(latents) % 2:
            return False
        first, second = latents.chunk(2)
        return torch.equal(first, second)


def _nobody() -> None:
    """What a reference to a pipeline becomes in a copy."""


def _end_call(merger: TokenMerger, *_: Any) -> None:
    merger.end_call()


# --- its blocks ---------------------------------------------------------------------------------


def _enter_transformer(
    blocks: list[_Block], transformer: nn.Module, args: Args, kwargs: Kwargs
) -> None:
    """Tell the blocks of a transformer their size; what was decided in the last call is over."""
    h, w = _get(args, kwargs, 0, "hidden_states").shape[-2:]
    for block in blocks:
        block.size = (h, w)
        block.merging = None


class _Block:
    """Merging in one transformer block: what its hooks hand to each other.

    Attributes:
        size: h, w of the tokens.
        merging: what was decided about this call; a recomputation for gradients meets it again.
    """

    def __init__(self, block: Any, merger: TokenMerger, downsample: int) -> None:
        self.block = block
        self.merger = merger
        self.downsample = downsample
        self.size = (0, 0)
        self.merging: Decision | None = None
        self.plans: BlockPlans | None = None  # from here on: while the block runs
        self.x: Tensor | None = None
        self.merged: Tensor | None = None

    def hook(self) -> Iterator[Any]:
        """Hook the block and its layers; yields what takes the hooks off."""
        block = self.block
        has_self_attention = not block.only_cross_attention
        yield block.register_forward_pre_hook(
            partial(self._enter, has_self_attention), with_kwargs=True
        )
        yield block.attn1.register_forward_pre_hook(self._make_plans, with_kwargs=True)
        layers = [(block.attn1, "q", "kv"), (block.attn2, "crossattn", "crossattn")]
        for attention, queries, keys in layers:
            if attention is not None:
                before = partial(self._before_attention, queries, keys)
                yield attention.register_forward_pre_hook(before, with_kwargs=True)
                yield attention.register_forward_hook(partial(self._unmerge, queries))
        yield block.ff.register_forward_pre_hook(self._before_ff)
        yield block.ff.register_forward_hook(partial(self._unmerge, "mlp"))
        yield block.register_forward_hook(self._leave)

    def _enter(
        self, has_self_attention: bool, block: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        x = self.x = _get(args, kwargs, 0, "hidden_states")
        self.merged = None  # it is still there where an error ended the last call
        if self.merging is None:
            self.merging = self.merger.block(x, self.size, self.downsample, has_self_attention)
        if not self.merging.is_whole_block:
            return None
        self.plans = self._made(x, None)
        self.merged = self.plans.block.merge(x)
        return _put(args, kwargs, 0, "hidden_states", self.merged)

    def _make_plans(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Make the plans where norm1 of the input is there to be compared."""
        if self.merged is None:
            assert self.x is not None
            self.plans = self._made(self.x, _get(args, kwargs, 0, "hidden_states"))

    @torch.no_grad()
    def _made(self, x: Tensor, normed: Tensor | None) -> BlockPlans:
        """The plans for the places of the block; those that are there already, or else new ones."""
        merging = self.merging
        assert merging is not None
        if merging.removed and merging.plan is None:
            metrics = merging.metrics_of(self.block.attn1, self.block.norm1, x, normed)
            merging.plan, merging.query_plan = (merging.planner or plan_block)(merging, metrics)
        return merging.places

    def _before_attention(
        self, queries: str, keys: str, attention: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        x = _get(args, kwargs, 0, "hidden_states")
        context = _get(args, kwargs, 1, "encoder_hidden_states")
        mask = _get(args, kwargs, 2, "attention_mask")
        assert self.merging is not None
        if context is None and mask is not None and self.merging.removed:
            raise InputError("ToMe cannot merge tokens where the U-Net is given an attention_mask")
        q, kv = self._plan(queries), self._plan(keys)
        sees_merged = not q.is_identity or (context is None and not kv.is_identity)
        if sees_merged or self.merged is not None:
            _refuse_processor(attention)  # others may have been set since
        merged, context, bias = self._current.for_attention(x, context, q, kv)
        args, kwargs = _put(args, kwargs, 0, "hidden_states", merged)
        args, kwargs = _put(args, kwargs, 1, "encoder_hidden_states", context)
        if bias is not None:
            mask = bias[:, 0].to(x.dtype)  # (B, 1, L)
        return _put(args, kwargs, 2, "attention_mask", mask)

    def _before_ff(self, ff: nn.Module, args: Args) -> Args:
        return (self._current.mlp.merge(args[0]), *args[1:])

    def _unmerge(self, place: str, layer: nn.Module, args: Args, out: Tensor) -> Tensor:
        return self._plan(place).unmerge(out)

    def _leave(self, block: nn.Module, args: Args, out: Tensor) -> Tensor:
        if self.merged is not None:
            assert self.x is not None
            out = self.x + self._current.block.unmerge(out - self.merged)
        self.plans = self.x = self.merged = None
        return out

    @property
    def _current(self) -> BlockPlans:
        assert self.plans is not None
        return self.plans

    def _plan(self, place: str) -> MergePlan:
        return getattr(self._current, place)


def _get(args: Args, kwargs: Kwargs, position: int, name: str) -> Any:
    """An argument, wherever the caller has put it; None without."""
    return args[position] if position < len(args) else kwargs.get(name)


def _put(args: Args, kwargs: Kwargs, position: int, name: str, value: Any) -> tuple[Args, Kwargs]:
    """The arguments with another value in one place."""
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}
