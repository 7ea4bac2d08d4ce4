"""``ratio: auto``: a static rule of size, device and precision, so that every run is the same."""

from __future__ import annotations

from ldm.modules.tome.config import ToMeConfig

# From how many tokens on merging pays for its matching, by device and by whether types are half.
# On a fast device attention is so cheap that few tokens are not worth any further operation.
PAYS_FROM = {
    ("cpu", False): 1024,
    ("cpu", True): 1024,
    ("cuda", False): 4096,
    ("cuda", True): 16384,
    ("mps", False): 4096,
    ("mps", True): 4096,
}


def pays_from(device_type: str, is_half: bool) -> int:
    """The number of tokens from which merging is expected to save time."""
    return PAYS_FROM.get((device_type, is_half), 16384)


def auto_ratio(config: ToMeConfig) -> float:
    """The ratio that ``auto`` stands for in a block where merging pays.

    Keys and values may be reduced as far as the grid goes; where queries are merged too, half of
    the tokens is as far as pictures stay close to unmerged ones.
    """
    is_kv_grid = config.apply_to == ("kv",) and config.method == "grid"
    return config.max_ratio if is_kv_grid else min(config.max_ratio, 0.5)
