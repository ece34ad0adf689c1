"""load_few_step sets LoRA, scheduler and call defaults, and warns of or refuses what does not fit."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict

from stepdistill.export.rung import export_rung
from stepdistill.models.lora_file import read_lora
from stepdistill.models.network.kind import load_network
from stepdistill.sampling import ADAPTER, FewStepWarning, load_few_step
from tests.integration.exported import write_rung
from tests.integration.few_step import PROMPT, by_hand, latents, pipeline_of, without_warning


@pytest.mark.parametrize("kind", ["folder", "kohya"])
def test_the_defaults_of_the_call_are_the_rungs_settings(rung, kind):
    _, teacher, folder = rung
    (file,) = (folder / "kohya").glob("*.safetensors")
    pipeline = pipeline_of(teacher)
    record = without_warning(load_few_step, pipeline, folder if kind == "folder" else file)
    assert record.student_steps == 4
    drawn = without_warning(latents, pipeline, PROMPT)
    assert torch.allclose(drawn, by_hand(teacher, folder), atol=1e-5)
    assert torch.equal(
        drawn, without_warning(latents, pipeline, PROMPT, num_inference_steps=4, guidance_scale=1.0)
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
        *(
            pytest.param(change, False, marks=pytest.mark.slow)
            for change in (
                lambda c: DDPMScheduler.from_config(c, timestep_spacing="trailing"),
                lambda c: EulerAncestralDiscreteScheduler.from_config(c, timestep_spacing="trailing"),
                lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing", clip_sample=True),
                lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing", beta_end=0.02),
            )
        ),
        (lambda c: EulerDiscreteScheduler.from_config(c, timestep_spacing="trailing"), True),
    ],
)
@pytest.mark.slow_after_first
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
        with pytest.warns(FewStepWarning, match="fix: call load_few_step again"):
            latents(pipeline, PROMPT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_scale": 7.0}, "guidance_scale=7: guidance is already distilled into the LoRA"),
        ({"num_inference_steps": 20}, "num_inference_steps=20: this LoRA is trained for 4"),
        ({"eta": 1.0}, "eta=1 adds noise"),
    ],
)
@pytest.mark.slow_after_first
def test_other_steps_and_guidance_are_warned_of_and_used(rung, options, says):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    with pytest.warns(FewStepWarning, match=says):
        drawn = latents(pipeline, PROMPT, **options)
    assert torch.allclose(drawn, by_hand(teacher, folder, **options), atol=1e-4)


def test_loading_another_rung_replaces_the_rung_and_keeps_the_style_lora(rung, tmp_path):
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


def test_from_pipe_keeps_lora_and_scheduler_and_loading_again_sets_the_defaults(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    load_few_step(other, folder)
    assert pipeline.get_list_adapters()["unet"] == [ADAPTER]

    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        return other(
            PROMPT, image=image, strength=0.5, generator=generator, output_type="latent", **options
        ).images

    explicit = draw(num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(draw(), explicit)


@pytest.mark.slow
def test_a_few_step_pipeline_is_saved_as_a_vanilla_pipeline(rung, tmp_path):
    pipeline = pipeline_of(rung[1])
    load_few_step(pipeline, rung[2])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    again = pipeline_of(tmp_path / "saved")
    assert type(again) is StableDiffusionPipeline
    drawn = latents(again, PROMPT, num_inference_steps=4, guidance_scale=1.0)
    assert torch.allclose(drawn, by_hand(rung[1], rung[2]), atol=1e-4)


def attention_style(teacher, folder):
    """A LoRA on to_q and to_v only, like most style LoRAs."""
    unet = load_network(teacher)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    state = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


@pytest.mark.slow
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
@pytest.mark.slow_after_first
def test_a_lora_that_was_removed_or_weakened_is_warned_of(rung, tmp_path, change, says):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    change(pipeline, attention_style(teacher, tmp_path / "style"))
    for _ in range(2):  # the warning is repeated at every call
        with pytest.warns(FewStepWarning, match=says):
            latents(pipeline, PROMPT)
    load_few_step(pipeline, folder)
    without_warning(latents, pipeline, PROMPT)


@pytest.mark.slow
def test_a_rung_that_another_pipeline_put_on_the_shared_unet_is_warned_of(rung):
    config, teacher, four = rung
    write_rung(config, teacher, 2, seed=5)
    first = pipeline_of(teacher)
    load_few_step(first, four)
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    load_few_step(second, export_rung(config, 2))
    with pytest.warns(FewStepWarning, match="another rung was loaded onto this network"):
        latents(first, PROMPT)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_compiled_unet_is_the_same_unet(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    without_warning(load_few_step, pipeline, folder)
    assert torch.allclose(without_warning(latents, pipeline, PROMPT), by_hand(teacher, folder), atol=1e-4)


def test_a_pipeline_built_from_its_components_is_a_vanilla_one(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    other = type(pipeline)(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    drawn = latents(other, PROMPT, num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(drawn, latents(pipeline, PROMPT))


def test_a_strength_that_leaves_no_step_is_refused(rung):
    _, teacher, folder = rung
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    load_few_step(other, folder)
    with pytest.raises(ValueError, match=r"strength=0\.2 leaves no step of 4; allowed: 0\.25 and more"):
        other(PROMPT, image=torch.rand(1, 3, 32, 32), strength=0.2)
