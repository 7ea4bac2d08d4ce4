"""Pictures: reading, sizing, conversion, grids, and files that say how they were made.

A picture is an array (H, W, 3) of uint8; models see (3, H, W), float32 in [-1, 1].
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import (
    Image,
    ImageDraw,
    ImageFont,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
)

from ldm.errors import InputError, is_out_of_memory
from ldm.masks import Mask, painted
from ldm.numbered import Numbers, make_folder
from ldm.text import parse_json
from ldm.util import part_of
from ldm.web_ui import web_ui_text

Pixels = NDArray[np.uint8]
# What is read; not EPS, for one, which is a program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000")
MOST_IN_GRID = 100
LABEL_SIZE = 14  # pixels; of the letters
_EXIF, _USER_COMMENT, _ORIENTATION = 0x8769, 0x9286, 0x0112
logger = logging.getLogger(__name__)


def load_rgb(path: str | Path) -> Pixels:
    """Read a picture, turned as its camera held it, transparent parts over white.

    Returns:
        Pixels, (H, W, 3).

    Raises:
        InputError: the file is missing or is no picture that can be read.
    """
    colours, alpha = _values(path)
    if alpha is not None:
        colours = colours * alpha[..., None] + (1 - alpha[..., None])
    return np.rint(colours * 255).astype(np.uint8)


def load_mask(path: str | Path, tell: bool = True) -> Mask:
    """Read a mask, (H, W): True where to paint; `ldm.masks` says which part of the file that is.

    Args:
        path: of a picture.
        tell: log how much is painted.

    Raises:
        InputError: the file is missing or is no picture that can be read.
    """
    mask, part = painted(*_values(path, is_mask=True))
    if tell:
        share = 100 * float(mask.mean())
        logger.info("The mask %s: %.1f %% is painted, %s", path, share, part)
        if mask.all() or not mask.any():
            much = "everything" if mask.all() else "nothing"
            logger.warning("the mask %s paints %s", path, much)
    return mask


def as_path(name: str, given: object) -> Path:
    """A path, or a refusal.

    Args:
        name: what it is to lead to: picture or mask.
        given: what may be none.

    Raises:
        InputError: it is no path.
    """
    if isinstance(given, str | os.PathLike):
        return Path(given)
    raise InputError(
        f"{name}: must be the path of a file or a numpy array, not {type(given).__name__}; "
        "numpy.asarray makes one of a PIL picture"
    )


def as_mask(mask: str | Path | NDArray[Any]) -> Mask:
    """A mask (H, W), True where to paint: of a file, or of an array of any kind of numbers.

    Raises:
        InputError: it is no picture that can be read, or an array or object of another kind.
    """
    if not isinstance(mask, np.ndarray):
        return load_mask(as_path("mask", mask))
    if mask.ndim == 3 and mask.shape[2] == 1:
        mask = mask[..., 0]
    if mask.ndim == 2 and mask.dtype == np.bool_:
        return mask
    if not (mask.ndim == 2 or (mask.ndim == 3 and mask.shape[2] == 3)) or mask.size == 0:
        raise InputError(f"mask: must be (H, W), not an array of shape {mask.shape}")
    values = mask.astype(np.float32)
    values /= max(1.0, float(values.max()))
    return painted(values if mask.ndim == 3 else np.repeat(values[..., None], 3, axis=2))[0]


def check_shape(mask: Mask, pixels: Pixels) -> None:
    """Refuse a mask that has not the shape of its picture, as far as whole pixels can, at any size.

    Raises:
        InputError: it would lie elsewhere.
    """
    (height, width), (h, w) = pixels.shape[:2], mask.shape
    if abs(height * w - width * h) > max(height, width, h, w):
        raise InputError(
            f"mask: it is {w}x{h}, but the picture is {width}x{height}: make them alike"
        )


def _values(
    path: str | Path, is_mask: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Colours (H, W, 3) of a picture, 0 to 1, and how opaque they are, (H, W), if that is said.

    The 16 bits of a mask are scaled by the largest value that there is.
    """
    image = _open(path)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits a pixel, which PIL would clip
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: not a picture that can be read (values are not numbers)")
        highest = float(values.max())
        if image.mode.startswith("I") and 1 < highest <= 65535 and not is_mask:
            highest = 65535.0
        grey = np.clip(values / max(1.0, highest), 0, 1).astype(np.float32)
        clear = image.info.get("transparency")
        alpha = (values != clear).astype(np.float32) if isinstance(clear, int) else None
        return np.repeat(grey[..., None], 3, axis=2), alpha
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    array = np.asarray(image.convert("RGBA" if has_alpha else "RGB")).astype(np.float32)
    array /= 255
    return array[..., :3], array[..., 3] if has_alpha else None


def _open(path: str | Path) -> Image.Image:
    """A picture whose pixels are read, turned as its camera held it."""
    _regular(path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Path(path).open("rb") as file:
                image: Image.Image = Image.open(file, formats=FORMATS)
                image.load()
                n_told = len(told)
                turn = image.getexif().get(_ORIENTATION, 1)
                if any(re.search("EXIF|Truncated", str(one.message)) for one in told[n_told:]):
                    raise ValueError("its EXIF data are damaged")
                if not isinstance(turn, int) or not 0 <= turn <= 8:
                    raise ValueError(f"its EXIF orientation is {turn}")
                image = ImageOps.exif_transpose(image)
        except Exception as error:  # decoders fail in any way on what was damaged or made up
            if is_out_of_memory(error):
                raise
            raise InputError(f"{path}: not a picture that can be read ({_why(error)})") from None
    return image


def _regular(path: str | Path) -> None:
    """Refuse what is not there, and pipes and devices, which may never end."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a picture that can be read ({_why(error)})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InputError(f"{path}: not a picture that can be read (it is {kind})")


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def picture_texts(path: str | Path) -> dict[str, str]:
    """The texts that a picture carries: PNG's chunks, and the comment in EXIF (JPEG, WebP).

    Raises:
        InputError: the file is missing or is no picture that can be read.
    """
    image = _open(path)
    info = image.info.items()
    texts = {key: value for key, value in info if isinstance(key, str) and isinstance(value, str)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is damaged there, which then says nothing
        try:
            comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
        except Exception:  # as above
            comment = None
    if isinstance(comment, bytes):
        comment = _comment(comment)
    if isinstance(comment, str) and "parameters" not in texts:
        texts["parameters"] = comment
    return texts


def _comment(data: bytes) -> str:
    """An EXIF comment: eight letters that name its encoding, then the text."""
    kind, text = data[:8], data[8:]
    if kind != b"UNICODE\0":
        return (text if kind == b"ASCII\0\0\0" else data).decode("utf-8", "replace").strip("\0 ")
    # the standard leaves the order open, and writers differ; the names of settings are ASCII
    is_little = text[1::2].count(0) > text[::2].count(0)
    return text.decode("utf-16-le" if is_little else "utf-16-be", "replace").strip("\0 \ufeff")


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


def loses_sides(pixels: Pixels, height: int, width: int) -> bool:
    """Whether `fit` crops a picture to a size of another shape, by more than rounding does."""
    own_height, own_width = pixels.shape[:2]
    too_wide = abs(height / own_height * own_width - width)
    too_high = abs(width / own_width * own_height - height)
    return min(too_wide, too_high) >= 8


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
        """Write a PNG whose text chunks say how the picture was made, whole or not at all.

        ``parameters`` is in the form of the web UIs, ``ldm`` is JSON with every setting.

        Raises:
            InputError: the file cannot be written there, or its name is that of another format.
        """
        if Image.registered_extensions().get(Path(path).suffix.lower(), "PNG") != "PNG":
            raise InputError(f"{path}: pictures are always PNG files; let the name end in .png")
        save_image(self.pixels, path, self.texts if with_settings else None)

    def write(self, path: Path, with_settings: bool = True) -> None:
        """Likewise into a file that is given its name later; see `ldm.numbered.Numbers.save`."""
        _write_png(path, self.pixels, self.texts if with_settings else None)

    @property
    def texts(self) -> dict[str, str]:
        """What the file says of how it was made: text chunks by their keywords."""
        about = json.dumps(self.settings, ensure_ascii=False)
        return {"parameters": web_ui_text(self.settings), "ldm": about}


def save_image(pixels: Pixels, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG, whole or not at all; missing folders are made.

    Args:
        pixels: (H, W, 3).
        path: of the file; an existing one is replaced.
        texts: text chunks, keyword -> text.

    Raises:
        InputError: the file cannot be written there.
    """
    make_folder(Path(path).parent)
    with part_of(path) as part:
        _write_png(part, pixels, texts)


def _write_png(path: Path, pixels: Pixels, texts: Mapping[str, str] | None) -> None:
    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    Image.fromarray(pixels).save(path, "PNG", pnginfo=info)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a picture of ours was made with.

    Raises:
        InputError: the file cannot be read, or carries no settings.
    """
    text = picture_texts(path).get("ldm")
    if text is None:
        raise InputError(f"{path}: this picture does not say how it was made")
    return parse_json(text, f"{path}, its settings")


@dataclass
class Gallery:
    """A folder of results: ``samples/00000.png`` and on, and ``grid-0000.png`` with all of a run.

    Attributes:
        folder: made when the first picture is saved.
        n_columns: pictures in a row of the grid.
        has_samples: save single pictures.
        has_grid: save a grid, of a run of at most 100 pictures.
        has_settings: write the settings into the files.
    """

    folder: Path
    n_columns: int = 4
    has_samples: bool = True
    has_grid: bool = True
    has_settings: bool = True
    _shown: list[Picture] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing is looked at before the first picture."""
        self._samples = Numbers(self.folder / "samples", "{:05}.png")
        self._expected: Iterator[int] = iter(())

    def expect(self, places: Iterable[int]) -> None:
        """Say which of the free numbers, counted from 0, the next pictures are to have."""
        first = self._samples.next
        self._expected = (first + place for place in places)

    def add(self, picture: Picture) -> Path | None:
        """Save a picture under the next number; returns where, if single pictures are saved."""
        if self.has_grid:
            self._shown.append(picture)
            if len(self._shown) > MOST_IN_GRID:
                logger.info("There is no grid of more than %d pictures", MOST_IN_GRID)
                self.has_grid = False
                self._shown.clear()
        if not self.has_samples:
            return None
        return self._samples.save(self._writer(picture), next(self._expected, None))

    def close(self) -> None:
        """Save the grid, with the settings of its first picture and how many it shows."""
        if self._shown:
            grid = make_grid([picture.pixels for picture in self._shown], self.n_columns)
            about = {**self._shown[0].settings, "grid": len(self._shown)}
            writer = self._writer(Picture(grid, about))
            Numbers(self.folder, "grid-{:04}.png").save(writer)

    def _writer(self, picture: Picture) -> Callable[[Path], None]:
        return partial(picture.write, with_settings=self.has_settings)


def label(pixels: Pixels, lines: Sequence[str]) -> Pixels:
    """Write lines of text below a picture, (H, W, 3) -> (H + some, W, 3), black on white.

    Args:
        pixels: the picture.
        lines: one below the other; the font shrinks where one is too wide.
    """
    height, width = pixels.shape[:2]
    size = LABEL_SIZE
    while size > 8 and max(map(ImageFont.load_default(size).getlength, lines)) > width - 8:
        size -= 1
    step = round(1.35 * LABEL_SIZE)
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
