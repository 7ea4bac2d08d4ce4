"""Damaged pictures, masks and settings in pictures."""

import io
import json
from collections import Counter

import numpy as np
from PIL import Image, PngImagePlugin

from ldm import images
from ldm.cli import options, txt2img
from tests.fuzz.fuzzing import cases, damaged, files_below, json_value, outcome, told, value

MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"]
FORMATS = {
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "AVIF": ["RGB", "RGBA"],
    "GIF": ["RGB", "P"],
    "TIFF": ["RGB", "RGBA", "L", "I;16", "CMYK"],
    "BMP": ["RGB", "L", "1"],
    "JPEG2000": ["RGB", "L"],
}


def picture(chance):
    """The bytes of a picture in some format and mode, with EXIF data and settings inside."""
    kind = chance.choice(list(FORMATS))
    mode = chance.choice(FORMATS[kind])
    height, width = chance.randrange(1, 24), chance.randrange(1, 24)
    pixels = np.frombuffer(chance.randbytes(height * width * 3), np.uint8)
    image = Image.fromarray(pixels.reshape(height, width, 3))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    else:
        image = image.convert(mode)
    extra = {}
    if kind in ("JPEG", "WEBP", "PNG", "AVIF") and chance.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = chance.randrange(12)
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + value(chance).encode("utf-16-be", "ignore")
        extra["exif"] = exif.tobytes()
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        for keyword in ("ldm", "parameters"):
            if chance.random() < 0.5:
                info.add_text(keyword, value(chance).encode("utf-8", "ignore").decode())
        extra["pnginfo"] = info
    file = io.BytesIO()
    image.save(file, kind, **extra)
    return file.getvalue()


def test_a_picture_is_read_or_refused(tmp_path):
    path = tmp_path / "x.png"
    counts = Counter()
    for number, chance in cases(150):
        data = picture(chance)
        path.write_bytes(damaged(data, chance) if chance.random() < 0.8 else data)

        def read():
            assert images.load_rgb(path).shape[2] == 3
            assert images.load_mask(path).ndim == 2
            images.picture_texts(path)

        counts[outcome(read, ("picture", number))] += 1
    told("pictures", counts)
    assert counts["works"]
    assert counts["refused"]
    assert files_below(tmp_path) == [path]


def about(chance):
    """Settings as a picture of ours has them, some of them others."""
    names = ["prompt", "seed", "steps", "sampler", "H", "W", "scale", "eta", "tome", "model"]
    names += ["n_samples", "loras", "negative_prompt", "emphasis", "ckpt", "outdir", "--help"]
    good = {"prompt": "hills", "seed": 7, "steps": 9, "tome": {"ratio": 0.5}, "sampler": "euler"}
    return {**good, **{chance.choice(names): json_value(chance) for _ in range(3)}}


def test_what_a_picture_says_is_data(tmp_path):
    path = tmp_path / "x.png"
    parser = txt2img.build_parser
    counts = Counter()
    for number, chance in cases(150):
        said = json.dumps(about(chance))
        if chance.random() < 0.2:
            said = damaged(said.encode(), chance).decode("utf-8", "ignore")
        web_ui = f"{value(chance)}\nSteps: {value(chance)}, Sampler: Euler a, Seed: {value(chance)}"
        texts = {"ldm": said} if number % 2 else {"parameters": web_ui}
        texts = {key: text.encode("utf-8", "ignore").decode() for key, text in texts.items()}
        images.save_image(np.zeros((4, 4, 3), np.uint8), path, texts)

        def read():
            args = options.parse(parser(), ["--from_picture", str(path)])
            assert (args.ckpt, args.outdir) == (None, "outputs/txt2img-samples")
            options.settings(args)
            _ = options.wishes(args).tome

        counts[outcome(read, ("settings", number, texts))] += 1
    told("settings in pictures", counts)
    assert counts["works"]
    assert counts["refused"]
