"""Noise schedules: beta and everything that follows from it.

Pure functions of numbers. Sums and products are taken in float64; what a model stores is float32.
``alpha_bar_t`` is the product of ``1 - beta`` up to and including step ``t`` (0 .. T-1).

Sources: Ho et al. 2020 (arXiv 2006.11239); Nichol and Dhariwal 2021 (arXiv 2102.09672);
Song et al. 2021 (arXiv 2010.02502).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm.errors import InputError

BETA_SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt", "squaredcos_cap_v2")
DISCRETIZATIONS = ("uniform", "quad")
SIGMA_SPACINGS = ("uniform", "karras", "sgm_uniform")
KARRAS_RHO = 7.0

Float64Array: TypeAlias = npt.NDArray[np.float64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = Float32Array | Float64Array
IntArray: TypeAlias = npt.NDArray[np.int64]


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> Float64Array:
    """Noise variance beta of every step, (n_timestep,), in float64.

    Args:
        schedule: ``linear`` is linear in sqrt(beta), as all Stable Diffusion models use it;
            ``sqrt_linear`` is linear in beta, ``sqrt`` its square root; ``cosine`` and
            ``squaredcos_cap_v2`` have alpha_bar follow a squared cosine.
        n_timestep: number of steps T.
        linear_start: first value of the linear schedules.
        linear_end: last value of the linear schedules.
        cosine_s: offset of ``cosine`` that keeps the first betas from vanishing.

    Raises:
        InputError: no schedule has that name.
    """
    if schedule == "linear":
        return np.linspace(np.sqrt(linear_start), np.sqrt(linear_end), n_timestep) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep)
    if schedule == "sqrt":
        return np.sqrt(np.linspace(linear_start, linear_end, n_timestep))
    if schedule in ("cosine", "squaredcos_cap_v2"):
        offset = cosine_s if schedule == "cosine" else 0.008
        # upstream's "cosine" adds the offset to t and divides by 1 + offset, as the paper does
        angle = (np.arange(n_timestep + 1) / n_timestep + offset) / (1 + offset) * np.pi / 2
        alpha_bar = np.cos(angle) ** 2
        return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    raise InputError(f"beta_schedule {schedule!r}: choose from {', '.join(BETA_SCHEDULES)}")


def check_betas(betas: Float64Array) -> None:
    """Refuse noise variances, (T,), with which there is no model; the last may be 1.

    Raises:
        InputError: there are none, they are no list, or one adds no noise or leaves no picture.
    """
    if betas.ndim != 1:
        raise InputError(f"given_betas of shape {betas.shape}: must be a list of numbers")
    is_beta = (betas > 0) & (betas < 1)  # NaN is not, either
    is_beta[-1:] |= betas[-1:] == 1
    if len(betas) == 0 or not is_beta.all():
        found = ", ".join(f"{beta:g}" for beta in betas[~is_beta][:1]) or "none"
        raise InputError(
            f"betas (linear_start, linear_end, given_betas, ...) {found}: must be above 0 and "
            "below 1"
        )


def rescale_zero_terminal_snr(betas: npt.ArrayLike) -> Float64Array:
    """Betas, (T,), whose alpha_bar falls to exactly 0: the last step is noise alone.

    sqrt(alpha_bar) is shifted and scaled so that its last value is 0 and its first one stays.

    Source: Lin et al. 2023 (arXiv 2305.08891) algorithm 1.
    """
    root = np.sqrt(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def schedule_buffers(betas: npt.ArrayLike, v_posterior: float = 0.0) -> dict[str, Tensor]:
    """The twelve schedule tensors that a checkpoint stores, by their state-dict names.

    Args:
        betas: noise variances, (T,).
        v_posterior: 0 takes the posterior's own variance, 1 takes beta, between them a mix.

    Returns: name -> (T,) float32 tensor on the CPU, also under a ``torch.device`` context.
    """
    beta = np.asarray(betas, dtype=np.float64)
    alpha = 1.0 - beta
    alpha_bar = np.cumprod(alpha)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    posterior_variance = (1 - v_posterior) * beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    posterior_variance = posterior_variance + v_posterior * beta
    with np.errstate(divide="ignore"):  # of a schedule that ends in noise alone
        recip = 1 / alpha_bar
    arrays = {  # state-dict names
        "betas": beta,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha_bar),
        "log_one_minus_alphas_cumprod": np.log(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
        "posterior_variance": posterior_variance,
        # the variance of step 0 is 0
        "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(alpha_bar_prev) / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - alpha_bar_prev) * np.sqrt(alpha) / (1 - alpha_bar),
    }
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


def variational_weights(
    betas: npt.ArrayLike, parameterization: str, v_posterior: float = 0.0
) -> Tensor:
    """Weight of each step's squared error in the variational bound, (T,) float32.

    eps: beta^2 / (2 posterior_variance alpha (1 - alpha_bar)), x0: 0.5 sqrt(alpha_bar) /
    (2 - alpha_bar) as upstream has it, v: one. Step 0, whose posterior variance may be 0, takes
    the weight of step 1. Source: Ho et al. 2020 eq. 12; CompVis ddpm.py.

    Args:
        betas: noise variances, (T,).
        parameterization: eps, x0 or v.
        v_posterior: see `schedule_buffers`.
    """
    beta = np.asarray(betas, dtype=np.float64)
    alpha_bar = np.cumprod(1 - beta)
    if parameterization == "v":
        weights = np.ones(len(beta))
    elif parameterization == "x0":
        weights = 0.5 * np.sqrt(alpha_bar) / (2 - alpha_bar)
    else:
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
        # posterior_variance (1 - alpha_bar) / beta
        variance = (1 - v_posterior) * (1 - alpha_bar_prev) + v_posterior * (1 - alpha_bar)
        with np.errstate(divide="ignore"):
            weights = beta / (2 * (1 - beta) * variance)
    weights[0] = weights[min(1, len(weights) - 1)]
    return torch.from_numpy(weights.astype(np.float32))


def make_ddim_timesteps(discretization: str, n_steps: int, n_timesteps: int) -> IntArray:
    """The training steps that DDIM and PLMS visit, ascending, (number of steps,).

    ``uniform`` is upstream's rule, ``range(0, T, T // n_steps) + 1``, wherever that rule stays
    below T: pictures then are upstream's. It gives more steps than asked for where ``n_steps``
    does not divide T (30 -> 31). For the counts at which upstream runs past the last step (3, 9,
    27, 251 .. 333, 501 and more of 1000) there are exactly ``n_steps``, evenly spaced.

    Args:
        discretization: ``uniform`` or ``quad`` (denser at low noise).
        n_steps: 1 .. n_timesteps.
        n_timesteps: number of training steps T.

    Raises:
        InputError: a value outside of these.
    """
    if not 1 <= n_steps <= n_timesteps:
        raise InputError(
            f"{n_steps} sampling steps: this model takes from 1 to {n_timesteps} steps"
        )
    if discretization == "uniform":
        steps = np.arange(0, n_timesteps, n_timesteps // n_steps) + 1
        if steps[-1] < n_timesteps:
            return steps
        if n_steps == n_timesteps:
            return np.arange(n_timesteps)
        return np.arange(n_steps) * (n_timesteps - 1) // n_steps + 1
    if discretization == "quad":
        roots = np.linspace(0, math.sqrt(0.8 * n_timesteps), n_steps)
        return (roots**2).astype(np.int64) + 1
    raise InputError(
        f"ddim_discretize {discretization!r}: choose from {', '.join(DISCRETIZATIONS)}"
    )


@dataclass(frozen=True)
class StepCoefficients:
    """What one update x_t -> x_prev needs to know of the schedule.

    Attributes:
        t: the model's step; a fraction where a solver visits times between steps.
        alpha_bar: at t.
        alpha_bar_prev: at the step's end, where there is less noise.
        signal: sqrt(alpha_bar).
        noise: sqrt(1 - alpha_bar).
        signal_prev: sqrt(alpha_bar_prev).
        direction: sqrt(1 - alpha_bar_prev - sigma^2), the share of the predicted noise that stays.
        sigma: standard deviation of the fresh noise.
    """

    t: int | float
    alpha_bar: float
    alpha_bar_prev: float
    signal: float
    noise: float
    signal_prev: float
    direction: float
    sigma: float


def step_coefficients(
    timesteps: IntArray | Float64Array,
    alpha_bar: FloatArray,
    alpha_bar_prev: FloatArray,
    eta: float = 0.0,
) -> list[StepCoefficients]:
    """Coefficients of each step; all arrays are (n,), and the order is kept.

    They are computed in the arrays' precision: given float32 they are upstream's to the last bit.

    Args:
        timesteps: the model's steps.
        alpha_bar: at these steps.
        alpha_bar_prev: at the end of each step.
        eta: 0 is deterministic, 1 has the variance of ancestral sampling.

    Source: Song et al. 2021 eq. 12 and 16.

    Raises:
        InputError: with this eta a step adds more noise than there is at its end.
    """
    a, a_prev = alpha_bar.astype(np.float64), alpha_bar_prev.astype(np.float64)
    sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    sigma = sigma.astype(alpha_bar.dtype)
    rest = 1 - alpha_bar_prev - sigma**2
    if eta and not rest.min() >= 0:  # nor what is no number
        raise InputError(f"eta {eta:g}: a step would add more noise than it leaves; 0 to 1 will do")
    columns = (
        timesteps,
        alpha_bar,
        alpha_bar_prev,
        np.sqrt(alpha_bar),
        np.sqrt(1 - alpha_bar),
        np.sqrt(alpha_bar_prev),
        np.sqrt(rest),
        sigma,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [StepCoefficients(*row) for row in rows]


def ddim_coefficients(
    alpha_bar: Tensor, timesteps: IntArray, eta: float = 0.0
) -> list[StepCoefficients]:
    """Coefficients of the DDIM steps through ``timesteps``, both ascending.

    Below the lowest step comes ``alpha_bar[0]``, not 1: upstream's choice.

    Args:
        alpha_bar: the model's alphas_cumprod, (T,).
        timesteps: ascending training steps, (n,).
        eta: see step_coefficients.
    """
    table = to_numpy(alpha_bar)
    previous = np.append(table[:1], table[timesteps[:-1]])
    return step_coefficients(timesteps, table[timesteps], previous, eta)


def original_coefficients(
    alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float = 0.0
) -> list[StepCoefficients]:
    """Coefficients of all T training steps, ascending; the last step ends without noise.

    Args:
        alpha_bar: the model's alphas_cumprod, (T,).
        alpha_bar_prev: the model's alphas_cumprod_prev, (T,).
        eta: see step_coefficients.
    """
    steps = np.arange(len(alpha_bar))
    return step_coefficients(steps, to_numpy(alpha_bar), to_numpy(alpha_bar_prev), eta)


def dpm_coefficients(alpha_bar: Tensor, n_steps: int) -> list[StepCoefficients]:
    """Coefficients of ``n_steps`` steps of equal length in time from T-1 to 0, ascending.

    Times between the training steps are allowed; there log(alpha_bar) is interpolated linearly.

    Args:
        alpha_bar: the model's alphas_cumprod, (T,).
        n_steps: at least 1.

    Source: Lu et al. 2022 (arXiv 2211.01095), with their discrete noise schedule.

    Raises:
        InputError: n_steps is less than 1.
    """
    if n_steps < 1:
        raise InputError(f"{n_steps} sampling steps: at least 1 is needed")
    log_alpha_bar = np.log(to_numpy(alpha_bar).astype(np.float64))
    last = len(log_alpha_bar) - 1
    times = np.linspace(0, last, n_steps + 1)
    levels = np.exp(np.interp(times, np.arange(last + 1), log_alpha_bar))
    return step_coefficients(times[1:], levels[1:], levels[:-1])


def sigma_coefficients(
    alpha_bar: Tensor, n_steps: int, spacing: str = "uniform", eta: float = 0.0
) -> list[StepCoefficients]:
    """Coefficients of ``n_steps`` steps from the most noise to none at all, ascending.

    With sigma = sqrt((1 - alpha_bar) / alpha_bar), the noise in x / sqrt(alpha_bar), the last step
    goes from the model's lowest sigma to 0. Times between the training steps are allowed; there
    log(sigma) is interpolated linearly.

    Args:
        alpha_bar: the model's alphas_cumprod, (T,).
        n_steps: at least 1.
        spacing: ``uniform`` in time; ``karras``: sigma^(1/7) falls linearly; or ``sgm_uniform``:
            in time, but with the last step to no noise as long as the others.
        eta: see step_coefficients.

    Source: Karras et al. 2022 (arXiv 2206.00364) eq. 5; k-diffusion's get_sigmas.

    Raises:
        InputError: n_steps is less than 1, or the spacing none of these.
    """
    if n_steps < 1:
        raise InputError(f"{n_steps} sampling steps: at least 1 is needed")
    log_sigma = _log_sigma(alpha_bar)
    steps = np.arange(len(log_sigma))
    if spacing == "uniform":
        times = np.linspace(steps[-1], 0, n_steps)[::-1]
    elif spacing == "sgm_uniform":
        times = np.linspace(steps[-1], 0, n_steps + 1)[:-1][::-1]
    elif spacing == "karras":
        highest, lowest = np.exp(log_sigma[[-1, 0]] / KARRAS_RHO).tolist()
        roots = np.linspace(highest, lowest, n_steps)[::-1]
        times = np.interp(KARRAS_RHO * np.log(roots), log_sigma, steps)
    else:
        raise InputError(f"schedule {spacing!r}: choose from {', '.join(SIGMA_SPACINGS)}")
    levels = 1 / (1 + np.exp(2 * np.interp(times, steps, log_sigma)))
    return step_coefficients(times, levels, np.append(1.0, levels[:-1]), eta)


def time_of(alpha_bar: Tensor, sigma: float) -> float:
    """The step, a fraction, at which a model's sigma = sqrt((1 - alpha_bar) / alpha_bar) is this.

    Args:
        alpha_bar: the model's alphas_cumprod, (T,).
        sigma: above 0.
    """
    log_sigma = _log_sigma(alpha_bar)
    return float(np.interp(math.log(sigma), log_sigma, np.arange(len(log_sigma))))


def _log_sigma(alpha_bar: Tensor) -> Float64Array:
    table = to_numpy(alpha_bar).astype(np.float64)
    return 0.5 * np.log((1 - table) / table)


def to_numpy(alpha_bar: Tensor) -> Float32Array:
    """A model's alpha_bar as a float32 array in main memory.

    Where it is 0, samplers take 2^-24, the smallest that float16 has, as diffusers do: what they
    divide by is its root.
    """
    return np.maximum(alpha_bar.detach().float().cpu().numpy(), np.float32(2.0**-24))
