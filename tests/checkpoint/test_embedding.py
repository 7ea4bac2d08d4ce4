"""Textual-inversion files of each kind, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoint.embedding import read_embedding
from ldm.errors import InputError

SHAPES = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 16)}
VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def write(folder, content, name):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.clone() for key, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


FILES = {
    "web_ui.pt": {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": VECTORS},
        "name": "cat",
        "step": 500,
        "sd_checkpoint": None,
    },
    "authors.pt": {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)}),
    },
    "web_ui.safetensors": {"emb_params": VECTORS},
    "diffusers.bin": {"<cat>": VECTORS},
    "diffusers.safetensors": {"<cat>": VECTORS},
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file(tmp_path, name):
    embedding = read_embedding(write(tmp_path, FILES[name], name), SHAPES)
    torch.testing.assert_close(embedding.vectors, VECTORS, rtol=0, atol=0)
    stem = name.partition(".")[0]
    assert embedding.words == ((stem, "<cat>") if stem == "diffusers" else (stem,))
    assert f"{name}: 3 vectors; write {stem!r}" in embedding.summary()


def test_one_vector_and_half_types(tmp_path):
    path = write(tmp_path, {"<cat>": VECTORS[0].half()}, "cat.safetensors")
    embedding = read_embedding(path, SHAPES)
    torch.testing.assert_close(embedding.vectors, VECTORS[:1].half().float(), rtol=0, atol=0)


def test_an_open_clip_table_is_found(tmp_path):
    path = write(tmp_path, {"emb_params": VECTORS}, "cat.safetensors")
    shapes = {"cond_stage_model.model.token_embedding.weight": (49408, 24)}
    with pytest.raises(InputError, match=r"vectors of \(3, 16\), but .* have 24 numbers"):
        read_embedding(path, shapes)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ({"clip_l": VECTORS, "clip_g": VECTORS}, "a.safetensors", "for SDXL"),
        ({"a": VECTORS, "b": VECTORS}, "a.safetensors", "it has 2 tensors, not one"),
        ({"string_to_param": 3}, "a.pt", "it has 0 tensors, not one"),
        ([VECTORS], "a.pt", "holds a list"),
        ({"emb_params": VECTORS[None]}, "a.safetensors", r"vectors of \(1, 3, 16\)"),
        ({"emb_params": torch.ones(76, 16)}, "a.safetensors", "76 vectors: allowed are 1 to 75"),
        ({"emb_params": torch.ones(0, 16)}, "a.safetensors", "0 vectors"),
        ({"emb_params": VECTORS / 0}, "a.safetensors", "not numbers"),
        ({"string_to_param": Evil()}, "a.pt", "'print', which no weights need"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, content, name, words):
    with pytest.raises(InputError, match=words):
        read_embedding(write(tmp_path, content, name), SHAPES)
    assert capsys.readouterr().out == ""


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        read_embedding(tmp_path / "cat.pt", SHAPES)
    with pytest.raises(InputError, match="is a folder"):
        read_embedding(tmp_path, SHAPES)
