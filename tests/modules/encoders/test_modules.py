"""The text encoders against the published ones' numbers, names and token ids."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch

from ldm.errors import InputError
from ldm.modules.encoders.modules import (
    CLIP_L,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    token_ids,
    truncated_words,
)
from tests.golden_util import GOLDEN, fill_parameters, load_golden, load_golden_keys

TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
TINY_OPENCLIP = {"embed_dim": 16, "width": 32, "heads": 4, "layers": 3}
TOKENS = json.loads((GOLDEN / "tokenizer.json").read_text())
PROMPTS = [entry["prompt"] for entry in TOKENS]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a text encoder tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def clip() -> FrozenCLIPEmbedder:
    encoder = FrozenCLIPEmbedder(text_config=TINY_CLIP)
    fill_parameters(encoder.transformer["text_model"], seed=11)
    return encoder


@pytest.fixture(scope="module")
def openclip() -> FrozenOpenCLIPEmbedder:
    encoder = FrozenOpenCLIPEmbedder(layer="penultimate", text_config=TINY_OPENCLIP)
    fill_parameters(encoder.model, seed=11)
    return encoder


def test_clip_equals_the_published_model(clip: FrozenCLIPEmbedder) -> None:
    golden, metadata = load_golden("clip_text")
    assert json.loads(metadata["config"]).items() >= TINY_CLIP.items()
    torch.testing.assert_close(
        clip.encode_tokens(golden["input_ids"]), golden["last_hidden_state"], rtol=0, atol=1e-5
    )


def test_openclip_equals_the_published_model(openclip: FrozenOpenCLIPEmbedder) -> None:
    golden, _ = load_golden("openclip_text")
    torch.testing.assert_close(
        openclip.encode_tokens(golden["input_ids"]), golden["penultimate"], rtol=0, atol=1e-5
    )


def test_openclip_last_runs_every_block(openclip: FrozenOpenCLIPEmbedder) -> None:
    last = FrozenOpenCLIPEmbedder(layer="last", text_config=TINY_OPENCLIP)
    last.load_state_dict(openclip.state_dict())
    assert not torch.allclose(last(["a"]), openclip(["a"]))
    cut = {**TINY_OPENCLIP, "layers": 2}
    shorter = FrozenOpenCLIPEmbedder(layer="last", text_config=cut)
    shorter.load_state_dict(openclip.state_dict(), strict=False)
    torch.testing.assert_close(shorter(["a"]), openclip(["a"]))


@pytest.mark.parametrize(
    ("encoder_class", "family", "not_parameters"),
    [
        (FrozenCLIPEmbedder, "sd1", {"transformer.text_model.embeddings.position_ids"}),
        (FrozenOpenCLIPEmbedder, "sd2", set()),
    ],
)
def test_names_and_shapes_are_the_checkpoints(
    encoder_class: type[torch.nn.Module], family: str, not_parameters: set[str]
) -> None:
    with torch.device("meta"):
        encoder = encoder_class()
    names = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    expected = load_golden_keys(family, "cond_stage_model.")
    assert names == {name: s for name, s in expected.items() if name not in not_parameters}


@pytest.mark.parametrize("name", ["clip", "openclip"])
def test_weights_can_be_assigned_to_a_model_on_meta(
    name: str, request: pytest.FixtureRequest
) -> None:
    encoder = request.getfixturevalue(name)
    with torch.device("meta"):
        empty = (
            FrozenCLIPEmbedder(text_config=TINY_CLIP)
            if name == "clip"
            else FrozenOpenCLIPEmbedder(layer="penultimate", text_config=TINY_OPENCLIP)
        )
    empty.load_state_dict(encoder.state_dict(), assign=True)
    empty.to("cpu")  # fails if anything is left on the meta device
    assert torch.equal(empty(["a horse"]), encoder(["a horse"]))


@pytest.mark.parametrize(("name", "key"), [("clip", "sd1"), ("openclip", "sd2")])
def test_token_ids_equal_the_published_ones(
    name: str, key: str, request: pytest.FixtureRequest
) -> None:
    ids = request.getfixturevalue(name).tokenize(PROMPTS)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [entry[f"{key}_input_ids"] for entry in TOKENS]


def test_any_prompt_is_encoded(clip: FrozenCLIPEmbedder, openclip: FrozenOpenCLIPEmbedder) -> None:
    prompts = ["", "\u00c9lan \u6771\u4eac \U0001f642", "word " * 500, "\x00\ufffd"]
    for encoder in (clip, openclip):
        embedding = encoder.encode(prompts)
        assert embedding.shape == (4, 77, 32)
        assert embedding.isfinite().all()
        assert torch.equal(encoder.encode(prompts[0]), encoder(prompts[:1]))
        # A prompt's embedding does not depend on its neighbours.
        torch.testing.assert_close(embedding[1:2], encoder(prompts[1:2]))


def test_truncated_words_names_what_is_cut() -> None:
    kept = " ".join(["word"] * 75)
    assert truncated_words(kept) == ""
    assert truncated_words(f"{kept} A Red hat") == "a red hat"
    assert truncated_words("one two three four", max_length=5) == "four"


@pytest.mark.parametrize("name", ["clip", "openclip"])
def test_words_with_vectors_of_their_own(name: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(name)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    plain = encoder(["a photo of my-cat"])
    table = encoder.token_embedding
    house, red = (table.weight[encoder.tokenize(word)[0, 1]] for word in ("house", "red"))
    encoder.set_words({"My-Cat": torch.stack([red, house]), "<x>": house[None].double()})
    # The words stand for the vectors of others, so they have to give what those give.
    for prompt, same in [
        ("a photo of my-cat, on grass", "a photo of red house, on grass"),
        ("MY-CAT", "red house"),
        ("<X> my-cat <x>", "house red house house"),
        ("my-cats and amy-cat", "my-cats and amy-cat"),
    ]:
        assert torch.equal(encoder([prompt]), encoder([same]))
    assert not torch.equal(encoder(["a photo of my-cat"]), plain)
    encoder.set_words({})
    assert torch.equal(encoder(["a photo of my-cat"]), plain)
    after = encoder.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_words_with_vectors_count_as_so_many_tokens() -> None:
    words = {"cat": [50000, 50001, 50002]}
    assert token_ids("a cat", words)[1:] == words["cat"]
    assert truncated_words("one cat two", max_length=6, words=words) == "two"
    assert truncated_words("one Cat two", max_length=4, words=words) == "cat two"
    for like in ("\u017fun", "\u0131n"):  # a long s, and an i without its dot
        assert token_ids(like, {"sun": [50000], "in": [50001]}) == token_ids(like)


def test_clip_layers(clip: FrozenCLIPEmbedder) -> None:
    def build(**options: object) -> FrozenCLIPEmbedder:
        encoder = FrozenCLIPEmbedder(text_config=TINY_CLIP, **options)
        encoder.load_state_dict(clip.state_dict())
        return encoder

    last = clip(["a red hat"])
    end = clip.tokenize(["a red hat"])[0].tolist().index(49407)
    assert torch.equal(build(layer="pooled")(["a red hat"]), last[:, end : end + 1])
    # a layer's embedding is normalised as the last one's is
    assert torch.equal(build(layer="hidden", layer_idx=-1)(["a red hat"]), last)
    tower = clip.transformer["text_model"]
    table = tower.embeddings["token_embedding"](clip.tokenize("a red hat"))
    first = tower.final_layer_norm(table + tower.embeddings["position_embedding"].weight)
    assert torch.equal(build(layer="hidden", layer_idx=0)(["a red hat"]), first)


def test_the_encoders_are_those_of_transformers_and_open_clip() -> None:
    from open_clip.transformer import TextTransformer
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = torch.randint(0, 49408, (2, 77))
    theirs = CLIPTextModel(CLIPTextConfig(**CLIP_L | TINY_CLIP)).eval()
    theirs = getattr(theirs, "text_model", theirs)  # before transformers 5.6
    ours = FrozenCLIPEmbedder(text_config=TINY_CLIP)
    state = {n: t for n, t in theirs.state_dict().items() if not n.endswith("position_ids")}
    ours.transformer["text_model"].load_state_dict(state)
    assert torch.equal(ours.encode_tokens(ids), theirs(input_ids=ids).last_hidden_state)

    tower = TextTransformer(
        output_dim=16, context_length=77, vocab_size=49408, width=32, heads=4, layers=3
    ).eval()
    openclip = FrozenOpenCLIPEmbedder(text_config=TINY_OPENCLIP)
    openclip.model.load_state_dict(tower.state_dict(), strict=False)
    tower, openclip = tower.double(), openclip.double()  # in float32 processors differ
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.transformer.resblocks:
        x = block(x, attn_mask=torch.full((77, 77), -torch.inf).triu(1).double())
    torch.testing.assert_close(openclip.encode_tokens(ids), tower.ln_final(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoder_class", [FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder])
def test_freezing(encoder_class: type[torch.nn.Module]) -> None:
    tiny = TINY_CLIP if encoder_class is FrozenCLIPEmbedder else TINY_OPENCLIP
    frozen = encoder_class(text_config=tiny)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trained = encoder_class(text_config=tiny, freeze=False)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    trained(["a red hat"]).square().mean().backward()
    gradients = [parameter.grad for parameter in trained.parameters()]
    unused = {"model.logit_scale", "model.text_projection"}
    assert sum(gradient is None for gradient in gradients) == len(
        unused & {name for name, _ in trained.named_parameters()}
    )


def test_half_precision_weights(clip: FrozenCLIPEmbedder, openclip: FrozenOpenCLIPEmbedder) -> None:
    for encoder, other in (
        (clip, FrozenCLIPEmbedder(text_config=TINY_CLIP)),
        (openclip, FrozenOpenCLIPEmbedder(layer="penultimate", text_config=TINY_OPENCLIP)),
    ):
        other.load_state_dict(encoder.state_dict())
        half = other.to(torch.bfloat16)(["a red hat"])
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), encoder(["a red hat"]), rtol=0.1, atol=0.15)


@pytest.mark.parametrize(
    ("encoder_class", "arguments", "message"),
    [
        (FrozenCLIPEmbedder, {"version": "someone/else"}, "'someone/else' is not built in"),
        (FrozenCLIPEmbedder, {"layer": "first"}, "'first' is not last, pooled or hidden"),
        (FrozenCLIPEmbedder, {"layer": "hidden", "layer_idx": 13}, "-12 .. 12, not 13"),
        (FrozenCLIPEmbedder, {"text_config": {"width": 3}}, "text_config has no 'width'"),
        (FrozenCLIPEmbedder, {"max_length": 100}, "max_length 100: must be 3 to 77"),
        (FrozenCLIPEmbedder, {"max_length": 2}, "max_length 2: must be 3 to 77"),
        (FrozenCLIPEmbedder, {"text_config": {"num_attention_heads": 5}}, "5 heads cannot share"),
        (
            FrozenCLIPEmbedder,
            {"text_config": {"hidden_act": "swish"}},
            "hidden_act 'swish': choose",
        ),
        (FrozenOpenCLIPEmbedder, {"max_length": 78}, "max_length 78: must be 3 to 77"),
        (FrozenOpenCLIPEmbedder, {"text_config": {"heads": 0}}, "0 heads cannot share 1024"),
        (FrozenOpenCLIPEmbedder, {"arch": "ViT-L-14"}, "'ViT-L-14' is not built in"),
        (FrozenOpenCLIPEmbedder, {"layer": "pooled"}, "'pooled' is not last or penultimate"),
        (FrozenOpenCLIPEmbedder, {"text_config": {"hidden_size": 3}}, "has no 'hidden_size'"),
    ],
)
def test_unusable_arguments_are_named(
    encoder_class: type[torch.nn.Module], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encoder_class(**arguments)


def test_reading_prompts_imports_no_large_library() -> None:
    code = (
        "import sys; from ldm.modules.encoders.modules import *\n"
        f"FrozenOpenCLIPEmbedder(text_config={TINY_OPENCLIP})(['a'])\n"
        f"FrozenCLIPEmbedder(text_config={TINY_CLIP})(['a'])\n"
        "with torch.device('meta'): FrozenCLIPEmbedder(); FrozenOpenCLIPEmbedder()\n"
        "large = {'transformers', 'open_clip', 'torchvision', 'sympy'} & set(sys.modules)\n"
        "sys.exit(str(large) if large else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[1]).returncode == 0
