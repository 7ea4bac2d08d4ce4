"""Is the demo model fit to measure merging on? Did it learn, and does its attention matter?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.demo.classifier import AttributeClassifier
from ldm.demo.objects import count_objects, train_finder
from ldm.demo.quality import first_stage_quality, frechet, reconstructions, renders, told_apart
from ldm.demo.rendered import picture_of, scene_of, stacked
from ldm.demo.samples import PROMPT_SEED, captions_of, draw, held_out_scenes, samples
from ldm.demo.scenes import ATTRIBUTES, Scene, attributes, render
from ldm.evaluation.appendix_f.controls import CONTROLS, control
from ldm.evaluation.appendix_f.distances import psnr
from ldm.evaluation.appendix_f.statistics import bootstrap
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.tome.config import ToMeConfig

# Merging by similarity: in the form that plain --tome-ratio takes, and as it was published.
BY_SIMILARITY = {
    "similarity 0.5": {"ratio": 0.5},
    "similarity 0.5, sizes not counted": {"ratio": 0.5, "proportional": False},
}


def named_attributes(scene: Scene) -> dict[str, str]:
    """What a caption of the scene names; an absent object or a plain sky goes without saying."""
    silent = ("none", "plain", "bare")
    return {k: v for k, v in attributes(scene).items() if v not in silent}


def attribute_accuracy(
    classifier: AttributeClassifier, pictures: Tensor, scenes: list[Scene]
) -> dict[str, float]:
    """Share of the named attributes that the classifier finds: ``all``, and by ``name=value``."""
    found: dict[str, list[bool]] = {"all": []}
    for start in range(0, len(scenes), 64):
        seen = classifier.predict_attributes(pictures[start : start + 64])
        for scene, prediction in zip(scenes[start : start + 64], seen, strict=True):
            for name, value in named_attributes(scene).items():
                is_right = prediction[name] == value
                found["all"].append(is_right)
                found.setdefault(name, []).append(is_right)
                found.setdefault(f"{name}={value}", []).append(is_right)
    return {name: float(np.mean(hits)) for name, hits in found.items()}


@torch.no_grad()
def classifier_accuracy(
    classifier: AttributeClassifier, model: LatentDiffusion, n: int = 512, pixels: int = 128
) -> dict[str, dict[str, float]]:
    """Accuracy of each attribute on held-out renders and on their reconstructions."""
    stage = next(model.first_stage_model.parameters())
    right: dict[str, dict[str, list[bool]]] = {
        kind: {name: [] for name in ATTRIBUTES} for kind in ("renders", "reconstructions")
    }
    for start in tqdm(range(0, n, 32), desc="classifier"):
        scenes = [scene_of(i, PROMPT_SEED + 1, "held_out") for i in range(start, start + 32)]
        renders = [
            picture_of(i, PROMPT_SEED + 1, "held_out", pixels) for i in range(start, start + 32)
        ]
        x = stacked(renders)
        z = model.first_stage_model.encode(x.to(stage)).mode()
        both = {"renders": x, "reconstructions": model.first_stage_model.decode(z).float().cpu()}
        for kind, pictures in both.items():
            seen = classifier.predict_attributes(pictures)
            for scene, prediction in zip(scenes, seen, strict=True):
                for name, value in attributes(scene).items():
                    right[kind][name].append(prediction[name] == value)
    return {
        kind: {name: float(np.mean(hits)) for name, hits in table.items()}
        for kind, table in right.items()
    }


def objects_of(pictures: Tensor, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Mean number of separate objects, in samples and in renders of the same scenes, by object."""
    finder = train_finder()
    drawn = [render(s, np.random.default_rng((PROMPT_SEED, i)), 128) for i, s in enumerate(scenes)]
    counts = {
        "samples": count_objects(finder, pictures),
        "renders": count_objects(finder, stacked(drawn)),
    }
    return {
        kind: {
            name: float(
                np.mean([n for n, s in zip(numbers, scenes, strict=True) if s.object == name])
            )
            for name in sorted({scene.object for scene in scenes})
        }
        for kind, numbers in counts.items()
    }


def against_renders(
    classifier: AttributeClassifier,
    model: LatentDiffusion,
    pictures: Tensor,
    cache_dir: str | None = None,
) -> dict[str, float]:
    """Fréchet distances to fresh renders, and how often a network tells samples from them."""
    n = len(pictures)
    reference, others = renders(2 * n, pictures.shape[-1], cache_dir).split(n)
    return {
        "n": n,
        "frechet_samples": frechet(classifier, pictures, reference),
        "frechet_reconstructions": frechet(classifier, reconstructions(model, others), reference),
        "frechet_renders": frechet(classifier, others, reference),
        "told_apart": told_apart(pictures, others),
    }


def rows(model: LatentDiffusion, pixels: int, n: int, steps: int, scale: float) -> Tensor:
    """Renders, reconstructions of them and samples of their captions, (3n, 3, H, W) in rows.

    Args:
        model: the demo model.
        pixels: a side.
        n: pictures in a row, of scenes that training never saw.
        steps: of the sampler.
        scale: of guidance.
    """
    scenes = held_out_scenes(n)
    drawn = [
        render(s, np.random.default_rng((PROMPT_SEED, i, 0)), pixels) for i, s in enumerate(scenes)
    ]
    shown = stacked(drawn)
    size = pixels // model.first_stage_model.f
    samples = draw(model, captions_of(scenes), list(range(n)), steps, scale, size)
    return torch.cat([shown, reconstructions(model, shown), samples])


def spread(pictures: Tensor) -> float:
    """Root mean square difference between pictures (n, 3, H, W) of one prompt, over all pairs."""
    flat = pictures.flatten(1).double()
    return (2 * flat.var(dim=0).mean()).sqrt().item()


def nearest(pictures: Tensor, others: Tensor) -> Tensor:
    """Distance of each picture to the closest of others, both at 32x32, per value, (n,)."""
    a, b = (F.adaptive_avg_pool2d(p.float(), 32).flatten(1) for p in (pictures, others))
    return torch.cdist(a, b).min(dim=1).values / a.shape[1] ** 0.5


def check(
    model: LatentDiffusion,
    classifier: AttributeClassifier,
    n_prompts: int = 200,
    steps: int = 25,
    scale: float = 2.0,
    size: int = 32,
    n_controls: int = 32,
    n_training: int = 2000,
    only: tuple[str, str] | None = None,
    cache_dir: str | None = None,
    n_frechet: int = 0,
) -> tuple[dict[str, Any], Tensor]:
    """Measure everything that the demo model is accepted by.

    Args:
        model: the demo model.
        classifier: the shipped one.
        n_prompts: held-out prompts to draw.
        steps: of the sampler.
        scale: of guidance.
        size: of the latents, a side.
        n_controls: prompts for the comparison of controls, each with a seed of its own; 0: none.
        n_training: training renders to look for copies among.
        only: an attribute and the value that it has in all prompts.
        cache_dir: where renders and samples are kept, or None.
        n_frechet: pictures, the prompts' included, for the Fréchet distance and for the network
            that tries to tell samples from renders; 0: none.

    Returns: the report, and the pictures of the held-out prompts, (n, 3, H, W).
    """
    scenes = held_out_scenes(n_prompts, only)
    prompts = captions_of(scenes)
    report: dict[str, Any] = {"steps": steps, "scale": scale, "n_prompts": n_prompts, "only": only}
    pixels = size * model.first_stage_model.f
    report["pixels"] = pixels
    report["first_stage"] = first_stage_quality(model, pixels)
    report["classifier"] = classifier_accuracy(classifier, model, pixels=pixels)
    drawn = samples(model, max(n_prompts, n_frechet), steps, scale, size, only, cache_dir)
    pictures = drawn[:n_prompts]
    report["attributes"] = attribute_accuracy(classifier, pictures, scenes)
    report["objects"] = objects_of(pictures, scenes)
    if n_frechet:
        report["against_renders"] = against_renders(classifier, model, drawn, cache_dir)

    seeds = list(range(1000, 1008))
    pairs = []
    for i in tqdm(range(min(6, n_prompts)), desc="spread"):
        sampled = draw(model, [prompts[i]] * len(seeds), seeds, steps, scale, size)
        again = [np.random.default_rng((PROMPT_SEED, i, s)) for s in seeds]
        drawn = stacked([render(scenes[i], rng, pixels) for rng in again])
        pairs.append((spread(sampled), spread(drawn)))
    report["spread"] = {
        "samples": float(np.mean([p[0] for p in pairs])),
        "renders": float(np.mean([p[1] for p in pairs])),
    }

    training = renders(n_training, 128, cache_dir, 1, "train")
    fresh = stacked([picture_of(i, PROMPT_SEED, "held_out", 128) for i in range(n_prompts)])
    to_training = nearest(pictures, training)
    report["copies"] = {
        "closest_sample": to_training.min().item(),
        "median_sample": to_training.quantile(0.5).item(),
        "closest_fresh_render": nearest(fresh, training).min().item(),
        "median_fresh_render": nearest(fresh, training).quantile(0.5).item(),
    }
    if n_controls:
        report["attention"] = attention_matters(model, prompts[:n_controls], steps, scale, size)
    return report, pictures


def attention_matters(
    model: LatentDiffusion, prompts: list[str], steps: int, scale: float, size: int
) -> dict[str, dict[str, float]]:
    """PSNR in dB, against the unmerged pictures, of merging by similarity and of the controls."""
    unet = model.model.diffusion_model
    before = unet.tome.config
    seeds = list(range(5000, 5000 + len(prompts)))

    def settings() -> Iterator[tuple[str, dict[str, Any], AbstractContextManager[None]]]:
        for name, config in BY_SIMILARITY.items():
            yield name, config, nullcontext()
        for name in CONTROLS:
            yield name, {}, control(unet, name)

    def run(name: str) -> Tensor:
        return draw(model, prompts, seeds, steps, scale, size, show=name)

    results = {}
    try:
        unet.tome.configure(ToMeConfig())
        reference = run("unmerged")
        for name, config, context in settings():
            unet.tome.configure(ToMeConfig.from_mapping(config))
            with context:
                results[name] = asdict(bootstrap(psnr(run(name), reference)))
    finally:
        unet.tome.configure(before)
    return results
