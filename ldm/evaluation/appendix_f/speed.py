"""How fast a plan's settings are: on the drawing model, and on models of the real shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ldm.config import load_config, model_defaults
from ldm.errors import InputError
from ldm.evaluation.appendix_f.plan import Setting
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.benchmark.program import MODELS
from ldm.evaluation.benchmark.speed import N_EXTRA_ROUNDS, Case, compare, contenders
from ldm.evaluation.benchmark.speed_report import figures, machine
from ldm.evaluation.benchmark.unets import UNets, build_unet
from ldm.text import read_json

BATCH = 2  # the two halves of guidance for one picture
OWN = "own"


def measure_speed(
    names: Sequence[str],
    own: tuple[Mapping[str, Any], Sequence[int]],
    settings: Sequence[Setting],
    weight: torch.Tensor,
    store: Store,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure the milliseconds of a U-Net step; what was measured before is kept.

    Args:
        names: of models: `OWN`, or of the benchmark's `MODELS`.
        own: configuration of the drawing model, and the sizes of its pictures.
        settings: controls are left out, and what changes the sampling: its steps differ.
        weight: has the type and the device of the weights, which are random.
        store: the folder that the results go to.
        rounds: interleaved measurements of each setting, of which the median counts.

    Returns: ``rows``, ``machine`` and ``about``, in plain values.
    """
    merging = [s for s in settings if not s.control and not s.sampling and not s.config.is_off]
    dtype = str(weight.dtype).removeprefix("torch.")
    where = machine(weight.device)
    rows: list[dict[str, Any]] = []
    for name in names:
        config, sizes = own if name == OWN else _shapes(MODELS[name])
        for size in sizes:
            made = {"keys": [s.key for s in merging], "rounds": rounds, "device": where["device"]}
            kept = f"speed/{name}-{size}-{dtype}.json"
            found = _kept(store, kept, made, where)
            if found is None:
                case = Case(name, size, BATCH, dtype, "sdpa")
                found = _rows(case, config, merging, weight, rounds)
                store.write_json(kept, {**made, "machine": where, "rows": found})
            rows += found
    place = where.get("gpu") or f"{where['processor']}, {where['threads']} threads"
    return {
        "rows": rows,
        "machine": place,
        "about": (
            f"One call of the U-Net for one picture with guidance (batch {BATCH}): median of "
            f"{rounds} interleaved rounds, on {place}, with the lowest and the highest ratio of "
            "two neighbouring ones; grey where these leave open which is faster. Weights are "
            "random: times do not depend on them, and say nothing of fidelity. Match, merge and "
            "unmerge are shares of a step."
        ),
    }


def _shapes(path: str) -> tuple[dict[str, Any], list[int]]:
    config = load_config(path)
    return config, [model_defaults(config)["H"]]


def _kept(
    store: Store, name: str, made: Mapping[str, Any], where: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Rows of an earlier run, if it measured the same on such a machine."""
    try:
        there = read_json(store.folder / name)
    except InputError:  # new, or damaged
        return None
    is_same = {key: there.get(key) for key in made} == dict(made)
    return there["rows"] if is_same and _place(there.get("machine", {})) == _place(where) else None


def _place(machine: Mapping[str, Any]) -> list[Any]:
    """What a time depends on, of where it was measured."""
    return [machine.get(name) for name in ("processor", "threads", "gpu")]


def _rows(
    case: Case,
    config: Mapping[str, Any],
    settings: Sequence[Setting],
    weight: torch.Tensor,
    rounds: int,
) -> list[dict[str, Any]]:
    unet = build_unet(config, weight.dtype, weight.device)
    latent_size = case.size // model_defaults(dict(config))["f"]
    configs = {setting.name: setting.config for setting in settings}
    found = contenders(case, UNets(unet), latent_size, configs, has_oracles=False)
    total = len(found) * (rounds + N_EXTRA_ROUNDS)
    with tqdm(total=total, desc=f"speed of {case.model}, {case.size}", unit="visit") as bar:
        for _ in compare(found, unet, rounds):
            bar.update()
    by_name = {setting.name: setting for setting in settings}
    rows = []
    for entry in figures([contender.row for contender in found]):
        setting = by_name.get(entry["name"], Setting(entry["name"]))
        rows.append(
            {
                "model": case.model,
                "size": case.size,
                "dtype": case.dtype,
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
