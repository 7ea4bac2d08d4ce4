"""Textual-inversion files of each kind, and what is refused."""

import base64
import json
import zlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoint.embedding import read_embedding, read_embeddings
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


def only(path):
    (embedding,) = read_embedding(path, SHAPES)
    return embedding


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
    "onetrainer.safetensors": {"emp_params": VECTORS},
    "comfyui.safetensors": {"clip_l": VECTORS},
    "diffusers.bin": {"<cat>": VECTORS},
    "diffusers.safetensors": {"<cat>": VECTORS},
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file(tmp_path, name):
    embedding = only(write(tmp_path, FILES[name], name))
    torch.testing.assert_close(embedding.vectors, VECTORS, rtol=0, atol=0)
    stem = name.partition(".")[0]
    assert embedding.words == ((stem, "<cat>") if stem == "diffusers" else (stem,))
    assert f"{name}: 3 vectors; write {stem!r}" in embedding.summary()


def test_one_vector_and_half_types(tmp_path):
    path = write(tmp_path, {"<cat>": VECTORS[0].half()}, "cat.safetensors")
    embedding = only(path)
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
        ({"a": VECTORS, "b": VECTORS[:, :9]}, "a.safetensors", "it has 2 tensors, not one"),
        ({"emb_params": VECTORS.int()}, "a.safetensors", "vectors of int32, not of floating"),
        ({"emb_params": VECTORS + 0j}, "a.safetensors", "vectors of complex64, not of floating"),
        ({"a": torch.zeros(1).expand(10**9, 16)}, "a.pt", "1000000000 vectors: allowed are"),
        ({"a": torch.eye(16).to_sparse()}, "a.pt", "vectors of sparse_coo"),
        ({"string_to_param": 3}, "a.pt", "it has 0 tensors, not one"),
        ([VECTORS], "a.pt", "holds a list"),
        (
            {"emp_params": VECTORS, "emp_params_out": VECTORS},
            "a.safetensors",
            r"behind the text encoder \(emp_params_out",
        ),
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


def test_several_words_in_one_file(tmp_path):
    path = write(tmp_path, {"<cat>": VECTORS, "<dog>": VECTORS[:1] + 1}, "animals.safetensors")
    cat, dog = read_embedding(path, SHAPES)
    assert (cat.words, dog.words) == (("<cat>",), ("<dog>",))
    assert torch.equal(dog.vectors, VECTORS[:1] + 1)
    (chosen,) = read_embeddings([(path, "<dog>")], SHAPES)
    assert (chosen.words, len(chosen.vectors)) == (("<dog>",), 1)
    with pytest.raises(InputError, match="no vectors for 'bird', but for <cat>, <dog>"):
        read_embeddings([(path, "bird")], SHAPES)


def test_two_files_of_one_name(tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder, {"*": VECTORS}, "learned_embeds.bin"))
    with pytest.raises(InputError, match=r"both stand for 'learned_embeds'; .* FILE:WORD"):
        read_embeddings(paths, SHAPES)
    first, second = read_embeddings([paths[0], (paths[1], "toy")], SHAPES)
    assert (first.words, second.words) == (("learned_embeds",), ("toy",))


@pytest.mark.parametrize("word", ["", " ", "a\nb", "\x1b[2J", "x" * 10**5])
def test_a_word_that_cannot_be_written_is_left_out(tmp_path, word):
    path = write(tmp_path, {word: VECTORS}, "cat.pt")
    assert only(path).words == ("cat",)


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def picture(path, *chunks):
    header = chunk(b"IHDR", (1).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b""))
    return path


def in_picture(path, content):
    text = base64.b64encode(json.dumps(content).encode())
    return picture(path, chunk(b"tEXt", b"x\0y"), chunk(b"tEXt", b"sd-ti-embedding\0" + text))


def test_an_embedding_in_a_picture(tmp_path):
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": {"TORCHTENSOR": VECTORS.tolist()}},
        "name": "cat",
    }
    embedding = only(in_picture(tmp_path / "cat.png", content))
    assert embedding.words == ("cat",)
    assert torch.equal(embedding.vectors, VECTORS)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"string_to_param": [1]},
        {"string_to_param": {"*": 3}},
        {"string_to_param": {"*": {"TORCHTENSOR": "abc"}}},
        {"string_to_param": {"*": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}},
        {"string_to_param": {"*": {"TORCHTENSOR": []}}},
        {"string_to_param": {"*": {"TORCHTENSOR": [["a"]]}}},
    ],
)
def test_other_things_in_a_picture_are_one_line(tmp_path, content):
    with pytest.raises(InputError, match=r"cat\.png"):
        only(in_picture(tmp_path / "cat.png", content))


def test_damaged_pictures_and_such_without_an_embedding(tmp_path):
    with pytest.raises(InputError, match="a picture without an embedding"):
        only(picture(tmp_path / "cat.png"))
    for body in (b"sd-ti-embedding\0###", b"sd-ti-embedding\0e30=\xff"):
        with pytest.raises(InputError, match="sd-ti-embedding is damaged"):
            only(picture(tmp_path / "cat.png", chunk(b"tEXt", body)))
    whole = in_picture(tmp_path / "cat.png", {"string_to_param": {}}).read_bytes()
    for end in range(8, len(whole), 7):
        (tmp_path / "cut.png").write_bytes(whole[:end])
        with pytest.raises(InputError):
            only(tmp_path / "cut.png")
