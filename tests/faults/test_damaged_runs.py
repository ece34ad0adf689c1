"""Damaged files in a run's folder: made again or named in one line, never used, never a traceback."""

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
    """One bit of the byte at three quarters, which is data and no header."""
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
    """Every value in a list of its own."""
    path.write_text(json.dumps({key: [[value]] for key, value in read_json(path).items()}))


BYTES = (cut, empty, flip, noise, missing, folder)
SHAPES = (deep, a_list, no_keys, a_text, other_types)


def names(damages, *, fast=None):
    """A test for each damage; those that are not among `fast` are slow."""
    marked = [d if fast is None or d in fast else pytest.param(d, marks=pytest.mark.slow) for d in damages]
    return pytest.mark.parametrize("damage", marked, ids=lambda damage: damage.__name__)


def measured(config):
    """The numbers of the table, but for those that are of time."""
    results = read_sealed(config.run_dir / "evaluation" / "results.json")
    timed = ("seconds_per_image", "speed_up", "cost")
    return [{k: v for k, v in row.items() if k not in timed} for row in results["rows"]]


def drawn(config):
    """What is drawn and computed of it, by place; but for markers and manifests, which hold seconds."""
    files = tree(config.run_dir / "evaluation")
    return {name: digest for name, digest in files.items() if not name.endswith(".json")}


def exported(config):
    """All of rungs/ but the cards, which name their folder."""
    return {k: v for k, v in tree(config.run_dir / "rungs").items() if not k.endswith("README.md")}


# evaluation/: everything is made again

# Each in a folder of its own, so that one evaluation heals all of them.
MADE_AGAIN = {
    "teacher-4/images/000001.png": "its pictures are drawn again",
    "student-2/latents/000004.safetensors": "its pictures are drawn again",
    "student-1/chunks/000000.json": "its pictures are drawn again",
    "seeds/student-1/images/000000.png": "its pictures are drawn again",
    "studies/teacher-4/latents/000000.safetensors": "its pictures are drawn again",
    "floor/manifest.json": "it is written again",
    "student-1/cost.json": "the cost is measured again",
    "student-2/features/main.safetensors": "the features are computed again",
    "features/real/main.safetensors": "the features are computed again",
}
NOT_NOTICED = {  # once it is gone nothing says that it was ever there
    missing: {"student-1/chunks/000000.json", "floor/manifest.json", "student-1/cost.json"}
    | {name for name in MADE_AGAIN if "features" in name},
}


@names((cut, empty, flip, noise, missing), fast=(cut, flip))
def test_what_is_damaged_of_an_evaluation_is_made_again_and_named(whole_run, copy, asked, damage):
    for name in MADE_AGAIN:
        damage(copy.run_dir / "evaluation" / name)
    found = asked(lambda: stages.evaluate(copy))
    assert (found.code, found.errors) == (0, [])
    for name, then in MADE_AGAIN.items():
        if name not in NOT_NOTICED.get(damage, ()):
            assert f"{name} is missing or not as it was written: {then}" in found.said, name
    assert drawn(copy) == drawn(whole_run)
    assert measured(copy) == measured(whole_run)
    assert asked(lambda: stages.evaluate(copy)).said == ""


@names(SHAPES, fast=(other_types,))
def test_json_of_another_shape_in_an_evaluation_is_written_again(whole_run, copy, asked, damage):
    changed = [name for name in MADE_AGAIN if name.endswith(".json")]
    for name in changed:
        damage(copy.run_dir / "evaluation" / name)
    found = asked(lambda: stages.evaluate(copy))
    assert (found.code, found.errors) == (0, [])
    for name in changed:
        if damage is not no_keys:
            assert name in found.said
    assert drawn(copy) == drawn(whole_run)
    assert measured(copy) == measured(whole_run)


def test_another_picture_in_the_place_of_a_drawn_one_is_not_measured_and_not_shown(whole_run, copy, asked):
    images = copy.run_dir / "evaluation" / "student-2" / "images"
    shutil.copy(images / "000005.png", images / "000002.png")
    shown = asked(lambda: stages.report(copy))
    assert shown.code == 0
    assert "000002.png is missing or not as it was written: it is left out of the report" in shown.said
    assert asked(lambda: stages.evaluate(copy)).code == 0
    assert drawn(copy) == drawn(whole_run)
    assert asked(lambda: stages.report(copy)).said == ""


@pytest.mark.parametrize("of", ["latents/000000", "features/main"])
def test_a_changed_number_in_latents_or_features_is_not_measured(whole_run, copy, asked, of):
    """A whole file, whose header says all that it said before."""
    path = copy.run_dir / "evaluation" / "student-1" / f"{of}.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[7] += 1
    save_file(tensors, path, metadata=header)
    assert str(path) in asked(lambda: stages.evaluate(copy)).said
    assert measured(copy) == measured(whole_run)


def test_an_evaluation_of_an_earlier_version_is_taken_over(whole_run, copy, asked):
    """Its markers knew no sha256: nothing is drawn again, and from now on a change is noticed."""
    for marker in copy.run_dir.glob("evaluation/**/chunks/*.json"):
        raw = read_json(marker)
        write_json(marker, {key: raw[key] for key in ("images", "seconds_per_image")})
    image = copy.run_dir / "evaluation" / "student-1" / "images" / "000003.png"
    stamp = image.stat().st_mtime_ns
    cut(copy.run_dir / "evaluation" / "student-2" / "images" / "000003.png")
    found = asked(lambda: stages.evaluate(copy))
    assert "student-2/images/000003.png" in found.said
    assert len(found.warnings) == 1
    assert image.stat().st_mtime_ns == stamp
    assert drawn(copy) == drawn(whole_run)
    Image.new("RGB", (32, 32)).save(image)
    assert "student-1/images/000003.png" in asked(lambda: stages.evaluate(copy)).said
    assert drawn(copy) == drawn(whole_run)


# rungs/


@names((*BYTES, *SHAPES))
def test_a_damaged_rung_json_is_named_by_every_command_and_its_rung_trained_again(
    whole_run, copy, asked, damage
):
    path, before = copy.run_dir / "rungs/1/rung.json", tree(copy.run_dir / "evaluation")
    damage(path)
    line = f"stepdistill: {path} is missing or not as it was written; mend: `stepdistill distill`, which trains it"
    for command in (
        lambda: stages.evaluate(copy),
        lambda: stages.sample(copy.run_dir, steps=1, prompt=PROMPT, seed=0, output=copy.run_dir / "x.png"),
        lambda: stages.export(copy, steps=[1]),
    ):
        found = asked(command)
        assert (found.code, len(found.errors), found.warnings) == (2, 1, [])
        assert found.errors[0].startswith(line)
    assert tree(copy.run_dir / "evaluation") == before
    if damage is not cut:
        return  # one retraining is enough
    found = asked(lambda: stages.distill(copy))
    assert found.code == 0
    assert f"{path} is missing or not as it was written: the 1-step rung counts as not finished" in found.said
    assert tree(copy.run_dir)[LORA] == tree(whole_run.run_dir)[LORA]
    assert asked(lambda: stages.export(copy)).said == ""


@pytest.mark.parametrize(
    "change",
    [{"prediction_type": "sample"}, {"student_steps": 4}, {"start_timestep": 399}, {"base_fingerprint": "0"}],
    ids=lambda change: next(iter(change)),
)
def test_another_value_in_rung_json_is_not_used(copy, asked, change):
    path = copy.run_dir / "rungs/2/rung.json"
    write_json(path, read_json(path) | change)
    found = asked(lambda: stages.evaluate(copy))
    assert found.code == 2
    assert str(path) in found.errors[0]
    with pytest.raises(ValueError, match=r"rung\.json is not as it was written"):
        load_few_step(None, path.parent)


def test_a_rung_of_an_earlier_version_without_a_checksum_is_read(copy, asked):
    for path in copy.run_dir.glob("rungs/*/rung.json"):
        write_json(path, read_sealed(path))
    assert asked(lambda: stages.distill(copy)).said == ""
    write_json(path, {key: value for key, value in read_json(path).items() if key != "lora_rank"})
    assert asked(lambda: stages.export(copy)).warnings != []


@names(BYTES)
def test_damaged_weights_of_a_rung_are_named(copy, asked, damage):
    damage(copy.run_dir / LORA)
    found = asked(lambda: stages.evaluate(copy))
    assert (found.code, len(found.errors)) == (2, 1)
    assert f"{copy.run_dir / LORA} is missing or not as it was written" in found.errors[0]
    with pytest.raises(ValueError, match=r"pytorch_lora_weights|holds 0 LoRA files"):
        load_few_step(None, copy.run_dir / "rungs/1")


EXPORTED = ("rungs/1/scheduler/scheduler_config.json", "rungs/1/base.json")


@pytest.mark.parametrize("name", EXPORTED)
@names((*BYTES, *SHAPES), fast=(flip, a_list))
def test_a_damaged_export_is_named_and_exported_again(whole_run, copy, asked, name, damage):
    if (name, damage) == ("rungs/1/base.json", missing):
        return  # as an earlier version exported it; load_few_step warns that the base could not be checked
    damage(copy.run_dir / name)
    before = tree(copy.run_dir / "evaluation")
    with pytest.raises(
        ValueError,
        match=r"(scheduler_config|base)\.json is (missing or )?not as it was exported|no exported rung",
    ):
        load_few_step(None, copy.run_dir / "rungs/1")
    found = asked(lambda: stages.evaluate(copy))
    assert (found.code, len(found.errors)) == (2, 1)
    assert found.errors[0].startswith(f"stepdistill: {copy.run_dir / name} is ")
    assert "not as it was exported; mend: `stepdistill export` writes it again" in found.errors[0]
    assert tree(copy.run_dir / "evaluation") == before
    if damage is folder:
        found = asked(lambda: stages.export(copy))
        assert f"mend: move the folder {copy.run_dir / name} away" in found.errors[0]
        (copy.run_dir / name).rmdir()
    assert asked(lambda: stages.export(copy)).code == 0
    assert exported(copy) == exported(whole_run)


@names((cut, flip, deep), fast=(flip,))
def test_sample_exports_again_what_is_damaged_of_an_export(whole_run, copy, asked, damage):
    pictures = []
    for config in (whole_run, copy):
        if config is copy:
            for name in EXPORTED:
                damage(copy.run_dir / name)
        picture = copy.run_dir.parent / f"{len(pictures)}.png"
        found = asked(
            lambda path=picture, c=config: stages.sample(
                c.run_dir, steps=1, prompt=PROMPT, seed=3, output=path
            )
        )
        assert found.code == 0
        pictures.append(picture.read_bytes())
    assert "base.json is not as it was exported; mend: `stepdistill export`" in found.said
    assert pictures[0] == pictures[1]


@names((cut, empty, flip, noise), fast=(cut, flip))
def test_a_damaged_kohya_file_is_refused_and_exported_again(whole_run, copy, asked, damage):
    (path,) = copy.run_dir.glob("rungs/2/kohya/*.safetensors")
    damage(path)
    pipeline = DiffusionPipeline.from_pretrained(embedded_folder("teacher"), torch_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mend: (copy or )?export it again"):
        load_few_step(pipeline, path)
    assert asked(lambda: stages.export(copy)).code == 0
    assert exported(copy) == exported(whole_run)


def test_another_prediction_type_in_a_kohya_files_header_is_refused(copy):
    (path,) = copy.run_dir.glob("rungs/2/kohya/*.safetensors")
    content = path.read_bytes()
    told = rb"\"prediction_type\": \"epsilon\""
    assert told in content
    path.write_bytes(content.replace(told, rb"\"prediction_type\": \"samples\""))
    with pytest.raises(ValueError, match="has a header that cannot be read"):
        load_few_step(None, path)


# cache/ and the teacher's folder


@pytest.mark.parametrize("name", ["manifest.json", "text.safetensors", "shards/00000.safetensors"])
@names((cut, flip, missing), fast=(flip,))
def test_a_damaged_cache_is_named_and_prepared_again(whole_run, copy, asked, name, damage):
    shutil.rmtree(copy.run_dir / "rungs")
    damage(copy.run_dir / "cache" / name)
    found = asked(lambda: stages.distill(copy))
    assert (found.code, len(found.errors)) == (2, 1)
    assert "no intact cache in" in found.errors[0]
    assert "run `stepdistill prepare`" in found.errors[0]
    assert asked(lambda: stages.prepare(copy)).code == 0
    assert tree(copy.run_dir / "cache") == tree(whole_run.run_dir / "cache")


@names(SHAPES, fast=(no_keys,))
def test_a_cache_manifest_of_another_shape_is_written_again(whole_run, copy, asked, damage):
    damage(copy.run_dir / "cache" / "manifest.json")
    lent = copy.model_copy(
        update={
            "name": "borrower",
            "data": copy.data.model_copy(update={"source": str(copy.run_dir / "cache")}),
        }
    )
    found = asked(lambda: stages.prepare(lent))
    assert (found.code, len(found.errors)) == (2, 1)
    assert "cache/manifest.json is damaged or of another version" in found.errors[0]
    found = asked(lambda: stages.prepare(copy))
    assert found.code == 0
    assert not any("the data changed" in line for line in found.warnings)
    assert tree(copy.run_dir / "cache") == tree(whole_run.run_dir / "cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose teacher is made of the letters' and a LoRA."""
    place = tmp_path_factory.mktemp("made")
    save_lora(random_student(embedded_folder("teacher")), place / "lora")
    config = small_config(place / "runs", f"teacher.loras=[{{path: {place / 'lora'}}}]")
    open_run(config)
    make_teacher(config)
    return config


@names((cut, empty, flip, noise, missing, *SHAPES), fast=(flip,))
def test_a_damaged_teacher_json_has_the_teacher_made_again(made, tmp_path, asked, damage):
    config = copy_of(made, tmp_path)
    damage(config.run_dir / "teacher.json")
    found = asked(lambda: stages.evaluate(config))
    assert (found.code, len(found.errors)) == (2, 1)
    before = tree(config.run_dir / "teacher")
    found = asked(lambda: make_teacher(config))
    assert found.code == 0
    assert tree(config.run_dir / "teacher") == before
    assert tree(config.run_dir)["teacher.json"] == tree(made.run_dir)["teacher.json"]


# the report, and what it reads

SHOWN = (
    "environment.json",
    "cache/manifest.json",
    "rungs/2/rung.json",
    "rungs/1/previews/phase0-mse-end.json",
    TAKEN,
)


@names((cut, noise, flip, deep, a_list, a_text), fast=(cut, a_list))
def test_a_report_names_what_it_leaves_out(copy, asked, damage):
    preview = next(copy.run_dir.glob("rungs/1/previews/*.png"))
    image = copy.run_dir / "evaluation/student-1/images/000001.png"
    write_sealed(copy.run_dir / TAKEN, {"1": {"from": "runs/other/rungs/1", "sha256": "0"}})
    for path in (*(copy.run_dir / name for name in SHOWN), preview, image):
        damage(path)
    found = asked(lambda: stages.report(copy))
    assert (found.code, found.errors) == (0, [])
    for path in (*(copy.run_dir / name for name in SHOWN), preview, image):
        unnoticed = damage is flip and path == preview  # a picture for the eye, which nothing is measured on
        assert unnoticed or str(path) in found.said, path


def test_lines_of_the_log_that_are_damaged_are_left_out_and_counted(copy, asked):
    log = copy.run_dir / "log.jsonl"
    whole = log.read_bytes()
    wrong = (
        b"[" * 20_000,
        b"[1]",
        b'"a"',
        b"\xff",
        b'{"rung": [2], "phase": 0, "step": 0}',
        b'{"rung": 2, "phase": "0"}',
    )
    log.write_bytes(b"\n".join([*wrong, whole[:-1]]) + b'\n{"rung": 2, "pha')  # the last as a kill leaves it
    for command in (lambda: stages.report(copy), lambda: stages.distill(copy)):
        assert asked(command).code == 0
    assert (
        "log.jsonl is missing or not as it was written: 6 of its 8 lines are left out"
        in asked(lambda: stages.report(copy)).said
    )


@names((cut, empty, flip, noise, *SHAPES))
def test_damaged_results_are_refused_and_measured_again(whole_run, copy, asked, damage):
    path = copy.run_dir / "evaluation" / "results.json"
    damage(path)
    found = asked(lambda: stages.report(copy))
    assert (found.code, len(found.errors), found.warnings) == (2, 1, [])
    assert f"{path} is not what `stepdistill evaluate` writes" in found.errors[0]
    if damage is cut:
        found = asked(lambda: stages.export(copy))
        assert found.code == 0
        assert "the card is written without numbers" in found.said
        assert asked(lambda: stages.evaluate(copy)).said == ""
        assert measured(copy) == measured(whole_run)
        assert asked(lambda: stages.report(copy)).said == ""


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
def test_results_of_another_shape_without_a_checksum_are_no_traceback(copy, asked, value):
    path = copy.run_dir / "evaluation" / "results.json"
    whole = read_sealed(path)
    codes = []
    for part in PARTS:
        write_json(path, whole | {part: value})
        found = asked(lambda: stages.report(copy, output=copy.run_dir / "page"))
        codes.append(found.code)
        assert len(found.errors) == (found.code == 2), part
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


@names(SAID_OF_CONFIG)
def test_a_damaged_config_yaml_is_one_line_for_every_command(copy, asked, damage):
    path = copy.run_dir / "config.yaml"
    before = tree(copy.run_dir)
    damage(path)
    from stepdistill.config.load import load_config

    for command in (
        lambda: stages.evaluate(load_config(copy.run_dir)),
        lambda: stages.sample(copy.run_dir, steps=1, prompt=PROMPT, seed=0, output=path.with_name("x.png")),
        lambda: stages.prepare(copy),
    ):
        found = asked(command)
        assert (found.code, len(found.errors), found.warnings) == (2, 1, [])
    found = asked(lambda: stages.report_runs([copy.run_dir]))
    assert len(found.errors) == (found.code == 2)
    assert found.code == 2 or damage in (cut, no_keys)  # a page shows what is left of it
    after = tree(copy.run_dir)
    kept = {name: digest for name, digest in before.items() if not name.startswith(("config.yaml", "report"))}
    assert {name: after[name] for name in kept} == kept


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{here}: &{here} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]"
    for before, here in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize("text", [BOMB, "ladder: &a [*a]", "1: 2\n[3]: 4", "seed: 1\nladder: 7"])
def test_a_config_that_says_more_than_it_holds_costs_no_memory(copy, asked, text):
    (copy.run_dir / "config.yaml").write_text(text)
    for command in (lambda: stages.prepare(copy), lambda: stages.report_runs([copy.run_dir])):
        found = asked(command)
        assert (found.code, len(found.errors)) == (2, 1)
