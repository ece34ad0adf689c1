"""A few-step pipeline as an object: pickled, copied, saved, and built from parts whose dtypes do not match."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from stepdistill.sampling import FewStepWarning, load_few_step
from tests.integration.few_step import PROMPT, by_hand, latents, pipeline_of, without_warning


@pytest.mark.parametrize("copied", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy, copy.copy])
@pytest.mark.slow_after_first
def test_pickled_and_copied_pipelines_draw_the_same_as_the_original(rung, copied):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    other = copied(pipeline)
    assert isinstance(other, StableDiffusionPipeline)
    assert type(other).__name__ == "StableDiffusionPipeline"
    drawn = without_warning(latents, other, PROMPT)
    assert torch.allclose(drawn, without_warning(latents, pipeline, PROMPT), atol=1e-4)
    assert torch.allclose(drawn, by_hand(teacher, folder), atol=1e-4)
    with pytest.warns(FewStepWarning, match="trained for 4"):  # the copy makes the same checks
        latents(other, PROMPT, num_inference_steps=5)
    load_few_step(other, folder)
    assert isinstance(StableDiffusionImg2ImgPipeline.from_pipe(other), StableDiffusionImg2ImgPipeline)


@pytest.mark.slow
def test_a_pickle_is_read_in_another_process(rung, tmp_path):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    (tmp_path / "pipeline.pkl").write_bytes(pickle.dumps(pipeline))
    script = (
        "import pickle, sys, torch\n"
        "from tests.integration.few_step import PROMPT, latents, without_warning\n"
        "pipeline = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.save(without_warning(latents, pipeline, PROMPT), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "pipeline.pkl"), str(tmp_path / "latents.pt")]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert torch.allclose(torch.load(tmp_path / "latents.pt"), latents(pipeline, PROMPT), atol=1e-4)


def test_saving_with_an_unmerged_lora_is_refused_with_the_call_to_make_first(rung, tmp_path):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    plain = latents(pipeline, PROMPT)
    with pytest.raises(ValueError, match=r"LoRAs beside its weights \(few_step\).*fuse_lora\(\) and then"):
        pipeline.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    pipeline.fuse_lora()
    # fused into the weights, but still present as an adapter
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipeline.save_pretrained(tmp_path / "broken")
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "merged")
    again = latents(pipeline_of(tmp_path / "merged"), PROMPT, num_inference_steps=4, guidance_scale=1.0)
    assert torch.allclose(again, plain, atol=1e-4)


def test_the_base_alone_is_saved_after_unloading(rung, tmp_path):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "base")
    options = {"num_inference_steps": 4, "guidance_scale": 1.0}
    base = pipeline_of(teacher)
    base.scheduler = pipeline.scheduler
    assert torch.equal(
        latents(pipeline_of(tmp_path / "base"), PROMPT, **options), latents(base, PROMPT, **options)
    )


def test_a_float16_text_encoder_beside_a_float32_unet_is_warned_of_before_the_call_fails(rung, tmp_path):
    _, teacher, folder = rung
    DiffusionPipeline.from_pretrained(teacher, dtype=torch.float16).save_pretrained(tmp_path / "half")
    mixed = StableDiffusionPipeline.from_pretrained(tmp_path / "half")
    mixed.set_progress_bar_config(disable=True)
    with pytest.warns(FewStepWarning, match=r"text_encoder is torch.float16.*dtype=torch.float32"):
        load_few_step(mixed, folder)
    with pytest.raises(RuntimeError, match="dtype"):
        latents(mixed, PROMPT)
    mixed.to(torch.float32)
    without_warning(load_few_step, mixed, folder)
    without_warning(latents, mixed, PROMPT)
