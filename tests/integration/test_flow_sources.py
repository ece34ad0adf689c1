"""Transformers from a single file beside a folder, and with LoRAs merged in; what does not fit is named."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from eval.random_teacher import build
from stepdistill.config import ConfigError
from stepdistill.models import adapters
from stepdistill.models.network.kind import kind_of
from stepdistill.stages import open_run
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.loading import load_pipeline
from stepdistill.teacher.lora_trial import check_lora_goes_on
from stepdistill.teacher.make import make_teacher
from tests.integration.conftest import tiny_config
from tests.original_layout import original_sd3, original_z_image

ORIGINAL = {"sd35_medium": original_sd3, "z_image": original_z_image}
FAMILIES = list(ORIGINAL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny pipeline of each family, by name."""
    place = tmp_path_factory.mktemp("teachers")
    for family in FAMILIES:
        build(family, tiny=True).save_pretrained(place / family, safe_serialization=True)
    return place


def without_transformer(folder, target):
    """A copy of a pipeline's folder in which the transformer has no weights."""
    shutil.copytree(folder, target)
    for file in (target / "transformer").glob("*.safetensors"):
        file.unlink()
    return target


def flow_config(place, *overrides):
    """A run of one rung on a flow."""
    ladder = [
        {"teacher_steps": 8, "student_steps": 4, "phases": [{"objective": "mse", "max_train_steps": 2}]}
    ]
    return tiny_config(place, "data.resolution=64", f"ladder={json.dumps(ladder)}", *overrides)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.slow_after_first
def test_a_transformer_is_read_from_one_file_to_the_last_weight(folders, tmp_path, family, prefix):
    torch.manual_seed(5)
    tuned = DiffusionPipeline.from_pretrained(folders / family).transformer
    for parameter in tuned.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    save_file(ORIGINAL[family](tuned, prefix), tmp_path / "tuned.safetensors")
    folder = without_transformer(folders / family, tmp_path / "others")
    config = flow_config(
        tmp_path, f"teacher.path={tmp_path / 'tuned.safetensors'}", f"teacher.config={folder}"
    )
    open_run(config)
    made = DiffusionPipeline.from_pretrained(make_teacher(config))
    ours, theirs = made.transformer.state_dict(), tuned.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    plain = DiffusionPipeline.from_pretrained(folders / family)
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(made, part).state_dict(), getattr(plain, part).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["of diffusers", "of a whole model"])
@pytest.mark.slow_after_first
def test_other_files_that_diffusers_reads_are_read_too(folders, tmp_path, family, layout):
    transformer = DiffusionPipeline.from_pretrained(folders / family).transformer.to(torch.bfloat16)
    state = transformer.state_dict()
    if layout == "of a whole model":
        state = ORIGINAL[family](transformer) | {"vae.encoder.conv_in.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "tuned.safetensors")
    folder = without_transformer(folders / family, tmp_path / "others")
    config = flow_config(
        tmp_path, f"teacher.path={tmp_path / 'tuned.safetensors'}", f"teacher.config={folder}"
    )
    open_run(config)
    stored = load_file(make_teacher(config) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in transformer.state_dict().items())
    text = load_file(make_teacher(config) / "text_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in text.values()} == {torch.float32}  # as in the folder


def test_a_text_encoder_saved_by_the_class_of_a_whole_model_is_accepted(folders, tmp_path):
    """As Z-Image's released folder has Qwen3ForCausalLM's names, in several files."""
    folder = shutil.copytree(folders / "z_image", tmp_path / "whole")
    file = folder / "text_encoder" / "model.safetensors"
    state = {f"model.{key}": tensor for key, tensor in load_file(file).items()}
    file.unlink()
    parts = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    index = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate(parts, start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / "text_encoder" / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, name)
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(examine_pipeline(folder)) == []
    ours, theirs = (load_pipeline(place).text_encoder.state_dict() for place in (folder, folders / "z_image"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow_after_first
def test_a_file_that_lacks_a_weight_or_has_one_too_many_is_named(folders, tmp_path, family):
    state = ORIGINAL[family](DiffusionPipeline.from_pretrained(folders / family).transformer)
    folder = without_transformer(folders / family, tmp_path / "others")
    lacking = dict(list(state.items())[1:])
    unknown = state | {"model.diffusion_model.something.weight": torch.zeros(2)}
    for name, tensors in (("lacking", lacking), ("unknown", unknown)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        config = flow_config(
            tmp_path,
            f"name={name}",
            f"teacher.path={tmp_path / name}.safetensors",
            f"teacher.config={folder}",
        )
        open_run(config)
        with pytest.raises(
            ConfigError, match=r"transformer: .*(lacks 1 of|no place|no such transformer in a known layout)"
        ):
            make_teacher(config)


def test_a_transformer_alone_needs_the_other_parts(folders, tmp_path):
    state = original_z_image(DiffusionPipeline.from_pretrained(folders / "z_image").transformer, prefix="")
    save_file(state, tmp_path / "tuned.safetensors")
    path = f"teacher.path={tmp_path / 'tuned.safetensors'}"
    with pytest.raises(ConfigError, match=r"or a transformer alone, with teacher.config=FOLDER"):
        open_run(flow_config(tmp_path, path))
    folder = without_transformer(folders / "z_image", tmp_path / "others")
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"teacher.config: got .* lacks text_encoder/model.safetensors"):
        open_run(flow_config(tmp_path, path, f"teacher.config={folder}"))


def style_lora(folder, target, *, seed, scale=0.3):
    """Writes a LoRA for the transformer that visibly changes the images; returns its file."""
    network = DiffusionPipeline.from_pretrained(folder).transformer
    adapters.add_adapter(network, "style", rank=4, seed=seed, targets=kind_of(network).lora_targets)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if ".lora_B.style." in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    state = get_peft_model_state_dict(network, adapter_name="style")
    StableDiffusion3Pipeline.save_lora_weights(target, transformer_lora_layers=state)
    return target / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow_after_first
def test_loras_merged_into_the_teacher_draw_the_same_as_loaded_ones(folders, tmp_path, family):
    file = style_lora(folders / family, tmp_path / "a", seed=1)
    check_lora_goes_on(file, folders / family)
    other = next(name for name in FAMILIES if name != family)
    with pytest.raises(ValueError, match=f"does not fit the transformer of .*{other}"):
        check_lora_goes_on(file, folders / other)
    of_unet = {key.replace("transformer.", "unet.", 1): value for key, value in load_file(file).items()}
    save_file(of_unet, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA of a"):
        check_lora_goes_on(tmp_path / "unet.safetensors", folders / family)
    loras = json.dumps([{"path": str(file), "weight": 0.5}])
    config = flow_config(tmp_path, f"teacher.path={folders / family}", f"teacher.loras={loras}")
    open_run(config)
    baked = DiffusionPipeline.from_pretrained(make_teacher(config))
    loaded, plain = (DiffusionPipeline.from_pretrained(folders / family) for _ in range(2))
    loaded.load_lora_weights(file.parent, weight_name=file.name, adapter_name="a")
    loaded.set_adapters(["a"], [0.5])

    def latents(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
        return pipeline("a thing", generator=torch.Generator().manual_seed(0), **options).images

    assert torch.allclose(latents(baked), latents(loaded), atol=1e-4)
    assert not torch.allclose(latents(baked), latents(plain), atol=1e-2)
