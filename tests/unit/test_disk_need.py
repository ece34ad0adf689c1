"""The disk space that a run is expected to need, against the sizes of its parts."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from stepdistill.config.load import load_config
from stepdistill.disk.space import folder_bytes
from stepdistill.models.adapters import add_adapter, lora_parameters
from stepdistill.models.identity import layer_shapes
from stepdistill.plan.disk_need import disk_need
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import embedded_folder
from tests.conftest import build_tiny_unet

TEACHER = embedded_folder("teacher")


def need_of(*overrides):
    return disk_need(load_config("configs/letters.yaml", list(overrides)), TeacherFacts.of_folder(TEACHER))


@pytest.mark.parametrize("rank", [4, 12])
def test_the_parameters_of_a_lora_are_counted_as_peft_adds_them(rank):
    unet = build_tiny_unet()
    counted = lora_parameters(layer_shapes(unet), rank)
    assert counted == sum(
        parameter.numel() for parameter in add_adapter(unet, "x", rank=rank, seed=0).values()
    )


def test_text_embeddings_count_once_per_caption_and_shard(tmp_path):
    """20 images with one caption need 20 latents of 4 x 8 x 8 and one text embedding of 24 x 64, in float32."""
    for k in range(20):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a wall")
    need = need_of(f"data.source={tmp_path}", "data.num_images=null")
    shapes = {name: read_size(name) for name in ("max_position_embeddings", "cross_attention_dim")}
    text = shapes["max_position_embeddings"] * shapes["cross_attention_dim"]
    assert need.cache == 4 * (20 * 4 * 8 * 8 + text)
    assert need.is_whole
    for k in range(20):
        (tmp_path / f"{k}.txt").write_text(f"wall {k}")
    assert need_of(f"data.source={tmp_path}", "data.num_images=null").cache == 4 * 20 * (4 * 8 * 8 + text)


def read_size(key):
    import json

    part = "unet" if key == "cross_attention_dim" else "text_encoder"
    return json.loads((TEACHER / part / "config.json").read_text())[key]


def test_rungs_grow_with_rank_and_formats_and_rows_with_the_number_of_images():
    usual = need_of()
    assert need_of("lora.rank=64").rungs > 1.9 * usual.rungs
    assert need_of("export.formats=[diffusers,kohya,fused]").rungs > usual.rungs
    assert need_of("evaluation.num_images=512").evaluation > 1.8 * usual.evaluation
    assert usual.teacher == 0


def test_checkpoints_count_the_adam_states_of_student_and_discriminator():
    """Two that stay, the one at the phase's start and the next one; mse alone has no discriminator."""
    mse = "[{objective: mse, max_train_steps: 1}]"
    alone = need_of(*(f"ladder.{index}.phases={mse}" for index in range(5))).checkpoints
    unet = UNet2DConditionModel.from_pretrained(TEACHER / "unet")
    lora = lora_parameters(layer_shapes(unet), load_config("configs/letters.yaml").lora.rank)
    ema = load_config("configs/letters.yaml").training.ema_decay > 0
    assert alone == 4 * 4 * lora * (3 + ema)
    assert need_of().checkpoints > alone
    assert need_of("training.checkpoint.keep=4").checkpoints == 6 / 4 * need_of().checkpoints


def test_a_fake_score_and_a_self_teacher_are_in_checkpoints():
    """The fake score has Adam's moments as the student has; the average that teaches is one more copy."""
    rungs = {
        "mse": "[{objective: mse}]",
        "dmd": "[{objective: dmd}]",
        "ema": "[{objective: mse, teacher: ema}]",
    }
    plain, dmd, ema = (
        need_of(f"ladder.1.phases={phases}", *LAST_RUNGS).checkpoints for phases in rungs.values()
    )
    assert dmd == 2 * plain
    assert 3 * ema == 4 * plain


LAST_RUNGS = [f"ladder.{index}.phases=[{{objective: mse}}]" for index in (0, 2, 3, 4)]


def test_a_smaller_base_counts_its_pipeline_and_the_states_of_all_weights():
    unet = UNet2DConditionModel.from_pretrained(TEACHER / "unet")
    count = sum(parameter.numel() for parameter in unet.parameters())
    need, plain = need_of("shrink.remove=[middle]"), need_of()
    ema = load_config("configs/letters.yaml").training.ema_decay > 0
    assert need.checkpoints == 4 * 4 * count * (3 + ema)
    assert need.base == sum(file.stat().st_size for file in TEACHER.glob("*/*.safetensors"))
    assert need.total - plain.total == need.base + need.checkpoints - plain.checkpoints
    assert plain.base == 0


def test_repeated_prompts_are_counted_without_iterating(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    need = need_of(f"data.source={tmp_path / 'prompts.txt'}", "data.num_images=1000000000")
    assert need.cache > 10**9 * 4 * 8 * 8 * 4


def test_folder_bytes_counts_the_files_in_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "x")
    assert folder_bytes(tmp_path) == 5
    assert folder_bytes(tmp_path / "nowhere") == 0
    assert torch.get_default_device().type == "cpu"
