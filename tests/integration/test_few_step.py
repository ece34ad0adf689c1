"""load_few_step: all of it set, what does not fit warned of or refused."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file

from eval.random_teacher import build
from stepdistill.export.rung import export_rung
from stepdistill.models.lora_file import read_lora
from stepdistill.sampling import ADAPTER, FewStepWarning, load_few_step
from tests.integration.exported import rung_of, write_rung

PROMPT = "a red letter a"


@pytest.fixture(scope="module")
def rung(tmp_path_factory):
    """(config, teacher's folder, exported folder) of a 4-step rung on a tiny SD1.5."""
    config, teacher, _ = rung_of(tmp_path_factory.mktemp("sd15"), "sd15", "export.dtype=float32")
    return config, teacher, export_rung(config, 4)


def pipeline_of(teacher):
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, *args, **options):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline(
            *args, generator=generator, output_type="latent", height=32, width=32, **options
        ).images


def without_warning(action, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewStepWarning)
        return action(*args, **options)


def by_hand(teacher, folder, **options):
    """What the card says: LoRA, scheduler, steps, no guidance."""
    pipeline = pipeline_of(teacher)
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return latents(pipeline, PROMPT, **{"num_inference_steps": 4, "guidance_scale": 1.0, **options})


@pytest.mark.parametrize("kind", ["folder", "kohya"])
def test_the_defaults_of_the_call_are_the_rungs(rung, kind):
    _, teacher, folder = rung
    (file,) = (folder / "kohya").glob("*.safetensors")
    pipeline = pipeline_of(teacher)
    record = without_warning(load_few_step, pipeline, folder if kind == "folder" else file)
    assert record.student_steps == 4
    found = without_warning(latents, pipeline, PROMPT)
    assert torch.allclose(found, by_hand(teacher, folder), atol=1e-5)
    assert torch.equal(
        found, without_warning(latents, pipeline, PROMPT, num_inference_steps=4, guidance_scale=1.0)
    )
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("scheduler", "fits"),
    [
        (lambda c: DDIMScheduler.from_config(c, timestep_spacing="leading"), False),
        (lambda c: LCMScheduler.from_config(c), False),
        (lambda c: DDIMScheduler.from_config(c, prediction_type="sample"), False),
        (lambda c: EulerDiscreteScheduler.from_config(c, timestep_spacing="linspace"), False),
        (lambda c: EulerDiscreteScheduler.from_config(c, timestep_spacing="trailing"), True),
    ],
)
def test_a_wrong_scheduler_is_replaced_before_and_warned_of_after(rung, scheduler, fits):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    pipeline.scheduler = scheduler(pipeline.scheduler.config)
    load_few_step(pipeline, folder)
    assert torch.allclose(without_warning(latents, pipeline, PROMPT), by_hand(teacher, folder), atol=1e-5)
    pipeline.scheduler = scheduler(pipeline.scheduler.config)
    if fits:
        without_warning(latents, pipeline, PROMPT)
    else:
        with pytest.warns(FewStepWarning, match="trained at|prediction|this LoRA's is"):
            latents(pipeline, PROMPT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_scale": 7.0}, "guidance_scale=7: the LoRA has guidance in it already"),
        ({"num_inference_steps": 20}, "num_inference_steps=20: this LoRA is trained for 4"),
    ],
)
def test_other_steps_and_guidance_are_warned_of_and_obeyed(rung, options, says):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    with pytest.warns(FewStepWarning, match=says):
        found = latents(pipeline, PROMPT, **options)
    assert torch.allclose(found, by_hand(teacher, folder, **options), atol=1e-4)


def test_a_style_beside_it_stays_and_another_rung_takes_its_place(rung, tmp_path):
    config, teacher, folder = rung
    write_rung(config, teacher, 2, seed=5)
    two = export_rung(config, 2)
    write_rung(config, teacher, 8, seed=6)  # a style is any other LoRA
    style = config.run_dir / "rungs" / "8"
    pipeline = pipeline_of(teacher)
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.set_adapters("style", 0.7)
    load_few_step(pipeline, folder)
    assert sorted(pipeline.get_active_adapters()) == [ADAPTER, "style"]
    with_both = latents(pipeline, PROMPT)
    merged = pipeline_of(teacher)
    for path, weight in ((style, 0.7), (folder, 1.0)):
        for name, layer in read_lora(path).layers.items():
            merged.unet.get_submodule(name).weight.data += weight * layer.delta()
    merged.scheduler = pipeline.scheduler
    expected = latents(merged, PROMPT, num_inference_steps=4, guidance_scale=1.0)
    assert torch.allclose(with_both, expected, atol=1e-4)
    load_few_step(pipeline, two)
    assert sorted(pipeline.get_list_adapters()["unet"]) == [ADAPTER, "style"]
    pipeline.delete_adapters("style")
    assert torch.allclose(
        without_warning(latents, pipeline, PROMPT), by_hand(teacher, two, num_inference_steps=2), atol=1e-5
    )


def test_another_base_of_equal_shapes_is_warned_of_and_half_precision_is_none(rung, tmp_path):
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
    """A copy of the exported folder with the file changed, and rung.json for that file."""
    from stepdistill.durable import sha256_file

    copy = shutil.copytree(rung[2], place / "4")
    path = copy / "pytorch_lora_weights.safetensors"
    change(path)
    raw = json.loads((copy / "rung.json").read_text())
    (copy / "rung.json").write_text(json.dumps(raw | {"sha256": sha256_file(path)}))
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
    with pytest.raises(ValueError, match="is a LoRA of another U-Net"):
        load_few_step(shallower, rung[2] if kind == "folder" else file)


def test_what_is_no_rung_is_refused_with_what_to_do(rung, tmp_path):
    pipeline = pipeline_of(rung[1])
    with pytest.raises(ValueError, match="is not there"):
        load_few_step(pipeline, tmp_path / "nothing")
    with pytest.raises(ValueError, match="run `stepdistill export`"):
        load_few_step(pipeline, tmp_path)
    with pytest.raises(ValueError, match="does not say how it is sampled"):
        load_few_step(pipeline, rung[2] / "pytorch_lora_weights.safetensors")


def test_a_pipeline_made_of_it_keeps_lora_and_scheduler_and_takes_the_defaults_again(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    load_few_step(other, folder)
    assert pipeline.get_list_adapters()["unet"] == [ADAPTER]

    def drawn(**options):
        generator = torch.Generator().manual_seed(0)
        return other(
            PROMPT, image=image, strength=0.5, generator=generator, output_type="latent", **options
        ).images

    given = drawn(num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(drawn(), given)


def test_it_is_saved_as_the_vanilla_pipeline_that_it_is(rung, tmp_path):
    pipeline = pipeline_of(rung[1])
    load_few_step(pipeline, rung[2])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    again = pipeline_of(tmp_path / "saved")
    assert type(again) is StableDiffusionPipeline
    found = latents(again, PROMPT, num_inference_steps=4, guidance_scale=1.0)
    assert torch.allclose(found, by_hand(rung[1], rung[2]), atol=1e-4)
