"""What a sampler sees of a model: a function from noisy latents to the noise in them.

The parameterisation and classifier-free guidance are settled here, so samplers know neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Conditioning: TypeAlias = Any  # a tensor, a list of conditionings, a dict of them, or None
Denoiser: TypeAlias = Callable[[Tensor, "int | float", float], Tensor]
"""(x_t, t, alpha_bar_t) -> predicted noise; x_t and the result are (B, C, h, w)."""
Scale: TypeAlias = "float | Callable[[int | float], float]"
"""Of classifier-free guidance: one for all steps, or t -> scale."""

PARAMETERIZATIONS = ("eps", "x0", "v")


class DiffusionModel(Protocol):
    """What samplers need of a model.

    Attributes:
        num_timesteps: number of training steps T.
        betas: noise variances, (T,).
        alphas_cumprod: alpha_bar, (T,).
        alphas_cumprod_prev: alpha_bar of the step before, (T,), beginning with 1.
        parameterization: ``eps``, ``x0`` or ``v``.
        device: where ``apply_model`` takes its tensors.

    A model may also have ``begin_run(is_guided)`` and ``end_run()``, which are called before and
    after each sampling run, and ``at_step(t)``, called before ``apply_model`` with t as a number.
    Within a run, all calls get the same conditioning objects, and all batches have two halves if it
    is guided.
    """

    num_timesteps: int
    parameterization: str

    @property
    def betas(self) -> Tensor: ...  # noqa: D102 - described above

    @property
    def alphas_cumprod(self) -> Tensor: ...  # noqa: D102 - described above

    @property
    def alphas_cumprod_prev(self) -> Tensor: ...  # noqa: D102 - described above

    @property
    def device(self) -> torch.device: ...  # noqa: D102 - described above

    def apply_model(self, x: Tensor, t: Tensor, c: Conditioning, /) -> Tensor:
        """Model output for latents (B, C, h, w), steps (B,) and conditioning of B rows."""
        ...


@contextmanager
def sampling_run(model: DiffusionModel, is_guided: bool) -> Iterator[None]:
    """Tell the model that a sampling run starts, and that it is over, if it wants to know."""
    getattr(model, "begin_run", _nothing)(is_guided)
    try:
        yield
    finally:
        getattr(model, "end_run", _nothing)()


def _nothing(*_: float) -> None: ...


def uses_guidance(unconditional_conditioning: Conditioning, scale: Scale) -> bool:
    """Whether there is classifier-free guidance, which takes two rows for each picture."""
    return unconditional_conditioning is not None and scale != 1.0


def concat_conditioning(first: Conditioning, second: Conditioning) -> Conditioning:
    """Concatenate two conditionings along the batch, entry by entry through lists and dicts.

    Raises:
        ValueError: they differ in keys, in lengths of lists or in rows.
    """
    if isinstance(second, Mapping):
        if first.keys() != second.keys():
            raise ValueError(f"conditionings differ in keys: {[*first]} and {[*second]}")
        return {key: concat_conditioning(first[key], second[key]) for key in second}
    if isinstance(second, (list, tuple)):
        return [concat_conditioning(a, b) for a, b in zip(first, second, strict=True)]
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"the unconditional conditioning has {first.shape[0]} rows, and the conditioning "
            f"{second.shape[0]}"
        )
    return torch.cat([first, second])


def check_batch_size(conditioning: Conditioning, batch_size: int) -> None:
    """Check that each tensor of a conditioning has one row for each picture.

    Raises:
        ValueError: one has not. (Upstream prints a warning and fails later.)
    """
    if isinstance(conditioning, Mapping):
        conditioning = list(conditioning.values())
    if isinstance(conditioning, Sequence):
        for entry in conditioning:
            check_batch_size(entry, batch_size)
    elif isinstance(conditioning, Tensor) and conditioning.shape[0] != batch_size:
        raise ValueError(
            f"conditioning has {conditioning.shape[0]} rows, but the batch size is {batch_size}"
        )


def eps_from_output(output: Tensor, x: Tensor, alpha_bar: float, parameterization: str) -> Tensor:
    """Predicted noise from a model's output, same shapes.

    With a = alpha_bar: v = sqrt(a) eps - sqrt(1 - a) x0 and x = sqrt(a) x0 + sqrt(1 - a) eps, so
    eps = sqrt(a) v + sqrt(1 - a) x = (x - sqrt(a) x0) / sqrt(1 - a).
    Source: Salimans and Ho 2022 (arXiv 2202.00512).

    Raises:
        ValueError: the parameterisation is not one of eps, x0, v.
    """
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if parameterization == "eps":
        return output
    if parameterization == "v":
        return signal * output + noise * x
    if parameterization == "x0":
        return (x - signal * output) / noise
    raise ValueError(f"parameterization {parameterization!r}: choose from {PARAMETERIZATIONS}")


def noise_predictor(
    model: DiffusionModel,
    conditioning: Conditioning,
    unconditional_conditioning: Conditioning = None,
    scale: Scale = 1.0,
) -> Denoiser:
    """The model as a Denoiser, with its conditioning and classifier-free guidance built in.

    Guidance takes one batch of 2B rows, the unconditional half first:
    output_u + scale * (output_c - output_u). Without an unconditional conditioning, or with scale
    1, it is one pass of B rows. The combination is in the latents' precision (upstream's under
    autocast: in float16).

    Source: Ho and Salimans 2022 (arXiv 2207.12598).
    """
    is_guided = uses_guidance(unconditional_conditioning, scale)
    if is_guided:
        conditioning = concat_conditioning(unconditional_conditioning, conditioning)

    def predict_noise(x: Tensor, t: int | float, alpha_bar: float) -> Tensor:
        dtype = torch.float32 if isinstance(t, float) else torch.long
        steps = torch.full((x.shape[0],), t, dtype=dtype, device=x.device)
        getattr(model, "at_step", _nothing)(t)
        if is_guided:
            output = model.apply_model(torch.cat([x] * 2), torch.cat([steps] * 2), conditioning)
            unconditional, conditional = output.to(x.dtype).chunk(2)
            factor = scale(t) if callable(scale) else scale
            output = unconditional + factor * (conditional - unconditional)
        else:
            output = model.apply_model(x, steps, conditioning).to(x.dtype)
        return eps_from_output(output, x, alpha_bar, model.parameterization)

    return predict_noise
