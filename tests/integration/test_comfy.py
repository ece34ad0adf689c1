"""ComfyUI's workflow beside kohya's file: its nodes fit together and draw the same latents as load_few_step."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from eval.random_teacher import build
from stepdistill.export import comfy
from stepdistill.export.rung import export_rung
from stepdistill.run.rungs import RungRecord
from stepdistill.sampling import load_few_step
from stepdistill.teacher.facts import TeacherFacts
from tests.integration.comfy_nodes import check_structure, run
from tests.integration.exported import rung_of, with_export
from tests.integration.few_step import without_warning

FAMILIES = {
    "sd15": ("sd15", {}),
    "sd21_v": ("sd21_v", {}),
    "zero_snr": ("sd21_v", {"rescale_betas_zero_snr": True}),
    "sdxl": ("sdxl", {}),
}
RUNGS = [
    ("sd15", 4, {}),
    ("sd15", 2, {"prediction_type": "sample"}),
    ("sd15", 1, {}),
    ("sd15", 1, {"start_timestep": 399}),
    ("sd15", 1, {"start_timestep": 499}),
    ("sd15", 1, {"start_timestep": 620, "prediction_type": "sample"}),
    ("sd21_v", 4, {}),
    ("zero_snr", 4, {}),
    ("sdxl", 1, {"start_timestep": 399}),
]
MORE_RUNGS = [
    ("sd15", 8, {}),
    ("sd15", 1, {"start_timestep": 4}),
    ("sd21_v", 1, {"start_timestep": 699}),
    ("sdxl", 4, {}),
    ("sdxl", 1, {"prediction_type": "sample"}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a name in FAMILIES to (a folder with that family's tiny teacher, the name of the family)."""
    by_name = {}

    def of(name):
        if name not in by_name:
            family, scheduler = FAMILIES[name]
            by_name[name] = tmp_path_factory.mktemp(name)
            pipeline = build(family, tiny=True)
            pipeline.scheduler.register_to_config(**scheduler)
            pipeline.save_pretrained(by_name[name] / "teacher", safe_serialization=True)
        return by_name[name], FAMILIES[name][0]

    return of


def exported(folders, name, steps, options):
    place, family = folders(name)
    prompts = 'preview.prompts=["a (red) letter a"]'
    config, teacher, _ = rung_of(place, family, "export.dtype=float32", prompts, steps=steps, **options)
    folder = export_rung(config, steps)
    (path,) = (folder / "kohya").glob("*_comfyui.json")
    return config, teacher, folder, json.loads(path.read_text())


def ours(teacher, folder):
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    load_few_step(pipeline, folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return without_warning(pipeline, "a (red) letter a", generator=generator, output_type="latent").images


def relative_error(latents, expected):
    return float((latents - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        *RUNGS[::3],
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [*RUNGS, *MORE_RUNGS]
            if case not in RUNGS[::3]
        ),
    ],
)
@pytest.mark.slow_after_first
def test_the_comfyui_workflow_gives_the_same_latents_as_load_few_step(folders, name, steps, options):
    _, teacher, folder, workflow = exported(folders, name, steps, options)
    check_structure(workflow)
    latents = run(workflow, DiffusionPipeline.from_pretrained(teacher), folder / "kohya")
    assert relative_error(latents, ours(teacher, folder)) < 2e-4


@pytest.mark.parametrize("start", [399, 499])
@pytest.mark.slow_after_first
def test_without_the_latent_multiplication_the_workflow_draws_something_else(folders, start):
    _, teacher, folder, workflow = exported(folders, "sd15", 1, {"start_timestep": start})
    (node,) = (n for n in workflow["nodes"] if n["type"] == "LatentMultiply")
    node["widgets_values"] = [1.0]
    latents = run(workflow, DiffusionPipeline.from_pretrained(teacher), folder / "kohya")
    assert relative_error(latents, ours(teacher, folder)) > 0.03


@pytest.mark.parametrize(("name", "options"), [("sd21_v", {}), ("sd15", {"prediction_type": "sample"})])
@pytest.mark.slow_after_first
def test_without_model_sampling_the_workflow_draws_something_else(folders, name, options):
    _, teacher, folder, workflow = exported(folders, name, 2, options)
    (node,) = (n for n in workflow["nodes"] if n["type"] == "ModelSamplingDiscrete")
    node["widgets_values"] = ["eps", False]
    latents = run(workflow, DiffusionPipeline.from_pretrained(teacher), folder / "kohya")
    assert relative_error(latents, ours(teacher, folder)) > 0.03


@pytest.mark.parametrize(
    ("start", "denoise", "first_sigma", "multiplier"),
    [
        (399, 0.4, None, 1.32),
        (499, 0.5, None, 1.1766),
        (99, 0.1, None, 3.0929),
        (899, 0.9, None, 1.0072),
        (620, 1.0, 2.456261, 1.0797),
    ],
)
def test_a_start_timestep_is_computed_from_the_schedule(folders, start, denoise, first_sigma, multiplier):
    base = TeacherFacts.of_folder(folders("sd15")[0] / "teacher").scheduler
    setting = comfy.setting_of(record_of(start_timestep=start), base)
    assert setting.start == comfy.Start(denoise, first_sigma, multiplier)
    timesteps = [999 - 100 * k for k in range(10)]
    assert first_sigma is not None or timesteps[10 - int(10 * denoise)] == start


def record_of(**options):
    fields = {"student_steps": 1, "teacher_steps": 2, "prediction_type": "epsilon", "lora_rank": 4}
    return RungRecord(**fields, base_fingerprint="", sha256="", **options)


def test_the_last_timestep_needs_no_extra_nodes(folders):
    base = TeacherFacts.of_folder(folders("sd15")[0] / "teacher").scheduler
    assert comfy.setting_of(record_of(start_timestep=999), base) == comfy.setting_of(record_of(), base)


def test_the_workflow_names_files_and_size_but_no_local_path(folders):
    workflow = comfy.workflow(
        comfy.setting_of(record_of(), TeacherFacts.of_folder(folders("sd15")[0] / "teacher").scheduler),
        checkpoint=comfy.model_file_name("/somewhere/my-model.safetensors"),
        lora="mine_1step_lora.safetensors",
        teacher_loras=[(comfy.model_file_name("/somewhere/style/"), 0.8)],
        size=(768, 512),
        prompt="a cat",
        title="mine_1step",
    )
    check_structure(workflow)
    widgets = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    assert widgets["CheckpointLoaderSimple"] == ["my-model.safetensors"]
    assert widgets["LoraLoader"] == ["style.safetensors", 0.8, 0.8]
    assert widgets["LoraLoaderModelOnly"] == ["mine_1step_lora.safetensors", 1.0]
    assert widgets["EmptyLatentImage"] == [512, 768, 1]
    assert widgets["SaveImage"] == ["mine_1step"]
    assert "somewhere" not in json.dumps(workflow)


def test_a_lower_rank_has_a_separate_workflow(folders):
    config, _, folder, _ = exported(folders, "sd15", 8, {})
    lower = export_rung(with_export(config, rank=2), 8)
    for place, name in ((folder, "letters_8step"), (lower, "letters_8step_rank2")):
        workflow = json.loads((place / "kohya" / f"{name}_comfyui.json").read_text())
        (node,) = (n for n in workflow["nodes"] if n["type"] == "LoraLoaderModelOnly")
        assert (place / "kohya" / node["widgets_values"][0]).is_file()
        assert f"`kohya/{name}_comfyui.json`" in (place / "README.md").read_text()


def test_another_noise_schedule_gets_no_workflow_and_the_card_says_so(tmp_path):
    config, teacher, _ = rung_of(tmp_path, "sd15")
    path = teacher / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    folder = export_rung(config, 4)
    assert not list((folder / "kohya").glob("*.json"))
    card = " ".join((folder / "README.md").read_text().split())
    assert "ComfyUI: not with this LoRA. It samples with Stable Diffusion's noise schedule" in card
    assert "A1111, Forge: not with this LoRA. They sample with Stable Diffusion's noise schedule" in card
