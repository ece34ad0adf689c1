"""A full disk or a read-only folder at every file of a run: one line with the path and the remedy and exit code 2. Existing
files stay, and the same command resumes afterwards."""

import shutil

import pytest
from PIL import Image

from stepdistill import stages
from stepdistill.export.hub import stage as stage_for_the_hub
from stepdistill.ladder import save_lora
from stepdistill.models.network.kind import load_network
from stepdistill.run.lock import LOCK
from stepdistill.run.rungs import WEIGHT_NAME
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.make import make_teacher
from tests.faults.small_run import read_only, room_for, small_config, tree
from tests.integration.exported import random_student

PROMPT = "a red letter a on white"
FULL, CLOSED = (
    "File too large; fix: make room there",
    "Permission denied; fix: allow this user to write there",
)


def with_options(config, **changes):
    """The config with changed values in the evaluation and export sections."""
    sections = {name: getattr(config, name).model_copy(update=options) for name, options in changes.items()}
    return config.model_copy(update=sections)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def assert_stopped(outcome, path, reason, before, after, *, rewritten=()):
    """Asserts that there is one line about `path`, no other file is lost or changed, and nothing half-written is left.

    outcome: what `run_command` returned; before, after: the sha256 of all files by path; rewritten: prefixes of paths that
    may have changed."""
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome
    assert outcome.errors[0].startswith(f"stepdistill: cannot write {path}"), outcome.errors[0]
    assert reason in outcome.errors[0]
    untouched = {name: digest for name, digest in before.items() if not name.startswith(rewritten or "\0")}
    assert {name: after.get(name) for name in untouched} == untouched
    assert not [name for name in after if name.endswith(".partial")]


def middle(smaller, larger):
    """A size limit in bytes between the sizes of two files."""
    low, high = (path.stat().st_size for path in (smaller, larger))
    assert low + 1 < high, (smaller, larger)
    return (low + high) // 2


# Each step removes more files than the step before it, so the command fails at an earlier file; one command at the end
# writes all of them again.


def full_steps(run_command, root, command, steps, *, rewritten=()):
    """steps: tuples of (files to remove, the largest size in bytes that can be written, the file that the message names)."""
    stopped_steps(run_command, root, command, steps, room_for, FULL, rewritten)


def closed_steps(run_command, root, command, steps, *, rewritten=()):
    """steps: tuples of (files to remove, the read-only folder, the file that the message names)."""
    stopped_steps(run_command, root, command, steps, read_only, CLOSED, rewritten)


def stopped_steps(run_command, root, command, steps, hindrance, reason, rewritten):
    for removed, place, named in steps:
        for path in removed:
            remove(path)
        before = tree(root)
        with hindrance(place):
            outcome = run_command(command)
        assert_stopped(outcome, named, reason, before, tree(root), rewritten=rewritten)
    assert run_command(command).code == 0


def evaluation_places(copy):
    folder = copy.run_dir / "evaluation"
    row = folder / "teacher-4"
    return (
        folder,
        row,
        row / "images/000004.png",
        row / "latents/000004.safetensors",
        row / "chunks/000004.json",
    )


def test_a_full_disk_during_evaluate(whole_run, copy, run_command):
    folder, row, image, latents, marker = evaluation_places(copy)
    scored = with_options(copy, evaluation={"score_cmd": "echo {}"})
    before = tree(folder)
    with room_for(0):
        outcome = run_command(lambda: stages.evaluate(scored))
    assert_stopped(outcome, copy.run_dir / "config.yaml", FULL, before, tree(folder))
    largest = max(path.stat().st_size for path in (row / "images").glob("*"))
    images_fit = (largest + latents.stat().st_size) // 2
    assert largest < latents.stat().st_size
    steps = [
        ([], 0, folder / "results.json"),
        ([row / "cost.json"], 0, row / "cost.json"),
        ([row / "features/main.safetensors"], 0, row / "features/main.safetensors"),
        ([marker, latents], images_fit, latents),
        ([image], 0, image),
        ([row], 0, row / "manifest.json"),
    ]
    full_steps(run_command, copy.run_dir, lambda: stages.evaluate(copy), steps)
    files = {k: v for k, v in tree(folder).items() if not k.endswith(".json")}
    assert files == {
        k: v for k, v in tree(whole_run.run_dir / "evaluation").items() if not k.endswith(".json")
    }


@pytest.mark.slow
def test_a_read_only_folder_during_evaluate(whole_run, copy, run_command):
    folder, row, image, latents, marker = evaluation_places(copy)
    steps = [
        ([], folder, folder / "results.json"),
        ([row / "cost.json"], row, row / "cost.json"),
        ([row / "features/main.safetensors"], row / "features", row / "features/main.safetensors"),
        ([marker], row / "chunks", marker),
        ([marker, latents], row / "latents", latents),
        ([marker, image], row / "images", image),
        ([row], folder, row),
    ]
    closed_steps(run_command, copy.run_dir, lambda: stages.evaluate(copy), steps)


def test_a_full_disk_where_a_scorers_prompts_are_written(copy, run_command):
    scored = with_options(copy, evaluation={"score_cmd": "echo {}"})
    config = copy.run_dir / "config.yaml"
    assert run_command(lambda: stages.evaluate(scored)).code == 0
    prompts = copy.run_dir / "evaluation/teacher-4/prompts.txt"
    full_steps(run_command, copy.run_dir, lambda: stages.evaluate(scored), [([prompts], 0, prompts)])
    assert "score_cmd: echo {}" in config.read_text()


@pytest.mark.slow
def test_a_full_disk_during_prepare(whole_run, copy, run_command):
    cache, environment = copy.run_dir / "cache", copy.run_dir / "environment.json"
    shard, text, manifest = (
        cache / "shards/00000.safetensors",
        cache / "text.safetensors",
        cache / "manifest.json",
    )
    config_fits = middle(environment, manifest)
    steps = [
        ([manifest], config_fits, text),
        ([text], config_fits, text),
        ([shard], config_fits, shard),
        ([], 0, environment),
        ([copy.run_dir], 0, copy.run_dir / "config.yaml"),
    ]
    full_steps(run_command, copy.run_dir.parent, lambda: stages.prepare(copy), steps)
    assert tree(cache) == tree(whole_run.run_dir / "cache")


@pytest.mark.slow
def test_a_read_only_folder_during_prepare(whole_run, copy, run_command):
    cache = copy.run_dir / "cache"
    shards, manifest = cache / "shards", cache / "manifest.json"
    steps = [
        ([manifest], cache, cache / "text.safetensors"),
        ([shards / "00000.safetensors"], shards, shards / "00000.safetensors"),
        ([shards], cache, shards),
        ([], copy.run_dir, copy.run_dir / LOCK),
        ([copy.run_dir], copy.run_dir.parent, copy.run_dir / LOCK),
    ]
    closed_steps(run_command, copy.run_dir.parent, lambda: stages.prepare(copy), steps)
    assert tree(cache) == tree(whole_run.run_dir / "cache")


@pytest.mark.slow
def test_a_full_disk_during_distill(whole_run, copy, run_command):
    """The finished rung stays if the next one cannot be written."""
    log, rungs = copy.run_dir / "log.jsonl", copy.run_dir / "rungs"
    preview = next(rungs.glob("1/previews/*.png"))
    steps = [
        ([rungs / "1"], preview.stat().st_size, rungs / ".1.partial" / WEIGHT_NAME),
        ([], middle(log, preview), rungs / ".1.partial/previews" / preview.name),
        ([], 0, log),
    ]
    full_steps(
        run_command,
        copy.run_dir,
        lambda: stages.distill(copy),
        steps,
        rewritten=("log.jsonl", "rungs/.1.partial"),
    )
    assert tree(rungs)[f"1/{WEIGHT_NAME}"] == tree(whole_run.run_dir / "rungs")[f"1/{WEIGHT_NAME}"]


@pytest.mark.slow
def test_a_read_only_folder_during_distill(whole_run, copy, run_command):
    rungs = copy.run_dir / "rungs"
    steps = [
        ([rungs / "1"], rungs, rungs / ".1.partial"),
        ([], copy.run_dir, copy.run_dir / LOCK),
    ]
    closed_steps(run_command, copy.run_dir, lambda: stages.distill(copy), steps, rewritten=("log.jsonl",))
    assert tree(rungs)[f"1/{WEIGHT_NAME}"] == tree(whole_run.run_dir / "rungs")[f"1/{WEIGHT_NAME}"]


def test_a_full_disk_during_export(whole_run, copy, run_command):
    rung, grid = copy.run_dir / "rungs/2", copy.run_dir / "report/grid.png"
    (kohya,) = (rung / "kohya").glob("*.safetensors")
    scheduler, base = rung / "scheduler/scheduler_config.json", rung / "base.json"
    steps = [
        ([], middle(base, kohya), kohya),
        ([], middle(scheduler, base), base),
        ([], 0, scheduler),
    ]
    full_steps(run_command, copy.run_dir, lambda: stages.export(copy, steps=[2]), steps)
    lower = with_options(copy, export={"rank": 2})
    for _ in range(2):  # first without the folder, then with it
        steps = [([], 500, rung / "rank2" / WEIGHT_NAME), ([], 0, rung / "rank2/kept.json")]
        full_steps(run_command, copy.run_dir, lambda: stages.export(lower, steps=[2]), steps)
    plain = with_options(copy, export={"formats": ("diffusers",)})
    Image.effect_noise((256, 256), 90).save(grid)
    largest = max(rung / "README.md", base, key=lambda path: path.stat().st_size)
    steps = [([], middle(largest, grid), rung / "grid.png")]
    full_steps(run_command, copy.run_dir, lambda: stages.export(plain, steps=[2]), steps)
    remove(grid)
    long = plain.model_copy(
        update={"preview": plain.preview.model_copy(update={"prompts": ("a word " * 500,)})}
    )
    steps = [([], base.stat().st_size, rung / "README.md")]
    full_steps(run_command, copy.run_dir, lambda: stages.export(long, steps=[2]), steps)


def test_a_read_only_folder_during_export(whole_run, copy, run_command):
    rung = copy.run_dir / "rungs/2"
    steps = [
        ([rung / "kohya"], rung, rung / "base.json"),
        ([rung / "scheduler"], rung, rung / "scheduler/scheduler_config.json"),
    ]
    closed_steps(run_command, copy.run_dir, lambda: stages.export(copy, steps=[2]), steps)
    (kohya,) = (rung / "kohya").glob("*.safetensors")
    steps = [([], rung / "kohya", kohya), ([], rung / "scheduler", rung / "scheduler/scheduler_config.json")]
    closed_steps(run_command, copy.run_dir, lambda: stages.export(copy, steps=[2]), steps)
    fused = with_options(copy, export={"formats": ("fused",)})
    (rung / "fused").mkdir()
    steps = [([], rung / "fused", rung / "fused/unet")]
    closed_steps(run_command, copy.run_dir, lambda: stages.export(fused, steps=[2]), steps)


@pytest.mark.parametrize("of_two", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "two"])
def test_a_report_that_cannot_be_written(whole_run, copy, run_command, of_two):
    """The report of one run or the comparison of two."""
    other = copy.run_dir.rename(copy.run_dir.with_name("other"))
    runs, folder = [other], other / "report"
    if of_two:
        runs, folder = [other, whole_run.run_dir], other.parent / "comparison"
    command = lambda: stages.report_runs(runs)  # noqa: E731
    full_steps(run_command, copy.run_dir.parent, command, [([], 0, folder / "index.html")])
    closed_steps(run_command, copy.run_dir.parent, command, [([], folder, folder / "index.html")])


@pytest.mark.slow
def test_a_image_that_cannot_be_written(copy, run_command, tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    (place / "old.png").write_bytes(b"the old one")

    def command(name):
        return lambda: stages.sample(copy.run_dir, steps=1, prompt=PROMPT, seed=0, output=place / name)

    full_steps(run_command, place, command("old.png"), [([], 0, place / "old.png")])
    closed_steps(run_command, place, command("new.png"), [([], place, place / "new.png")])
    for name in ("image.exe", "image", "."):
        outcome = run_command(command(name))
        assert (outcome.code, len(outcome.errors)) == (2, 1)
        assert "allowed: a file that ends in .png" in outcome.errors[0]
    outcome = run_command(command("old.png/inside.png"))
    assert f"fix: move the file {place / 'old.png'} away" in outcome.errors[0]


@pytest.mark.slow
def test_a_teacher_that_cannot_be_written(tmp_path, run_command):
    save_lora(random_student(embedded_folder("teacher")), tmp_path / "lora")
    config = small_config(tmp_path / "runs", f"teacher.loras=[{{path: {tmp_path / 'lora'}}}]")
    config.run_dir.mkdir(parents=True)
    steps = [([], 20_000, config.run_dir / "teacher")]
    full_steps(run_command, config.run_dir, lambda: make_teacher(config), steps)
    before = tree(config.run_dir)
    steps = [([config.run_dir / "teacher.json"], config.run_dir, config.run_dir / "teacher")]
    closed_steps(run_command, config.run_dir, lambda: make_teacher(config), steps)
    assert tree(config.run_dir) == before


def test_an_extract_and_a_push_that_cannot_be_written(copy, run_command, tmp_path):
    tuned = tmp_path / "tuned"
    unet = load_network(embedded_folder("teacher"))
    for parameter in unet.parameters():
        parameter.data *= 1.01
    unet.save_pretrained(tuned)
    output = tmp_path / "extracted"
    command = lambda: stages.extract(embedded_folder("teacher"), tuned, rank=2, output=output)  # noqa: E731
    with room_for(500):
        outcome = run_command(command)
    assert_stopped(outcome, output / WEIGHT_NAME, FULL, {}, {})
    assert run_command(command).code == 0
    rung = copy.run_dir / "rungs/2"
    with room_for(500):
        outcome = run_command(lambda: stage_for_the_hub(copy, 2, rung, "me/mine", tmp_path))
    assert_stopped(outcome, tmp_path / "2", "fix: ", {}, {})


def test_a_file_in_the_place_of_a_folder_is_named(whole_run, copy, run_command):
    """This holds for every user, including root."""
    for name, command in (
        ("cache/shards", stages.prepare),
        ("evaluation/student-1", stages.evaluate),
        ("report", stages.report),
        ("rungs/2/scheduler", stages.export),
    ):
        path = copy.run_dir / name
        moved = path.rename(path.with_name("elsewhere"))
        path.write_text("mine")
        outcome = run_command(lambda c=command: c(copy))
        assert (outcome.code, len(outcome.errors)) == (2, 1), name
        assert f"fix: move the file {path} away, then the same command" in outcome.errors[0], outcome.errors[
            0
        ]
        assert path.read_text() == "mine"
        path.unlink()
        moved.rename(path)
