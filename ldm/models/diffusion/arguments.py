"""Arguments of models that have few values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ldm.errors import InputError, shown

Inert: TypeAlias = Mapping[str, "tuple[Any, ...] | None"]
"""Arguments of upstream's configurations that select something which is not included. The values
are the ones that mean "without it"; None allows every value, as the argument changes nothing."""

INERT_ARGUMENTS: Inert = {
    "num_timesteps_cond": (None, 1),
    "cond_stage_forward": (None,),
    "use_positional_encodings": (False,),
    "make_it_fit": (False,),
    "reset_ema": (False,),
    "reset_num_ema_updates": (False,),
    "finetune_keys": (None,),
    "clip_denoised": None,
    "log_every_t": None,
}


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise InputError unless the value is one of the choices."""
    if value not in choices:
        raise InputError(f"{name} {value!r}: choose from {', '.join(choices)}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise InputError unless the value is a number from least to most."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and least <= value <= most):
        raise InputError(f"{name} {shown(value)}: must be a number from {least:g} to {most:g}")


def check_inert(owner: str, allowed_values: Inert, arguments: Mapping[str, Any]) -> None:
    """Raise InputError where an argument is unknown, or selects what is not included."""
    for name, value in arguments.items():
        if name not in allowed_values:
            raise InputError(f"{owner} has no argument {name!r}")
        allowed = allowed_values[name]
        if allowed is not None and value not in allowed:
            raise InputError(f"{owner}: {name}={value!r} is not supported, leave it out")
