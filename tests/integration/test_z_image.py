"""Z-Image: the whole ladder on a tiny pipeline, its LoRAs in a vanilla pipeline, and teachers that are refused."""

import json
import re
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from eval.random_teacher import build
from stepdistill import stages
from stepdistill.data.cache import load_cache
from stepdistill.models.network.conditioning import MASK
from stepdistill.plan.disk_need import disk_need
from stepdistill.sampling import FewStepWarning, load_few_step
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import broken_files, missing_parts, unsupported
from tests.integration.test_families import images
from tests.integration.test_sd3 import SIGMAS, changed, flow_config, seeded, trained_on_int8

FRESH = """
import sys, torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
teacher, rung, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(teacher)
pipeline.load_lora_weights(rung)
pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(rung, subfolder="scheduler")
options = {"guidance_scale": 0.0, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
torch.save(pipeline("a thing", num_inference_steps=4, height=64, width=64, **options).images, output)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("z_image") / "teacher"
    build("z_image", tiny=True).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.mark.parametrize(
    ("brought", "checkpointing"),
    [("images", "true"), ("prompts", "false")],
)
@pytest.mark.slow
def test_the_whole_ladder_ends_in_loras_that_a_vanilla_pipeline_loads(
    tmp_path, teacher, brought, checkpointing
):
    long = "a thing that " + "is as long as " * 4 + "this"
    (tmp_path / "prompts.txt").write_text(f"a thing\n{long}\n")
    source = images(tmp_path / "pictures") if brought == "images" else tmp_path / "prompts.txt"
    checkpoints = f"training.gradient_checkpointing={checkpointing}"
    config = flow_config(tmp_path, teacher, source, checkpoints, "data.resolution=64")
    stages.run_all(config)
    if brought == "prompts":
        lengths = load_cache(config).samples((64, 64), [0, 1]).conditioning.added_cond_kwargs[MASK].sum(1)
        assert len(set(lengths.tolist())) == 2
    results = json.loads((config.run_dir / "evaluation" / "results.json").read_text())
    assert {row["row"] for row in results["rows"]} == {"teacher-2", *(f"student-{n}" for n in (8, 4, 2, 1))}
    rung = config.run_dir / "rungs" / "4"
    keys = load_file(rung / "pytorch_lora_weights.safetensors").keys()
    prefixes = tuple(f"transformer.{part}." for part in ("layers", "noise_refiner", "context_refiner"))
    assert all(key.startswith(prefixes) for key in keys)
    card = (rung / "README.md").read_text()
    assert "sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=0.0, height=64, width=64)" in card
    assert "ModelSamplingAuraFlow with shift 6.0" in card
    output = tmp_path / "latents.pt"
    words = [sys.executable, "-c", FRESH, str(teacher), str(rung), str(output)]
    subprocess.run(words, check=True, capture_output=True)
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    options = {"output_type": "latent", "height": 64, "width": 64}
    base = pipeline("a thing", sigmas=SIGMAS[4], guidance_scale=0.0, generator=seeded(), **options).images
    load_few_step(pipeline, rung)
    ours = pipeline("a thing", generator=seeded(), output_type="latent").images
    assert torch.allclose(ours, torch.load(output), atol=1e-6)
    with pytest.warns(FewStepWarning, match="trained at height 64 and width 64"):
        pipeline("a thing", output_type="latent", height=128, width=64)
    assert not torch.allclose(ours, base, atol=1e-4)
    with pytest.warns(FewStepWarning, match="guidance is already distilled into the LoRA; use 0.0"):
        pipeline("a thing", guidance_scale=0.5, **options)


def test_the_ladder_is_trained_on_an_int8_base_that_is_near_the_whole_one(tmp_path, teacher, caplog):
    """As configs/z_image_24gb.yaml has it, where bfloat16 leaves too little of the card."""
    pytest.importorskip("torchao")
    trained_on_int8(tmp_path, teacher, caplog)


def test_a_complete_folder_is_accepted_and_its_facts_are_read(teacher):
    assert missing_parts(teacher) == []
    assert [*broken_files(teacher), *unsupported(teacher), *examine_pipeline(teacher)] == []
    facts = TeacherFacts.of_folder(teacher)
    assert (facts.network_part, facts.prediction_type, facts.is_zero_snr) == ("transformer", "velocity", True)
    assert facts.image_size == (1024, 1024)
    assert facts.latent_shape((64, 32)) == (16, 8, 4)
    assert facts.size_multiple == 16
    assert (facts.text_tokens, facts.call_options) == (512, {})


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("transformer", {"all_patch_size": [2, 4]}, "all_patch_size: \\[2, 4\\]; allowed: \\[2\\]"),
        ("transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim: 8; allowed: None"),
        ("transformer", {"in_channels": 8}, "a transformer of 8 channels and a VAE of 16"),
        (
            "transformer",
            {"cap_feat_dim": 24},
            "cap_feat_dim: 24 and text encoders of hidden_size 16; allowed",
        ),
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "allowed: a ZImageTransformer2DModel"),
    ],
)
def test_an_unfit_config_is_named(tmp_path, teacher, part, values, message):
    odd = unsupported(changed(teacher, tmp_path / "odd", part, **values))
    assert len(odd) == 1
    assert re.search(message, odd[0])


def test_disk_space_of_texts_is_that_of_the_longest_caption_not_of_the_longest_possible(tmp_path, teacher):
    (tmp_path / "prompts.txt").write_text("a thing\nanother thing\n")
    config = flow_config(
        tmp_path, teacher, tmp_path / "prompts.txt", "data.resolution=64", "data.num_images=4"
    )
    latents, texts = 4 * 16 * 8 * 8, 2 * (len("another thing") + 32) * 16
    assert disk_need(config, TeacherFacts.of_folder(teacher)).cache == 4 * (latents + texts)


def test_a_tokenizer_without_a_chat_template_is_named(tmp_path, teacher):
    folder = changed(teacher, tmp_path / "odd", "scheduler")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    assert [line for line in examine_pipeline(folder) if "has no chat template" in line]
