"""Networks that judge pictures, and what they say of a set of reference pictures."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.demo.check import PROMPT_SEED
from ldm.demo.classifier import AttributeClassifier
from ldm.demo.rendered import picture_of
from ldm.errors import InputError
from ldm.evaluation.appendix_f.frechet import Statistics
from ldm.images import load_rgb, to_pixels, to_unit

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Features(Protocol):
    """Turns pictures into the vectors that a Fréchet distance compares.

    Attributes:
        name: what tables call them.
        width: length of a vector.
    """

    name: str
    width: int

    def __call__(self, picture: Tensor) -> Tensor:
        """A picture (1, 3, H, W) in [-1, 1] -> (width,), float32 on the CPU."""
        ...


class ClassifierFeatures:
    """What the demo's attribute classifier sees; for pictures of the demo's kind alone.

    Args:
        classifier: the shipped one.
    """

    name = "the demo's attribute classifier"

    def __init__(self, classifier: AttributeClassifier) -> None:
        self.width = classifier.project.out_features
        self._classifier = classifier

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> Tensor:
        """A picture (1, 3, H, W) in [-1, 1] -> (width,)."""
        return self._classifier.features(picture)[0]


class InceptionFeatures:
    """The standard features of the FID: 2048 numbers of the Inception network.

    Args:
        weights: pt_inception-2015-12-05-6726825d.pth.
        device: where to compute.

    Raises:
        InputError: torch-fidelity, which has the network, is not installed, or the file is not
            that one.
    """

    name = "Inception"
    width = 2048

    def __init__(self, weights: str | Path, device: torch.device) -> None:
        if find_spec("torch_fidelity") is None:
            raise InputError('FID needs the package torch-fidelity: pip install -e ".[evaluation]"')
        from torchmetrics.image.fid import NoTrainInceptionV3

        self._device = device
        try:
            self._network = NoTrainInceptionV3(
                "inception-v3-compat", [str(self.width)], str(weights)
            ).to(device)
        except (OSError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"--fid-weights {weights}: cannot be used ({reason})") from None

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> Tensor:
        """A picture (1, 3, H, W) in [-1, 1] -> (width,)."""
        pixels = torch.from_numpy(to_pixels(picture.cpu())).movedim(-1, 1)
        return self._network(pixels.to(self._device)).float().cpu().reshape(self.width)


def lpips_network(weights: str | Path) -> Any:
    """The perceptual distance of Zhang et al. 2018 on AlexNet, from torchmetrics.

    Args:
        weights: torchvision's file of AlexNet (alexnet-owt-7be5be79.pth); the weights of the
            distance itself come with torchmetrics.

    Returns: a function of two pictures (1, 3, H, W) in [-1, 1], to a number.

    Raises:
        InputError: the file is not that one.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(net="alex", pnet_rand=True)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        for part in network.net.children():
            for number, layer in part.named_children():
                own = {
                    k.removeprefix(f"features.{number}."): v
                    for k, v in state.items()
                    if k.startswith(f"features.{number}.")
                }
                layer.load_state_dict(own)
    except Exception as error:  # whatever reading a foreign file may raise
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--lpips-weights {weights}: cannot be used ({reason})") from None

    @torch.inference_mode()
    def distance(picture: Tensor, reference: Tensor) -> float:
        return network(picture, reference).item()

    return distance


def clip_network(folder: str | Path) -> Any:
    """CLIP's cosine between a picture and its prompt, times 100, from torchmetrics.

    Args:
        folder: a CLIP model in the form of transformers, such as clip-vit-base-patch16.

    Returns: a function of a picture (1, 3, H, W) in [-1, 1] and a text, to a number.

    Raises:
        InputError: there is no such model.
    """
    from torchmetrics.functional.multimodal.clip_score import clip_score

    if not Path(folder).is_dir():
        raise InputError(f"--clip {folder}: there is no such folder")
    name: Any = str(folder)  # its type knows some published names only

    @torch.inference_mode()
    def score(picture: Tensor, text: str) -> float:
        pixels = torch.from_numpy(to_pixels(picture)).movedim(-1, 1)
        return clip_score(pixels[0], text, model_name_or_path=name).item()

    return score


def statistics_of(features: Features, pictures: Iterable[Tensor], n: int) -> Statistics:
    """Mean and covariance of the features of pictures, each (1, 3, H, W) in [-1, 1]."""
    progress = tqdm(pictures, desc="reference pictures", total=n, unit="picture")
    return Statistics.of(torch.stack([features(picture) for picture in progress]))


def rendered_reference(features: Features, n: int, size: int) -> Statistics:
    """Statistics of n renders of held-out scenes, none of which is drawn from a prompt here."""
    renders = (picture_of(i, PROMPT_SEED + 2, "held_out", size) for i in range(n))
    return statistics_of(features, (torch.from_numpy(to_unit(r[None])) for r in renders), n)


def reference_from(path: str | Path, features: Features) -> Statistics:
    """Statistics of a folder of pictures, or of a file in the form of pytorch-fid (.npz).

    Raises:
        InputError: there is nothing of the kind, or its length is another.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        if len(files) < 2:
            raise InputError(f"--fid-reference {path}: there are no pictures in it")
        pictures = (torch.from_numpy(to_unit(load_rgb(file)[None])) for file in files)
        return statistics_of(features, pictures, len(files))
    try:
        with np.load(path) as there:
            found = Statistics(
                *(torch.from_numpy(there[name]).double() for name in ("mu", "sigma"))
            )
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"--fid-reference {path}: allowed is a folder of pictures, or an .npz file with mu "
            "and sigma"
        ) from None
    if found.mean.shape != (features.width,) or found.covariance.shape != (features.width,) * 2:
        raise InputError(
            f"--fid-reference {path}: it is of {len(found.mean)} features, not of {features.width}"
        )
    return found
