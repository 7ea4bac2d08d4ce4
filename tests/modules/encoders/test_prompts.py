"""Long and weighted prompts, on a small encoder of the real structure."""

import pytest
import torch

from ldm.errors import InputError
from ldm.modules.encoders.emphasis import plain_text
from ldm.modules.encoders.modules import END_ID, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.prompts import chunks, embed_prompt, length_in_use
from tests.golden_util import fill_parameters
from tests.tiny_models import CLIP, OPEN_CLIP


@pytest.fixture(scope="module", params=[FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder])
def encoder(request):
    kind = CLIP if request.param is FrozenCLIPEmbedder else OPEN_CLIP
    return fill_parameters(request.param(**kind["params"]), seed=3)


@torch.no_grad()
def test_a_plain_prompt_is_embedded_as_ever(encoder):
    expected = encoder(["a red house"])
    for options in ((False, False), (True, False), (False, True), (True, True)):
        torch.testing.assert_close(embed_prompt(encoder, "a red house", *options), expected)
    assert embed_prompt(encoder, "", True).shape == expected.shape


@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks(encoder):
    words = " ".join(["house", "tree"] * 50)  # a token each
    assert embed_prompt(encoder, words).shape[1] == 77
    long = embed_prompt(encoder, words, is_long=True)
    assert long.shape[1] == 2 * 77
    torch.testing.assert_close(long[:, :77], encoder([words]))
    rest = " ".join(words.split()[75:])
    torch.testing.assert_close(long[:, 77:], encoder([rest]))
    exact = " ".join(words.split()[:75])
    assert embed_prompt(encoder, exact, is_long=True).shape[1] == 77


@torch.no_grad()
def test_a_weight_moves_a_word_away_from_the_empty_prompt(encoder):
    plain, empty = encoder(["a red house"]), encoder([""])
    weighted = embed_prompt(encoder, "a (red:1.5) house", has_emphasis=True)
    torch.testing.assert_close(weighted[:, :2], plain[:, :2])  # start, "a"
    torch.testing.assert_close(weighted[:, 3:], plain[:, 3:])
    torch.testing.assert_close(weighted[:, 2], empty[:, 2] + 1.5 * (plain - empty)[:, 2])
    without = embed_prompt(encoder, "(a red house:0)", has_emphasis=True)
    torch.testing.assert_close(without[:, 1:4], empty[:, 1:4])


@torch.no_grad()
def test_weights_reach_the_second_chunk(encoder):
    words = " ".join(["tree"] * 76)
    plain = embed_prompt(encoder, f"{words} house", is_long=True)
    weighted = embed_prompt(encoder, f"{words} (house:2)", True, True)
    different = (plain != weighted).any(dim=2)[0].nonzero().flatten().tolist()
    assert different == [77 + 2]


def test_a_pooled_text_has_no_words_to_weigh():
    encoder = FrozenCLIPEmbedder(**CLIP["params"], layer="pooled")
    with pytest.raises(InputError, match="an embedding for each token"):
        embed_prompt(encoder, "(red)", has_emphasis=True)


@pytest.mark.parametrize(
    ("prompt", "is_long", "expected"),
    [
        ("", False, 2),
        ("a house", False, 4),
        ("house " * 100, False, 77),
        ("a (red:1.2) house", False, 5),
    ],
)
def test_length_in_use_ends_with_the_end_token(encoder, prompt, is_long, expected):
    found = length_in_use(encoder, prompt, is_long, has_emphasis=True)
    assert found == expected
    ids = encoder.tokenize(plain_text(prompt))[0].tolist()
    assert ids.index(END_ID) == found - 1


def test_length_in_use_of_a_long_prompt(encoder):
    room = encoder.max_length - 2
    for n_tokens in (1, room, room + 1, 2 * room, 2 * room + 3):
        n = length_in_use(encoder, "house " * n_tokens, is_long=True)
        whole = embed_prompt(encoder, "house " * n_tokens, is_long=True).shape[1]
        assert whole - encoder.max_length < n <= whole
        assert n == n_tokens + 2 * (whole // encoder.max_length)


@torch.no_grad()
def test_break_begins_a_chunk(encoder):
    found = embed_prompt(encoder, "a red house BREAK the (sea:1.0)", True, True)
    expected = torch.cat([encoder(["a red house"]), encoder(["the sea"])], dim=1)
    torch.testing.assert_close(found, expected)
    assert embed_prompt(encoder, "BREAK a house BREAK", True, True).shape[1] == 77


def test_an_embedding_is_never_cut_in_two(encoder):
    encoder.set_words({"mycat": torch.zeros(4, 16)})
    try:
        prompt = "house " * 73 + "mycat mycat"
        first, second = chunks(encoder, prompt, is_long=True)
        assert (len(first), len(second)) == (73, 8)
        assert [len(chunk) for chunk in chunks(encoder, prompt)] == [73]
        assert length_in_use(encoder, prompt, is_long=True) == 77 + 10
    finally:
        encoder.set_words({})


@torch.no_grad()
def test_clip_skip_is_the_layer_before_with_the_final_norm(encoder):
    tower = encoder.transformer["text_model"] if hasattr(encoder, "transformer") else encoder.model
    ids = encoder.tokenize("a house")
    found = embed_prompt(encoder, "a house", clip_skip=2)
    assert torch.equal(found, tower(ids, encoder.n_skipped + 1))
    assert torch.equal(embed_prompt(encoder, "a house"), encoder(["a house"]))
