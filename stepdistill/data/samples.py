"""One picture and one caption from bytes that nobody vouches for: a right sample, or BadSample with its kind.

Pictures: upright by EXIF, sRGB where a colour profile says otherwise, transparency over white, 16 bit scaled to 8.
"""

import io
import unicodedata
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from stepdistill.config.data import Kind

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_ANIMATED = ("PNG", "WEBP")
"""A JPEG's further pictures are its maker's: a depth map, another exposure."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF's orientations that are a quarter turn away."""
_ORIENTATION_IN_PNG = (b"eXIf", b"Raw profile type", b"adobe.xmp")
MOST_BYTES = 2**28
"""Of one file; a larger one is no picture of a training set."""
MOST_CAPTION_BYTES = 2**17


class BadSample(ValueError):
    """A sample that cannot be trained on: its kind, and what is wrong with it."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


def decode_image(content: bytes, *, max_pixels: int, min_side: int) -> Image.Image:
    """The RGB picture in `content`; BadSample for one that is broken, animated, too large or too small.

    Size and format are looked at before any pixel is decoded, so a bomb costs nothing.
    """
    if len(content) > MOST_BYTES:
        raise BadSample("image_too_large", f"{len(content):,} bytes; allowed: up to {MOST_BYTES:,}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's bomb warning: the size is checked here
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image.size, max_pixels=max_pixels, min_side=min_side)
                if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
                    raise BadSample("image_animated", f"{getattr(image, 'n_frames', 1)} frames; allowed: one")
                if image.format == "PNG":
                    _check_sums(content)
                image.load()
                return _in_rgb(image)
        except BadSample:
            raise
        except Image.DecompressionBombError as error:
            raise BadSample("image_too_large", str(error)) from None
        except UnidentifiedImageError:  # whose message differs from run to run: it holds an address
            raise BadSample("image_unreadable", f"no picture; allowed: {', '.join(FORMATS)}") from None
        except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
            raise BadSample("image_unreadable", f"{type(error).__name__}: {error}") from None


def picture_size(content: bytes, *, max_pixels: int, min_side: int) -> tuple[int, int]:
    """(height, width) of the upright picture in `content`, from its header alone; BadSample where decode_image has one for
    what a header tells."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in decode_image
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image.size, max_pixels=max_pixels, min_side=min_side)
                width, height = image.size
                return (width, height) if _lies_on_its_side(image, content) else (height, width)
        except BadSample:
            raise
        except Exception as error:  # whatever a broken file leads to
            raise BadSample("image_unreadable", f"{type(error).__name__}: {error}") from None


def _lies_on_its_side(image: Image.Image, content: bytes) -> bool:
    """Whether EXIF's orientation swaps height and width. Pillow decodes a PNG to look for it: only one that has it."""
    if image.format == "PNG" and not any(mark in content for mark in _ORIENTATION_IN_PNG):
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except Exception:  # EXIF that is none makes the picture no worse
        return False


def read_caption(content: bytes | str | None) -> str:
    """A caption in one line; BadSample where there is none, or it is empty, not UTF-8 or over 128 KiB."""
    if content is None:
        raise BadSample("caption_missing", "no caption")
    try:  # a lone surrogate out of JSON is no text
        encoded = content if isinstance(content, bytes) else content.encode()
        if len(encoded) > MOST_CAPTION_BYTES:
            raise BadSample(
                "caption_too_long", f"{len(encoded):,} bytes; allowed: up to {MOST_CAPTION_BYTES:,}"
            )
        text = encoded.decode("utf-8-sig")
    except UnicodeError as error:
        raise BadSample("caption_not_utf8", str(error)) from None
    caption = " ".join("".join(c if _is_text(c) else " " for c in text).split())
    if not any(c.isprintable() and not c.isspace() for c in caption):
        raise BadSample("caption_empty", "an empty caption")
    return caption


def _is_text(character: str) -> bool:
    """Printable, or what joins others into one sign or word, as in Persian and in emoji."""
    return character.isprintable() or unicodedata.category(character) == "Cf"


def cover(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 (H, W, 3) of the size (H, W): the picture resized by Lanczos until it covers that, its middle cut out; and where
    the cut begins, (top, left), in pixels of the resized picture, for SDXL's time ids."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    whole = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    if whole == image.size:
        return np.asarray(image.crop((left, top, left + width, top + height))), (top, left)
    across, down = image.width / whole[0], image.height / whole[1]
    # Only the cut is resized: a picture of 4 million x 16 pixels would fill the memory.
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)), (top, left)


def _check_sums(content: bytes) -> None:
    """Of every part of a PNG: Pillow decodes without them what a flipped bit makes of the pixels."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        image.verify()


def _check_size(size: tuple[int, int], *, max_pixels: int, min_side: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadSample(
            "image_too_large", f"{width} x {height}; allowed: up to {max_pixels:,} pixels (data.max_pixels)"
        )
    if min(size) < min_side:
        raise BadSample(
            "image_too_small",
            f"{width} x {height}; allowed: {min_side} pixels a side at least (data.min_side)",
        )


def _in_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    turned = _upright(image)
    if turned.mode.startswith("I"):  # 16 bit in one channel; Pillow's own conversion clips at 255
        gray = np.asarray(turned).astype(np.float64) / 257
        return Image.fromarray(gray.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in turned.info or turned.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        over = turned.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return _in_srgb(turned, profile)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that is none makes the picture no worse
        return image


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """By the picture's own colour profile where it has a usable one."""
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
