"""Networks that judge finished pictures, and what they say of a set of reference pictures.

Weights are read without executing anything in their files.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.files import open_state_dict
from ldm.checkpoint.hashes import weights_key
from ldm.demo.check import named_attributes
from ldm.demo.classifier import AttributeClassifier
from ldm.demo.rendered import picture_of
from ldm.demo.samples import PROMPT_SEED
from ldm.demo.scenes import Scene
from ldm.errors import InputError
from ldm.evaluation.appendix_f.measures import FRECHET
from ldm.evaluation.appendix_f.statistics import Statistics
from ldm.evaluation.appendix_f.store import read_arrays
from ldm.images import load_rgb, to_pixels, to_unit
from ldm.util import file_stamp

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
INCEPTION_WIDTH = 2048
ALEXNET_LEAST = 32  # pixels a side; less leaves nothing after its pooling
ALEXNET_MAPS = (1, 4, 7, 9, 11)  # the layers whose results LPIPS compares


@dataclass(frozen=True)
class Looked:
    """What a judge gets to see.

    Attributes:
        picture: (1, 3, H, W) in [-1, 1], as it was stored.
        reference: the unmerged one, likewise; None where this is it.
        prompt: which.
        scene: what that names, where it is known.
    """

    picture: Tensor
    reference: Tensor | None
    prompt: str
    scene: Scene | None


@dataclass(frozen=True)
class Judge:
    """A network with something to say of each picture.

    Attributes:
        name: of the measure, or `FRECHET` for features that a Fréchet distance compares.
        key: a hash of its weights, and how it is used where there is a choice.
        title: what the network is.
        width: numbers for each picture.
        look: a value, or None where there is none.
    """

    name: str
    key: str
    title: str
    width: int
    look: Callable[[Looked], float | Tensor | None]

    @property
    def entry(self) -> str:
        """What its results are kept as; those of other weights have another name."""
        return f"{self.name}-{self.key}"

    def __call__(self, looked: Looked) -> np.ndarray[Any, Any]:
        """The numbers of a picture, (width,) float32; NaN where there is nothing to say."""
        with torch.inference_mode():
            value = self.look(looked)
        if value is None:
            return np.full(self.width, np.nan, np.float32)
        numbers = torch.as_tensor(value, dtype=torch.float32).flatten().cpu().numpy()
        assert numbers.shape == (self.width,)
        return numbers


def attribute_judges(classifier: AttributeClassifier) -> list[Judge]:
    """The demo's classifier: what it finds of what a prompt names, and its features."""
    key = weights_key(classifier.state_dict().items())

    def found(looked: Looked) -> float | None:
        if looked.scene is None:
            return None
        (seen,) = classifier.predict_attributes(looked.picture)
        named = named_attributes(looked.scene)
        return sum(seen[name] == value for name, value in named.items()) / len(named)

    def features(looked: Looked) -> Tensor:
        return classifier.features(looked.picture)[0]

    title = "the demo's attribute classifier"
    width = classifier.project.out_features
    return [Judge("attributes", key, title, 1, found), Judge(FRECHET, key, title, width, features)]


def inception_judge(weights: str | Path, device: torch.device) -> Judge:
    """The standard features of the FID: 2048 numbers of the Inception network.

    Args:
        weights: pt_inception-2015-12-05-6726825d.pth, or the same as .safetensors.
        device: where to compute.

    Raises:
        InputError: torch-fidelity, which has the network, is not installed, or the file is not
            that one.
    """
    if find_spec("torch_fidelity") is None:
        raise InputError('FID needs the package torch-fidelity: pip install -e ".[evaluation]"')
    from torchmetrics.image.fid import FrechetInceptionDistance

    stored = _weights("--fid-weights", weights)
    with tempfile.TemporaryDirectory() as folder:  # the package opens a file: one of our own
        copy = Path(folder) / "weights.pth"
        torch.save(stored, copy)
        try:
            metric: Any = FrechetInceptionDistance(
                INCEPTION_WIDTH, feature_extractor_weights_path=str(copy)
            )
        except (OSError, RuntimeError, KeyError) as error:
            raise _unusable("--fid-weights", weights, error) from None
    network = metric.inception.to(device)
    network.use_antialias = False  # published FIDs make pictures smaller without

    def features(looked: Looked) -> Tensor:
        pixels = torch.from_numpy(to_pixels(looked.picture.cpu())).movedim(-1, 1)
        return network(pixels.to(device))

    key = f"{weights_key(stored.items())}-bilinear"
    return Judge(FRECHET, key, "Inception", INCEPTION_WIDTH, features)


def lpips_judge(weights: str | Path) -> Judge:
    """The perceptual distance of Zhang et al. 2018 (arXiv 1801.03924) on AlexNet.

    Args:
        weights: torchvision's file of AlexNet (alexnet-owt-7be5be79.pth); the weights of the
            distance itself come with torchmetrics.

    Raises:
        InputError: the file is not that one.
    """
    import torchmetrics

    layers = alexnet_layers()
    stored = _weights("--lpips-weights", weights)
    try:
        own = {name: stored[f"features.{name}"].float() for name in layers.state_dict()}
        layers.load_state_dict(own, assign=True)
    except (RuntimeError, KeyError) as error:
        raise _unusable("--lpips-weights", weights, error) from None
    assert torchmetrics.__file__ is not None
    shipped = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    scales = open_state_dict(shipped)

    def distance(looked: Looked) -> Tensor | None:
        if looked.reference is None or min(looked.picture.shape[2:]) < ALEXNET_LEAST:
            return None
        a, b = (_maps(layers, p) for p in (looked.picture, looked.reference))
        total = torch.zeros(())
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            difference = (F.normalize(x) - F.normalize(y)).square().mean(dim=(2, 3))
            total += (difference * scales[f"lin{i}.model.1.weight"].flatten()).sum()
        return total

    return Judge("lpips", weights_key(stored.items()), "AlexNet", 1, distance)


def alexnet_layers() -> nn.Sequential:
    """AlexNet's convolutions without weights, under the numbers that torchvision's file has."""
    with torch.device("meta"):
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )


def _maps(layers: nn.Module, picture: Tensor) -> list[Tensor]:
    """What AlexNet's layers see in a picture (1, 3, H, W) in [-1, 1]."""
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
    x, found = (picture.cpu() - shift) / scale, []
    for number, layer in enumerate(layers.children()):
        x = layer(x)
        if number in ALEXNET_MAPS:
            found.append(x)
    return found


def clip_judge(folder: str | Path) -> Judge:
    """CLIP's cosine between a picture and its prompt, times 100; Hessel et al. 2021.

    Args:
        folder: a CLIP model in the form of transformers, such as clip-vit-base-patch16.

    Raises:
        InputError: there is no such model, or only in a form that may execute code.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise InputError(
            f"--clip {folder}: allowed is a folder with a CLIP model's config.json, "
            "preprocessor_config.json, tokenizer and model.safetensors"
        )
    from transformers import CLIPModel, CLIPProcessor

    options: dict[str, Any] = {"local_files_only": True}
    try:
        found: Any = CLIPModel.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, **options
        )
        model, loaded = found
        if loaded["missing_keys"]:  # these would be random
            raise ValueError(f"it lacks {min(loaded['missing_keys'])}")
        model.eval()
        processor = CLIPProcessor.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _unusable("--clip", folder, error) from None

    def score(looked: Looked) -> Tensor:
        given = processor(
            text=[looked.prompt],
            images=list(to_pixels(looked.picture.cpu())),
            return_tensors="pt",
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
        )
        result = model(**given)
        cosine = F.cosine_similarity(result.image_embeds, result.text_embeds)
        return 100 * cosine.clamp(min=0)

    return Judge("clip_score", _key_of_files(files), "CLIP", 1, score)


def _weights(flag: str, path: str | Path) -> dict[str, Tensor]:
    try:
        return dict(open_state_dict(path))
    except InputError as error:
        raise InputError(f"{flag} {path}: cannot be used ({error})") from None


def _unusable(flag: str, path: str | Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:120]
    return InputError(f"{flag} {path}: cannot be used ({reason})")


def _key_of_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(2**20), b""):
                digest.update(chunk)
    return digest.hexdigest()[:8]


# --- the reference of a Fréchet distance --------------------------------------------------------


def reference(
    judge: Judge, source: str | Path | None, n_rendered: int, size: int, cache: Path
) -> Statistics:
    """What is known of the reference pictures; kept on the disk, as it takes a while.

    Kept under everything that decides about it: the files' paths, sizes and times, or the number
    and size of renders; and the network.

    Args:
        judge: whose features count.
        source: a folder of pictures, or an .npz file with mu and sigma in the form of
            pytorch-fid; None takes renders of scenes that no prompt here names.
        n_rendered: how many of these.
        size: of the renders, in pixels.
        cache: folder of what is kept.

    Raises:
        InputError: there is nothing of the kind, or it is of other features.
    """
    if source is not None and Path(source).is_file():
        return _read(Path(source), judge)
    if source is None:
        identity: list[Any] = ["renders", n_rendered, size]
        n = n_rendered
        pictures = (picture_of(i, PROMPT_SEED + 2, "held_out", size) for i in range(n))
    else:
        folder = Path(source).resolve()
        found = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
        files = sorted(file for file in found if not file.is_dir())
        if len(files) < 2:
            raise InputError(
                f"--fid-reference {source}: pictures in it: {len(files)}; at least two are needed "
                f"({', '.join(PICTURES)})"
            )
        identity = [file_stamp(file, f"--fid-reference {file}") for file in files]
        n, pictures = len(files), (load_rgb(file) for file in files)
    key = hashlib.sha256(repr([judge.entry, *identity]).encode()).hexdigest()[:16]
    path = cache / f"{key}.npz"
    if path.exists():
        try:
            return _read(path, judge)
        except InputError:  # damaged, so it is computed again
            path.unlink()
    unit = (torch.from_numpy(to_unit(pixels[None])) for pixels in pictures)
    shown = tqdm(unit, desc="reference pictures", total=n, unit="picture")
    rows = [judge(Looked(one, None, "", None)) for one in shown]
    statistics = Statistics.of(torch.from_numpy(np.stack(rows)))
    statistics.save(path)
    return statistics


def _read(path: Path, judge: Judge) -> Statistics:
    try:
        there = read_arrays(path)
        mean, covariance = (torch.from_numpy(there[name]).double() for name in ("mu", "sigma"))
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("not numbers")
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"--fid-reference {path}: allowed is a folder of pictures, or an .npz file with mu "
            "and sigma"
        ) from None
    if mean.shape != (judge.width,) or covariance.shape != (judge.width,) * 2:
        raise InputError(
            f"--fid-reference {path}: it is of {mean.numel()} features, not of {judge.width}"
        )
    return Statistics(mean, covariance)
