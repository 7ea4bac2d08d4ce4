"""Prompts of more than one context's length, and with words of different weight."""

from __future__ import annotations

import re

import torch
from einops import rearrange
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.encoders.modules import TextEncoder

FACTORS = {"()": 1.1, "[]": 1 / 1.1}  # what a pair of brackets multiplies the weight by
_PARTS = re.compile(
    r"\\[()\[\]\\]|[(\[]|(?::\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*)?\)|\]|[^\\()\[\]:]+|[\\:]"
)


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt into pieces of one weight each, as the web UIs read it.

    ``(text)`` weighs 1.1, ``((text))`` 1.21, ``(text:1.4)`` 1.4 and ``[text]`` 1 / 1.1; ``\(`` is a
    bracket that is meant. So is one without a partner.

    Source: the syntax of AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # brackets, and the number of pieces before each
    for match in _PARTS.finditer(prompt):
        part = match[0]
        is_escaped = len(part) == 2 and part[0] == "\\"
        pair = (opened[-1][0] if opened else "") + part[-1]
        if part in ("(", "["):
            opened.append((part, len(pieces)))
            pieces.append((part, 1.0))  # goes when its partner is found
        elif pair in FACTORS and not is_escaped:
            _, start = opened.pop()
            factor = FACTORS[pair] if match[1] is None else float(match[1])
            pieces[start:] = [(text, weight * factor) for text, weight in pieces[start + 1 :]]
        else:
            pieces.append((part[1:] if is_escaped else part, 1.0))
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            text = joined.pop()[0] + text
        joined.append((text, weight))
    return joined


def plain_text(prompt: str) -> str:
    """A prompt without the marks of emphasis."""
    return "".join(text for text, _ in parse_emphasis(prompt))


def length_in_use(
    encoder: TextEncoder, prompt: str, is_long: bool = False, has_emphasis: bool = False
) -> int:
    """Tokens of a prompt's embedding up to its end token, beyond which there is only padding.

    Args:
        encoder, prompt, is_long, has_emphasis: as in `embed_prompt`.
    """
    room = encoder.max_length - 2
    n_tokens = len(encoder.token_ids(plain_text(prompt) if has_emphasis else prompt))
    n_full = max(0, n_tokens - 1) // room if is_long else 0
    return n_full * encoder.max_length + min(n_tokens - n_full * room, room) + 2


def embed_prompt(
    encoder: TextEncoder, prompt: str, is_long: bool = False, has_emphasis: bool = False
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

    Raises:
        InputError: words have weights, but the encoder gives no embedding for each token.
    """
    tokens: list[int] = []
    weights: list[float] = []
    for text, weight in parse_emphasis(prompt) if has_emphasis else [(prompt, 1.0)]:
        ids = encoder.token_ids(text)
        tokens += ids
        weights += [weight] * len(ids)
    room = encoder.max_length - 2
    starts = range(0, max(1, len(tokens)), room) if is_long else range(1)
    chunks = [slice(start, start + room) for start in starts]
    embedding = encoder.embed([tokens[chunk] for chunk in chunks])
    if any(weight != 1 for weight in weights):
        if embedding.shape[1] != encoder.max_length:
            raise InputError("emphasis needs a text encoder with an embedding for each token")
        factors = torch.ones(len(chunks), encoder.max_length, 1)
        for row, chunk in zip(factors, chunks, strict=True):
            row[1 : 1 + len(weights[chunk]), 0] = torch.tensor(weights[chunk])
        empty = encoder.embed([[]])
        embedding = embedding + (factors.to(embedding) - 1) * (embedding - empty)
    return rearrange(embedding, "n l c -> 1 (n l) c")
