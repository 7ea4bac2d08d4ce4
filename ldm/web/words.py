"""What the page says about each preset: what it does, and when to take it."""

from __future__ import annotations

import re

from ldm.config import preset_file, preset_names

PRESETS = {
    "none": "Nothing is merged, unless you move the ratio.",
    "quality": "Keeps 1/4 of the keys and values. Closest to the unmerged picture; start here.",
    "balanced": "Keeps 1/16 of the keys and values. For 768 pixels and more.",
    "fast": "Keeps 1/16, also at half resolution. The fastest; for drafts and very large pictures.",
    "appendix_f": "The ToMe paper's draft: merges around whole blocks. To compare with the paper.",
    "birch_kth": "Keeps one key and value in four, from 4096 tokens on. Published for Macs.",
    "birch_schedule": "Keeps 1024 to 2047 tokens of any size. Published for very large pictures.",
    "ca_tome": "Merges all pairs that are similar enough, however many. Published.",
    "comfy_q": "Merges queries only, as a node of ComfyUI does. To compare with it.",
    "hypertile": "Attention inside tiles; nothing is merged. Published for large pictures.",
    "ibtm": "Destinations where guidance changed most in the step before. Published.",
    "kv_cap": "At most so many keys and values, by random matching. For 4k pictures.",
    "kv_full_keys": "As birch_kth, matched by whole keys. Slower, perhaps more accurate.",
    "lalalune_r2048": "2048 keys and values less in every block. A published experiment.",
    "sito": "Prunes tokens most like a base token of their cell. Published; slow to match.",
    "todo": "Keys and values of every second row and column (ToDo). Published; no matching.",
    "todo_large": "ToDo with wider strides for 1536 pixels and more.",
    "tofu": "tomesd's matching, with means that keep their length. Published.",
    "toma": "Destinations cover each tile best; merging by matrices. Published for GPUs.",
    "tomesd": "The published tomesd: half of the tokens in 2x2 cells. To compare with it.",
    "trim_context": "Merges nothing; drops the prompt's padding, which changes the picture.",
}


def line_of(preset: str) -> str:
    """A line about a preset; of one that has none here, the first sentence of its file."""
    if preset in PRESETS or preset not in preset_names():
        return PRESETS.get(preset, "")
    comment = re.match(r"(?:#.*\n)+", preset_file(preset).read_text(encoding="utf-8"))
    words = " ".join((comment[0] if comment else "").replace("#", " ").split())
    return words.partition(". ")[0]
