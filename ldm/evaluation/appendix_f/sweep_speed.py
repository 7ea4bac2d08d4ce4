"""How fast a sweep's settings are: on the sweep's own model, and on models of the real shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ldm.config import model_defaults
from ldm.evaluation.appendix_f.files import write_text
from ldm.evaluation.appendix_f.plan import Setting
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.benchmark.speed import N_EXTRA_ROUNDS, Case, compare, contenders
from ldm.evaluation.benchmark.speed_report import figures, machine
from ldm.evaluation.benchmark.unets import UNets, build_unet

BATCH = 2  # the two halves of guidance for one picture


def measure_speed(
    models: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, Sequence[int]],
    settings: Sequence[Setting],
    dtype: str,
    device: torch.device,
    store: Store,
    own: str,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure the milliseconds of a U-Net step; what was measured before is kept.

    Args:
        models: configurations by name; weights are random.
        sizes: for each of them, pixels a side.
        settings: controls are left out.
        dtype: of weights and activations.
        device: where.
        store: the sweep's folder, which the results go to.
        own: which model the sweep's pictures come from.
        rounds: interleaved measurements of each setting, of which the median counts.

    Returns: ``rows``, ``machine`` and ``about``, in plain values.
    """
    merging = [s for s in settings if not s.control and not s.config.is_off]
    rows: list[dict[str, Any]] = []
    for name, config in models.items():
        for size in sizes[name]:
            path = store.folder / "speed" / f"{name}-{size}-{dtype}.json"
            keys = [setting.key for setting in merging]
            there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if there.get("keys") != keys or there.get("rounds") != rounds:
                found = _case(name, config, size, merging, dtype, device, rounds)
                there = {
                    "keys": keys,
                    "rounds": rounds,
                    "machine": machine(device),
                    "rows": [{**row, "is_own": name == own} for row in found],
                }
                write_text(path, json.dumps(there, indent=1) + "\n")
            rows += there["rows"]
            about = there["machine"]
    where = about.get("gpu") or f"{about['processor']}, {about['threads']} threads"
    return {
        "rows": rows,
        "machine": where,
        "about": (
            f"One call of the U-Net for one picture with guidance (batch {BATCH}): median of "
            f"{rounds} interleaved rounds, on {where}. Weights are random: times do not depend on "
            "them, and say nothing of quality. Quality above is the drawing model's own, so times "
            "of other models stand here alone. Match, merge and unmerge are shares of a step."
        ),
    }


def _case(
    name: str,
    config: Mapping[str, Any],
    size: int,
    settings: Sequence[Setting],
    dtype: str,
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    unet = build_unet(config, getattr(torch, dtype), device)
    case = Case(name, size, BATCH, dtype, "sdpa")
    f = model_defaults(dict(config))["f"]
    configs = {setting.name: setting.config for setting in settings}
    found = contenders(case, UNets(unet), size // f, configs, has_oracles=False)
    total = len(found) * (rounds + N_EXTRA_ROUNDS)
    with tqdm(total=total, desc=f"speed of {name}, {size}x{size}", unit="visit") as bar:
        for _ in compare(found, unet, rounds):
            bar.update()
    by_name = {setting.name: setting for setting in settings}
    rows = []
    for entry in figures([contender.row for contender in found]):
        setting = by_name.get(entry["name"], Setting(entry["name"]))
        rows.append(
            {
                "model": name,
                "size": size,
                "dtype": dtype,
                "setting": entry["name"],
                "key": setting.key,
                "source": setting.source,
                "ms": entry["median_ms"],
                "ms_all": entry["ms"],
                "speedup": entry["speedup"],
                "range": entry["speedup_range"],
                "peak_mib": entry["peak_mib"],
                "error": entry["error"],
                **entry["shares"],
            }
        )
    return rows
