"""load_few_step with files that do not fit: damaged, of another base, of another U-Net, or not a rung."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from eval.random_teacher import build
from stepdistill.sampling import FewStepWarning, load_few_step
from tests.integration.exported import update_rung_json
from tests.integration.few_step import pipeline_of, without_warning


@pytest.mark.slow
def test_another_base_of_equal_shapes_is_warned_of_but_the_same_base_in_half_precision_is_not(rung, tmp_path):
    _, teacher, folder = rung
    other = build("sd15", tiny=True, seed=7)
    with pytest.warns(FewStepWarning, match="trained on another base"):
        load_few_step(other, folder)
    for dtype in (torch.float16, torch.bfloat16):
        without_warning(load_few_step, DiffusionPipeline.from_pretrained(teacher, dtype=dtype), folder)
    tuned = pipeline_of(teacher)
    for parameter in tuned.unet.parameters():
        parameter.data += 0.1 * parameter.data.std().nan_to_num() * torch.randn_like(parameter)
    with pytest.warns(FewStepWarning, match="weights differ"):
        load_few_step(tuned, folder)


def damaged(rung, place, change):
    """A copy of the exported folder with a changed LoRA file, and rung.json adapted to that file."""
    copy = shutil.copytree(rung[2], place / "4")
    path = copy / "pytorch_lora_weights.safetensors"
    change(path)
    update_rung_json(copy)
    return copy


def zeroed(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in load_file(path).items()}
    save_file(state, path, metadata=metadata)


def halved(path):
    state = load_file(path)
    state.pop(next(key for key in state if "lora_A" in key))
    save_file(state, path, metadata={"format": "pt"})


def infinite(path):
    state = load_file(path)
    next(iter(state.values())).view(-1)[3] = float("nan")
    save_file(state, path, metadata={"format": "pt"})


def dora(path):
    state = load_file(path)
    name = next(key for key in state if "lora_A" in key)
    state[name.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(4)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (zeroed, "changes nothing: all its updates are zero"),
        (halved, "holds half of"),
        (infinite, "not finite"),
        (dora, "is a DoRA"),
        (lambda path: shutil.copy(path, path.with_name("other.safetensors")), "holds 2 LoRA files"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(rung, tmp_path, change, says):
    pipeline = pipeline_of(rung[1])
    with pytest.raises(ValueError, match=says):
        load_few_step(pipeline, damaged(rung, tmp_path, change))
    assert not getattr(pipeline.unet, "peft_config", None)


@pytest.mark.parametrize("kind", ["folder", "kohya"])
def test_a_flipped_bit_is_refused(rung, tmp_path, kind):
    copy = shutil.copytree(rung[2], tmp_path / "4")
    path = copy / "pytorch_lora_weights.safetensors"
    if kind == "kohya":
        (path,) = (copy / "kohya").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="changed or damaged"):
        load_few_step(pipeline_of(rung[1]), copy if kind == "folder" else path)


@pytest.mark.parametrize("kind", ["folder", "kohya"])
def test_a_lora_of_another_unet_is_refused(rung, kind):
    shallower = build("sdxl", tiny=True)
    (file,) = (rung[2] / "kohya").glob("*.safetensors")
    with pytest.raises(ValueError, match="is a LoRA of another network"):
        load_few_step(shallower, rung[2] if kind == "folder" else file)


def test_a_folder_or_file_that_is_not_a_rung_is_refused_with_the_remedy(rung, tmp_path):
    pipeline = pipeline_of(rung[1])
    with pytest.raises(ValueError, match="does not exist"):
        load_few_step(pipeline, tmp_path / "nothing")
    with pytest.raises(ValueError, match="run `stepdistill export`"):
        load_few_step(pipeline, tmp_path)
    with pytest.raises(ValueError, match="has no sampling settings in its header"):
        load_few_step(pipeline, rung[2] / "pytorch_lora_weights.safetensors")


def test_a_lora_of_a_shallower_unet_is_refused(rung):
    """All layers of the LoRA fit the deeper U-Net, which has more of them."""
    shallow = pipeline_of(rung[1])
    options = dict(shallow.unet.config) | {"transformer_layers_per_block": 2}
    torch.manual_seed(0)
    deeper = StableDiffusionPipeline(
        **{**shallow.components, "unet": UNet2DConditionModel(**options)}, requires_safety_checker=False
    )
    (file,) = (rung[2] / "kohya").glob("*.safetensors")
    for path in (rung[2], file):
        with pytest.raises(ValueError, match=r"LoRA of another network: that one has \d+ tensors, this one"):
            load_few_step(deeper, path)


def test_a_base_that_cannot_be_checked_is_warned_of(rung, tmp_path):
    copy = shutil.copytree(rung[2], tmp_path / "4")
    (copy / "base.json").unlink()
    with pytest.warns(FewStepWarning, match="could not be checked"):
        load_few_step(pipeline_of(rung[1]), copy)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "cannot read"),
        (lambda path: reheaded(path, {}), "has no sampling settings in its header"),
        (lambda path: reheaded(path, {"stepdistill": "{"}), "header that cannot be read"),
        (lambda path: reheaded(path, {"stepdistill": "{}"}), "header that cannot be read"),
    ],
)
def test_a_kohya_file_that_cannot_be_used_is_refused(rung, tmp_path, damage, says):
    (file,) = (rung[2] / "kohya").glob("*.safetensors")
    copy = tmp_path / "copy.safetensors"
    shutil.copy(file, copy)
    damage(copy)
    with pytest.raises(ValueError, match=says):
        load_few_step(pipeline_of(rung[1]), copy)


def reheaded(path, metadata):
    save_file(load_file(path), path, metadata={"format": "pt", **metadata})
