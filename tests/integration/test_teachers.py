"""Teachers of the real families with random weights: as a folder, as one file, with LoRAs merged in; refused teachers."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from eval.random_teacher import FAMILIES, build
from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.models import adapters
from stepdistill.sampling import load_few_step
from stepdistill.stages import open_run
from stepdistill.teacher.make import make_teacher
from stepdistill.teacher.source import teacher_folder
from tests.integration.conftest import tiny_config
from tests.original_layout import original_state


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny pipeline of each family, by name."""
    place = tmp_path_factory.mktemp("teachers")
    for family in FAMILIES:
        build(family, tiny=True).save_pretrained(place / family, safe_serialization=True)
    return place


def configs_alone(folder, target):
    """Copies the folder without any weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.slow_after_first
def test_one_file_is_read_to_the_last_weight(folders, tmp_path, family, dtype):
    pipeline = DiffusionPipeline.from_pretrained(folders / family, dtype=dtype)
    save_file(original_state(pipeline), tmp_path / "model.safetensors")
    configs = configs_alone(folders / family, tmp_path / "configs")
    config = tiny_config(
        tmp_path, f"teacher.path={tmp_path / 'model.safetensors'}", f"teacher.config={configs}"
    )
    open_run(config)
    folder = make_teacher(config)
    assert folder == teacher_folder(config) == config.run_dir / "teacher"
    again = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    assert type(again) is type(pipeline)
    parts = ["unet", "vae", "text_encoder"] + ["text_encoder_2"] * (family == "sdxl")
    for part in parts:
        ours, theirs = getattr(again, part).state_dict(), getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    written_at = (folder / "model_index.json").stat().st_mtime_ns
    assert make_teacher(config) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == written_at


def style_lora(folder, target, *, seed=3, scale=0.3):
    """Writes a LoRA for the U-Net that visibly changes the images; returns its folder."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    adapters.add_adapter(pipeline.unet, "style", rank=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pipeline.unet.named_parameters():
        if ".lora_B.style." in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    type(pipeline).save_lora_weights(
        target, unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="style")
    )
    return target / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_loras_merged_into_the_teacher_draw_the_same_as_loaded_ones(folders, tmp_path, family):
    first = style_lora(folders / family, tmp_path / "a", seed=1)
    second = style_lora(folders / family, tmp_path / "b", seed=2)
    loras = json.dumps([{"path": str(first), "weight": 0.5}, {"path": str(second.parent)}])
    config = tiny_config(tmp_path, f"teacher.path={folders / family}", f"teacher.loras={loras}")
    open_run(config)
    baked = DiffusionPipeline.from_pretrained(make_teacher(config))
    loaded = DiffusionPipeline.from_pretrained(folders / family)
    loaded.load_lora_weights(first.parent, weight_name=first.name, adapter_name="a")
    loaded.load_lora_weights(second.parent, weight_name=second.name, adapter_name="b")
    loaded.set_adapters(["a", "b"], [0.5, 1.0])
    plain = DiffusionPipeline.from_pretrained(folders / family)

    def latents(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "latent"}
        return pipeline("a thing", generator=torch.Generator().manual_seed(0), **options).images

    assert torch.allclose(latents(baked), latents(loaded), atol=1e-4)
    assert not torch.allclose(latents(baked), latents(plain), atol=1e-2)


@pytest.mark.slow
def test_a_lora_of_another_model_and_a_file_without_a_lora_are_refused(folders, tmp_path):
    foreign = style_lora(folders / "sdxl", tmp_path / "xl")
    (tmp_path / "none").mkdir()
    save_file({"something.else": torch.zeros(3)}, tmp_path / "none" / "pytorch_lora_weights.safetensors")
    teacher = f"teacher.path={folders / 'sd15'}"
    for name, lora in (("foreign", foreign), ("empty", tmp_path / "none")):
        config = tiny_config(tmp_path, f"name={name}", teacher, f'teacher.loras=[{{"path": "{lora}"}}]')
        with pytest.raises(ConfigError, match=r"teacher\.loras"):
            make_teacher_of(config)
    config = tiny_config(tmp_path, teacher, 'teacher.loras=[{"path": "/nowhere"}]')
    with pytest.raises(ConfigError, match=r"teacher\.loras\.0\.path: got '/nowhere', which does not exist"):
        open_run(config)


def test_files_that_are_not_a_checkpoint_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    (tmp_path / "existing.py").write_text("1 / 0")
    (tmp_path / "broken.safetensors").write_bytes(b"no header at all, but long enough to be read")
    save_file({"lora.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    for name, message in (
        ("model.ckpt", "which is not a .safetensors file; allowed: a diffusers pipeline folder, or"),
        ("existing.py", "which is not a .safetensors file; allowed: a diffusers pipeline folder, or"),
        ("missing.safetensors", "which does not exist"),
        ("broken.safetensors", "as safetensors"),
        ("lora.safetensors", "holds no whole model"),
    ):
        config = tiny_config(tmp_path, f"name=of-{name}", f"teacher.path={tmp_path / name}")
        with pytest.raises(ConfigError, match=message):
            make_teacher_of(config)


def make_teacher_of(config):
    open_run(config)
    return make_teacher(config)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("unet", "in_channels", 9, "9 input channels"),
        ("unet", "time_cond_proj_dim", 256, "time_cond_proj_dim: 256"),
        ("unet", "class_embed_type", "timestep", "class_embed_type"),
        ("scheduler", "beta_start", None, "without betas"),
    ],
)
def test_models_that_cannot_be_distilled_are_named(folders, tmp_path, part, key, value, message):
    shutil.copytree(folders / "sd15", tmp_path / "odd")
    path = next((tmp_path / "odd" / part).glob("*config.json"))
    content = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(ConfigError, match=message):
        open_run(tiny_config(tmp_path, f"teacher.path={tmp_path / 'odd'}"))


def test_code_beside_a_model_is_not_run(folders, tmp_path):
    shutil.copytree(folders / "sd15", tmp_path / "odd")
    index = tmp_path / "odd" / "model_index.json"
    content = json.loads(index.read_text()) | {"unet": ["my_unet", "MyUnet"]}
    index.write_text(json.dumps(content))
    (tmp_path / "odd" / "my_unet.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match=r"code of its own \(unet: my_unet\)"):
        open_run(tiny_config(tmp_path, f"teacher.path={tmp_path / 'odd'}"))


@pytest.mark.slow
def test_a_teacher_of_zero_terminal_snr_is_not_asked_for_epsilon(folders, tmp_path):
    shutil.copytree(folders / "sd21_v", tmp_path / "zero")
    path = tmp_path / "zero" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    teacher = f"teacher.path={tmp_path / 'zero'}"
    with pytest.raises(ConfigError, match=r"ladder\.0\.prediction_type: got epsilon"):
        open_run(tiny_config(tmp_path, teacher, "ladder.0.prediction_type=epsilon"))
    with pytest.raises(ConfigError, match=r"ladder\.1\.phases\.0\.loss_space: got epsilon"):
        open_run(tiny_config(tmp_path, teacher, "ladder.1.phases.0.loss_space=epsilon"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"prediction_type": "epsilon"}))
    with pytest.raises(ConfigError, match=r"teacher\.path: .* predicts epsilon with zero terminal SNR"):
        open_run(tiny_config(tmp_path, teacher, "ladder.0.prediction_type=v_prediction"))
    path.write_text(json.dumps(content))
    phase = "phases: [{objective: mse, max_train_steps: 1}]"
    converted = "phases: [{objective: convert, max_train_steps: 1}, {objective: mse, max_train_steps: 1}]"
    last = f"{{teacher_steps: 2, student_steps: 1, prediction_type: sample, {converted}}}"
    ladder = f"[{{teacher_steps: 4, student_steps: 2, {phase}}}, {last}]"
    resize = "evaluation.resize=torchmetrics"  # the reader takes smaller images
    config = tiny_config(tmp_path, teacher, "data.num_images=8", resize, f"ladder={ladder}")
    stages.prepare(config)
    stages.distill(config)
    stages.export(config)
    for steps in (2, 1):
        exported = json.loads(
            (config.run_dir / "rungs" / str(steps) / "scheduler" / "scheduler_config.json").read_text()
        )
        assert exported["rescale_betas_zero_snr"] is True
        assert exported["prediction_type"] == ("sample" if steps == 1 else "v_prediction")


def with_timesteps(folders, place, count):
    """The tiny Stable Diffusion 1.5 with a noise schedule of `count` timesteps."""
    shutil.copytree(folders / "sd15", place / "short")
    path = place / "short" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": count}))
    return f"teacher.path={place / 'short'}"


@pytest.mark.slow
def test_a_teacher_with_500_timesteps_is_distilled_on_its_own_schedule(folders, tmp_path):
    """In diffusers' pipeline the U-Net is given timestep 499, the last of 500, and the one in the middle."""
    phases = "phases: [{objective: mse, max_train_steps: 1}, {objective: single, max_train_steps: 1}]"
    ladder = f"ladder=[{{teacher_steps: 4, student_steps: 2, {phases}}}]"
    options = ["data.num_images=8", "training.train_batch_size=2", "export.formats=[diffusers]"]
    options.append("evaluation.resize=torchmetrics")
    config = tiny_config(tmp_path, with_timesteps(folders, tmp_path, 500), *options, ladder)
    stages.prepare(config)
    stages.distill(config)
    stages.export(config)
    pipeline = DiffusionPipeline.from_pretrained(teacher_folder(config), dtype=torch.float32)
    load_few_step(pipeline, config.run_dir / "rungs" / "2")
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a thing", output_type="latent")
    assert pipeline.scheduler.timesteps.tolist() == [499, 249]


def test_a_ladder_of_more_steps_than_the_teacher_has_timesteps_is_refused(folders, tmp_path):
    teacher = with_timesteps(folders, tmp_path, 10)
    with pytest.raises(ConfigError, match=r"^ladder\.0\.teacher_steps: got 128; allowed: 1 to 10, [^\n]*$"):
        open_run(tiny_config(tmp_path, teacher))
    ladder = "ladder=[{teacher_steps: 2, student_steps: 1, start_timestep: 499, phases: [{objective: mse}]}]"
    with pytest.raises(ConfigError, match=r"^evaluation\.teacher_steps\.0: got 32; allowed: 1 to 10, "):
        open_run(tiny_config(tmp_path, teacher, ladder))
    with pytest.raises(ConfigError, match=r"^ladder\.0\.start_timestep: got 499; allowed: 1 to 9, "):
        open_run(tiny_config(tmp_path, teacher, ladder, "evaluation.teacher_steps=[8]"))


@pytest.mark.parametrize(
    ("family", "kind"), [("sd15", "sample"), ("sd15", "v_prediction"), ("sd21_v", "sample")]
)
def test_a_rung_with_another_prediction_type_must_begin_with_convert(folders, tmp_path, family, kind):
    teacher = f"teacher.path={folders / family}"
    rung = f"teacher_steps: 2, student_steps: 1, prediction_type: {kind}"
    message = rf"^ladder\.0\.prediction_type: got {kind}, but [^\n]* allowed: [^\n]*objective: convert[^\n]*$"
    with pytest.raises(ConfigError, match=message):
        open_run(tiny_config(tmp_path, teacher, f"ladder=[{{{rung}, phases: [{{objective: mse}}]}}]"))
    phases = "[{objective: convert}, {objective: mse}]"
    open_run(tiny_config(tmp_path, teacher, f"ladder=[{{{rung}, phases: {phases}}}]"))
