"""Prompts of more than one context's length, and with words of different weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor

from ldm.errors import InputError, escaped
from ldm.modules.encoders.modules import TextEncoder

FACTORS = {"(": 1.1, "[": 1 / 1.1}  # what a pair of brackets multiplies the weight by
PARTNERS = {")": "(", "]": "["}
BREAK = ("BREAK", -1.0)  # the piece that ends a chunk
MAX_WEIGHT = 100.0
_PARTS = re.compile(
    r"\\[()\[\]\\]|[(\[]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|[\\:]"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
# A pair of brackets with none inside; a backslash makes a bracket a character.
_INSIDE = r"(?:\\.|[^\[\]\\])*"
_OPEN = rf"(?<!\\)(?:\\\\)*\[(?={_INSIDE}\])"
_NUMBER = r"\s*\+?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?\s*"
# What the web UIs read as more than words, and what it is called.
_EMPHASIS = (
    (re.compile(r"\([^()]*:\s*[+-]?[\d.]+\s*\)"), "emphasis"),
    (re.compile(r"\({2}|\[{2}"), "emphasis"),
    (_BREAK, "BREAK"),
)
_OTHERS = (
    (re.compile(rf"{_OPEN}{_INSIDE}:{_NUMBER}\]"), "prompt editing"),
    (re.compile(rf"{_OPEN}(?:\\.|[^\[\]\\|])*\|{_INSIDE}\]"), "alternating words"),
    (re.compile(r"\bAND\b"), "AND"),
    (re.compile(r"<\w+:[^<>]*>"), "LoRA in a negative prompt"),
)

Tokens = list[tuple[int, float]]  # ids and weights


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt into pieces of one weight each, as the web UIs read it.

    ``(text)`` weighs 1.1, ``((text))`` 1.21, ``(text:1.4)`` 1.4 and ``[text]`` 1 / 1.1; ``\(`` is a
    bracket that is meant. A bracket that is not closed reaches to the end, a closing one without a
    partner is a character. The word BREAK is the piece `BREAK`.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, parse_prompt_attention.

    Raises:
        InputError: a weight is beyond 100.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # number of pieces before each

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [
            (text, weight if (text, weight) == BREAK else weight * factor)
            for text, weight in pieces[start:]
        ]

    for match in _PARTS.finditer(prompt):
        part = match[0]
        if part in opened:
            opened[part].append(len(pieces))
        elif match[1] is not None and opened["("]:
            multiply(opened["("].pop(), float(match[1]))
        elif part in PARTNERS and opened[PARTNERS[part]]:
            multiply(opened[PARTNERS[part]].pop(), FACTORS[PARTNERS[part]])
        elif part[0] == "\\" and len(part) == 2:
            pieces.append((part[1:], 1.0))
        else:
            first, *others = _BREAK.split(part)
            pieces.append((first, 1.0))
            for text in others:
                pieces += [BREAK, (text, 1.0)]
    for bracket, starts in opened.items():
        for start in starts:
            multiply(start, FACTORS[bracket])
    joined: list[tuple[str, float]] = []
    for text, weight in filter(lambda piece: piece[0], pieces):
        if abs(weight) > MAX_WEIGHT:
            raise InputError(
                f"emphasis {weight:g} of {escaped(text)!r}: allowed are -{MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}"
            )
        if joined and joined[-1][1] == weight and BREAK not in ((text, weight), joined[-1]):
            text = joined.pop()[0] + text
        joined.append((text, weight))
    return joined


def plain_text(prompt: str) -> str:
    """A prompt without the marks of emphasis."""
    return "".join(" " if piece == BREAK else piece[0] for piece in parse_emphasis(prompt))


def syntax_remarks(prompt: str, is_long: bool = False, has_emphasis: bool = False) -> Iterator[str]:
    """Lines about the web UIs' syntax in a prompt that is read as words, or not at all."""
    if not has_emphasis:
        for pattern, name in _EMPHASIS:
            if match := pattern.search(prompt):
                yield (
                    f"{escaped(match[0].strip())!r} in a prompt is read as words: --emphasis reads "
                    f"the web UIs' {name}"
                )
                break
    elif not is_long and _BREAK.search(prompt):
        yield "BREAK in a prompt does nothing without --long_prompt, which reads it in chunks"
    for pattern, name in _OTHERS:
        if match := pattern.search(prompt):
            yield (
                f"{escaped(match[0])!r} in a prompt is read as words: the web UIs' {name} is not "
                "included"
            )


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
        factors = torch.ones(len(found), encoder.max_length, 1)
        for row, chunk in zip(factors, found, strict=True):
            row[1 : 1 + len(chunk), 0] = torch.tensor([weight for _, weight in chunk])
        empty = encoder.embed([[]], clip_skip)
        embedding = embedding + (factors.to(embedding) - 1) * (embedding - empty)
    return rearrange(embedding, "n l c -> 1 (n l) c")


def _ids(tokens: Sequence[tuple[int, float]]) -> list[int]:
    return [token for token, _ in tokens]
