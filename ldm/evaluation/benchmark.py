"""A whole benchmark: every case in turn, with progress, and results written as they come."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.config import model_defaults
from ldm.errors import InputError
from ldm.evaluation.peers import PACKAGES, TOMESD_MAX_RATIO, diffusers_unet, installed
from ldm.evaluation.speed import Case, Row, build_unet, compare, contenders
from ldm.evaluation.speed_report import (
    can_plot,
    machine,
    table,
    title,
    versions,
    write_json,
    write_plot,
)
from ldm.modules.tome.config import ToMeConfig

BUSY = 0.5  # load of a core, from which on other programs disturb the timings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What to measure: every combination.

    Attributes:
        models: configurations by name.
        sizes: pixels a side.
        dtypes: names of types.
        backends: of attention.
        batches: rows of a step.
        settings: of merging, by name.
        rounds: measurements of each.
        has_oracles: measure the settings' oracles.
        has_peers: measure diffusers and tomesd where they are installed.
    """

    models: Mapping[str, Mapping[str, Any]]
    sizes: Sequence[int]
    dtypes: Sequence[str]
    backends: Sequence[str]
    batches: Sequence[int]
    settings: Mapping[str, ToMeConfig]
    rounds: int
    has_oracles: bool = True
    has_peers: bool = True

    @property
    def tomesd_ratios(self) -> list[float]:
        """The ratios for tomesd: those of our settings that it can remove, else its default."""
        plain = [c.ratio for name, c in self.settings.items() if name.startswith("ratio ")]
        return [r for r in plain if isinstance(r, float) and r <= TOMESD_MAX_RATIO] or [0.5]


def measure(
    plan: Plan, device: torch.device, path: Path, command: str = "", started: str = ""
) -> list[Row]:
    """Measure everything; print a table for each case, and write a JSON file and a plot.

    Args:
        plan: what.
        device: where.
        path: the JSON file, written anew after each measurement; the plot lies beside it.
        command, started: notes for the file.
    """
    about: dict[str, Any] = {
        "command": command,
        "started": started,
        "rounds": plan.rounds,
        "machine": machine(device),
        "versions": versions(),
    }
    _say_what_disturbs(plan, about["machine"])
    rows: list[Row] = []
    peers = installed() if plan.has_peers else []
    n_settings = len(plan.settings) * (2 if plan.has_oracles else 1) + 1
    n_cases = len(plan.models) * len(plan.dtypes) * len(plan.sizes) * len(plan.batches)
    n_visits = n_cases * len(plan.backends) * n_settings
    if "diffusers" in peers and "sdpa" in plan.backends:
        n_visits += n_cases * (1 + len(plan.tomesd_ratios) * ("tomesd" in peers))
    with tqdm(total=n_visits * (plan.rounds + 2), unit="visit", smoothing=0.1) as bar:
        for (name, config), dtype in itertools.product(plan.models.items(), plan.dtypes):
            bar.set_description(f"building {name}")
            unet = build_unet(config, getattr(torch, dtype), device)
            peer = _peer(config, unet) if "diffusers" in peers else None
            f = model_defaults(dict(config))["f"]
            for backend, size, batch in itertools.product(plan.backends, plan.sizes, plan.batches):
                case = Case(name, size, batch, dtype, backend)
                found = contenders(
                    case,
                    unet,
                    size // f,
                    plan.settings,
                    peer if backend == "sdpa" else None,
                    plan.tomesd_ratios if "tomesd" in peers else (),
                    plan.has_oracles,
                )
                rows += [contender.row for contender in found]
                bar.set_description(title(case))
                for setting in compare(found, unet, plan.rounds):
                    bar.set_postfix_str(setting, refresh=False)
                    bar.update()
                    write_json(path, about, rows)
                shown = table([row for row in rows if row.case == case])
                bar.write(f"\n{title(case)}\n\n{shown}\n")
            del unet, peer, found  # one model in memory at a time
    print(f"Results are in {path}")
    if can_plot():
        write_plot(path.with_suffix(".png"), rows)
        print(f"The plot is {path.with_suffix('.png')}")
    return rows


def _peer(config: Mapping[str, Any], unet: torch.nn.Module) -> Any:
    """diffusers' model of the configuration; None, with a warning, where there is none."""
    try:
        return diffusers_unet(config["model"]["params"]["unet_config"]["params"], unet)
    except (ImportError, InputError) as error:
        logger.warning("diffusers is left out: %s", " ".join(str(error).split()))
        return None


def _say_what_disturbs(plan: Plan, about: Mapping[str, Any]) -> None:
    """Warn of a busy machine, and tell which peers could be had."""
    load, cores = about.get("load_before"), about["cores"]
    if load is not None and load > BUSY * cores:
        logger.warning(
            "other programs keep this machine busy (load %.1f on %d cores): expect longer and "
            "less certain times",
            *(load, cores),
        )
    missing = [name for name in PACKAGES if name not in installed()]
    if plan.has_peers and missing:
        logger.info(
            'Not installed, so not compared with: %s (pip install -e ".[bench]")',
            ", ".join(missing),
        )
