"""A ladder of several teachers through all stages, resumed to equal bits; teachers that do not fit are refused."""

import json
import shutil

import pytest
from PIL import Image

from eval.random_teacher import build
from stepdistill import stages
from stepdistill.cli import guarded
from stepdistill.disk.durable import read_sealed
from stepdistill.models.adapters import adapter_metadata
from stepdistill.models.lora_file import write_lora
from stepdistill.models.shared_network import STUDENT
from stepdistill.run.rungs import WEIGHT_NAME, rung_folder
from stepdistill.teacher.folder import embedded_folder
from tests.integration.conftest import SMALL, tiny_config
from tests.integration.exported import random_student
from tests.integration.test_checkpoint import distill_and_stop
from tests.integration.test_objectives import shortened


def write_expert(teacher, folder, *, seed=0):
    """A random LoRA on a teacher, as diffusers saves it."""
    folder.mkdir()
    network = random_student(teacher, seed=seed)
    state = {key: 0.2 * tensor for key, tensor in network.adapter_state(STUDENT).items()}
    write_lora(folder, state, adapter_metadata(network.model, STUDENT))


def write_pipeline(folder, *, seed=0):
    """A tiny SD1.5 with random weights."""
    build("sd15", tiny=True, seed=seed).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Folders of two LoRAs on the letters' teacher."""
    place = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(["first", "second"]):
        write_expert(embedded_folder("teacher"), place / name, seed=seed)
    return place


@pytest.mark.slow
def test_the_shipped_config_of_two_experts_is_trained_and_measured(loras, tmp_path):
    paths = [f"teachers.{k}.loras.0.path={loras / name}" for k, name in enumerate(["first", "second"])]
    config = shortened("letters_experts", tmp_path, *paths)
    stages.run_all(config)
    rows = {row["row"]: row for row in read_sealed(config.run_dir / "evaluation" / "results.json")["rows"]}
    assert {"teacher-32", "student-4", "expert-first-32", "expert-second-32"} <= set(rows)
    assert {"accuracy_of_first", "accuracy_of_second"} <= set(rows["student-4"])
    # each prompt of the teacher's row is drawn by one of the two
    mixed, first, second = (rows[name] for name in ("teacher-32", "expert-first-32", "expert-second-32"))
    assert mixed["accuracy_of_first"] == first["accuracy_of_first"]
    assert mixed["accuracy_of_second"] == second["accuracy_of_second"]
    assert first["latent_mse_to_teacher"] > 0 < second["latent_mse_to_teacher"]
    assert "accuracy of first" in (config.run_dir / "report" / "results.md").read_text()


@pytest.mark.slow
def test_stopped_and_started_again_it_has_equal_bits(loras, tmp_path, monkeypatch):
    phases = [{"objective": "mse", "max_train_steps": 3, "learning_rate": 1e-3}]
    ladder = [{"teacher_steps": 8, "student_steps": 4, "phases": phases}]
    experts = [
        {"name": name, "loras": [{"path": str(loras / name)}], "prompts": prompts}
        for name, prompts in (("first", "letter [a-p] "), ("second", "letter [k-z] "))
    ]
    options = [
        f"ladder={json.dumps(ladder)}",
        f"teachers={json.dumps(experts)}",
        "training.checkpoint={every_minutes: 0}",
    ]
    straight, stopped = (tiny_config(tmp_path / name, *options) for name in ("straight", "stopped"))
    for config in (straight, stopped):
        stages.prepare(config)
    stages.distill(straight)
    distill_and_stop(stopped, monkeypatch, after=1)
    stages.distill(stopped)
    weights = [(rung_folder(c.run_dir, 4) / WEIGHT_NAME).read_bytes() for c in (straight, stopped)]
    assert weights[0] == weights[1]
    other = tiny_config(tmp_path / "other", *options[:1])
    stages.prepare(other)
    stages.distill(other)
    assert (rung_folder(other.run_dir, 4) / WEIGHT_NAME).read_bytes() != weights[0]


@pytest.mark.slow
def test_another_pipeline_is_a_teacher_beside_the_first(tmp_path):
    """Its U-Net alone answers: a run whose only teacher it is ends as one that has it at teacher.path."""
    first, second = (write_pipeline(tmp_path / name, seed=seed) for seed, name in enumerate(["one", "two"]))
    for part in ("text_encoder", "vae"):
        shutil.rmtree(second / part)
        shutil.copytree(first / part, second / part)
    phases = [{"objective": "mse", "max_train_steps": 2, "learning_rate": 1e-3}]
    options = [
        f"ladder={json.dumps([{'teacher_steps': 8, 'student_steps': 4, 'phases': phases}])}",
        *(
            "data.source=letters",
            "data.resolution=64",
            "evaluation.features=reader",
            "evaluation.resize=torchmetrics",
        ),
    ]
    beside = tiny_config(
        tmp_path / "a", *options, f"teacher.path={first}", f"teachers=[{{name: other, path: {second}}}]"
    )
    stages.prepare(beside)
    stages.distill(beside)
    alone = tiny_config(tmp_path / "b", *options, f"teacher.path={first}")
    stages.prepare(alone)
    stages.distill(alone)
    weights = [(rung_folder(c.run_dir, 4) / WEIGHT_NAME).read_bytes() for c in (beside, alone)]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        (
            "[{name: a, loras: [{path: nowhere}]}]",
            "teachers.0.loras.0.path: got 'nowhere', but there is no file nowhere",
        ),
        ("[{name: a, path: nowhere}]", "teachers.0.path: got 'nowhere', which holds no pipeline"),
        (
            "[{name: a, prompts: zebra}]",
            "teachers: no teacher's prompts ('zebra') match 'a ",
        ),
        (
            "[{name: a, loras: [{path: FOREIGN}]}]",
            "teachers.0.loras: the LoRA of a is a LoRA of another network",
        ),
        ("[{name: a, path: OTHER}]", "with a U-Net other than teacher.path has"),
    ],
)
def test_teachers_that_do_not_fit_are_refused_with_nothing_written(tmp_path, capsys, teachers, expected):
    if "FOREIGN" in teachers or "OTHER" in teachers:
        other = write_pipeline(tmp_path / "other")
        write_expert(other, tmp_path / "foreign")
        teachers = teachers.replace("FOREIGN", str(tmp_path / "foreign")).replace("OTHER", str(other))
    config = tiny_config(tmp_path / "runs", f"teachers={teachers}", *SMALL)
    assert guarded(lambda: stages.run_all(config)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["doctor", "prepare", "run_all"])
def test_one_caption_of_the_data_without_a_teacher_is_found_before_anything_is_encoded(
    tmp_path, capsys, stage
):
    """The prompts of previews and table have teachers; of the training captions, the last has none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, caption in enumerate([*["a red car"] * 7, "a zebra"]):
        Image.new("RGB", (64, 64), (number, 90, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    (tmp_path / "prompts.txt").write_text("a red car\n")
    config = tiny_config(
        tmp_path / "runs",
        "teachers=[{name: cars, prompts: car}]",
        f"data.source={folder}",
        "data.num_images=null",
        f"evaluation.prompts={tmp_path / 'prompts.txt'}",
        "preview.prompts=[a red car]",
    )
    assert guarded(lambda: getattr(stages, stage)(config)) == 2
    captured = capsys.readouterr()
    assert "no teacher's prompts ('car') match 'a zebra'" in captured.out + captured.err
    assert not (tmp_path / "runs").exists()
