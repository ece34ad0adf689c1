"""Decodes one image or caption from untrusted bytes: returns a usable one, or raises BadSample with its kind.

Images are turned upright by EXIF, converted to sRGB by their colour profile and to 8 bit; transparency is laid over white.
"""

import io
import unicodedata
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from stepdistill.config.data import Kind
from stepdistill.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_ANIMATED = ("PNG", "WEBP")
"""Formats whose further frames make an animation. JPEG is not one: a camera may add a depth map or another exposure."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
_ORIENTATION_IN_PNG = (b"eXIf", b"Raw profile type", b"adobe.xmp")
MAX_IMAGE_BYTES = 2**28
"""Largest file that is read as an image."""
MAX_CAPTION_BYTES = 2**17


class BadSample(DataError):
    """A sample that cannot be trained on; `kind` classifies what is wrong with it, the message describes it."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


def decode_image(content: bytes, *, max_pixels: int, min_side: int) -> Image.Image:
    """The RGB image in `content`; BadSample for one that is broken, animated, too large or too small.

    Size and format are checked before any pixel is decoded, so a decompression bomb costs nothing.
    """
    if len(content) > MAX_IMAGE_BYTES:
        raise BadSample("image_too_large", f"{len(content):,} bytes; allowed: up to {MAX_IMAGE_BYTES:,}")
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
        except UnidentifiedImageError:  # Pillow's message holds a memory address, which differs per run
            raise BadSample("image_unreadable", f"not an image; allowed: {', '.join(FORMATS)}") from None
        except Exception as error:  # Pillow's decoders raise many types of errors for broken files
            raise BadSample("image_unreadable", f"{type(error).__name__}: {error}") from None


def upright_size(content: bytes, *, max_pixels: int, min_side: int) -> tuple[int, int]:
    """(height, width) of the upright image in `content`, from its header alone.

    BadSample if the header cannot be read, or the image is too large or too small.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in decode_image
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image.size, max_pixels=max_pixels, min_side=min_side)
                width, height = image.size
                return (width, height) if _lies_on_its_side(image, content) else (height, width)
        except BadSample:
            raise
        except Exception as error:  # as in decode_image
            raise BadSample("image_unreadable", f"{type(error).__name__}: {error}") from None


def _lies_on_its_side(image: Image.Image, content: bytes) -> bool:
    """Whether the EXIF orientation swaps height and width.

    Pillow decodes the whole PNG to look for EXIF, so a PNG without an EXIF marker is skipped.
    """
    if image.format == "PNG" and not any(mark in content for mark in _ORIENTATION_IN_PNG):
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except Exception:  # an image with broken EXIF is still usable
        return False


def read_caption(content: bytes | str | None) -> str:
    """The caption as one line of text; BadSample if it is missing, empty, not UTF-8 or longer than 128 KiB."""
    if content is None:
        raise BadSample("caption_missing", "no caption")
    try:  # JSON may hold lone surrogates, which cannot be encoded
        encoded = content if isinstance(content, bytes) else content.encode()
        if len(encoded) > MAX_CAPTION_BYTES:
            raise BadSample(
                "caption_too_long", f"{len(encoded):,} bytes; allowed: up to {MAX_CAPTION_BYTES:,}"
            )
        text = encoded.decode("utf-8-sig")
    except UnicodeError as error:
        raise BadSample("caption_not_utf8", str(error)) from None
    caption = " ".join("".join(c if _is_text(c) else " " for c in text).split())
    if not any(c.isprintable() and not c.isspace() for c in caption):
        raise BadSample("caption_empty", "an empty caption")
    return caption


def _is_text(character: str) -> bool:
    """Whether a character is printable, or a format character that joins others, as in Persian words and in emoji."""
    return character.isprintable() or unicodedata.category(character) == "Cf"


def cover(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """The image resized by Lanczos until it covers `size` (H, W), then centre-cropped: uint8 (H, W, 3), and the crop's
    (top, left) in pixels of the resized image, for SDXL's time ids."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    whole = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    if whole == image.size:
        return np.asarray(image.crop((left, top, left + width, top + height))), (top, left)
    across, down = image.width / whole[0], image.height / whole[1]
    # Only the crop is resized: resizing the whole of a 4 million x 16 image would fill the memory.
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)), (top, left)


def _check_sums(content: bytes) -> None:
    """Verifies the checksum of every PNG chunk; Pillow decodes damaged pixels without checking them."""
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
            f"{width} x {height}; allowed: at least {min_side} pixels per side (data.min_side)",
        )


def _in_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    turned = _upright(image)
    if turned.mode.startswith("I"):  # 16 bit in one channel; Pillow's conversion would clip at 255
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
    except Exception:  # an image with broken EXIF is still usable
        return image


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image as RGB, converted to sRGB by its embedded colour profile if that is usable."""
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
