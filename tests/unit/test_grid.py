"""The grid of images and its headings."""

from PIL import Image

from stepdistill.images.image_grid import image_grid


def solid(color):
    return Image.new("RGB", (32, 32), color)


def test_headings_are_above_their_columns_and_only_move_the_tiles_down():
    rows = {"teacher": [solid("red"), solid("green")], "ours": [solid("blue"), solid("white")]}
    plain = image_grid(rows)
    headed = image_grid(rows, headings=["a red letter a on white", "b"])
    added = headed.height - plain.height
    assert headed.width == plain.width
    assert added >= 2 * 11  # the first heading is wider than its tile of 64 pixels
    assert headed.crop((0, added, *headed.size)).tobytes() == plain.tobytes()
    ink = [x for x in range(headed.width) for y in range(added) if headed.getpixel((x, y)) != (255, 255, 255)]
    first = next(x for x in range(plain.width) if plain.getpixel((x, 40)) == (255, 0, 0))
    assert first - 2 <= min(ink) <= first + 8
    assert max(ink) > first + 64  # the second heading
