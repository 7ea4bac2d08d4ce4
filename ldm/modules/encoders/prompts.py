"""Prompts of more than one context's length, and with words of different weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.encoders.emphasis import BREAK, parse_emphasis
from ldm.modules.encoders.modules import TextEncoder

Tokens = list[tuple[int, float]]  # ids and weights


def chunks(
    encoder: TextEncoder, prompt: str, is_long: bool = False, has_emphasis: bool = False
) -> list[Tokens]:
    """A prompt's tokens in as many chunks as it takes, at least one; an embedding is never cut.

    Args:
        encoder, prompt, is_long, has_emphasis: as in `embed_prompt`.
    """
    room = encoder.max_length - 2
    sizes = {ids[0]: len(ids) for ids in encoder.words.values()}
    found: list[Tokens] = [[]]
    for piece in parse_emphasis(prompt) if has_emphasis else [(prompt, 1.0)]:
        if piece == BREAK:
            if is_long and found[-1]:
                found.append([])
            continue
        ids = encoder.token_ids(piece[0])
        while ids:
            size = sizes.get(ids[0], 1)
            if len(found[-1]) + size > room:
                if not is_long:
                    return found
                found.append([])
            found[-1] += [(token, piece[1]) for token in ids[:size]]
            ids = ids[size:]
    if len(found) > 1 and not found[-1]:
        found.pop()
    return found


def length_in_use(
    encoder: TextEncoder, prompt: str, is_long: bool = False, has_emphasis: bool = False
) -> int:
    """Tokens of a prompt's embedding up to its end token, beyond which there is only padding.

    Args:
        encoder, prompt, is_long, has_emphasis: as in `embed_prompt`.
    """
    found = chunks(encoder, prompt, is_long, has_emphasis)
    return (len(found) - 1) * encoder.max_length + len(found[-1]) + 2


def embed_prompt(
    encoder: TextEncoder,
    prompt: str,
    is_long: bool = False,
    has_emphasis: bool = False,
    clip_skip: int = 1,
) -> Tensor:
    """The embedding of one prompt, (1, n * L, C), from n contexts of L tokens.

    Weight w of a token adds (w - 1) * (embedding - empty) to its embedding, empty being what the
    empty prompt has in its place: 1 changes nothing, and 0 takes the word out.

    Args:
        encoder: what reads it.
        prompt: what the user wrote.
        is_long: read all of it, in chunks of L - 2 tokens, each encoded by itself with a start and
            an end of its own; else n is 1, and what does not fit is cut off.
        has_emphasis: read the marks of `parse_emphasis`.
        clip_skip: see `TextEncoder.embed`.

    Raises:
        InputError: words have weights, but the encoder gives no embedding for each token.
    """
    found = chunks(encoder, prompt, is_long, has_emphasis)
    embedding = encoder.embed([_ids(chunk) for chunk in found], clip_skip)
    if any(weight != 1 for chunk in found for _, weight in chunk):
        if embedding.shape[1] != encoder.max_length:
            raise InputError("emphasis needs a text encoder with an embedding for each token")
        factors = torch.ones(len(found), encoder.max_length, 1, dtype=torch.float32)
        for row, chunk in zip(factors, found, strict=True):
            weights = [weight for _, weight in chunk]
            row[1 : 1 + len(chunk), 0] = torch.tensor(weights, dtype=torch.float32)
        empty = encoder.embed([[]], clip_skip)
        embedding = embedding + (factors.to(embedding) - 1) * (embedding - empty)
    return rearrange(embedding, "n l c -> 1 (n l) c")


def _ids(tokens: Sequence[tuple[int, float]]) -> list[int]:
    return [token for token, _ in tokens]
