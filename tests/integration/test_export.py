"""Every file of an exported rung gives the trained U-Net in a new process, whichever tool reads it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from eval.random_teacher import unet_config
from stepdistill.config.load import load_config
from stepdistill.export.card_tools import tools_section
from stepdistill.export.fused import fused_unet
from stepdistill.export.kohya import sgm_name
from stepdistill.export.rung import HEADER, export_rung
from stepdistill.models.lora_file import read_lora
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import STUDENT
from stepdistill.run.rungs import RungRecord, require_rung, rung_folder
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import embedded_folder
from tests.integration.exported import (
    RANK,
    random_student,
    rung_of,
    unet_output,
    update_rung_json,
    with_export,
    write_rung,
)
from tests.integration.kohya_reader import merged
from tests.original_layout import unet_name

FAMILIES = ("sd15", "sd21_v", "sdxl")
FRESH = """
import pathlib
import sys
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

teacher, rung, inputs, output = sys.argv[1:]
tensors = load_file(inputs)
added = {key: tensors[key] for key in ("text_embeds", "time_ids") if key in tensors} or None
pipeline = DiffusionPipeline.from_pretrained(teacher)
outputs = {}

@torch.no_grad()
def ask(unet, name):
    outputs[name] = unet(
        tensors["sample"], tensors["timestep"], tensors["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False
    )[0].contiguous()

def loaded(name, *place, **options):
    pipeline.load_lora_weights(*place, adapter_name=name, **options)
    ask(pipeline.unet, name)
    pipeline.set_adapters(name, 0.5)
    ask(pipeline.unet, name + " half")
    pipeline.unload_lora_weights()

ask(pipeline.unet, "base")
loaded("diffusers", rung)
for file in sorted(pathlib.Path(rung, "kohya").glob("*.safetensors")):
    loaded(file.stem, str(file))
ask(UNet2DConditionModel.from_pretrained(f"{rung}/fused/unet"), "fused")
save_file(outputs, output)
"""


def inputs_for(unet):
    from stepdistill.export.onnx_unet import inputs_of

    return inputs_of(unet, 2, tokens=10, seed=3)


@pytest.fixture(
    scope="module", params=["sd15", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])]
)
def family(request, tmp_path_factory):
    """(config, teacher, network, folder) with both spellings of kohya's file and the fused U-Net, in float32."""
    place = tmp_path_factory.mktemp(request.param)
    config, teacher, network = rung_of(place, request.param, "export.dtype=float32")
    spellings = ("diffusers", "sgm") if request.param == "sdxl" else ("diffusers",)
    for spelling in spellings:
        folder = export_rung(with_export(config, kohya_names=spelling, formats=["kohya", "fused"]), 4)
        (file,) = (folder / "kohya").glob("*.safetensors")
        file.rename(folder / spelling)
    for spelling in spellings:
        (folder / spelling).rename(folder / "kohya" / f"kohya_{spelling}.safetensors")
    return config, teacher, network, folder


@pytest.mark.slow
def test_a_fresh_process_loads_the_trained_unet(family, tmp_path):
    _, teacher, network, folder = family
    from safetensors.torch import save_file

    inputs = inputs_for(network.model)
    save_file(inputs, tmp_path / "inputs.safetensors")
    script = FRESH.replace("{rung}/kohya_{spelling}", "{rung}/kohya/kohya_{spelling}")
    command = [
        sys.executable,
        "-c",
        script,
        teacher,
        folder,
        tmp_path / "inputs.safetensors",
        tmp_path / "out.safetensors",
    ]
    completed = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    outputs = load_file(tmp_path / "out.safetensors")
    with network.using(STUDENT):
        trained = unet_output(network.model, inputs)
    half_unet = load_network(teacher)
    for name, layer in read_lora(folder).layers.items():
        half_unet.get_submodule(name).weight.data += 0.5 * layer.delta()
    half = unet_output(half_unet, inputs)
    size = trained.abs().max()
    assert (outputs["base"] - trained).abs().max() > 0.01 * size  # the LoRA does something
    assert (half - trained).abs().max() > 0.01 * size
    names = {name for name in outputs if name.startswith("kohya") and "half" not in name}
    is_xl = "text_embeds" in inputs
    assert names == ({"kohya_diffusers", "kohya_sgm"} if is_xl else {"kohya_diffusers"})
    for name in ("diffusers", *names):
        assert (outputs[name] - trained).abs().max() <= 1e-6 * max(1, size), name
        assert (outputs[f"{name} half"] - half).abs().max() <= 2e-6 * max(1, size), name
    assert (outputs["fused"] - trained).abs().max() <= 2e-6 * max(1, size)


@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
def test_kohyas_file_is_right_for_a_reader_of_its_documentation(family, spelling):
    _, teacher, _, folder = family
    if spelling == "sgm" and not load_network(teacher).config.addition_embed_type:
        pytest.skip("SD has one spelling")
    weights = {key: w.detach() for key, w in load_network(teacher).named_parameters()}
    attended = {key.split(".")[1] for key in weights if key.startswith("up_blocks") and "attentions" in key}
    spelt = {key: unet_name(key, attended) if spelling == "sgm" else key for key in weights}
    merged_weights = merged(
        folder / "kohya" / f"kohya_{spelling}.safetensors", {spelt[key]: w for key, w in weights.items()}
    )
    expected = dict(UNet2DConditionModel.from_pretrained(folder / "fused" / "unet").named_parameters())
    changed = 0
    for key, weight in expected.items():
        assert torch.allclose(merged_weights[spelt[key]], weight, rtol=0, atol=1e-6), key
        changed += not torch.equal(weight, weights[key])
    assert changed == len(read_lora(folder).layers) > 50


def test_the_original_names_are_those_of_the_original_layout(family):
    _, teacher, _, folder = family
    unet = load_network(teacher)
    names = dict(unet.named_parameters())
    attended = {key.split(".")[1] for key in names if key.startswith("up_blocks") and "attentions" in key}
    for name in read_lora(folder).layers:
        assert sgm_name(name, dict(unet.config)) == unet_name(f"{name}.weight", attended).removesuffix(
            ".weight"
        )


@pytest.mark.parametrize(
    ("family_name", "version", "architecture", "prefix"),
    [
        ("sd15", "sd_v1", "stable-diffusion-v1/lora", "lora_unet_down_blocks_0_"),
        ("sd21_v", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "lora_unet_down_blocks_0_"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "lora_unet_input_blocks_1_0_"),
    ],
)
@pytest.mark.slow_after_first
def test_kohyas_header_says_what_the_tools_look_for(tmp_path, family_name, version, architecture, prefix):
    config, _, _ = rung_of(tmp_path, family_name, "export.license=openrail++", "name=my-model")
    folder = export_rung(config, 4)
    path = folder / "kohya" / "my-model_4step_lora.safetensors"
    with safe_open(path, framework="pt") as file:
        header, keys = file.metadata(), list(file.keys())
        assert file.get_tensor(keys[-1]).dtype == torch.float16
    assert any(key.startswith(prefix) for key in keys)
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_base_model_version": version,
        "ss_v2": str(family_name == "sd21_v"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.title": "my-model_4step_lora",
        "modelspec.license": "openrail++",
    }
    assert {key: header[key] for key in expected} == expected
    assert header["modelspec.prediction_type"] == ("v" if family_name == "sd21_v" else "epsilon")
    facts = json.loads(header[HEADER])
    assert (facts["student_steps"], facts["guidance_scale"], facts["timesteps"]) == (
        4,
        1.0,
        [999, 749, 499, 249],
    )
    before = path.read_bytes()
    path.unlink()
    export_rung(
        with_export(config, formats=["kohya", "fused"]), 4
    )  # exporting other formats too changes no byte
    assert path.read_bytes() == before


@pytest.mark.slow
def test_equal_weights_are_equal_bytes_however_long_they_took_to_train(tmp_path):
    content = []
    for place, seconds in (("first", 61.5), ("second", 7.25)):
        (tmp_path / place).mkdir()
        config, _, _ = rung_of(tmp_path / place, "sd15", f"teacher.path={tmp_path / 'first' / 'teacher'}")
        record = require_rung(config.run_dir, 4)
        dataclasses.replace(record, training_seconds=seconds).write(rung_folder(config.run_dir, 4))
        folder = export_rung(config, 4)
        content.append({path.name: path.read_bytes() for path in sorted((folder / "kohya").iterdir())})
        content[-1]["lora"] = (folder / "pytorch_lora_weights.safetensors").read_bytes()
        assert json.loads((folder / "rung.json").read_text())["training_seconds"] == seconds
    assert content[0] == content[1]


def test_the_diffusers_lora_file_says_that_it_is_for_diffusers_only(tmp_path):
    config, _, _ = rung_of(tmp_path, "sd15")
    folder = export_rung(config, 4)
    lower = export_rung(with_export(config, rank=2), 4)
    for place in (folder, lower):
        with safe_open(place / "pytorch_lora_weights.safetensors", framework="pt") as file:
            hint = file.metadata()["usage_hint"]
        assert "leave out the rest without an error" in hint
        card = " ".join((place / "README.md").read_text().split())
        assert "`pytorch_lora_weights.safetensors` is for diffusers only" in card
    assert read_lora(folder).layers


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 2},
        {"use_rslora": True},
        {"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1, "conv1": 16}},
        {"lora_alpha": 3, "use_rslora": True},
    ],
)
@pytest.mark.slow_after_first
def test_alpha_that_is_not_the_rank_is_in_kohyas_file_and_in_the_fused_unet(tmp_path, changes):
    """Compares with peft's output for that config."""
    config, teacher, _ = rung_of(tmp_path, "sd15", "export.dtype=float32")
    folder = config.run_dir / "rungs" / "4"
    path = folder / "pytorch_lora_weights.safetensors"
    _with_peft_config(path, changes)
    update_rung_json(folder)
    exported = export_rung(with_export(config, formats=["kohya", "fused"]), 4)
    unet = load_network(teacher)
    unet.load_lora_adapter(load_file(path), prefix="unet", metadata=_peft_config(path), adapter_name="x")
    inputs = inputs_for(unet)
    expected = unet_output(unet, inputs)
    (file,) = (exported / "kohya").glob("*.safetensors")
    weights = {key: w.detach() for key, w in load_network(teacher).named_parameters()}
    by_kohya = load_network(teacher)
    by_kohya.load_state_dict(merged(file, weights))
    scale = expected.abs().max()
    assert (unet_output(by_kohya, inputs) - expected).abs().max() <= 3e-6 * scale
    assert (unet_output(fused_unet(teacher, read_lora(path)), inputs) - expected).abs().max() <= 3e-6 * scale
    plain = _with_peft_config(path, {"lora_alpha": 4, "use_rslora": False, "alpha_pattern": {}})
    assert (unet_output(fused_unet(teacher, read_lora(plain)), inputs) - expected).abs().max() > 1e-3 * scale


def _peft_config(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def _with_peft_config(path, changes):
    from safetensors.torch import save_file

    config = {**_peft_config(path), **{f"unet.{key}": value for key, value in changes.items()}}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save_file(load_file(path), path, metadata=metadata)
    return path


def test_all_exported_rungs_have_equal_shapes(tmp_path):
    """A server needs this to swap the 8-, 4- and 2-step rungs in one compiled network."""
    config, teacher, _ = rung_of(tmp_path, "sd15", steps=8)
    write_rung(config, teacher, 4, seed=1)
    shapes = []
    for steps in (8, 4):
        folder = export_rung(config, steps)
        shapes.append({k: t.shape for k, t in load_file(folder / "pytorch_lora_weights.safetensors").items()})
        reduced = export_rung(with_export(config, rank=2), steps)
        shapes.append(
            {k: t.shape for k, t in load_file(reduced / "pytorch_lora_weights.safetensors").items()}
        )
    assert shapes[0] == shapes[2]
    assert shapes[1] == shapes[3]
    assert {min(shape[:2]) for shape in shapes[1].values()} == {2}


def second_weight(network):
    return list(network.group(STUDENT).values())[1]


def test_the_active_adapter_takes_part_in_the_forward_pass(tmp_path):
    """Guards the tests above: outputs with and without the adapter differ."""
    _, teacher, network = rung_of(tmp_path, "sd15")
    inputs = inputs_for(network.model)
    with network.using(STUDENT):
        first = unet_output(network.model, inputs)
    assert not torch.allclose(unet_output(network.model, inputs), first, atol=1e-3)
    assert not torch.equal(second_weight(random_student(teacher, seed=1)), second_weight(network))


@pytest.mark.parametrize(
    ("teacher_kind", "student_kind", "zero_snr", "comfy", "elsewhere"),
    [
        ("epsilon", "epsilon", False, "strength 1.0;", "CFG scale 1."),
        (
            "epsilon",
            "sample",
            False,
            "ModelSamplingDiscrete with sampling x0, zsnr false",
            "not with this LoRA",
        ),
        (
            "v_prediction",
            "v_prediction",
            True,
            "sampling v_prediction, zsnr true",
            "CFG scale 1; set up the base",
        ),
        ("v_prediction", "epsilon", False, "sampling eps, zsnr false", "not with this LoRA"),
    ],
)
@pytest.mark.slow_after_first
def test_the_card_names_the_settings_for_each_tool(
    tmp_path, teacher_kind, student_kind, zero_snr, comfy, elsewhere
):
    config, teacher, _ = rung_of(tmp_path, "sd15", prediction_type=student_kind)
    path = teacher / "scheduler" / "scheduler_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"prediction_type": teacher_kind, "rescale_betas_zero_snr": zero_snr}))
    card = " ".join((export_rung(config, 4) / "README.md").read_text().split())
    assert comfy in card
    assert elsewhere in card


def card_of_tools(unet, **options):
    """The card's section about tools, for a rung on the letters teacher with another U-Net."""
    record = RungRecord(1, 2, "epsilon", RANK, "", "", **options)
    facts = TeacherFacts.of_folder(embedded_folder("teacher"))
    teacher = dataclasses.replace(facts, configs={**facts.configs, "unet": unet})
    config = load_config("configs/letters.yaml", [])
    return " ".join(tools_section(config, record, Path("mine_1step_lora.safetensors"), teacher).split())


def test_a_unet_of_other_depth_is_not_offered_to_a1111():
    """A1111's map of names has three places per block, for two layers and a resampler."""
    config = unet_config("sd15")
    assert "CFG scale 1." in card_of_tools(config)
    assert "cannot open it" not in card_of_tools(config)
    shallow = card_of_tools(config | {"layers_per_block": 1})
    assert (
        "A1111, Forge: not with this LoRA. They expect two layers in every block of the U-Net, and" in shallow
    )
    assert "KSampler with 1 step, cfg 1.0" in shallow
    letters = card_of_tools(json.loads((embedded_folder("teacher") / "unet" / "config.json").read_text()))
    assert "and this one has 1." in letters
    assert (
        "other widths (64 channels in the first block, 64 in the text embeddings), so the unmodified tools cannot open it"
        in letters
    )
    for unet in (unet_config("sd21_v"), unet_config("sdxl")):
        assert "cannot open it" not in card_of_tools(unet)


def test_a_rung_with_start_timestep_is_offered_to_comfyui_and_to_ddim_alone(tmp_path):
    config, _, _ = rung_of(tmp_path, "sd15", steps=1, start_timestep=399)
    card = " ".join((export_rung(config, 1) / "README.md").read_text().split())
    assert "drag `kohya/letters_1step_comfyui.json` into its window" in card
    assert "SDTurboScheduler (steps 1, denoise 0.4) -> AddNoise" in card
    assert "-> LatentMultiply 1.32 -> SamplerCustomAdvanced with DisableNoise, BasicGuider and euler" in card
    assert "EulerDiscreteScheduler begins with the noise scaled by 0.76" in card
    assert "Their samplers cannot give the U-Net pure noise at timestep 399" in card
    assert "KSampler with" not in card


def test_the_folder_for_the_hub_names_the_repository_but_no_local_path(tmp_path):
    from stepdistill.export.hub import stage

    config, _, _ = rung_of(tmp_path, "sd15", "export.base_model=some/base", "export.license=mit")
    folder = export_rung(with_export(config, formats=["kohya", "fused"]), 4)
    (folder / "previews").mkdir()
    (folder / "previews" / "a.png").write_bytes(b"x")
    export_rung(with_export(config, rank=2), 4)
    copy = stage(config, 4, folder, "me/mine", tmp_path / "up")
    files = sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file())
    assert files == [
        "README.md",
        "base.json",
        "fused/unet/config.json",
        "fused/unet/diffusion_pytorch_model.safetensors",
        "kohya/letters_4step_comfyui.json",
        "kohya/letters_4step_lora.safetensors",
        "pytorch_lora_weights.safetensors",
        "rung.json",
        "scheduler/scheduler_config.json",
    ]
    card = (copy / "README.md").read_text()
    assert "base_model: some/base\nbase_model_relation: adapter\n" in card
    assert "pipeline.load_lora_weights('me/mine')" in card
    assert "from_pretrained('some/base'" in card
    for path in copy.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
