"""A whole benchmark: every case in turn, with progress, and results written as they come."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.cli.program import said_when_stopped
from ldm.config import model_defaults
from ldm.errors import InputError
from ldm.evaluation.benchmark.peers import PACKAGES, TOMESD_MAX_RATIO, diffusers_unet, installed
from ldm.evaluation.benchmark.speed import (
    N_EXTRA_ROUNDS,
    UPSTREAM_STEPS,
    Case,
    Row,
    compare,
    contenders,
    repeats,
)
from ldm.evaluation.benchmark.speed_report import (
    against_upstream,
    can_plot,
    machine,
    table,
    title,
    versions,
    write_json,
    write_plot,
)
from ldm.evaluation.benchmark.unets import UNets, build_unet, compiled_unet, upstream_unet
from ldm.modules.tome import backend
from ldm.modules.tome.config import ToMeConfig
from ldm.util import part_of

BUSY = 0.5  # load of a core, from which on other programs disturb the timings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
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
        has_compiled: measure everything with compiled blocks, too.
        has_graphs: measure everything as CUDA graphs, too, where there are any.
        has_kernels: measure settings with windows with the Triton kernels, too, on CUDA.
        has_peers: measure diffusers and tomesd where they are installed.
        has_upstream: measure upstream's own way to compute.
    """

    models: Mapping[str, dict[str, Any]]
    sizes: Sequence[int]
    dtypes: Sequence[str]
    backends: Sequence[str]
    batches: Sequence[int]
    settings: Mapping[str, ToMeConfig]
    rounds: int
    has_oracles: bool = True
    has_compiled: bool = False
    has_graphs: bool = False
    has_kernels: bool = False
    has_peers: bool = True
    has_upstream: bool = False

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """Backend, size and batch of the cases of each model and type."""
        return list(itertools.product(self.backends, self.sizes, self.batches))

    def n_visits(self, peers: Sequence[str]) -> int:
        """How often `compare` comes by, with those packages among the peers."""
        n_ours = 1 + len(self.settings) * (2 if self.has_oracles else 1)
        n_ours += len(UPSTREAM_STEPS) * self.has_upstream
        n_ours += self.has_compiled * (1 + len(self.settings))
        fused = [c for c in self.settings.values() if self.has_kernels and backend.takes_kernels(c)]
        n_ours += len(fused)
        n_ours += self.has_graphs * (1 + sum(map(repeats, [*self.settings.values(), *fused])))
        n_peers = 0
        if "diffusers" in peers:
            n_peers = 1 + len(self.tomesd_ratios) * ("tomesd" in peers)
        n_settings = sum(n_ours + n_peers * (group[0] == "sdpa") for group in self.groups)
        return len(self.models) * len(self.dtypes) * n_settings * (self.rounds + N_EXTRA_ROUNDS)

    @property
    def tomesd_ratios(self) -> list[float]:
        """The ratios for tomesd: those of our settings that it can remove, else its default."""
        plain = [c.ratio for name, c in self.settings.items() if name.startswith("ratio ")]
        return [r for r in plain if isinstance(r, float) and r <= TOMESD_MAX_RATIO] or [0.5]


def measure(scope: Scope, device: torch.device, outdir: Path, command: str) -> None:
    """Measure everything; print a table for each case, and write a JSON file and a plot.

    Args:
        scope: what.
        device: where.
        outdir: the folder of results. The JSON file is written anew after each measurement.
        command: noted in it.
    """
    started = datetime.now(timezone.utc)
    about: dict[str, Any] = {
        "command": command,
        "started": f"{started:%Y-%m-%d %H:%M:%S} UTC",
        "rounds": scope.rounds,
        "machine": machine(device),
        "versions": versions(),
    }
    outdir.mkdir(parents=True, exist_ok=True)
    _say_what_disturbs(scope, about["machine"])
    rows: list[Row] = []
    path = _claimed(outdir, f"{started:%Y%m%d-%H%M%S}", about)
    with said_when_stopped(lambda: f"what was measured is in {path}"):
        _measure(scope, device, path, about, rows)
    for line in against_upstream(rows):
        print(line)
    print(f"Results are in {path}")
    if can_plot():
        plot = path.with_suffix(".png")
        write_plot(plot, rows)
        if plot.is_file():  # there is none of nothing but unmerged models
            print(f"The plot is {plot}")


def _claimed(outdir: Path, name: str, about: Mapping[str, Any]) -> Path:
    """The JSON file of this run; another one that began in the same second has another."""
    path, number = outdir / f"{name}.json", 1
    while True:
        try:
            with part_of(path, exclusive=True) as part:
                write_json(part, about, [])
            return path
        except FileExistsError:
            number += 1
            path = outdir / f"{name}-{number}.json"


def _measure(
    scope: Scope, device: torch.device, path: Path, about: Mapping[str, Any], rows: list[Row]
) -> None:
    """Fill the rows, and write the file anew after each measurement."""
    peers = installed() if scope.has_peers else []
    with tqdm(total=scope.n_visits(peers), unit="visit", smoothing=0.1) as bar:
        for (name, config), dtype in itertools.product(scope.models.items(), scope.dtypes):
            bar.set_description(f"building {name}")
            f = model_defaults(config)["f"]
            unet = build_unet(config, getattr(torch, dtype), device)
            unets = UNets(
                unet,
                compiled=compiled_unet(config, unet) if scope.has_compiled else None,
                diffusers=_peer(config, unet) if "diffusers" in peers else None,
                upstream=upstream_unet(config, device) if scope.has_upstream else None,
            )
            for backend, size, batch in scope.groups:
                case = Case(name, size, batch, dtype, backend)
                found = contenders(
                    case,
                    unets,
                    size // f,
                    scope.settings,
                    scope.tomesd_ratios if "tomesd" in peers else (),
                    scope.has_oracles,
                    scope.has_graphs,
                    scope.has_kernels,
                )
                rows += [contender.row for contender in found]
                bar.set_description(title(case))
                for setting in compare(found, unet, scope.rounds):
                    bar.set_postfix_str(setting, refresh=False)
                    bar.update()
                    write_json(path, about, rows)
                shown = table([row for row in rows if row.case == case])
                bar.write(f"\n{title(case)}\n\n{shown}\n")
            del unet, unets, found  # one model in memory at a time


def _peer(config: Mapping[str, Any], unet: torch.nn.Module) -> Any:
    """diffusers' model of the configuration; None, with a warning, where there is none."""
    try:
        return diffusers_unet(config["model"]["params"]["unet_config"]["params"], unet)
    except (ImportError, RuntimeError, InputError) as error:  # the second where it is damaged
        logger.warning("diffusers is left out: %s", " ".join(str(error).split()))
        return None


def _say_what_disturbs(scope: Scope, about: Mapping[str, Any]) -> None:
    """Warn of a busy machine, and tell which peers could be had."""
    load, cores = about.get("load_before"), about["cores"]
    if load is not None and load > BUSY * cores:
        logger.warning(
            "other programs keep this machine busy (load %.1f on %d cores): expect longer and "
            "less certain times",
            *(load, cores),
        )
    missing = [name for name in PACKAGES if name not in installed()]
    if scope.has_peers and missing:
        logger.info(
            'Not installed, so not compared with: %s (pip install -e ".[bench]")',
            ", ".join(missing),
        )
