"""load_few_step: all of it set, what does not fit warned of or refused."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from eval.random_teacher import build
from stepdistill.export.rung import export_rung
from stepdistill.models.loading import load_unet
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
        (lambda c: DDPMScheduler.from_config(c, timestep_spacing="trailing"), False),
        (lambda c: EulerAncestralDiscreteScheduler.from_config(c, timestep_spacing="trailing"), False),
        (lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing", clip_sample=True), False),
        (lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing", beta_end=0.02), False),
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
        with pytest.warns(FewStepWarning, match="mend: call load_few_step again"):
            latents(pipeline, PROMPT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_scale": 7.0}, "guidance_scale=7: the LoRA has guidance in it already"),
        ({"num_inference_steps": 20}, "num_inference_steps=20: this LoRA is trained for 4"),
        ({"eta": 1.0}, "eta=1 adds noise"),
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


def attention_style(teacher, folder):
    """A LoRA on to_q and to_v alone, as most styles are."""
    unet = load_unet(teacher)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    state = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def test_a_style_on_some_layers_stays_through_every_change_of_rung(rung, tmp_path):
    config, teacher, four = rung
    write_rung(config, teacher, 2, seed=5)
    two, style = export_rung(config, 2), attention_style(teacher, tmp_path / "style")
    drawn = {}
    for with_style in (True, False):
        for hotswap in (True, False):
            pipeline = pipeline_of(teacher)
            if with_style:
                pipeline.load_lora_weights(style, adapter_name="style")
            load_few_step(pipeline, four)
            load_few_step(pipeline, two, hotswap=hotswap)
            expected = [ADAPTER, "style"] if with_style else [ADAPTER]
            assert sorted(pipeline.get_active_adapters()) == expected
            drawn[with_style, hotswap] = without_warning(latents, pipeline, PROMPT)
    for with_style in (True, False):
        assert torch.allclose(drawn[with_style, True], drawn[with_style, False], atol=1e-5)
    assert not torch.allclose(drawn[True, True], drawn[False, True], atol=1e-2)


def unloaded(pipeline, _style):
    pipeline.unload_lora_weights()


def disabled(pipeline, _style):
    pipeline.disable_lora()


def displaced(pipeline, style):
    pipeline.load_lora_weights(style, adapter_name="style")


def weakened(pipeline, _style):
    pipeline.set_adapters([ADAPTER], [0.3])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (unloaded, "was unloaded"),
        (disabled, "is not active"),
        (displaced, "is not active: set_adapters leaves 'few_step' out, or a later LoRA took its place"),
        (weakened, "has weight 0.3, not 1"),
    ],
)
def test_a_lora_that_is_no_longer_at_work_is_warned_of(rung, tmp_path, change, says):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    change(pipeline, attention_style(teacher, tmp_path / "style"))
    for _ in range(2):  # at every call
        with pytest.warns(FewStepWarning, match=says):
            latents(pipeline, PROMPT)
    load_few_step(pipeline, folder)
    without_warning(latents, pipeline, PROMPT)


def test_a_rung_that_another_pipeline_put_on_the_shared_unet_is_warned_of(rung):
    config, teacher, four = rung
    write_rung(config, teacher, 2, seed=5)
    first = pipeline_of(teacher)
    load_few_step(first, four)
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    load_few_step(second, export_rung(config, 2))
    with pytest.warns(FewStepWarning, match="another rung was loaded onto this U-Net"):
        latents(first, PROMPT)


def test_a_merged_lora_is_not_added_to(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    plain = latents(pipeline, PROMPT)
    pipeline.fuse_lora()
    assert torch.allclose(without_warning(latents, pipeline, PROMPT), plain, atol=1e-4)
    for _ in range(2):
        with pytest.raises(ValueError, match="has a LoRA merged into its weights"):
            load_few_step(pipeline, folder)
        pipeline.unload_lora_weights()
    fresh = pipeline_of(teacher)
    load_few_step(fresh, folder)
    fresh.fuse_lora()
    fresh.unfuse_lora()
    fresh.unload_lora_weights()
    load_few_step(fresh, folder)
    assert torch.allclose(without_warning(latents, fresh, PROMPT), plain, atol=1e-4)


def test_a_lora_of_a_shallower_unet_is_refused(rung):
    """All its layers fit: the deeper one has more."""
    shallow = pipeline_of(rung[1])
    options = dict(shallow.unet.config) | {"transformer_layers_per_block": 2}
    torch.manual_seed(0)
    deeper = StableDiffusionPipeline(
        **{**shallow.components, "unet": UNet2DConditionModel(**options)}, requires_safety_checker=False
    )
    (file,) = (rung[2] / "kohya").glob("*.safetensors")
    for path in (rung[2], file):
        with pytest.raises(ValueError, match=r"LoRA of another U-Net: that one has \d+ tensors, this one"):
            load_few_step(deeper, path)


def test_a_base_that_cannot_be_looked_at_is_said(rung, tmp_path):
    copy = shutil.copytree(rung[2], tmp_path / "4")
    (copy / "base.json").unlink()
    with pytest.warns(FewStepWarning, match="could not be checked"):
        load_few_step(pipeline_of(rung[1]), copy)


@pytest.mark.slow
def test_a_compiled_unet_is_the_same_unet(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    without_warning(load_few_step, pipeline, folder)
    assert torch.allclose(without_warning(latents, pipeline, PROMPT), by_hand(teacher, folder), atol=1e-4)


def test_a_pipeline_of_its_parts_is_a_vanilla_one(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    other = type(pipeline)(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    found = latents(other, PROMPT, num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(found, latents(pipeline, PROMPT))


def test_a_strength_that_leaves_no_step_is_refused(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    load_few_step(other, folder)
    with pytest.raises(ValueError, match=r"strength=0\.2 leaves no step of 4; allowed: 0\.25 and more"):
        other(PROMPT, image=torch.rand(1, 3, 32, 32), strength=0.2)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "cannot read"),
        (lambda path: reheaded(path, {}), "does not say how it is sampled"),
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
