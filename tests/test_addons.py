"""What prompts name: LoRAs by tags, embeddings by words."""

import pytest

from ldm.addons import embeddings_in, find_addons, lora_files, taken_loras
from ldm.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lora/sub/ink.safetensors", "embeddings/sub/cat-toy.pt", "embeddings/dog.png"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "models"


def test_of_two_files_that_differ_in_their_ending_none_is_hidden(folder):
    for name in ("lora/ink.pt", "lora/ink.safetensors", "lora/ink.ckpt", "embeddings/dog.pt"):
        (folder / name).touch()
    lora = folder / "lora"
    assert find_addons("lora") == {
        "ink": lora / "ink.safetensors",
        "ink.ckpt": lora / "ink.ckpt",
        "ink.pt": lora / "ink.pt",
        "sub/ink": lora / "sub/ink.safetensors",
    }
    assert find_addons("embeddings")["dog"] == folder / "embeddings" / "dog.pt"
    assert "dog.png" not in find_addons("embeddings")


def test_tags_are_taken_out_of_a_prompt():
    found = taken_loras("a <lora:my style:0.5>house <LORA: b >(<lyco:c:-1>)")
    assert found == ("a house ()", (("my style", 0.5), ("b", 1.0), ("c", -1.0)))
    assert taken_loras("1 < 2  > 0 <3 <b>") == ("1 < 2  > 0 <3 <b>", ())


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<lora:a:much>", "the weight is not a number from -10 to 10"),
        ("<lora:a:nan>", "the weight is not a number from -10 to 10"),
        ("<lora:a:11>", "the weight is not a number from -10 to 10"),
        ("<lora:a:1:0.5>", "only <lora:NAME:WEIGHT> is known"),
        ("<hypernet:a:1>", "only <lora:NAME:WEIGHT> is known"),
    ],
)
def test_tags_that_cannot_be_used(tag, message):
    with pytest.raises(InputError, match=message):
        taken_loras(f"a house {tag}")


def test_names_are_those_of_the_folder_never_paths(folder):
    assert lora_files((("sub/ink", 0.5),)) == [(folder / "lora/sub/ink.safetensors", 0.5)]
    for name in ("ink", "../lora/sub/ink", str(folder / "lora/sub/ink.safetensors"), "", "\0"):
        with pytest.raises(InputError, match="not in models/lora, where there are: sub/ink"):
            lora_files(((name, 1.0),))


def test_embeddings_are_words(folder):
    assert list(find_addons("embeddings")) == ["dog", "sub/cat-toy"]
    assert list(embeddings_in(["x", "a Cat-Toy, please"])) == ["cat-toy"]
    assert embeddings_in(["a cat-toys dogs"]) == {}


def test_a_file_wins_over_the_picture_of_its_name(folder):
    (folder / "embeddings" / "dog.bin").touch()
    assert embeddings_in(["a dog"]) == {"dog": folder / "embeddings" / "dog.bin"}
