"""SD3: the whole ladder on a tiny pipeline, its LoRAs in a vanilla pipeline, and teachers that are refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from eval.random_teacher import build
from stepdistill import stages
from stepdistill.config import ConfigError, LoraRow
from stepdistill.evaluation.draw.rows import try_scheduler
from stepdistill.export.scheduler import student_scheduler
from stepdistill.run.rungs import RungRecord
from stepdistill.sampling import FewStepWarning, load_few_step
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import broken_files, missing_parts, unsupported
from stepdistill.teacher.ladder_fit import check_ladder_fits
from tests.integration.conftest import tiny_config
from tests.integration.test_families import images

LADDER = [
    {"teacher_steps": 8, "student_steps": 8, "phases": [{"objective": "mse", "loss_space": "velocity"}]},
    {"teacher_steps": 8, "student_steps": 4, "phases": [{"objective": "mse"}, {"objective": "paired"}]},
    {"teacher_steps": 4, "student_steps": 2, "phases": [{"objective": "mse"}, {"objective": "single"}]},
    {"teacher_steps": 2, "student_steps": 1, "phases": [{"objective": "mse"}]},
]
SIGMAS = {4: [1.0, 0.75, 0.5, 0.25], 2: [1.0, 0.5]}
FRESH = """
import sys, torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
teacher, rung, sigmas, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(teacher)
pipeline.load_lora_weights(rung)
pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(rung, subfolder="scheduler")
options = {"guidance_scale": 1.0, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
torch.save(pipeline("a thing", sigmas=[float(s) for s in sigmas.split(",")], **options).images, output)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "teacher"
    build("sd35_medium", tiny=True).save_pretrained(folder, safe_serialization=True)
    return folder


def flow_config(place, teacher, source, *overrides):
    ladder = [r | {"phases": [p | {"max_train_steps": 2} for p in r["phases"]]} for r in LADDER]
    return tiny_config(
        place,
        f"teacher.path={teacher}",
        f"data.source={source}",
        "data.num_images=10",
        "data.teacher_steps=2",
        "lora.rank=4",
        "training.train_batch_size=2",
        f"ladder={json.dumps(ladder)}",
        "evaluation.num_images=8",
        "evaluation.teacher_steps=[2]",
        "evaluation.features=reader",
        "evaluation.resize=torchmetrics",
        "evaluation.diversity_prompts=0",
        "evaluation.lora_scales=[]",
        "evaluation.matrix=false",
        "evaluation.cost_batch_sizes=[]",
        "evaluation.floor=false",
        *overrides,
    )


def trained_on_int8(tmp_path, teacher, caplog):
    """Trains the ladder on a base in int8, whose output is near the whole one's."""
    (tmp_path / "prompts.txt").write_text("a thing\nanother thing\n")
    options = ["training.base_quantization=int8", "data.resolution=64", "training.mixed_precision=bf16"]
    config = flow_config(tmp_path, teacher, tmp_path / "prompts.txt", *options)
    with caplog.at_level("INFO"):
        stages.prepare(config)
        stages.distill(config)
    (line,) = [m for m in caplog.messages if "the base model in int8: its output is" in m]
    assert 0 < float(line.split("is ")[1].split(" %")[0]) < 3


def drawn_alone(teacher, rung, sigmas, tmp_path):
    """The latents that a vanilla pipeline draws in a process of its own."""
    output = tmp_path / "latents.pt"
    words = [teacher, rung, ",".join(map(str, sigmas)), output]
    subprocess.run([sys.executable, "-c", FRESH, *map(str, words)], check=True, capture_output=True)
    return torch.load(output)


@pytest.mark.parametrize(
    ("brought", "checkpointing"),
    [("images", "true"), pytest.param("prompts", "false", marks=pytest.mark.slow)],
)
def test_the_whole_ladder_ends_in_loras_that_a_vanilla_pipeline_loads(
    tmp_path, teacher, brought, checkpointing
):
    (tmp_path / "prompts.txt").write_text("a thing\nanother thing\n")
    source = images(tmp_path / "pictures") if brought == "images" else tmp_path / "prompts.txt"
    config = flow_config(tmp_path, teacher, source, f"training.gradient_checkpointing={checkpointing}")
    stages.run_all(config)
    results = json.loads((config.run_dir / "evaluation" / "results.json").read_text())
    assert {row["row"] for row in results["rows"]} == {"teacher-2", *(f"student-{n}" for n in (8, 4, 2, 1))}
    rung = config.run_dir / "rungs" / "4"
    keys = load_file(rung / "pytorch_lora_weights.safetensors").keys()
    assert all(key.startswith("transformer.transformer_blocks.") for key in keys)
    assert not (rung / "kohya").exists()
    card = (rung / "README.md").read_text()
    assert "sigmas=[1.0, 0.75, 0.5, 0.25]" in card
    assert "ModelSamplingSD3 with shift 3.0" in card
    vanilla = drawn_alone(teacher, rung, SIGMAS[4], tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    options = {"output_type": "latent"}
    base = pipeline("a thing", sigmas=SIGMAS[4], guidance_scale=1.0, generator=seeded(), **options).images
    load_few_step(pipeline, rung)
    ours = pipeline("a thing", generator=seeded(), **options).images
    assert torch.allclose(ours, vanilla, atol=1e-6)
    assert not torch.allclose(ours, base, atol=1e-4)
    with pytest.warns(FewStepWarning, match="trained for 4"):
        pipeline("a thing", num_inference_steps=2, **options)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    with pytest.warns(FewStepWarning, match=r"has shift=1.0, not 3.0"):
        pipeline("a thing", **options)


def seeded():
    return torch.Generator().manual_seed(0)


def test_a_complete_folder_is_accepted_and_its_facts_are_read(teacher):
    assert missing_parts(teacher) == []
    assert [*broken_files(teacher), *unsupported(teacher), *examine_pipeline(teacher)] == []
    facts = TeacherFacts.of_folder(teacher)
    assert (facts.network_part, facts.prediction_type, facts.is_zero_snr) == ("transformer", "velocity", True)
    assert facts.image_size == (64, 64)
    assert facts.latent_shape((64, 32)) == (16, 8, 4)
    assert facts.size_multiple == 16


def changed(teacher, target, part, **values):
    """A copy of the teacher with other values in the config of a part."""
    shutil.copytree(teacher, target)
    file = target / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return target


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("scheduler", {"shift": -1}, "shift: -1; allowed: a number above 0"),
        (
            "scheduler",
            {"use_karras_sigmas": True},
            "use_karras_sigmas: True; allowed: without use_karras_sigmas",
        ),
        (
            "scheduler",
            {"use_dynamic_shifting": True, "max_shift": "high"},
            "max_shift: 'high'; allowed: a number above 0",
        ),
        (
            "scheduler",
            {"use_dynamic_shifting": True, "max_image_seq_len": 256},
            "max_image_seq_len: 256; allowed: not base_image_seq_len",
        ),
        ("scheduler", {"num_train_timesteps": 1}, "num_train_timesteps: 1; allowed"),
        ("transformer", {"in_channels": 32}, "a transformer of 32 input channels; allowed: 16"),
        ("transformer", {"patch_size": 0}, "patch_size: 0; allowed: 1 to 16"),
        ("transformer", {"sample_size": 0}, "a transformer with sample_size: 0"),
        ("vae", {"shift_factor": None}, "a VAE with shift_factor: None; allowed: a number"),
        ("vae", {"latent_channels": 4}, "a transformer of 16 channels and a VAE of 4"),
    ],
)
def test_a_folder_that_cannot_be_distilled_is_refused_in_one_line(tmp_path, teacher, part, values, message):
    folder = changed(teacher, tmp_path / "odd", part, **values)
    with pytest.raises(ConfigError) as refused:
        stages.prepare(flow_config(tmp_path / "runs", folder, "letters"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ladder.3.start_timestep=499", "got 499, but this teacher matches flows"),
        ("ladder.0.phases.0.loss_space=epsilon", "gives zero weight to the first step of a flow"),
        ("export.formats=[onnx]", "got onnx, which is written for U-Nets"),
        (
            "export.formats=[kohya]",
            "got kohya, which is written for U-Nets; allowed for a transformer: diffusers",
        ),
    ],
)
def test_settings_that_flows_do_not_have_are_refused(tmp_path, teacher, override, message):
    config = flow_config(tmp_path, teacher, "letters", override)
    with pytest.raises(ConfigError, match=message):
        stages.run_all(config)
    assert not (config.run_dir / "cache").exists()


def test_a_scheduler_that_does_not_step_on_a_flow_is_refused_for_another_lora(tmp_path):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    row = LoraRow(name="other", path=str(tmp_path), steps=4, scheduler="LCMScheduler", scheduler_options={})
    with pytest.raises(
        ConfigError, match=r"loras: other: .*LCMScheduler does not step on the base model's flow"
    ):
        try_scheduler(row, flow)
    try_scheduler(row.model_copy(update={"scheduler": "FlowMatchLCMScheduler"}), flow)


@pytest.mark.slow
def test_the_ladder_is_trained_on_an_int8_base_that_is_near_the_whole_one(tmp_path, teacher, caplog):
    pytest.importorskip("torchao")
    trained_on_int8(tmp_path, teacher, caplog)


def test_latents_and_rungs_of_another_teacher_are_found_before_anything_is_made(tmp_path, teacher, capsys):
    other = tiny_config(tmp_path / "other", "data.num_images=8")
    stages.prepare(other)
    first = LADDER[0]
    rung = tmp_path / "rungs" / str(first["student_steps"])
    rung.mkdir(parents=True)
    RungRecord(first["student_steps"], first["teacher_steps"], "velocity", 4, "another", "0" * 64).write(rung)
    for source, more, message in (
        (other.run_dir / "cache", [], "holds latents of another model"),
        ("letters", [f"start_from={rung}"], "belongs to the base model another"),
    ):
        config = flow_config(tmp_path / "runs", teacher, source, *more)
        with pytest.raises(ConfigError, match="problem"):
            stages.doctor(config)
        assert message in capsys.readouterr().out
        with pytest.raises(ConfigError, match=message):
            stages.run_all(config)
        assert not config.run_dir.exists()


def test_models_that_are_distilled_already_are_refused(tmp_path, teacher):
    folder = shutil.copytree(teacher, tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    turbo = "stabilityai/stable-diffusion-3.5-large-turbo"
    for path, message in (
        (folder, "FLUX.1-dev has its guidance distilled into it"),
        (turbo, r"distilled to few steps already; allowed: a base model, here .*3.5-large$"),
    ):
        with pytest.raises(ConfigError, match=message):
            stages.prepare(flow_config(tmp_path / "runs", path, "letters"))


def test_a_damaged_weight_is_named(tmp_path, teacher):
    folder = shutil.copytree(teacher, tmp_path / "damaged")
    file = folder / "text_encoder_3" / "model.safetensors"
    state = load_file(file)
    state.pop("encoder.block.0.layer.0.SelfAttention.q.weight")
    save_file(state, file, metadata={"format": "pt"})
    assert any("text_encoder_3" in line and "lacks 1 of" in line for line in examine_pipeline(folder))


def test_a_dynamic_shift_is_a_fixed_one_at_the_runs_size(tmp_path, teacher):
    """The pipeline gives its scheduler mu by the number of patches; a student's scheduler has the shift that this makes."""
    folder = changed(teacher, tmp_path / "dynamic", "scheduler", use_dynamic_shifting=True, base_shift=0.8)
    assert unsupported(folder) == []
    facts, sigmas = TeacherFacts.of_folder(folder), SIGMAS[4]
    dynamic = FlowMatchEulerDiscreteScheduler.from_config(dict(facts.scheduler))
    for size in ((64, 64), (512, 768)):
        dynamic.set_timesteps(sigmas=sigmas, mu=0.8 + (1.15 - 0.8) / 3840 * (size[0] * size[1] // 256 - 256))
        fixed = student_scheduler(facts.scheduler_at(size), "velocity")
        fixed.set_timesteps(sigmas=sigmas)
        assert torch.allclose(fixed.sigmas, dynamic.sigmas, atol=1e-6)
    (tmp_path / "pictures").mkdir()
    buckets = flow_config(tmp_path, folder, tmp_path / "pictures", "data.buckets=true")
    with pytest.raises(ConfigError, match=r"data\.buckets: got true, but this teacher's shift depends"):
        check_ladder_fits(buckets, facts)


def test_steps_that_fall_together_after_the_shift_are_refused(tmp_path, teacher):
    facts = TeacherFacts.of_folder(changed(teacher, tmp_path / "steep", "scheduler", shift=1e7))
    config = flow_config(tmp_path, tmp_path / "steep", "letters")
    with pytest.raises(ConfigError, match=r"ladder\.0\.teacher_steps: got 8, but .* fall together"):
        check_ladder_fits(config, facts)
