"""Hostile or broken files other than a teacher's folder: one-file checkpoints, LoRAs, extractors. `doctor` refuses each in
one line with exit code 2, within seconds and with little memory, and no code in them is run."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from stepdistill.cli import _raised_here
from stepdistill.config.load import load_config
from stepdistill.disk.durable import sha256_file
from stepdistill.evaluation.check import check_evaluation
from stepdistill.export.kohya import read_kohya
from stepdistill.models.lora_file import read_lora
from stepdistill.teacher.lora_header import check_lora_header
from stepdistill.teacher.lora_trial import check_lora_numbers
from tests.extractors import build_clip, build_dinov2
from tests.faults.bounds import bounded, command, one_line, problems
from tests.faults.hostile_folders import edited, in_place_of, removed, replaced, retyped, with_number, without
from tests.integration.test_teachers import style_lora
from tests.original_layout import original_state

LORA = "pytorch_lora_weights.safetensors"


def refused(capsys, says, *options, stages=("doctor",)):
    """Asserts that each stage refuses in one line that matches `says`; for `doctor` one of its problems must match."""
    for stage in stages:
        code, out, error = command(capsys, stage, *options)
        assert code == 2, out + error
        line = one_line(error)
        lines = problems(out) if stage == "doctor" else [line]
        assert any(re.search(says, line) for line in lines), out + error


def refused_before_training(says, *options):
    """Asserts that the check before training, in `doctor` and `run`, raises an error in one line that matches `says`."""
    path, *overrides = options
    config = load_config(path, overrides)
    with bounded(), pytest.raises(ValueError, match=says) as caught:
        check_evaluation(config)
    assert "\n" not in str(caught.value)
    assert _raised_here(caught.value)


@pytest.fixture(scope="session")
def checkpoint(tiny_teacher, tmp_path_factory):
    """A folder with the teacher as one file, and its configs in a folder beside that file."""
    place = tmp_path_factory.mktemp("checkpoint")
    save_file(original_state(DiffusionPipeline.from_pretrained(tiny_teacher)), place / "model.safetensors")
    shutil.copytree(tiny_teacher, place / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return place


def evil(*parts):
    return edited("configs/model_index.json", unet=list(parts))


# name -> (how the checkpoint's folder is changed, pattern of `doctor`'s message, whether only `prepare` can detect it)
CHECKPOINTS = {
    "cut short": (
        lambda place: os.truncate(place / "model.safetensors", 10_000),
        r"model\.safetensors cannot be read as safetensors",
    ),
    "empty": (replaced("model.safetensors", b""), r"cannot be read as safetensors"),
    "a pipe": (in_place_of("model.safetensors", os.mkfifo), r"is a pipe or a device, not a file"),
    "a directory": (in_place_of("model.safetensors", os.mkdir), r"teacher"),
    "a LoRA": (
        retyped("model.safetensors", lambda _: {"lora_A.weight": torch.zeros(2)}),
        r"holds no whole model .*a LoRA goes into teacher\.loras",
    ),
    "configs that are not a pipeline's": (
        removed("configs/model_index.json"),
        r"teacher\.config: .* lacks model_index\.json",
    ),
    "configs with code": (evil("my_unet", "MyUnet"), r"teacher\.config: .*code of its own \(unet: my_unet\)"),
    "configs of the system": (evil("os", "system"), r"teacher\.config: .*code of its own \(unet: os\)"),
    "configs of another class": (
        evil("diffusers", "AutoencoderKL"),
        r"teacher\.config: .* as its unet; allowed",
    ),
    "configs that are not JSON": (
        replaced("configs/unet/config.json", b"{"),
        r"teacher\.config: .*is not JSON",
    ),
    "configs of a billion layers": (
        edited("configs/unet/config.json", layers_per_block=10**9),
        r"teacher\.config: .*layers_per_block is 1000000000",
    ),
    "configs of many thousand layers": (
        edited("configs/text_encoder/config.json", num_hidden_layers=10**5),
        r"teacher\.config: .*asks for 100000 layers",
    ),
    "configs of a billion timesteps": (
        edited("configs/scheduler/scheduler_config.json", num_train_timesteps=10**9),
        r"teacher\.config: .*num_train_timesteps: 1000000000",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_file_is_refused(name, checkpoint, tmp_path, options, capsys):
    change, says = CHECKPOINTS[name]
    place = tmp_path / "one"
    shutil.copytree(checkpoint, place)
    change(place)
    teacher = (f"teacher.path={place / 'model.safetensors'}", f"teacher.config={place / 'configs'}")
    refused(capsys, says, *options, *teacher, stages=("doctor", "prepare"))


def with_another(key):
    """A change that adds a tensor for which no model has a place."""
    return lambda state: state | {key: torch.zeros(3)}


TENSORS = {
    "a weight that is not a number": (with_number("out.2.weight", float("nan")), r"not finite"),
    "a weight of the U-Net missing": (
        without("middle_block.*weight"),
        r"unet: .*lacks 1 of \d+ weights, first mid_block",
    ),
    "a weight of the VAE missing": (
        without("first_stage_model.decoder.conv_in.bias"),
        r"vae: .*lacks 1 of \d+ weights, first decoder\.conv_in\.bias",
    ),
    "a weight of the text encoder missing": (
        without("cond_stage_model.*mlp.fc1.bias"),
        r"text_encoder: .*lacks 1 of \d+ weights, first encoder\.layers\.0\.mlp\.fc1\.bias",
    ),
    "a text encoder missing": (
        lambda state: {k: v for k, v in state.items() if not k.startswith("cond_stage")},
        r"text_encoder: .* holds no text_encoder",
    ),
    "a weight too many in the U-Net": (
        with_another("model.diffusion_model.extra.weight"),
        r"unet: .*has no place, first model\.diffusion_model\.extra\.weight",
    ),
    "a block too many in the U-Net": (
        with_another("model.diffusion_model.input_blocks.12.0.in_layers.0.weight"),
        r"unet: .*has no place, first down_blocks",
    ),
    "a weight too many in the VAE": (
        with_another("first_stage_model.extra.weight"),
        r"vae: .*has no place, first first_stage_model\.extra\.weight",
    ),
    "a weight too many in the text encoder": (
        with_another("cond_stage_model.transformer.text_model.extra.weight"),
        r"text_encoder: .*has no place, first extra\.weight",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_checkpoint_whose_tensors_are_not_those_of_its_configs_is_refused(
    name, checkpoint, tmp_path, options, capsys
):
    change, says = TENSORS[name]
    place = tmp_path / "one"
    shutil.copytree(checkpoint, place)
    retyped("model.safetensors", change)(place)
    teacher = (f"teacher.path={place / 'model.safetensors'}", f"teacher.config={place / 'configs'}")
    refused(capsys, says, *options, *teacher, stages=("doctor", "prepare"))
    assert not (tmp_path / "runs" / "letters" / "cache").exists()
    assert not (tmp_path / "runs" / "letters" / "teacher.json").exists()


def test_what_real_checkpoints_hold_besides_the_weights_is_accepted(checkpoint, tmp_path, options, capsys):
    """Averaged weights, noise schedules, and buffers of text encoders, as released checkpoints have them."""
    others = {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(1),
        "cond_stage_model.logit_scale": torch.ones(1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    place = tmp_path / "one"
    shutil.copytree(checkpoint, place)
    retyped("model.safetensors", lambda state: state | others)(place)
    teacher = (f"teacher.path={place / 'model.safetensors'}", f"teacher.config={place / 'configs'}")
    code, out, _ = command(capsys, "doctor", *options, *teacher)
    assert code == 0, out


@pytest.fixture(scope="session")
def style(tiny_teacher, tmp_path_factory):
    """The folder of a LoRA that fits the teacher."""
    place = tmp_path_factory.mktemp("style")
    style_lora(tiny_teacher, place)
    return place


def of_another_model(folder):
    state = load_file(folder / LORA)
    wider = {key: torch.cat([tensor, tensor], dim=1) for key, tensor in state.items() if ".lora_A." in key}
    save_file(state | wider, folder / LORA)


def two_files(folder):
    (folder / LORA).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def pickled(folder):
    torch.save({}, folder / "pytorch_lora_weights.bin")
    (folder / LORA).unlink()


LORAS = {
    "cut short": (lambda folder: os.truncate(folder / LORA, 1000), r"cannot be read as safetensors"),
    "empty": (replaced(LORA, b""), r"cannot be read as safetensors"),
    "a pipe": (in_place_of(LORA, os.mkfifo), r"is a pipe or a device|which does not exist|got path"),
    "no LoRA": (retyped(LORA, lambda _: {"something": torch.zeros(2)}), r"holds no LoRA"),
    "numbers that are none": (retyped(LORA, with_number("lora_A", float("nan"))), r"not finite"),
    "of another model": (of_another_model, r"does not fit the U-Net of .*shape"),
}
# name -> (peft's config in a LoRA's metadata, pattern of the message)
LORA_CONFIGS = {
    "a pattern that never ends": (
        {"alpha_pattern": {"(.*a)*(.*b)*(.*c)*(.*d)*!": 4}},
        r"unet\.alpha_pattern",
    ),
    "a pattern of ranks that never ends": ({"rank_pattern": {"(.*.*)*!": 4}}, r"unet\.rank_pattern"),
    "a pattern of words": ({"alpha_pattern": {"to_q": "much"}}, r"unet\.alpha_pattern"),
    "patterns that are a list": ({"alpha_pattern": ["to_q"]}, r"unet\.alpha_pattern"),
    "patterns without end": (
        {"alpha_pattern": {f"m{n}": 1 for n in range(9999)}},
        r"alpha_pattern.*up to \d+",
    ),
    "modules by an expression": ({"target_modules": "(.*.*)*!"}, r"unet\.target_modules"),
    "modules in lists by an expression": ({"target_modules": ["(.*.*)*!"]}, r"unet\.target_modules"),
    "no modules by an expression": ({"exclude_modules": "(.*.*)*!"}, r"unet\.exclude_modules"),
    "code of its own": (
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        r"unet\.megatron_config': .*allowed: nothing",
    ),
    "a change of the base model": ({"init_lora_weights": "pissa"}, r"unet\.init_lora_weights': 'pissa'"),
    "modules of its own": ({"modules_to_save": ["conv_in"]}, r"unet\.modules_to_save"),
    "a rank of billions": ({"r": 10**9}, r"unet\.r': 1000000000; allowed: 1 to 65536"),
    "no rank": ({"r": 0}, r"unet\.r': 0; allowed"),
    "an alpha that is none": ({"lora_alpha": float("nan")}, r"unet\.lora_alpha': nan; allowed: a number"),
    "lists in lists": ('{"unet.r": ' + "[" * 100_000, r"is not JSON: RecursionError"),
    "no object": ("[1]", r"is list; allowed: a JSON object"),
}


def with_config(content):
    """A change that puts peft's config, an object or a text, into a LoRA's metadata."""

    def change(folder):
        named = (
            content if isinstance(content, str) else json.dumps({f"unet.{k}": v for k, v in content.items()})
        )
        save_file(load_file(folder / LORA), folder / LORA, metadata={"lora_adapter_metadata": named})

    return change


def with_a_tensor_called(name):
    return retyped(LORA, lambda state: {name if key == min(state) else key: state[key] for key in state})


LORAS |= {f"metadata: {name}": (with_config(content), says) for name, (content, says) in LORA_CONFIGS.items()}
LORAS["a name that is an expression"] = (
    with_a_tensor_called("unet.(.*a)*(.*b)*!.lora_A.weight"),
    r"has a tensor called .*; allowed: up to 500 letters",
)
TEACHERS_LORAS = LORAS | {
    "two files": (two_files, r"holds 2 \.safetensors files; allowed: one"),
    "pickled": (pickled, r"holds 0 \.safetensors files"),
}


@pytest.mark.parametrize("name", [name for name in TEACHERS_LORAS if not name.startswith("metadata")])
def test_a_bad_lora_of_the_teacher_is_refused(name, tiny_teacher, style, tmp_path, options, capsys):
    change, says = TEACHERS_LORAS[name]
    shutil.copytree(style, tmp_path / "style")
    change(tmp_path / "style")
    loras = json.dumps([{"path": str(tmp_path / "style")}])
    settings = (f"teacher.path={tiny_teacher}", f"teacher.loras={loras}")
    refused(capsys, rf"teacher\.loras\.0\.path: .*({says})", *options, *settings, stages=("doctor",))
    code, _, error = command(capsys, "prepare", *options, *settings)
    assert code == 2
    assert "teacher.loras.0.path: " in one_line(error)


def row(path, **values):
    return "evaluation.loras=" + json.dumps([{"name": "theirs", "path": str(path), "steps": 4} | values])


@pytest.mark.parametrize("name", [name for name in LORAS if name.startswith(("metadata", "a name"))])
def test_no_header_of_a_lora_reaches_peft_unchecked(name, style, tmp_path):
    change, says = LORAS[name]
    shutil.copytree(style, tmp_path / "style")
    change(tmp_path / "style")
    with bounded(2):
        for read in (check_lora_header, read_lora, check_lora_numbers, lambda file: read_kohya(file, (), {})):
            with pytest.raises(ValueError, match=says) as caught:
                read(tmp_path / "style" / LORA)
            assert "\n" not in str(caught.value)


def test_what_peft_writes_passes_the_check_of_the_header(style, tmp_path):
    config = LoraConfig(r=4, target_modules=["to_q"], rank_pattern={"^a.to_q$": 8}, use_rslora=True).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    shutil.copytree(style, tmp_path / "style")
    with_config(config)(tmp_path / "style")
    assert check_lora_header(tmp_path / "style" / LORA)["unet.use_rslora"] is True


@pytest.mark.parametrize("name", [name for name in LORAS if not name.startswith("metadata")])
def test_a_bad_lora_row_of_the_table_is_refused(name, tiny_teacher, style, tmp_path, options):
    change, says = LORAS[name]
    shutil.copytree(style, tmp_path / "style")
    change(tmp_path / "style")
    settings = (f"teacher.path={tiny_teacher}", row(tmp_path / "style"))
    refused_before_training(rf"evaluation\.loras: theirs: .*({says})", *options, *settings)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000000000}']
)
def test_a_hostile_scheduler_beside_a_lora_is_refused(content, tiny_teacher, style, tmp_path, options):
    shutil.copytree(style, tmp_path / "style")
    (tmp_path / "style" / "scheduler").mkdir()
    (tmp_path / "style" / "scheduler" / "scheduler_config.json").write_text(content)
    says = "is damaged" if content.startswith("[") else "num_train_timesteps 1000000000; allowed: 1 to"
    settings = (f"teacher.path={tiny_teacher}", row(tmp_path / "style"))
    refused_before_training(says, *options, *settings)


SCHEDULERS = {
    "no scheduler": ({"scheduler": "StableDiffusionPipeline"}, r"got scheduler 'StableDiffusionPipeline'"),
    "a function": ({"scheduler": "os.system"}, r"got scheduler 'os\.system'"),
    "a billion timesteps": ({"scheduler_options": {"num_train_timesteps": 10**9}}, r"num_train_timesteps"),
    "half a timestep": ({"scheduler_options": {"num_train_timesteps": 0.5}}, r"num_train_timesteps"),
    "unknown spacing": ({"scheduler_options": {"timestep_spacing": "evil"}}, r"cannot sample in 4 steps"),
    "timesteps out of reach": (
        {"scheduler_options": {"timestep_spacing": "leading", "steps_offset": 10**6}},
        r"cannot sample in 4 steps: timesteps from",
    ),
    "timesteps where none are taken": (
        {"scheduler": "DDIMScheduler", "timesteps": [999, 749, 499, 249]},
        r"DDIMScheduler does not accept custom timesteps",
    ),
    "betas of another kind": ({"scheduler_options": {"beta_schedule": "evil"}}, r"cannot sample in 4 steps"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_bad_scheduler_of_a_table_row_is_refused(name, tiny_teacher, style, options):
    values, says = SCHEDULERS[name]
    refused_before_training(says, *options, f"teacher.path={tiny_teacher}", row(style, **values))


@pytest.fixture(scope="session")
def extractors(tmp_path_factory):
    """A folder with a tiny CLIP and a tiny DINOv2, each in a folder."""
    place = tmp_path_factory.mktemp("extractors")
    (place / "clip").mkdir()
    (place / "dinov2").mkdir()
    build_clip(place / "clip")
    build_dinov2(place / "dinov2")
    return place


def processor(**values):
    """A change that sets values of the image processor's config, which CLIP's folder holds inside another object."""

    def change(folder):
        if not (folder / "processor_config.json").is_file():
            return edited("preprocessor_config.json", **values)(folder)
        content = json.loads((folder / "processor_config.json").read_text())
        content["image_processor"] |= values
        return edited("processor_config.json", **content)(folder)

    return change


def with_broken_processor(folder):
    next(folder.glob("*processor_config.json")).write_text("{")


WEIGHTS = "model.safetensors"
EXTRACTORS = {
    "no folder": (shutil.rmtree, r"config\.json does not exist"),
    "no weights": (removed(WEIGHTS), r"model\.safetensors does not exist"),
    "weights cut short": (
        lambda folder: os.truncate(folder / WEIGHTS, 2000),
        r"cannot be read as safetensors",
    ),
    "weights that are a pipe": (in_place_of(WEIGHTS, os.mkfifo), r"is a pipe or a device"),
    "a weight missing": (retyped(WEIGHTS, without("layer.*weight")), r"no weights for"),
    "a weight that is not a number": (
        retyped(WEIGHTS, with_number("layer.*weight", float("nan"))),
        r"not finite",
    ),
    "a config that is not JSON": (replaced("config.json", b"{"), r"config\.json is not JSON"),
    "a config that is a pipe": (in_place_of("config.json", os.mkfifo), r"config\.json is a pipe"),
    "another model": (edited("config.json", model_type="bert"), r"it holds bert"),
    "a model with code": (
        edited("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        r"custom code",
    ),
    "a processor that is not JSON": (with_broken_processor, r"not a valid JSON"),
    "a deviation of nothing": (processor(image_std=[0, 0, 0]), r"image_std"),
    "a mean of one number": (processor(image_mean=0.5), r"shape"),
}
OF_CLIP = EXTRACTORS | {
    "a billion layers": (
        edited("config.json", text_config={"num_hidden_layers": 10**9}),
        r"num_hidden_layers is 1000000000",
    ),
    "many thousand layers": (
        edited("config.json", vision_config={"num_hidden_layers": 10**5}),
        r"asks for 100000 layers",
    ),
    "no tokenizer": (removed("tokenizer.json"), r"no tokenizer\.json"),
    "a tokenizer that is not JSON": (replaced("tokenizer.json", b"{"), r"JSON"),
}
OF_DINOV2 = EXTRACTORS | {
    "a billion layers": (edited("config.json", num_hidden_layers=10**9), r"num_hidden_layers is 1000000000"),
    "images of a million pixels": (
        processor(crop_size={"height": 10**6, "width": 10**6}),
        r"images of 1000000 pixels",
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("clip", name) for name in OF_CLIP), *(("dinov2", name) for name in OF_DINOV2)],
)
def test_a_bad_clip_or_dinov2_folder_is_refused(kind, name, tiny_teacher, extractors, tmp_path, options):
    change, says = {"clip": OF_CLIP, "dinov2": OF_DINOV2}[kind][name]
    shutil.copytree(extractors / kind, tmp_path / kind)
    change(tmp_path / kind)
    settings = (f"teacher.path={tiny_teacher}", f"evaluation.{kind}={tmp_path / kind}")
    refused_before_training(rf"evaluation\.{kind}: cannot load .*({says})", *options, *settings)


def of_another_net(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


INCEPTIONS = {
    "another file": (lambda path: path.write_bytes(b"PK no script"), "", r"expected f58cb9b6"),
    "no script, on your word": (lambda path: path.write_bytes(b"PK no script"), "#", r"is no TorchScript"),
    "another net, on your word": (of_another_net, "#", r"a TorchScript, but not FID's Inception"),
    "a pipe": (os.mkfifo, "", r"no Inception weights at"),
    "a directory": (os.mkdir, "", r"no Inception weights at"),
}


@pytest.mark.parametrize("name", INCEPTIONS)
def test_a_bad_inception_file_is_refused(name, tiny_teacher, tmp_path, options):
    make, trust, says = INCEPTIONS[name]
    path = tmp_path / "inception-2015-12-05.pt"
    make(path)
    word = f"#sha256={sha256_file(path)}" if trust else ""
    settings = (f"teacher.path={tiny_teacher}", f"evaluation.features=inception:{path}{word}")
    refused_before_training(says, *options, *settings)


def test_statistics_that_are_pickled_are_not_read(tiny_teacher, tmp_path, options, capsys):
    np.savez(tmp_path / "stats.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    settings = (f"teacher.path={tiny_teacher}", f"evaluation.reference_stats={tmp_path / 'stats.npz'}")
    refused(capsys, r"evaluation\.reference_stats: cannot read", *options, *settings)
    assert not Path("/tmp/it-ran").exists()


@pytest.mark.parametrize(("key", "name"), [("prompts", "prompts.txt"), ("reference_stats", "stats.npz")])
def test_pipes_and_devices_are_refused_as_prompts_and_statistics(key, name, tiny_teacher, tmp_path, options):
    os.mkfifo(tmp_path / f"a-{name}")
    (tmp_path / f"b-{name}").symlink_to("/dev/zero")
    for letter in "ab":
        place = f"evaluation.{key}={tmp_path / f'{letter}-{name}'}"
        refused_before_training(
            "is a pipe or a device, not a file", *options, f"teacher.path={tiny_teacher}", place
        )


def test_statistics_of_gigabytes_are_not_unpacked(tiny_teacher, tmp_path, options):
    packed = zipfile.ZipFile(tmp_path / "stats.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with packed, packed.open("mu.npy", "w") as member:
        for _ in range(257):
            member.write(bytes(2**20))
    settings = (f"teacher.path={tiny_teacher}", f"evaluation.reference_stats={tmp_path / 'stats.npz'}")
    refused_before_training("mu.npy has more than 268435456 bytes", *options, *settings)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/it-ran",))
