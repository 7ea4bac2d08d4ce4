"""The text encoders of Stable Diffusion 1 (CLIP-L) and 2 (OpenCLIP-H).

Both are built from their configuration alone; the weights come with the checkpoint, the vocabulary
with open_clip, and nothing is ever downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError, shown
from ldm.modules.encoders.towers import ACTIVATIONS, ClipText, OpenClipText

START_ID, END_ID = 49406, 49407  # start and end of text in CLIP's vocabulary

# openai/clip-vit-large-patch14, in the names of transformers' CLIPTextConfig
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
# the text tower of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, in the names of open_clip's text_cfg
OPENCLIP_H = {
    "embed_dim": 1024,
    "context_length": 77,
    "vocab_size": 49408,
    "width": 1024,
    "heads": 16,
    "layers": 24,
}


@cache
def _tokenizer() -> Any:
    """open_clip's tokenizer, from its file alone: with the package, importing takes seconds."""
    package = find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def token_ids(prompt: str, words: Mapping[str, Sequence[int]] | None = None) -> list[int]:
    """The token ids of a prompt, without start, end and padding.

    Args:
        prompt: what the user wrote.
        words: ids of words with vectors of their own, which are read whole, in any case of letters.
    """
    encode = _tokenizer().encode
    if not words:
        return encode(prompt)
    own = {word.lower(): ids for word, ids in words.items()}
    longest_first = sorted(map(re.escape, own), key=len, reverse=True)
    pieces = re.split(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)", prompt, flags=re.IGNORECASE)
    # every second piece is a word, or like one: regular expressions take a long s for an s
    texts = (
        (own.get(piece.lower()) if i % 2 else None) or encode(piece)
        for i, piece in enumerate(pieces)
    )
    return [token for ids in texts for token in ids]


def truncated_words(
    prompt: str, max_length: int = 77, words: Mapping[str, Sequence[int]] | None = None
) -> str:
    """The end of a prompt that does not fit into the model's context; empty if all of it fits.

    Args:
        prompt: what the user wrote.
        max_length: tokens that the model reads, with the start and the end token.
        words: see token_ids.

    Returns:
        The words cut off, in lower case, as the tokenizer reads them.
    """
    names = {token: word for word, ids in (words or {}).items() for token in ids}
    cut = token_ids(prompt, words)[max_length - 2 :]
    parts = [
        name or _tokenizer().decode(list(tokens)) for name, tokens in groupby(cut, key=names.get)
    ]
    return " ".join(part.strip() for part in parts)


class TextEncoder(nn.Module):
    """What the two encoders share: reading prompts, and calling ``encode_tokens``.

    Args:
        max_length: tokens of a prompt, L.
        n_positions: tokens that the model has positions for.
        width: channels C.
        n_heads: of the attention.

    Raises:
        InputError: these do not go together.
    """

    padding_id: int
    n_layers: int

    def __init__(self, max_length: int, n_positions: int, width: int, n_heads: int) -> None:
        super().__init__()
        name = type(self).__name__
        if not 3 <= max_length <= n_positions:
            raise InputError(f"{name}: max_length {shown(max_length)}: must be 3 to {n_positions}")
        if n_heads < 1 or width % n_heads:
            raise InputError(f"{name}: {shown(n_heads)} heads cannot share {shown(width)} channels")
        self.max_length = max_length
        self.n_skipped = 0  # layers at the end that are left out
        self.words: dict[str, list[int]] = {}

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of vectors, one for each token id."""
        raise NotImplementedError

    def set_words(self, words: Mapping[str, Tensor]) -> None:
        """Let words stand for vectors of their own, (n, C), instead of those set before.

        The vectors become further rows of the table; without words it is as it was.
        """
        table = self.token_embedding
        known = table.weight[: table.num_embeddings].detach()
        ends = [table.num_embeddings]
        for vectors in words.values():
            ends.append(ends[-1] + len(vectors))
        self.words = {
            word: list(range(start, end))
            for word, start, end in zip(words, ends, ends[1:], strict=False)
        }
        rows = torch.cat([known, *(vectors.to(known) for vectors in words.values())])
        table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text, however long, without a start and an end."""
        return token_ids(text, self.words)

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Turn prompts into token ids, cut and padded to ``max_length``.

        Returns:
            Ids, (B, L), int64, on the CPU: start, the prompt's tokens, end, padding.
        """
        text = [text] if isinstance(text, str) else text
        return self._rows([self.token_ids(prompt) for prompt in text])

    def _rows(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        ids = torch.full((len(prompts), self.max_length), self.padding_id)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = [START_ID, *prompt[: self.max_length - 2], END_ID]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def embed(self, prompts: Sequence[Sequence[int]], clip_skip: int = 1) -> Tensor:
        """Encode B prompts given as ``token_ids``, to (B, L, C); what does not fit is cut off.

        Args:
            prompts: without a start and an end.
            clip_skip: 1 is the layer that the model was trained with, 2 the one before, ...; the
                final normalisation follows, as in the web UIs.

        Raises:
            InputError: there are not so many layers.
        """
        self.check_clip_skip(clip_skip)
        ids = self._rows(prompts).to(next(self.parameters()).device)
        return self.encode_tokens(ids, clip_skip - 1)

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raise InputError where there are not so many layers; see `embed`."""
        most = self.n_layers - self.n_skipped
        if not 1 <= clip_skip <= most:
            raise InputError(f"clip_skip {clip_skip}: this model's text encoder takes 1 to {most}")

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode prompts.

        Args:
            text: B prompts, or one; what does not fit into ``max_length`` tokens is cut off.

        Returns:
            Embeddings, (B, L, C), on the device and in the type of the weights.
        """
        return self.encode_tokens(self.tokenize(text).to(next(self.parameters()).device))

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Upstream's name for calling the encoder."""
        return self(text)

    def encode_tokens(self, ids: Tensor, n_more: int = 0) -> Tensor:
        """Encode token ids, (B, L), to embeddings, (B, L, C), with n_more layers left out."""
        raise NotImplementedError


class FrozenCLIPEmbedder(TextEncoder):
    """The text encoder of Stable Diffusion 1: CLIP's text model.

    Args:
        version: only "openai/clip-vit-large-patch14" is built in.
        device: no effect: the encoder runs where its weights are.
        max_length: tokens of a prompt, L.
        freeze: the parameters need no gradient.
        layer: "last" (after the final normalisation), "pooled" (the end token's, L = 1) or
            "hidden".
        layer_idx: which one for "hidden": 0 is the token embedding, -2 that after the last layer
            but one. The final normalisation follows here too, as in the web UIs (not upstream).
        text_config: entries that differ from CLIP-L's, in the names of CLIPTextConfig.

    Raises:
        InputError: an argument has a value that is not supported.
    """

    padding_id = END_ID

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        text_config: Mapping[str, Any] | None = None,
    ) -> None:
        if version != "openai/clip-vit-large-patch14":
            raise InputError(
                f"FrozenCLIPEmbedder: version {version!r} is not built in, only "
                "'openai/clip-vit-large-patch14' is; describe another one with text_config"
            )
        config = _override("FrozenCLIPEmbedder", CLIP_L, text_config)
        n_positions = config["max_position_embeddings"]
        super().__init__(
            max_length, n_positions, config["hidden_size"], config["num_attention_heads"]
        )
        if config["hidden_act"] not in ACTIVATIONS:
            raise InputError(
                f"FrozenCLIPEmbedder: hidden_act {shown(config['hidden_act'])}: choose from "
                f"{', '.join(ACTIVATIONS)}"
            )
        if layer not in ("last", "pooled", "hidden"):
            raise InputError(f"FrozenCLIPEmbedder: layer {layer!r} is not last, pooled or hidden")
        n_layers = config["num_hidden_layers"]
        if layer == "hidden" and (layer_idx is None or abs(layer_idx) > n_layers):
            raise InputError(
                f"FrozenCLIPEmbedder: layer 'hidden' needs layer_idx in -{n_layers} .. {n_layers}, "
                f"not {layer_idx}"
            )
        self.layer, self.n_layers = layer, n_layers
        if layer == "hidden":
            assert layer_idx is not None
            self.n_skipped = -1 - layer_idx if layer_idx < 0 else n_layers - layer_idx
        tower = ClipText(config)
        self.transformer = nn.ModuleDict({"text_model": tower})  # state-dict names
        if freeze:
            self.eval().requires_grad_(False)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of vectors, one for each token id."""
        tower: Any = self.transformer["text_model"]
        return tower.embeddings["token_embedding"]

    def encode_tokens(self, ids: Tensor, n_more: int = 0) -> Tensor:
        """Encode token ids, (B, L), to embeddings, (B, L, C); C = hidden_size.

        As upstream, there is no padding mask: the padding is part of what the model was trained on.
        """
        embeddings = self.transformer["text_model"](ids, self.n_skipped + n_more)
        if self.layer != "pooled":
            return embeddings
        ends = (ids == END_ID).int().argmax(dim=1)
        return embeddings[torch.arange(len(ids)), ends][:, None]


class FrozenOpenCLIPEmbedder(TextEncoder):
    """The text encoder of Stable Diffusion 2: the text half of an open_clip model.

    Args:
        arch: only "ViT-H-14" is built in.
        version: no effect: the weights come with the checkpoint.
        device: no effect: the encoder runs where its weights are.
        max_length: tokens of a prompt, L.
        freeze: the parameters need no gradient.
        layer: "last", or "penultimate", which leaves out the last block. The final normalisation
            follows in either case.
        text_config: entries that differ from ViT-H-14's, in the names of open_clip's ``text_cfg``,
            and ``embed_dim``.

    Raises:
        InputError: an argument has a value that is not supported.
    """

    padding_id = 0

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        text_config: Mapping[str, Any] | None = None,
    ) -> None:
        if arch != "ViT-H-14":
            raise InputError(
                f"FrozenOpenCLIPEmbedder: arch {arch!r} is not built in, only 'ViT-H-14' is; "
                "describe another one with text_config"
            )
        if layer not in ("last", "penultimate"):
            raise InputError(f"FrozenOpenCLIPEmbedder: layer {layer!r} is not last or penultimate")
        config = _override("FrozenOpenCLIPEmbedder", OPENCLIP_H, text_config)
        super().__init__(max_length, config["context_length"], config["width"], config["heads"])
        self.n_layers, self.n_skipped = config["layers"], int(layer == "penultimate")
        self.model = OpenClipText(config)
        if freeze:
            self.eval().requires_grad_(False)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of vectors, one for each token id."""
        return self.model.token_embedding

    def encode_tokens(self, ids: Tensor, n_more: int = 0) -> Tensor:
        """Encode token ids, (B, L), to embeddings, (B, L, C); C = width."""
        return self.model(ids, self.n_skipped + n_more)


def _override(
    owner: str, defaults: Mapping[str, Any], changes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The defaults with the changes made; an entry that has no default is refused by name."""
    changes = changes or {}
    if unknown := sorted(set(changes) - set(defaults)):
        raise InputError(
            f"{owner}: text_config has no {unknown[0]!r}; it has {', '.join(defaults)}"
        )
    return {**defaults, **changes}
