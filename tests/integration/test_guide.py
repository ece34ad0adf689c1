"""Every command and every snippet in docs/guide.md runs, on a tiny stand-in for the model that the guide names."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from eval.random_teacher import build
from stepdistill.export.rung import export_rung
from stepdistill.models.network.kind import load_network
from tests.integration.exported import rung_of
from tests.integration.launched import ended
from tests.original_layout import original_state

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def shortened(path):
    """The text of the config that the guide names, with the updates, images and precision of a test."""
    config = yaml.safe_load(path.read_text())
    for phase in (phase for rung in config["ladder"] for phase in rung["phases"]):
        phase["max_train_steps"] = 1
    config["training"] |= {"train_batch_size": 2, "gradient_accumulation_steps": 1, "mixed_precision": "no"}
    config["data"]["teacher_steps"] = 2
    config["preview"] = {"prompts": ["a thing"], "looks_images": 0}
    config["evaluation"] = {
        "num_images": 8,
        "teacher_steps": [2],
        "features": "reader",
        "resize": "torchmetrics",
        "diversity_prompts": 0,
        "lora_scales": [],
        "matrix": False,
        "cost_batch_sizes": [],
        "floor": False,
    }
    return config


@pytest.fixture
def readers_folder(tmp_path):
    """A folder with what a reader of the guide has: a float16 checkpoint, a pipeline of its family, a fine-tuned one,
    images and the configs."""
    pipeline = build("sd15", tiny=True).to(torch.float16)
    save_file(original_state(pipeline), tmp_path / "my-model.safetensors")
    pipeline.save_pretrained(tmp_path / "stable-diffusion-v1-5", safe_serialization=True)
    unet = load_network(tmp_path / "stable-diffusion-v1-5")
    for parameter in unet.parameters():
        parameter.data *= 1.01
    unet.save_pretrained(tmp_path / "tuned")
    (tmp_path / "pictures").mkdir()
    for k in range(10):
        pixels = np.random.default_rng(k).integers(0, 255, (256, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{k}.png")
        (tmp_path / "pictures" / f"{k}.txt").write_text(f"an image number {k}")
    (tmp_path / "configs").mkdir()
    config = shortened(ROOT / "configs" / "sd15.yaml")
    (tmp_path / "configs" / "sd15.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.slow
def test_every_command_and_snippet_of_the_guide_runs(readers_folder, monkeypatch):
    monkeypatch.chdir(readers_folder)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 7
    assert {shlex.split(line)[1] for line in commands if line.startswith("stepdistill")} >= {
        "doctor",
        "run",
        "report",
        "sample",
        "export",
        "extract",
    }
    for line in commands:
        words = shlex.split(line)
        if words[0] == "stepdistill":
            code, errors = ended(("-m",), *words)
        else:
            completed = subprocess.run(words, capture_output=True, text=True, check=False)
            code, errors = completed.returncode, completed.stderr
        assert code == 0, f"{line}\n{errors[-3000:]}"
    (snippet,) = blocks("python")
    strict = "import warnings\nfrom stepdistill.sampling import FewStepWarning\n"
    strict += "warnings.simplefilter('error', FewStepWarning)\n"
    script = f"{strict}{snippet}\nimage.save('snippet.png')\n"
    completed = subprocess.run(
        [sys.executable, "-c", script], cwd=readers_folder, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    folder = readers_folder / "runs/my-model/rungs/4"
    (card,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    script = f"{card}\nimage.save('card.png')\n"
    completed = subprocess.run(
        [sys.executable, "-c", script], cwd=readers_folder, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    for name in ("bicycle.png", "snippet.png", "card.png"):
        with Image.open(readers_folder / name) as image:
            assert image.size == Image.open(readers_folder / "bicycle.png").size
    assert "license: openrail" in (folder / "README.md").read_text()
    for name in (
        "kohya/my-model_4step_comfyui.json",
        "kohya/my-model_4step_lora.safetensors",
        "fused/unet/config.json",
        "rank16/rung.json",
    ):
        assert (folder / name).is_file(), name
    assert (readers_folder / "extracted/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("page", ["docs/guide.md", "README.md", "card"])
@pytest.mark.slow_after_first
def test_the_drawing_snippets_draw_with_a_float16_teacher(tmp_path, page):
    """diffusers reads a text encoder's dtype from the file and makes the U-Net float32, unless a snippet names one."""
    build("sd15", tiny=True).to(torch.float16).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    config, teacher, _ = rung_of(tmp_path, "sd15")
    folder = export_rung(config, 4)
    text = ((folder / "README.md") if page == "card" else ROOT / page).read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for path, replacement in (
        ('"runs/my-model/teacher"', repr(str(teacher))),
        ('embedded_folder("teacher")', repr(str(teacher))),
        ("runs/my-model/rungs/4", folder.as_posix()),
        ("runs/letters/rungs/4", folder.as_posix()),
    ):
        lines = lines.replace(path, replacement)
    names: dict = {}
    exec(lines, names)
    assert names["image"].size == (64, 64)
    assert names["pipeline"].get_active_adapters()


def test_files_that_the_guide_links_to_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", GUIDE) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_guides_tables_are_the_committed_results():
    tables = dict(re.findall(r"<!-- table: (\S+) -->\n(.*?)\n?<!-- end -->", GUIDE, flags=re.DOTALL))
    assert sorted(tables) == ["eval/results/full_size.md", "eval/results/wrong_sampler.md"]
    assert all(table.strip() == (ROOT / path).read_text().strip() for path, table in tables.items())
