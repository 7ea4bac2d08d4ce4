"""Pictures: reading, sizing, conversion, grids, and files that say how they were made.

A picture is an array (H, W, 3) of uint8; models see (3, H, W), float32 in [-1, 1].
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from ldm.errors import InputError
from ldm.settings import SIGMA_SAMPLERS

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
# our names -> the web UIs'
WEB_UI_SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm_solver": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
}
WEB_UI_UPSCALERS = {"latent": "Latent", "lanczos": "Lanczos"}


def load_rgb(path: str | Path) -> Pixels:
    """Read a picture, turned as its camera held it, transparent parts over white.

    Returns:
        Pixels, (H, W, 3).

    Raises:
        InputError: the file is missing or is no picture that can be read.
    """
    image = _open(path)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode.startswith(("I", "F")):  # 16 and 32 bits a pixel, which PIL would clip
        values = np.asarray(image, dtype=np.float64)
        highest = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
        image = Image.fromarray(np.rint(np.clip(values / highest, 0, 1) * 255).astype(np.uint8))
    return np.array(image.convert("RGB"))


def load_mask(path: str | Path) -> Mask:
    """Read a mask, (H, W): True where it is at least half white, which is what gets painted.

    Raises:
        InputError: the file is missing or is no picture that can be read.
    """
    return np.asarray(Image.fromarray(load_rgb(path)).convert("L")) >= 128


def _open(path: str | Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a picture that can be read ({error})") from None


def fit(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize a picture (H, W, 3) so that it covers a size, and crop what sticks out."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels)
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def fit_mask(mask: Mask, height: int, width: int) -> Mask:
    """Likewise for a mask (H, W), which stays two-valued."""
    grey = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    return fit(grey, height, width)[..., 0] >= 128


def to_unit(pixels: Pixels) -> NDArray[np.float32]:
    """Pixels (..., H, W, 3) -> (..., 3, H, W), float32 in [-1, 1]."""
    return np.moveaxis(pixels.astype(np.float32) / 127.5 - 1.0, -1, -3).copy()


def to_pixels(values: ArrayLike) -> Pixels:
    """(..., 3, H, W) in [-1, 1], an array or a tensor on the CPU -> pixels (..., H, W, 3).

    Values beyond the range are clamped. Deviation: upstream truncates to whole numbers, which
    darkens by half a step; here they are rounded.

    Raises:
        ArithmeticError: a value is not a number.
    """
    array = np.moveaxis(np.asarray(values, dtype=np.float32), -3, -1)
    if np.isnan(array).any():
        raise ArithmeticError("the picture has values that are not numbers (NaN)")
    return np.rint((np.clip(array, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def size_for(
    pixels: Pixels, height: int | None, width: int | None, longest: int, step: int = 8
) -> tuple[int, int]:
    """The size at which to work on a picture: its own shape, in whole steps.

    Args:
        pixels: the picture, (H, W, 3).
        height: wanted; with the width left open, that follows from the shape.
        width: wanted; likewise.
        longest: limit of the longer side where nothing is wanted.
        step: sides are multiples of it.

    Returns:
        Height and width in pixels.
    """
    own_height, own_width = pixels.shape[:2]
    if height is not None and width is not None:
        return height, width
    if height is not None:
        factor = height / own_height
    elif width is not None:
        factor = width / own_width
    else:
        factor = min(1.0, longest / max(own_height, own_width))
    scaled = (own_height * factor, own_width * factor)
    rounded = [max(step, round(side / step) * step) for side in scaled]
    return height or rounded[0], width or rounded[1]


def make_grid(pictures: Sequence[Pixels] | Pixels, n_columns: int, padding: int = 2) -> Pixels:
    """Lay pictures out in rows, on black, with a margin around each; a cell fits the largest.

    Args:
        pictures: (H, W, 3) each.
        n_columns: pictures in a row; fewer if there are not so many.
        padding: width of the margin in pixels.
    """
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    n_columns = min(n_columns, len(pictures))
    n_rows = -(-len(pictures) // n_columns)
    cell_h, cell_w = height + padding, width + padding
    grid = np.zeros((n_rows * cell_h + padding, n_columns * cell_w + padding, 3), np.uint8)
    for i, picture in enumerate(pictures):
        top = i // n_columns * cell_h + padding
        left = i % n_columns * cell_w + padding
        grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return grid


def next_path(folder: str | Path, name: str) -> Path:
    """The first free numbered file name: one above the highest number in use.

    Args:
        folder: where; it need not exist.
        name: a pattern such as ``grid-{:04}.png``.
    """
    before, after = re.split(r"{:0\d+}", name)
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    files = Path(folder).iterdir() if Path(folder).is_dir() else ()
    taken = [int(match[1]) for file in files if (match := pattern.fullmatch(file.name))]
    return Path(folder) / name.format(max(taken, default=-1) + 1)


@dataclass(frozen=True)
class Picture:
    """A picture and the settings that made it.

    Attributes:
        pixels: (H, W, 3).
        settings: everything that decided about it; plain values that JSON can hold.
    """

    pixels: Pixels
    settings: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path, with_settings: bool = True) -> None:
        """Write a PNG whose text chunks say how the picture was made.

        ``parameters`` is in the form of the web UIs, ``ldm`` is JSON with every setting.

        Raises:
            InputError: the file cannot be written there.
        """
        texts = {}
        if with_settings:
            texts["parameters"] = web_ui_text(self.settings)
            texts["ldm"] = json.dumps(self.settings, ensure_ascii=False)
        save_image(self.pixels, path, texts)


def web_ui_text(settings: Mapping[str, Any]) -> str:
    """Settings in the form that the web UIs write and read: prompts, then a line of names.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py.
    """
    model = settings.get("model", {})
    tome = settings.get("tome", {})
    loras = settings.get("loras", ())
    named = {
        "Steps": settings.get("steps"),
        "Sampler": WEB_UI_SAMPLERS.get(settings.get("sampler", "")),
        "Schedule type": _schedule_type(settings),
        "CFG scale": settings.get("scale"),
        "Seed": settings.get("seed"),
        "Size": f"{settings['W']}x{settings['H']}" if "W" in settings else None,
        "Model hash": model.get("hash"),
        "Model": model.get("name"),
        "Denoising strength": settings.get("strength", settings.get("hires_strength")),
        "Hires upscale": settings.get("hires_scale"),
        "Hires steps": settings.get("hires_steps"),
        "Hires upscaler": WEB_UI_UPSCALERS.get(settings.get("hires_upscaler", "")),
        "Eta": settings.get("eta") or None,
        "Token merging ratio": tome.get("ratio") or None,
        "Token merging ratio hr": (tome.get("hires") or {}).get("ratio"),
        "Loras": ", ".join(f"{one['name']}:{one['weight']:g}" for one in loras) or None,
        "Embeddings": ", ".join(one["name"] for one in settings.get("embeddings", ())) or None,
    }
    line = ", ".join(
        f"{name}: {_quoted(value)}" for name, value in named.items() if value is not None
    )
    negative = settings.get("negative_prompt")
    return "\n".join(
        [
            settings.get("prompt", ""),
            *([f"Negative prompt: {negative}"] if negative else []),
            line,
        ]
    )


def _schedule_type(settings: Mapping[str, Any]) -> str | None:
    """The name of the steps' spacing, for the samplers that have a choice."""
    has_choice = settings.get("sampler") in SIGMA_SAMPLERS
    return settings["schedule"].capitalize() if has_choice else None


def _quoted(value: object) -> str:
    """A value as text, in JSON's quotes where it holds what separates values."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def save_image(pixels: Pixels, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG, whole or not at all; missing folders are made.

    Args:
        pixels: (H, W, 3).
        path: of the file; an existing one is replaced.
        texts: text chunks, keyword -> text.

    Raises:
        InputError: the file cannot be written there.
    """
    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(temporary, "PNG", pnginfo=info)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a picture of ours was made with.

    Raises:
        InputError: the file cannot be read, or carries no settings.
    """
    text = _open(path).info.get("ldm")
    if text is None:
        raise InputError(f"{path}: this picture does not say how it was made")
    return json.loads(text)


@dataclass
class Gallery:
    """A folder of results: ``samples/00000.png`` and on, and ``grid-0000.png`` with all of a run.

    Attributes:
        folder: made when the first picture is saved.
        n_columns: pictures in a row of the grid.
        has_samples: save single pictures.
        has_grid: save a grid.
        has_settings: write the settings into the files.
        numbers: of the files to come; None: one above the highest in use.
    """

    folder: Path
    n_columns: int = 4
    has_samples: bool = True
    has_grid: bool = True
    has_settings: bool = True
    numbers: Iterator[int] | None = None
    _shown: list[Picture] = field(default_factory=list)

    def add(self, picture: Picture) -> Path | None:
        """Save a picture under the next number; returns where, if single pictures are saved."""
        if self.has_grid:
            self._shown.append(picture)
        if not self.has_samples:
            return None
        path = next_path(self.folder / "samples", "{:05}.png")
        if self.numbers is not None:
            path = path.with_name(f"{next(self.numbers):05}.png")
        picture.save(path, self.has_settings)
        return path

    @property
    def next_number(self) -> int:
        """The number of the next file, if nobody else writes there."""
        return int(next_path(self.folder / "samples", "{:05}.png").stem)

    def close(self) -> None:
        """Save the grid, with the settings of its first picture."""
        if self._shown:
            grid = make_grid([picture.pixels for picture in self._shown], self.n_columns)
            path = next_path(self.folder, "grid-{:04}.png")
            Picture(grid, self._shown[0].settings).save(path, self.has_settings)


def label(pixels: Pixels, lines: Sequence[str], font_size: int = 14) -> Pixels:
    """Write lines of text below a picture, (H, W, 3) -> (H + some, W, 3), black on white.

    Args:
        pixels: the picture.
        lines: one below the other; the font shrinks where one is too wide.
        font_size: in pixels.
    """
    height, width = pixels.shape[:2]
    size = font_size
    while size > 8 and max(map(ImageFont.load_default(size).getlength, lines)) > width - 8:
        size -= 1
    step = round(1.35 * font_size)
    image = Image.new("RGB", (width, height + step * len(lines) + 6), "white")
    image.paste(Image.fromarray(pixels))
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((4, height + 2 + i * step), line, "black", ImageFont.load_default(size))
    return np.array(image)


def encode_png(pixels: Pixels) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def encode_webp(pixels: Pixels, lossless_up_to: int = 256) -> bytes:
    """A picture as the content of a WebP file; exact up to a side, beyond it almost."""
    buffer = io.BytesIO()
    is_small = max(pixels.shape[:2]) <= lossless_up_to
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=is_small, quality=80 if is_small else 95)
    return buffer.getvalue()
