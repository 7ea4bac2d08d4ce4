import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.errors import InputError
from ldm.evaluation.appendix_f.networks import (
    Judge,
    Looked,
    alexnet_layers,
    clip_judge,
    inception_judge,
    lpips_judge,
    reference,
)
from ldm.images import save_image


def mean_judge(key="first"):
    """Looks at the mean colour."""
    return Judge("frechet", key, "a test", 3, lambda looked: looked.picture.mean(dim=(0, 2, 3)))


def folder_of(path, seed):
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(3):
        save_image(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), path / f"{i}.png")
    return path


def test_a_reference_is_kept_for_its_own_files_and_network_alone(tmp_path):
    a, b = folder_of(tmp_path / "A/val", 1), folder_of(tmp_path / "B/val", 2)
    cache = tmp_path / "cache"

    def mean(folder, key="first"):
        return reference(mean_judge(key), folder, 0, 0, cache).mean.tolist()

    first, second = mean(a), mean(b)
    assert first != second
    assert mean(a) == first
    assert len(list(cache.iterdir())) == 2
    mean(a, "other weights")
    assert len(list(cache.iterdir())) == 3
    save_image(np.zeros((8, 8, 3), np.uint8), a / "1.png")
    changed = mean(a)
    assert changed != first
    whole = next(cache.iterdir()).read_bytes()
    for content in (b"damaged", b"", whole[:4], whole[: len(whole) // 2]):
        for path in cache.iterdir():
            path.write_bytes(content)
        assert mean(a) == changed


def test_statistics_of_others_are_read_and_checked(tmp_path):
    path = tmp_path / "there.npz"
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3))
    found = reference(mean_judge(), path, 0, 0, tmp_path / "cache")
    assert found.mean.tolist() == [0, 1, 2]
    np.savez(path, mu=np.arange(4.0), sigma=np.eye(4))
    with pytest.raises(InputError, match="is of 4 features, not of 3"):
        reference(mean_judge(), path, 0, 0, tmp_path / "cache")
    whole, damaged = path.read_bytes(), io.BytesIO()
    np.savez(damaged, mu=np.full(3, np.nan), sigma=np.eye(3))
    array = io.BytesIO()
    np.save(array, np.eye(3))
    wrong = (b"", b"no", pickle.dumps([1]), whole[:4], whole[:-9], array.getvalue())
    for content in (*wrong, damaged.getvalue()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"allowed is a folder of pictures, or an .npz"):
            reference(mean_judge(), path, 0, 0, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="pictures in it: 0; at least two are needed"):
        reference(mean_judge(), tmp_path / "empty", 0, 0, tmp_path / "cache")


def test_a_reference_picture_that_cannot_be_read_is_named(tmp_path):
    folder, cache = folder_of(tmp_path / "some", 1), tmp_path / "cache"
    (folder / "folder.png").mkdir()
    plain = reference(mean_judge(), folder, 0, 0, cache).mean
    (folder / "3.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"--fid-reference .*3\.png: cannot be read"):
        reference(mean_judge(), folder, 0, 0, cache)
    (folder / "3.png").unlink()
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"3\.png: not a picture"):
        reference(mean_judge(), folder, 0, 0, cache)
    (folder / "3.png").unlink()
    for mode in ("L", "LA", "RGBA", "CMYK", "P"):  # all are seen as RGB
        Image.new(mode, (8, 8)).save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    found = reference(mean_judge(), folder, 0, 0, cache).mean
    assert found.isfinite().all()
    assert not torch.equal(found, plain)


class _Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("make", [lpips_judge, clip_judge])
def test_weights_execute_nothing(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "network"
    folder.mkdir()
    for name in ("weights.pth", "pytorch_model.bin"):
        torch.save({"features.0.weight": _Runs()}, folder / name)
        (folder / f"plain-{name}").write_bytes(pickle.dumps(_Runs()))
    targets = [folder] if make is clip_judge else sorted(folder.iterdir())
    for target in targets:
        with pytest.raises(InputError):
            make(target)
    assert not (tmp_path / "executed").exists()


def test_inception_is_checked_before_its_package_opens_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.evaluation.appendix_f.networks.find_spec", lambda name: name)
    torch.save({"Conv2d_1a_3x3.conv.weight": _Runs()}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"--fid-weights .*: cannot be used"):
        inception_judge(tmp_path / "weights.pth", torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_inception_makes_pictures_smaller_as_published_numbers_do(tmp_path, monkeypatch):
    class Inception(torch.nn.Module):
        use_antialias = True

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return torch.full((1, 2048), float(self.use_antialias))

    monkeypatch.setattr("ldm.evaluation.appendix_f.networks.find_spec", lambda name: name)
    name = "torchmetrics.image.fid.FrechetInceptionDistance"
    monkeypatch.setattr(name, lambda *_, **__: SimpleNamespace(inception=Inception()))
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "weights.pth")
    judge = inception_judge(tmp_path / "weights.pth", torch.device("cpu"))
    assert (judge(Looked(torch.zeros(1, 3, 64, 64), None, "", None)) == 0).all()


def test_lpips_is_that_of_torchmetrics(tmp_path):
    features = alexnet_layers()
    for parameter in features.to_empty(device="cpu").parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    save_file(weights, tmp_path / "alexnet.safetensors")
    torch.save(weights, tmp_path / "alexnet.pth")
    judge = lpips_judge(tmp_path / "alexnet.pth")
    assert judge.key == lpips_judge(tmp_path / "alexnet.safetensors").key
    a, b = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    theirs = torchmetrics.functional.image.lpips._LPIPS(net="alex", pnet_rand=True)
    for number, part in enumerate(theirs.net.children()):
        for name, layer in part.named_children():
            layer.load_state_dict(features[int(name)].state_dict())
        assert number < 5
    with torch.inference_mode():
        expected = theirs(a, b).item()
    assert judge(Looked(a, b, "", None)).item() == pytest.approx(expected, rel=1e-4)
    assert np.isnan(judge(Looked(a, None, "", None))).all()
    weights["features.0.weight"] = weights["features.0.weight"] + 1
    torch.save(weights, tmp_path / "other.pth")
    assert lpips_judge(tmp_path / "other.pth").key != judge.key


def test_a_clip_score_is_the_cosine_of_picture_and_prompt(tmp_path):
    transformers = pytest.importorskip("transformers")
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {**width, "num_attention_heads": 2, "vocab_size": 49408, "max_position_embeddings": 77}
    vision = {**width, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    assert list(Path(tmp_path).glob("*.safetensors"))
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    images = transformers.CLIPImageProcessor(size=32, crop_size=32)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    score = clip_judge(tmp_path)(Looked(torch.zeros(1, 3, 32, 32), None, "a " * 99, None)).item()
    assert 0 <= score <= 100
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"--clip .*it lacks visual_projection\.weight"):
        clip_judge(tmp_path)
