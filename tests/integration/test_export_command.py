"""`stepdistill export` and `extract` as a user runs them: every format, lower ranks, refused exports, a full disk."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from stepdistill.models.lora_file import read_lora
from stepdistill.models.network.kind import load_network
from stepdistill.sampling import load_few_step
from tests.integration.exported import rung_of, update_rung_json


def stepdistill(*arguments, **options):
    command = [sys.executable, "-m", "stepdistill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Every test runs the command in a new process, which takes several seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, teacher) of a run of which only the 4-step rung is finished."""
    config, teacher, _ = rung_of(tmp_path_factory.mktemp("export"), "sd15", "name=mine")
    return config, teacher


def test_a_run_is_exported_in_every_format_by_one_command(run):
    config, _ = run
    completed = stepdistill(
        "export", config.run_dir, "--steps", "4", "--format", "diffusers,kohya,fused", "export.license=mit"
    )
    assert completed.returncode == 0, completed.stderr
    folder = config.run_dir / "rungs" / "4"
    files = files_of(folder)
    assert [name for name in files if name.startswith("kohya")] == [
        "kohya/mine_4step_comfyui.json",
        "kohya/mine_4step_lora.safetensors",
    ]
    assert {"README.md", "base.json", "rung.json", "scheduler/scheduler_config.json"} < set(files)
    assert "fused/unet/diffusion_pytorch_model.safetensors" in files
    half = UNet2DConditionModel.from_pretrained(folder / "fused" / "unet", dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["license"], card["library_name"], card["pipeline_tag"]) == (
        "mit",
        "diffusers",
        "text-to-image",
    )
    assert "base_model" not in card  # a folder is not a repository
    assert "kohya/mine_4step_lora.safetensors" in (folder / "README.md").read_text()


def test_a_lower_rank_is_exported_into_a_separate_folder_that_loads(run):
    config, teacher = run
    completed = stepdistill("export", config.run_dir, "--steps", "4", "--rank", "2", "export.dtype=float32")
    assert completed.returncode == 0, completed.stderr
    assert "rank 2 keeps" in completed.stderr
    folder = config.run_dir / "rungs" / "4" / "rank2"
    assert {layer.rank for layer in read_lora(folder).layers.values()} == {2}
    assert json.loads((folder / "rung.json").read_text())["lora_rank"] == 2
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    assert load_few_step(pipeline, folder).lora_rank == 2
    assert load_few_step(pipeline, folder / "kohya" / "mine_4step_rank2_lora.safetensors").lora_rank == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "3"], "--steps: got 3; allowed: 8, 4, 2, 1"),
        (["--steps", "2"], "no finished 2-step rung"),
        (["--format", "gguf"], "export.formats.0: got 'gguf'"),
        (["--steps", "4", "--rank", "4"], "export.rank: got 4; allowed: below 4"),
        (["--rank", "99", "--dry-run"], "export.rank: got 99; allowed: below lora.rank"),
        (["--push", "me/mine"], "a repository holds one LoRA"),
        (["--steps", "4", "--push", "no/such/name"], "--push: got no/such/name"),
    ],
)
def test_an_impossible_export_is_refused_in_one_line(run, arguments, says):
    config, _ = run
    completed = stepdistill("export", config.run_dir, *arguments, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert completed.returncode == 2
    assert says in completed.stderr.strip().splitlines()[-1]


def test_a_full_disk_leaves_no_half_a_file(tmp_path):
    config, _, _ = rung_of(tmp_path, "sd15", "name=mine")
    folder = config.run_dir / "rungs" / "4"

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    completed = stepdistill("export", config.run_dir, "--steps", "4", preexec_fn=little_room)
    assert completed.returncode == 2
    last = completed.stderr.strip().splitlines()[-1]
    assert last.startswith("stepdistill: cannot write ")
    assert "make room there, then the same command" in last
    assert not list((folder / "kohya").glob("*"))
    assert stepdistill("export", config.run_dir, "--steps", "4").returncode == 0
    assert len(list((folder / "kohya").glob("*"))) == 2


def test_a_lora_is_extracted_from_a_fully_fine_tuned_unet(run, tmp_path):
    config, teacher = run
    lora = read_lora(config.run_dir / "rungs" / "4" / "pytorch_lora_weights.safetensors")
    tuned = load_network(teacher)
    for name, layer in lora.layers.items():
        tuned.get_submodule(name).weight.data += layer.delta()
    tuned.save_pretrained(tmp_path / "tuned")
    completed = stepdistill(
        "extract", teacher, tmp_path / "tuned", "--rank", "4", "--output", tmp_path / "extracted"
    )
    assert completed.returncode == 0, completed.stderr
    assert "rank 4 keeps 100.00 % of the change" in completed.stderr
    extracted = read_lora(tmp_path / "extracted")
    assert extracted.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        assert torch.allclose(extracted.layers[name].delta(), layer.delta(), atol=1e-5)
    DiffusionPipeline.from_pretrained(teacher).load_lora_weights(tmp_path / "extracted")
    same = stepdistill("extract", teacher, teacher, "--rank", "4", "--output", tmp_path / "none")
    assert same.returncode == 2
    assert "nothing to extract" in same.stderr
    assert not (tmp_path / "none").exists()


def test_a_quantised_base_is_not_merged_into(tmp_path):
    config, teacher, _ = rung_of(tmp_path, "sd15", "export.formats=[fused]")
    path = teacher / "unet" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(
        json.dumps(raw | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    completed = stepdistill("export", config.run_dir, "--steps", "4")
    assert completed.returncode == 2
    assert "quantised weights in unet; allowed: floating-point weights" in completed.stderr
    assert not (config.run_dir / "rungs" / "4" / "fused").exists()


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path):
    config, _, _ = rung_of(tmp_path, "sd15")
    path = config.run_dir / "rungs" / "4" / "pytorch_lora_weights.safetensors"
    from safetensors.torch import save_file

    state = load_file(path)
    next(iter(state.values())).view(-1)[0] = 1e6
    save_file(state, path, metadata={"format": "pt"})
    update_rung_json(path.parent)
    completed = stepdistill("export", config.run_dir, "--steps", "4")
    assert completed.returncode == 2
    assert "does not fit into torch.float16; allowed: export.dtype=float32" in completed.stderr
