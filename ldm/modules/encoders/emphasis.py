"""Programs' syntax in a prompt: the web UIs' emphasis is read, the rest named. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ldm.errors import InputError, escaped

FACTORS = {"(": 1.1, "[": 1 / 1.1}  # what a pair of brackets multiplies the weight by
PARTNERS = {")": "(", "]": "["}
BREAK = ("BREAK", -1.0)  # the piece that ends a chunk
MAX_WEIGHT = 100.0
MAX_DEPTH = 100  # open brackets; each of them costs time for every piece after it
_PARTS = re.compile(
    r"\\[()\[\]\\]|[(\[]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|[\\:]"
)
_BREAK = re.compile(r"(?:(?<!\s)\s+)?\bBREAK\b\s*")  # spaces are looked at once
# What is inside a pair of brackets, pairs without any inside included; a backslash makes a bracket
# a character.
_PAIR = r"\[(?:\\.|[^\[\]\\])*\]"
_INSIDE = rf"(?:\\.|[^\[\]\\]|{_PAIR})*"
_OPEN = rf"(?<!\\)(?:\\\\)*\[(?={_INSIDE}\])"
_NUMBER = r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?\s*"
_FLAG = re.compile(r"(?<!\S)--[a-zA-Z][\w-]*")  # as other programs' lines have them
# What the web UIs read as more than words, and what it is called.
_EMPHASIS = (
    (re.compile(r"[()][^()]*:\s*[+-]?[\d.]+\s*\)"), "emphasis"),
    (re.compile(r"\({2}|\[{2}"), "emphasis"),
    (_BREAK, "BREAK"),
)
_OTHERS = (
    (re.compile(rf"{_OPEN}{_INSIDE}:{_NUMBER}\]"), "prompt editing"),
    (re.compile(rf"{_OPEN}(?:\\.|[^\[\]\\|]|{_PAIR})*\|{_INSIDE}\]"), "alternating words"),
    (re.compile(r"\bAND\b"), "AND"),
    (re.compile(r"<\w+:[^<>]*>"), "LoRA in a negative prompt"),
)
# Likewise for other programs: Dynamic Prompts, NovelAI, InvokeAI (compel), ComfyUI.
_ELSEWHERE = (
    (re.compile(r"(?<!\w)__\w[\w/*.-]{0,99}?__(?!\w)"), "wildcards are"),
    (re.compile(r"(?<!\\)\{[^{}|]*\|[^{}]*\}"), "choices in braces are"),
    (re.compile(r"(?<!\\)\{[^{}|]+\}"), "emphasis in braces is"),
    (re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?::(?=\s*[^\W\d])"), "emphasis by :: is"),
    (re.compile(r"[^\W\d_]\+{2,}(?![\w+])|\)(?:\++|-+|\d*\.\d+)(?![\w.+(-])"), "such emphasis is"),
    (re.compile(r"\)\s*\.(?:and|blend|swap)\("), "blending of prompts is"),
    (re.compile(r"(?<!\w)embedding:(?=\S)"), "an embedding's name stands alone; this mark is"),
)


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt into pieces of one weight each, as the web UIs read it.

    ``(text)`` weighs 1.1, ``((text))`` 1.21, ``(text:1.4)`` 1.4 and ``[text]`` 1 / 1.1; ``\(`` is a
    bracket that is meant, ``\\`` a backslash, and any other backslash is nothing. A bracket that is
    not closed reaches to the end, a closing one without a partner is a character. The word BREAK is
    the piece `BREAK`.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, parse_prompt_attention.

    Raises:
        InputError: a weight is beyond 100, or more than 100 brackets are open.
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
            if sum(map(len, opened.values())) > MAX_DEPTH:
                raise InputError(
                    f"{escaped(prompt[match.start() :], 40)!r} in a prompt: more than {MAX_DEPTH} "
                    r"brackets are open; close them, or write \( and \[ where they are meant"
                )
        elif match[1] is not None and opened["("]:
            multiply(opened["("].pop(), float(match[1]))
        elif part in PARTNERS and opened[PARTNERS[part]]:
            multiply(opened[PARTNERS[part]].pop(), FACTORS[PARTNERS[part]])
        elif part[0] == "\\":
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
    """Lines about programs' syntax in a prompt that is read as words, or not at all."""
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
    if match := _FLAG.search(prompt):
        yield f"{escaped(match[0])!r} in a prompt is read as words, not as a flag"
    for pattern, name in _OTHERS:
        if match := pattern.search(prompt):
            yield (
                f"{escaped(match[0])!r} in a prompt is read as words: the web UIs' {name} is not "
                "included"
            )
    for pattern, what in _ELSEWHERE:
        if match := pattern.search(prompt):
            yield f"{escaped(match[0])!r} in a prompt is read as words: {what} not included"
