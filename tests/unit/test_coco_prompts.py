"""eval/coco_prompts.py: a fixed subset of COCO, and errors in one line."""

import json

from PIL import Image

from eval.coco_prompts import main, subset

ANNOTATIONS = {
    "images": [{"id": n, "file_name": f"{n:03d}.jpg"} for n in range(6)],
    "annotations": [
        {"id": 10 * n + k, "image_id": n, "caption": f"image {n}\n caption {k} "}
        for n in range(5)
        for k in (3, 1)
    ],
}


def test_the_subset_has_a_fixed_order_and_each_images_caption_of_the_lowest_id():
    chosen = subset(ANNOTATIONS, num_images=5, seed=0)
    assert sorted(chosen) == [(f"{n:03d}.jpg", f"image {n} caption 1") for n in range(5)]
    assert subset(ANNOTATIONS, num_images=3, seed=0) == chosen[:3]
    assert subset(ANNOTATIONS, num_images=5, seed=1) != chosen


def test_the_command_writes_prompts_and_links_and_its_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "captions.json").write_text(json.dumps(ANNOTATIONS))
    command = [str(tmp_path / "captions.json"), str(tmp_path / "pictures"), "--output", str(tmp_path / "out")]
    assert main([*command, "--num-images", "4"]) == 2
    assert "lacks 4 images" in capsys.readouterr().err
    (tmp_path / "pictures").mkdir()
    for n in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{n:03d}.jpg")
    assert main([*command, "--num-images", "9"]) == 2
    assert "allowed: up to 5" in capsys.readouterr().err
    assert main([*command, "--num-images", "4"]) == 0
    assert len((tmp_path / "out" / "prompts.txt").read_text().splitlines()) == 4
    assert len([p for p in (tmp_path / "out" / "images").iterdir() if p.is_file()]) == 4
