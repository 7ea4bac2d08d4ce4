"""What an experiment draws: settings of merging, sizes, prompts and seeds.

Checked before anything is loaded, so this takes no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config import load_config, load_preset, preset_file
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig, overlay
from ldm.settings import Settings

UNMERGED = "unmerged"
# What is done instead of merging by similarity, and why it is worth a row.
CONTROLS = {
    "again": "the unmerged picture a second time: nothing may differ",
    "rounding": "unmerged, attention by another formula: what rounding alone changes",
    "precision": "unmerged, the U-Net in another precision: what no setting can claim to beat",
    "none": "no self-attention at full resolution at all",
    "random": "random pairs of tokens merged, whatever they look like",
    "drop": "random tokens dropped without merging them into others",
    "steps": "unmerged with fewer steps: the other way to save time",
}
FLOORS = ("again", "rounding", "precision")  # controls that save nothing
CONTROL_RATIO = 0.5
FEWER_STEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the plan's steps
BEST_SAMPLER = "dpm_solver"  # nearest to its own limit after few steps; see docs/performance.md
LONGEST = 100  # letters of a setting's name in that of its folder
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Setting:
    """One way to draw.

    Attributes:
        name: what tables call it.
        config: of merging; for a control the one that saves as much work.
        control: one of `CONTROLS`, or empty.
        family: settings that differ in their amount only share it: a curve of the plots.
        source: name and hash of the file that it comes from.
        flags: of the scripts, that stand for the configuration.
        sampling: what differs from the plan's sampling: ``steps`` and ``sampler`` of a control,
            or ``reuse_deep``.
    """

    name: str
    config: ToMeConfig = field(default_factory=ToMeConfig)
    control: str = ""
    family: str = ""
    source: str = ""
    flags: tuple[str, ...] = ("--no-tome",)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def keys(self) -> dict[str, Any]:
        """The configuration in plain values; for a control that alone."""
        return {"control": self.control} if self.control else dataclasses.asdict(self.config)

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that change with anything that decides about the picture."""
        what: list[Any] = [dataclasses.asdict(self.config), self.control]
        what += [dict(self.sampling)] if self.sampling else []
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]

    @property
    def folder(self) -> str:
        """Name of the folder of its pictures."""
        words = re.sub("[^a-z0-9.]+", "-", self.name.lower()).strip("-")
        return f"{words[:LONGEST]}-{self.key}"


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together, always the same ones, whoever draws them.

    Attributes:
        size: pixels a side.
        first: number of the first picture among those of a setting and size.
        pictures: prompt and seed of each.
    """

    size: int
    first: int
    pictures: tuple[tuple[str, int], ...]

    @property
    def numbers(self) -> range:
        """Numbers of the pictures."""
        return range(self.first, self.first + len(self.pictures))


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn: each setting at each size for each prompt, with several seeds.

    Picture i has prompt i // n_seeds and seed ``sampling.seed + i``, so that txt2img with
    ``--from-file`` and ``--repeat`` draws the same.

    Attributes:
        settings: for each size (pixels a side); the first one merges nothing.
        prompts: texts.
        n_seeds: pictures of each prompt.
        sampling: steps, sampler, guidance, seed of the first picture, pictures at a time.
        control_share: controls are drawn for one of so many groups of prompts.
    """

    settings: Mapping[int, tuple[Setting, ...]]
    prompts: tuple[str, ...]
    n_seeds: int
    sampling: Settings
    control_share: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels a side."""
        return tuple(self.settings)

    @property
    def n_pictures(self) -> int:
        """Pictures of a setting at one size."""
        return len(self.prompts) * self.n_seeds

    def batches(self) -> list[Batch]:
        """All pictures of a setting, size after size."""
        seed, n = self.sampling.seed, self.sampling.n_samples
        pictures = [(self.prompts[i // self.n_seeds], seed + i) for i in range(self.n_pictures)]
        return [
            Batch(size, first, tuple(pictures[first : first + n]))
            for size in self.sizes
            for first in range(0, len(pictures), n)
        ]

    def settings_of(self, batch: Batch) -> tuple[Setting, ...]:
        """What is drawn for a batch, the unmerged setting first."""
        whole_prompts = math.lcm(self.n_seeds, self.sampling.n_samples)
        has_controls = batch.first // whole_prompts % self.control_share == 0
        return tuple(s for s in self.settings[batch.size] if has_controls or not s.control)


def unique(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Settings without those that do the same as an earlier one, after the unmerged one.

    Raises:
        InputError: two different ones have the same name.
    """
    found = {Setting(UNMERGED).key: Setting(UNMERGED)}
    for setting in settings:
        found.setdefault(setting.key, setting)
    names = [setting.name for setting in found.values()]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"setting {name!r}: two different ones have this name")
    return tuple(found.values())


def preset_settings(names: Sequence[str], ratios: Sequence[float | None]) -> Iterator[Setting]:
    """Each preset at the ratios that its method can have; None takes the preset as it is.

    Raises:
        InputError: there is no such preset, or it cannot be used.
    """
    for name in names:
        path = preset_file(name, may_be_path=True)
        preset = load_config(path)
        title, source = path.stem, f"{path.name} {file_hash(path)}"
        for ratio in ratios:
            change = {} if ratio is None else amount(preset, ratio)
            if change is not None:
                yield Setting(
                    title if ratio is None else f"{title} {ratio:g}",
                    ToMeConfig.from_mapping(overlay(preset, change)),
                    family=title,
                    source=source,
                    flags=("--tome-preset", name, *flags_of(change)),
                )


def amount(preset: Mapping[str, Any], ratio: float) -> dict[str, Any] | None:
    """The key that removes a share of tokens in a preset; None where its method cannot."""
    config = ToMeConfig.from_mapping(preset)
    if config.method == "kth":
        k = 1 / (1 - ratio)
        return {"k": round(k)} if abs(k - round(k)) < _ROUNDING else None
    if (
        config.method in ("downsample", "tiles")
        or config.is_off
        or ratio > config.max_ratio + _ROUNDING
    ):
        return None
    return {"ratio": ratio}


def flags_of(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of ``tome_config`` as flags of the scripts."""
    words = []
    for name, value in keys.items():
        if name == "steps":
            texts = [",".join(f"{progress}:{ratio}" for progress, ratio in value)]
        elif name == "rules":
            texts = [";".join(map(_rule_flag, value))]
        else:
            texts = [_word(one) for one in (value if isinstance(value, list | tuple) else [value])]
        words += ["--tome-" + name.replace("_", "-"), *texts]
    return tuple(words)


def _rule_flag(rule: Mapping[str, Any]) -> str:
    """An entry of ``rules`` as its flag has it: 4096:method=kth,k=4."""
    others = ((name, value) for name, value in rule.items() if name != "min_tokens")
    texts = [
        f"{name}={'+'.join(map(_word, value)) if isinstance(value, list | tuple) else _word(value)}"
        for name, value in others
    ]
    return f"{rule['min_tokens']}:{','.join(texts)}"


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def control_setting(control: str, ratio: float = CONTROL_RATIO, name: str = "") -> Setting:
    """A control; ratio is the share of tokens that are merged or dropped.

    Raises:
        InputError: there is no such control, or it cannot have that ratio.
    """
    allowed = [name for name in CONTROLS if name != "steps"]
    if control not in allowed:
        raise InputError(f"control {control!r}: the controls are {', '.join(allowed)}")
    config: dict[str, Any] = {}
    if control == "none":
        config = {"method": "random", "r": 2**31 - 1, "proportional": False}
    elif control in ("random", "drop"):
        config = {"method": "random", "ratio": ratio, "proportional": False}
    has_ratio = control in ("random", "drop")
    if has_ratio and not (isinstance(ratio, float) and 0 < ratio < 1):
        raise InputError(f"ratio {ratio!r}: a control takes a number above 0 and below 1")
    name = name or (f"control: {control} {ratio:g}" if has_ratio else f"control: {control}")
    return Setting(name, ToMeConfig.from_mapping(config), control, family="controls")


def control_settings(sampling: Settings) -> list[Setting]:
    """All controls, fewer steps among them, by the plan's sampler and by the best one.

    Args:
        sampling: with steps and a sampler.
    """
    steps, sampler = sampling.steps, sampling.sampler
    assert steps is not None
    assert sampler is not None
    found = [control_setting(name) for name in CONTROLS if name != "steps"]
    counts = dict.fromkeys(max(1, round(share * steps)) for share in FEWER_STEPS)
    for name in dict.fromkeys((sampler, BEST_SAMPLER)):
        for n in counts:
            if n < steps:
                found.append(
                    Setting(
                        f"control: {n} steps of {name}",
                        control="steps",
                        family=f"fewer steps of {name}",
                        sampling={"steps": n, "sampler": name},
                    )
                )
    return found


def read_settings(path: str | Path) -> list[Setting]:
    """Settings from a YAML file: name -> keys of ``tome_config``, a preset, or a control.

    ``preset`` names a file of configs/tome that the other keys are laid over; ``control`` is one
    of `CONTROLS`, with ``ratio`` beside it; ``family`` joins settings in the plots; ``reuse_deep``
    is that of the scripts.

    Raises:
        InputError: the file cannot be read, or a setting cannot be used.
    """
    path = Path(path)
    source = f"{path.name} {file_hash(path)}" if path.is_file() else ""
    found = []
    for name, entry in load_config(path).items():
        if not isinstance(entry, Mapping):
            raise InputError(f"{path}: {name}: must be a mapping of keys, not {entry!r}")
        keys = dict(entry)
        family = str(keys.pop("family", name))
        try:
            control = keys.pop("control", None)
            if control is not None:
                has_ratio = control in ("random", "drop")
                ratio = keys.pop("ratio", CONTROL_RATIO) if has_ratio else CONTROL_RATIO
                found.append(control_setting(control, ratio, name))
                if keys:
                    raise InputError(f"a control takes no {next(iter(keys))}")
                continue
            every = keys.pop("reuse_deep", None)
            sampling = {} if every is None else {"reuse_deep": every}
            Settings(**sampling)  # checks it
            preset = keys.pop("preset", None)
            base = None if preset is None else load_preset(preset)
            config = ToMeConfig.from_mapping(overlay(base, keys))
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from None
        given = [] if preset is None else ["--tome-preset", str(preset)]
        given += [] if every is None else ["--reuse_deep", str(every)]
        flags = (*given, *flags_of(keys)) or Setting.flags
        found.append(Setting(name, config, "", family, source, flags, sampling))
    return found


def file_hash(path: Path) -> str:
    """The first eight hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
