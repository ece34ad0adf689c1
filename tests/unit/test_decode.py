"""Images and captions as users have them: good ones are read correctly, bad ones refused by kind and at low cost."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from stepdistill.data.decode import BadSample, cover, decode_image, read_caption, upright_size

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8)


def colours(height=48, width=64):
    """A smooth RGB image with a different colour in every corner."""
    down, across = np.mgrid[0:height, 0:width]
    parts = [across * 255 / (width - 1), down * 255 / (height - 1), 255 - across * 255 / (width - 1)]
    return Image.fromarray(np.stack(parts, axis=-1).round().astype(np.uint8))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decoded(content, *, max_pixels=2**26, min_side=16):
    return decode_image(content, max_pixels=max_pixels, min_side=min_side)


def pixels(content):
    image = decoded(content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refused(content, **options):
    with pytest.raises(BadSample) as error:
        decoded(content, **options)
    assert str(error.value)
    return error.value.kind


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour, rows=b""):
    """A PNG written by hand, because Pillow cannot write 16-bit colours or headers without pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_sixteen_bit_gray_is_scaled_to_eight_and_not_clipped():
    deep = (np.tile(RAMP, (32, 1)).astype(np.uint16) * 257).astype(np.uint16)
    result = pixels(saved(Image.fromarray(deep)))
    assert np.array_equal(result, np.repeat(np.tile(RAMP, (32, 1))[..., None], 3, axis=2))


def test_sixteen_bit_colours_are_scaled_to_eight():
    deep = np.asarray(colours()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    assert np.abs(pixels(png(64, 48, 16, 2, rows)) - np.asarray(colours()).astype(int)).max() <= 1


def test_a_cmyk_jpeg_looks_like_the_image_that_it_was_made_from():
    result = pixels(saved(colours().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(result - np.asarray(colours()).astype(int)).mean() < 8


def test_transparent_images_are_composited_over_white():
    is_left = np.arange(64) < 32
    for mode in ("RGBA", "LA"):
        image = Image.new("RGB", (64, 48), (90, 90, 90)).convert(mode)
        image.putalpha(Image.fromarray(np.tile(np.where(is_left, 0, 128).astype(np.uint8), (48, 1))))
        result = pixels(saved(image))
        assert (result[:, :32] == 255).all(), mode
        assert np.abs(result[:, 32:] - round(90 * 128 / 255 + 127)).max() <= 1, mode
    palette = Image.fromarray(np.tile(is_left.astype(np.uint8), (48, 1)), mode="P")
    palette.putpalette([200, 10, 10, 10, 10, 200])
    result = pixels(saved(palette, transparency=1))
    assert (result[:, :32] == 255).all()
    assert (result[:, 32:] == (200, 10, 10)).all()
    keyed = pixels(saved(Image.new("RGB", (32, 32), (1, 2, 3)), transparency=(1, 2, 3)))
    assert (keyed == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_image_is_rotated_by_its_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = pixels(saved(colours(), exif=exif))
    upright = np.asarray(colours()).astype(int)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1),
        7: np.rot90(upright, -1)[:, ::-1][::-1, ::-1][:, ::-1][:, ::-1],
        8: np.rot90(upright),
    }[orientation]
    assert np.array_equal(result, turned)


def test_broken_exif_does_not_rotate_the_image():
    result = pixels(saved(colours(), exif=b"Exif\0\0no TIFF header at all"))
    assert np.array_equal(result, np.asarray(colours()))


def test_a_colour_profile_is_applied_and_a_broken_one_ignored():
    plain = np.asarray(colours()).astype(int)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(pixels(saved(colours(), icc_profile=srgb)) - plain).max() <= 2
    swapped = red_and_blue_swapped(srgb)
    assert np.abs(pixels(saved(colours(), icc_profile=swapped)) - plain[..., ::-1]).mean() < 4
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for broken in (b"no profile", srgb[:200], swapped[:-1000], lab, b""):
        assert np.array_equal(pixels(saved(colours(), icc_profile=broken)), plain), broken[:10]


def red_and_blue_swapped(profile):
    """The profile with the names of its red and blue primaries exchanged in the tag table."""
    head, count = bytearray(profile), int.from_bytes(profile[128:132], "big")
    names = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    for at in range(132, 132 + 12 * count, 12):
        head[at : at + 4] = names.get(bytes(head[at : at + 4]), head[at : at + 4])
    return bytes(head)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_is_refused_and_one_frame_is_a_image(kind):
    frames = [colours(), colours().transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    assert refused(saved(frames[0], kind, save_all=True, append_images=frames[1:])) == "image_animated"
    assert decoded(saved(frames[0], kind, save_all=True)).size == (64, 48)


def test_the_first_image_of_a_jpeg_with_two_is_read():
    content = saved(colours(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))], quality=95)
    assert np.abs(pixels(content) - np.asarray(colours()).astype(int)).mean() < 8


def test_the_size_limits_of_the_config_apply():
    assert refused(saved(Image.new("RGB", (1, 1)))) == "image_too_small"
    assert refused(saved(Image.new("RGB", (400, 15)))) == "image_too_small"
    assert decoded(saved(Image.new("RGB", (400, 16)))).size == (400, 16)
    assert refused(saved(Image.new("RGB", (100, 101))), max_pixels=10_000) == "image_too_large"
    assert decoded(saved(Image.new("RGB", (100, 100))), max_pixels=10_000).size == (100, 100)


def webp_canvas(width, height):
    """An animated WebP's header with a canvas of that size and one frame of 64 x 48 in it."""
    inner = saved(colours(), "WEBP")[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(6) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little") + bytes(4) + inner
    parts = [
        (b"VP8X", bytes([2, 0, 0, 0]) + sides),
        (b"ANIM", bytes(6)),
        (b"ANMF", frame),
    ]
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in parts
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def test_a_decompression_bomb_is_refused_before_decoding():
    black = saved(Image.new("1", (12000, 12000)))
    bombs = [black, png(12000, 12000, 8, 2), png(2**31 - 1, 2**31 - 1, 16, 6), webp_canvas(16000, 16000)]
    assert len(black) < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [refused(bomb) for bomb in bombs] == ["image_too_large"] * len(bombs)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 2**10
    assert refused(bytes(2**28 + 1)) == "image_too_large"


def test_a_truncated_or_foreign_file_is_unreadable():
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        intact = saved(colours(), kind)
        for share in (0.05, 0.5, 0.9):
            assert refused(intact[: int(share * len(intact))]) == "image_unreadable", (kind, share)
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>'
    for content in (b"", b"\0", noise, b"\x89PNG\r\n\x1a\n" + noise, b"\xff\xd8\xff\xe0" + noise, svg):
        assert refused(content) == "image_unreadable", content[:10]


def test_a_png_with_any_bit_flipped_is_unreadable():
    generator = np.random.default_rng(0)
    intact = saved(Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    for place in [*range(16), 29, 40, 41, *generator.integers(41, len(intact) - 16, 60)]:
        damaged = bytearray(intact)
        damaged[place] ^= 4
        with pytest.raises(BadSample):
            decoded(bytes(damaged))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_not_opened(kind):
    assert refused(saved(colours(), kind)) == "image_unreadable"


def captioned(content):
    with pytest.raises(BadSample) as error:
        read_caption(content)
    return error.value.kind


def test_zero_width_joiners_are_kept():
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}"
    assert read_caption(f"a {family}\x00 at  home") == f"a {family} at home"


def test_unusable_captions_are_refused_by_kind():
    assert captioned(None) == "caption_missing"
    for empty in (b"", "", b" \t\r\n", "\x00\x01", b"\xef\xbb\xbf", "\u200b"):
        assert captioned(empty) == "caption_empty", empty
    for broken in (b"caf\xe9", b"\xff\xfea\0", "a\ud800", "\udcff"):
        assert captioned(broken) == "caption_not_utf8", broken
    for long in (b"a" * (2**17 + 1), "a" * (2**17 + 1), "ä" * (2**16 + 1)):
        assert captioned(long) == "caption_too_long"


def test_a_caption_is_one_line_without_control_characters():
    assert read_caption(b"\xef\xbb\xbfa red wall\r\n") == "a red wall"
    assert read_caption("a\tred\n\nwall\x00\x1b[31m\x85") == "a red wall [31m"
    assert read_caption("eine grüne Tür, 緑のドア") == "eine grüne Tür, 緑のドア"
    words = [f"word{k}" for k in range(10_000)]
    assert read_caption("\n".join(words).encode()) == " ".join(words)


def test_cover_crops_the_centre_and_returns_the_offsets():
    wide = colours(40, 100)
    cut, corner = cover(wide, (40, 60))
    assert corner == (0, 20)
    assert np.array_equal(cut, np.asarray(wide)[:, 20:80])
    cut, corner = cover(colours(90, 30), (20, 30))
    assert (cut.shape, corner) == ((20, 30, 3), (35, 0))
    for size in ((16, 24), (24, 16), (50, 50), (128, 64)):
        image = colours(37, 91)
        cut, (top, left) = cover(image, size)
        assert (cut.shape, cut.dtype) == ((*size, 3), np.uint8)
        scale = max(size[0] / 37, size[1] / 91)
        resized = image.resize((round(91 * scale), round(37 * scale)), Image.Resampling.LANCZOS)
        beside = np.asarray(resized)[top : top + size[0], left : left + size[1]]
        assert (top, left) == ((resized.height - size[0]) // 2, (resized.width - size[1]) // 2)
        assert np.abs(cut.astype(int) - beside).max() <= 2, size


def test_cover_of_a_very_long_image_needs_little_memory():
    long = Image.new("RGB", (400_000, 16), (10, 200, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cut, (top, left) = cover(long, (256, 256))
    assert (top, left) == (0, (400_000 * 16 - 256) // 2)
    assert (cut == (10, 200, 30)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 2**10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_read_from_the_header_is_that_of_the_decoded_image(kind, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    content = saved(colours(height=48, width=64), kind, exif=exif)
    image = decoded(content)
    assert upright_size(content, max_pixels=2**26, min_side=16) == (image.height, image.width)
    assert (image.height > image.width) == (orientation in (6, 8))


@pytest.mark.parametrize(
    ("content", "options", "kind"),
    [
        (b"no image", {}, "image_unreadable"),
        (b"", {}, "image_unreadable"),
        (saved(Image.new("L", (9000, 9000))), {}, "image_too_large"),
        (saved(Image.new("RGB", (20, 20))), {"min_side": 32}, "image_too_small"),
    ],
)
def test_files_that_are_not_a_image_or_have_a_wrong_size_are_refused_from_the_header(content, options, kind):
    with pytest.raises(BadSample) as caught:
        upright_size(content, **{"max_pixels": 2**26, "min_side": 16} | options)
    assert caught.value.kind == kind
