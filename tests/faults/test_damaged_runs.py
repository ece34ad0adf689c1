"""Damaged files in a run's folder: each is written again or named in one line. None is used, none causes a traceback."""

import itertools
import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from stepdistill import stages
from stepdistill.disk.durable import read_json, read_sealed, write_json, write_sealed
from stepdistill.ladder import save_lora
from stepdistill.run.rungs import WEIGHT_NAME
from stepdistill.run.start_from import TAKEN
from stepdistill.sampling import load_few_step
from stepdistill.stages import open_run
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.make import make_teacher
from tests.faults.small_run import copy_of, small_config, tree
from tests.integration.exported import random_student

PROMPT = "a red letter a on white"
LORA = f"rungs/1/{WEIGHT_NAME}"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """Flips one bit of the byte at three quarters of the file, which is data and not header."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def noise(path):
    path.write_bytes(bytes(range(256)) * 8)


def missing(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def deep(path):
    path.write_bytes(b"[" * 20_000)


def a_list(path):
    path.write_text("[1, 2]")


def no_keys(path):
    path.write_text("{}")


def a_text(path):
    path.write_text('"text"')


def other_types(path):
    """Wraps every value in a list."""
    path.write_text(json.dumps({key: [[value]] for key, value in read_json(path).items()}))


BYTES = (cut, empty, flip, noise, missing, folder)
SHAPES = (deep, a_list, no_keys, a_text, other_types)


def parametrize_damages(damages, *, fast=None):
    """One test parameter per damage; those that are not in `fast` are marked slow."""
    marked = [d if fast is None or d in fast else pytest.param(d, marks=pytest.mark.slow) for d in damages]
    return pytest.mark.parametrize("damage", marked, ids=lambda damage: damage.__name__)


def measured_numbers(config):
    """The numbers of the table without those that measure time."""
    results = read_sealed(config.run_dir / "evaluation" / "results.json")
    timed = ("seconds_per_image", "speed_up", "cost")
    return [{k: v for k, v in row.items() if k not in timed} for row in results["rows"]]


def evaluation_files(config):
    """sha256 of the evaluation's files by path, without markers and manifests, which hold seconds."""
    files = tree(config.run_dir / "evaluation")
    return {name: digest for name, digest in files.items() if not name.endswith(".json")}


def exported_files(config):
    """sha256 of all files in rungs/ by path, without the cards, which name their folder."""
    return {k: v for k, v in tree(config.run_dir / "rungs").items() if not k.endswith("README.md")}


# evaluation/: everything is computed again

# Each damage is in another folder, so that one evaluation repairs all of them.
RECOMPUTED = {
    "teacher-4/images/000001.png": "its images are drawn again",
    "student-2/latents/000004.safetensors": "its images are drawn again",
    "student-1/chunks/000000.json": "its images are drawn again",
    "seeds/student-1/images/000000.png": "its images are drawn again",
    "studies/teacher-4/latents/000000.safetensors": "its images are drawn again",
    "floor/manifest.json": "it is written again",
    "student-1/cost.json": "the cost is measured again",
    "student-2/features/main.safetensors": "the features are computed again",
    "features/real/main.safetensors": "the features are computed again",
}
NOT_NOTICED = {  # if one of these is missing, no other file says that it existed
    missing: {"student-1/chunks/000000.json", "floor/manifest.json", "student-1/cost.json"}
    | {name for name in RECOMPUTED if "features" in name},
}


@parametrize_damages((cut, empty, flip, noise, missing), fast=(cut, flip))
def test_damaged_files_of_an_evaluation_are_named_and_computed_again(whole_run, copy, run_command, damage):
    for name in RECOMPUTED:
        damage(copy.run_dir / "evaluation" / name)
    outcome = run_command(lambda: stages.evaluate(copy))
    assert (outcome.code, outcome.errors) == (0, [])
    for name, then in RECOMPUTED.items():
        if name not in NOT_NOTICED.get(damage, ()):
            assert f"{name} is missing or not as it was written: {then}" in outcome.messages, name
    assert evaluation_files(copy) == evaluation_files(whole_run)
    assert measured_numbers(copy) == measured_numbers(whole_run)
    assert run_command(lambda: stages.evaluate(copy)).messages == ""


@parametrize_damages(SHAPES, fast=(other_types,))
def test_json_of_another_shape_in_an_evaluation_is_written_again(whole_run, copy, run_command, damage):
    changed = [name for name in RECOMPUTED if name.endswith(".json")]
    for name in changed:
        damage(copy.run_dir / "evaluation" / name)
    outcome = run_command(lambda: stages.evaluate(copy))
    assert (outcome.code, outcome.errors) == (0, [])
    for name in changed:
        if damage is not no_keys:
            assert name in outcome.messages
    assert evaluation_files(copy) == evaluation_files(whole_run)
    assert measured_numbers(copy) == measured_numbers(whole_run)


def test_a_replaced_drawn_image_is_neither_measured_nor_shown(whole_run, copy, run_command):
    images = copy.run_dir / "evaluation" / "student-2" / "images"
    shutil.copy(images / "000005.png", images / "000002.png")
    outcome = run_command(lambda: stages.report(copy))
    assert outcome.code == 0
    assert "000002.png is missing or not as it was written: it is left out of the report" in outcome.messages
    assert run_command(lambda: stages.evaluate(copy)).code == 0
    assert evaluation_files(copy) == evaluation_files(whole_run)
    assert run_command(lambda: stages.report(copy)).messages == ""


@pytest.mark.parametrize("of", ["latents/000000", "features/main"])
def test_a_changed_number_in_latents_or_features_is_not_measured(whole_run, copy, run_command, of):
    """The file is complete and its header unchanged; only a number differs."""
    path = copy.run_dir / "evaluation" / "student-1" / f"{of}.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[7] += 1
    save_file(tensors, path, metadata=header)
    assert str(path) in run_command(lambda: stages.evaluate(copy)).messages
    assert measured_numbers(copy) == measured_numbers(whole_run)


def test_an_evaluation_of_an_earlier_version_is_reused(whole_run, copy, run_command):
    """Markers of that version hold no sha256: nothing is drawn again, and from then on a change is noticed."""
    for marker in copy.run_dir.glob("evaluation/**/chunks/*.json"):
        raw = read_json(marker)
        write_json(marker, {key: raw[key] for key in ("images", "seconds_per_image")})
    image = copy.run_dir / "evaluation" / "student-1" / "images" / "000003.png"
    stamp = image.stat().st_mtime_ns
    cut(copy.run_dir / "evaluation" / "student-2" / "images" / "000003.png")
    outcome = run_command(lambda: stages.evaluate(copy))
    assert "student-2/images/000003.png" in outcome.messages
    assert len(outcome.warnings) == 1
    assert image.stat().st_mtime_ns == stamp
    assert evaluation_files(copy) == evaluation_files(whole_run)
    Image.new("RGB", (32, 32)).save(image)
    assert "student-1/images/000003.png" in run_command(lambda: stages.evaluate(copy)).messages
    assert evaluation_files(copy) == evaluation_files(whole_run)


# rungs/


@parametrize_damages((*BYTES, *SHAPES))
def test_a_damaged_rung_json_is_named_by_every_command_and_its_rung_trained_again(
    whole_run, copy, run_command, damage
):
    path, before = copy.run_dir / "rungs/1/rung.json", tree(copy.run_dir / "evaluation")
    damage(path)
    line = f"stepdistill: {path} is missing or not as it was written; fix: `stepdistill distill`, which trains it"
    for command in (
        lambda: stages.evaluate(copy),
        lambda: stages.sample(copy.run_dir, steps=1, prompt=PROMPT, seed=0, output=copy.run_dir / "x.png"),
        lambda: stages.export(copy, steps=[1]),
    ):
        outcome = run_command(command)
        assert (outcome.code, len(outcome.errors), outcome.warnings) == (2, 1, [])
        assert outcome.errors[0].startswith(line)
    assert tree(copy.run_dir / "evaluation") == before
    if damage is not cut:
        return  # one retraining is enough
    outcome = run_command(lambda: stages.distill(copy))
    assert outcome.code == 0
    assert (
        f"{path} is missing or not as it was written: the 1-step rung counts as not finished"
        in outcome.messages
    )
    assert tree(copy.run_dir)[LORA] == tree(whole_run.run_dir)[LORA]
    assert run_command(lambda: stages.export(copy)).messages == ""


@pytest.mark.parametrize(
    "change",
    [{"prediction_type": "sample"}, {"student_steps": 4}, {"start_timestep": 399}, {"base_fingerprint": "0"}],
    ids=lambda change: next(iter(change)),
)
def test_another_value_in_rung_json_is_not_used(copy, run_command, change):
    path = copy.run_dir / "rungs/2/rung.json"
    write_json(path, read_json(path) | change)
    outcome = run_command(lambda: stages.evaluate(copy))
    assert outcome.code == 2
    assert str(path) in outcome.errors[0]
    with pytest.raises(ValueError, match=r"rung\.json is not as it was written"):
        load_few_step(None, path.parent)


def test_a_rung_of_an_earlier_version_without_a_checksum_is_read(copy, run_command):
    for path in copy.run_dir.glob("rungs/*/rung.json"):
        write_json(path, read_sealed(path))
    assert run_command(lambda: stages.distill(copy)).messages == ""
    write_json(path, {key: value for key, value in read_json(path).items() if key != "lora_rank"})
    assert run_command(lambda: stages.export(copy)).warnings != []


@parametrize_damages(BYTES)
def test_damaged_weights_of_a_rung_are_named(copy, run_command, damage):
    damage(copy.run_dir / LORA)
    outcome = run_command(lambda: stages.evaluate(copy))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert f"{copy.run_dir / LORA} is missing or not as it was written" in outcome.errors[0]
    with pytest.raises(ValueError, match=r"pytorch_lora_weights|holds 0 LoRA files"):
        load_few_step(None, copy.run_dir / "rungs/1")


EXPORTED = ("rungs/1/scheduler/scheduler_config.json", "rungs/1/base.json")


@pytest.mark.parametrize("name", EXPORTED)
@parametrize_damages((*BYTES, *SHAPES), fast=(flip, a_list))
def test_a_damaged_export_is_named_and_exported_again(whole_run, copy, run_command, name, damage):
    if (name, damage) == ("rungs/1/base.json", missing):
        return  # an earlier version exported none; load_few_step warns that the base could not be checked
    damage(copy.run_dir / name)
    before = tree(copy.run_dir / "evaluation")
    with pytest.raises(
        ValueError,
        match=r"(scheduler_config|base)\.json is (missing or )?not as it was exported|no exported rung",
    ):
        load_few_step(None, copy.run_dir / "rungs/1")
    outcome = run_command(lambda: stages.evaluate(copy))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert outcome.errors[0].startswith(f"stepdistill: {copy.run_dir / name} is ")
    assert "not as it was exported; fix: `stepdistill export` writes it again" in outcome.errors[0]
    assert tree(copy.run_dir / "evaluation") == before
    if damage is folder:
        outcome = run_command(lambda: stages.export(copy))
        assert f"fix: move the folder {copy.run_dir / name} away" in outcome.errors[0]
        (copy.run_dir / name).rmdir()
    assert run_command(lambda: stages.export(copy)).code == 0
    assert exported_files(copy) == exported_files(whole_run)


@parametrize_damages((cut, flip, deep), fast=(flip,))
def test_sample_exports_a_damaged_rung_again(whole_run, copy, run_command, damage):
    images = []
    for config in (whole_run, copy):
        if config is copy:
            for name in EXPORTED:
                damage(copy.run_dir / name)
        image = copy.run_dir.parent / f"{len(images)}.png"
        outcome = run_command(
            lambda path=image, c=config: stages.sample(c.run_dir, steps=1, prompt=PROMPT, seed=3, output=path)
        )
        assert outcome.code == 0
        images.append(image.read_bytes())
    assert "base.json is not as it was exported; fix: `stepdistill export`" in outcome.messages
    assert images[0] == images[1]


@parametrize_damages((cut, empty, flip, noise), fast=(cut, flip))
def test_a_damaged_kohya_file_is_refused_and_exported_again(whole_run, copy, run_command, damage):
    (path,) = copy.run_dir.glob("rungs/2/kohya/*.safetensors")
    damage(path)
    pipeline = DiffusionPipeline.from_pretrained(embedded_folder("teacher"), torch_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"fix: (copy or )?export it again"):
        load_few_step(pipeline, path)
    assert run_command(lambda: stages.export(copy)).code == 0
    assert exported_files(copy) == exported_files(whole_run)


def test_another_prediction_type_in_a_kohya_files_header_is_refused(copy):
    (path,) = copy.run_dir.glob("rungs/2/kohya/*.safetensors")
    content = path.read_bytes()
    entry = rb"\"prediction_type\": \"epsilon\""
    assert entry in content
    path.write_bytes(content.replace(entry, rb"\"prediction_type\": \"samples\""))
    with pytest.raises(ValueError, match="has a header that cannot be read"):
        load_few_step(None, path)


# cache/ and the teacher's folder


@pytest.mark.parametrize("name", ["manifest.json", "text.safetensors", "shards/00000.safetensors"])
@parametrize_damages((cut, flip, missing), fast=(flip,))
def test_a_damaged_cache_is_named_and_prepared_again(whole_run, copy, run_command, name, damage):
    shutil.rmtree(copy.run_dir / "rungs")
    damage(copy.run_dir / "cache" / name)
    outcome = run_command(lambda: stages.distill(copy))
    assert (outcome.code, len(outcome.errors)) == (4, 1)
    assert "no intact cache in" in outcome.errors[0]
    assert "run `stepdistill prepare`" in outcome.errors[0]
    assert run_command(lambda: stages.prepare(copy)).code == 0
    assert tree(copy.run_dir / "cache") == tree(whole_run.run_dir / "cache")


@parametrize_damages(SHAPES, fast=(no_keys,))
def test_a_cache_manifest_of_another_shape_is_written_again(whole_run, copy, run_command, damage):
    damage(copy.run_dir / "cache" / "manifest.json")
    lent = copy.model_copy(
        update={
            "name": "borrower",
            "data": copy.data.model_copy(update={"source": str(copy.run_dir / "cache")}),
        }
    )
    outcome = run_command(lambda: stages.prepare(lent))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "cache/manifest.json is damaged or of another version" in outcome.errors[0]
    outcome = run_command(lambda: stages.prepare(copy))
    assert outcome.code == 0
    assert not any("the data changed" in line for line in outcome.warnings)
    assert tree(copy.run_dir / "cache") == tree(whole_run.run_dir / "cache")


@pytest.fixture(scope="module")
def run_with_lora_teacher(tmp_path_factory):
    """The config of a run whose teacher is the letters teacher with a LoRA merged into it."""
    place = tmp_path_factory.mktemp("made")
    save_lora(random_student(embedded_folder("teacher")), place / "lora")
    config = small_config(place / "runs", f"teacher.loras=[{{path: {place / 'lora'}}}]")
    open_run(config)
    make_teacher(config)
    return config


@parametrize_damages((cut, empty, flip, noise, missing, *SHAPES), fast=(flip,))
def test_the_teacher_is_written_again_if_its_json_is_damaged(
    run_with_lora_teacher, tmp_path, run_command, damage
):
    config = copy_of(run_with_lora_teacher, tmp_path)
    damage(config.run_dir / "teacher.json")
    outcome = run_command(lambda: stages.evaluate(config))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    before = tree(config.run_dir / "teacher")
    outcome = run_command(lambda: make_teacher(config))
    assert outcome.code == 0
    assert tree(config.run_dir / "teacher") == before
    assert tree(config.run_dir)["teacher.json"] == tree(run_with_lora_teacher.run_dir)["teacher.json"]


# the report, and what it reads

SHOWN = (
    "environment.json",
    "cache/manifest.json",
    "rungs/2/rung.json",
    "rungs/1/previews/phase0-mse-end.json",
    TAKEN,
)


@parametrize_damages((cut, noise, flip, deep, a_list, a_text), fast=(cut, a_list))
def test_a_report_names_the_damaged_files_it_skips(copy, run_command, damage):
    preview = next(copy.run_dir.glob("rungs/1/previews/*.png"))
    image = copy.run_dir / "evaluation/student-1/images/000001.png"
    write_sealed(copy.run_dir / TAKEN, {"1": {"from": "runs/other/rungs/1", "sha256": "0"}})
    for path in (*(copy.run_dir / name for name in SHOWN), preview, image):
        damage(path)
    outcome = run_command(lambda: stages.report(copy))
    assert (outcome.code, outcome.errors) == (0, [])
    for path in (*(copy.run_dir / name for name in SHOWN), preview, image):
        unnoticed = damage is flip and path == preview  # previews are only shown, nothing is measured on them
        assert unnoticed or str(path) in outcome.messages, path


def test_damaged_lines_of_the_log_are_skipped_and_counted(copy, run_command):
    log = copy.run_dir / "log.jsonl"
    content = log.read_bytes()
    wrong = (
        b"[" * 20_000,
        b"[1]",
        b'"a"',
        b"\xff",
        b'{"rung": [2], "phase": 0, "step": 0}',
        b'{"rung": 2, "phase": "0"}',
    )
    log.write_bytes(
        b"\n".join([*wrong, content[:-1]]) + b'\n{"rung": 2, "pha'
    )  # the last line is cut, as when the process is killed
    for command in (lambda: stages.report(copy), lambda: stages.distill(copy)):
        assert run_command(command).code == 0
    assert (
        "log.jsonl is missing or not as it was written: 6 of its 8 lines are left out"
        in run_command(lambda: stages.report(copy)).messages
    )


@parametrize_damages((cut, empty, flip, noise, *SHAPES))
def test_damaged_results_are_refused_and_measured_again(whole_run, copy, run_command, damage):
    path = copy.run_dir / "evaluation" / "results.json"
    damage(path)
    outcome = run_command(lambda: stages.report(copy))
    assert (outcome.code, len(outcome.errors), outcome.warnings) == (2, 1, [])
    assert f"{path} is not what `stepdistill evaluate` writes" in outcome.errors[0]
    if damage is cut:
        outcome = run_command(lambda: stages.export(copy))
        assert outcome.code == 0
        assert "the card is written without numbers" in outcome.messages
        assert run_command(lambda: stages.evaluate(copy)).messages == ""
        assert measured_numbers(copy) == measured_numbers(whole_run)
        assert run_command(lambda: stages.report(copy)).messages == ""


PARTS = (
    "rows",
    "floor",
    "metrics",
    "protocol",
    "prompts",
    "warnings",
    "diversity_grid",
    "scale_sweep",
    "num_images",
)


@pytest.mark.parametrize(
    "value", [3, "text", *(pytest.param(v, marks=pytest.mark.slow) for v in ([[]], {"a": [3]}))], ids=str
)
def test_unsealed_results_of_another_shape_cause_no_traceback(copy, run_command, value):
    path = copy.run_dir / "evaluation" / "results.json"
    results = read_sealed(path)
    codes = []
    for part in PARTS:
        write_json(path, results | {part: value})
        outcome = run_command(lambda: stages.report(copy, output=copy.run_dir / "page"))
        codes.append(outcome.code)
        assert len(outcome.errors) == (outcome.code == 2), part
    assert codes.count(2) >= 5


SAID_OF_CONFIG = {
    cut: "is not the config of a run",
    empty: "is not the config of a run",
    noise: "cannot read",
    deep: "cannot read",
    a_list: "is not the config of a run",
    a_text: "is not the config of a run",
    no_keys: "is not the config of a run",
    missing: "no config.yaml",
    folder: "no config.yaml",
}


@parametrize_damages(SAID_OF_CONFIG)
def test_a_damaged_config_yaml_is_one_line_for_every_command(copy, run_command, damage):
    path = copy.run_dir / "config.yaml"
    before = tree(copy.run_dir)
    damage(path)
    from stepdistill.config.load import load_config

    for command in (
        lambda: stages.evaluate(load_config(copy.run_dir)),
        lambda: stages.sample(copy.run_dir, steps=1, prompt=PROMPT, seed=0, output=path.with_name("x.png")),
        lambda: stages.prepare(copy),
    ):
        outcome = run_command(command)
        assert (outcome.code, len(outcome.errors), outcome.warnings) == (2, 1, [])
    outcome = run_command(lambda: stages.report_runs([copy.run_dir]))
    assert len(outcome.errors) == (outcome.code == 2)
    assert outcome.code == 2 or damage in (cut, no_keys)  # the page shows what can still be read
    after = tree(copy.run_dir)
    untouched = {
        name: digest for name, digest in before.items() if not name.startswith(("config.yaml", "report"))
    }
    assert {name: after[name] for name in untouched} == untouched


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{here}: &{here} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]"
    for before, here in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize("text", [BOMB, "ladder: &a [*a]", "1: 2\n[3]: 4", "seed: 1\nladder: 7"])
def test_a_config_with_exploding_aliases_or_nesting_costs_no_memory(copy, run_command, text):
    (copy.run_dir / "config.yaml").write_text(text)
    for command in (lambda: stages.prepare(copy), lambda: stages.report_runs([copy.run_dir])):
        outcome = run_command(command)
        assert (outcome.code, len(outcome.errors)) == (2, 1)
