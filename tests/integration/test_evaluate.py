"""The table, end to end: every kind of row and study, hostile prompts, an outside scorer, memory."""

import dataclasses
import html
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.disk.durable import read_sealed
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.measure.small_net import TrainingSettings, train_small_net, write_small_net
from stepdistill.report.build import build_report
from stepdistill.run.rungs import rung_folder
from stepdistill.stages import open_run
from tests.integration.conftest import tiny_config
from tests.integration.launched import TORCHRUN, ended

HOSTILE = [
    "<script>alert('x')</script><img src=x onerror=alert(1)>",
    "../../x",
    "\u202e\u200fright to left " + "long " * 800,
    "a prompt | with pipes & {{ braces }}",
]


@pytest.fixture
def copy_of(trained_run, tmp_path):
    """A config for a copy of the trained run, with overrides."""

    def make(*overrides):
        config = tiny_config(
            tmp_path,
            "evaluation.num_images=8",
            "evaluation.teacher_steps=[2, 1]",
            "evaluation.matrix=false",
            *overrides,
        )
        shutil.copytree(
            trained_run.run_dir, config.run_dir, ignore=shutil.ignore_patterns("evaluation", "report")
        )
        return config

    return make


def saved(config):
    return read_sealed(config.run_dir / "evaluation" / "results.json")


@pytest.mark.slow
def test_the_table_has_every_kind_of_row_floor_and_study(finished_run):
    results = saved(finished_run)
    rows = {row["row"]: row for row in results["rows"]}
    assert set(results["floor"]) >= {"fid_to_real", "fid_to_teacher", "precision", "coverage"}
    assert set(results["replicates"]) == set(rows)
    assert "below 5,000" in results["warnings"][0]
    assert rows["teacher-32"]["diversity"] == 1.0
    assert {"drift" in key for key in results["metrics"]} == {True, False}
    cells = {(c["adapter"], c["steps"]) for c in results["matrix"]["cells"]}
    assert cells == {(n, m) for n in (32, 8, 4, 2, 1) for m in (32, 8, 4, 2, 1)}
    assert {(c["row"], c["scale"]) for c in results["scale_sweep"]["cells"]} == {
        (f"student-{n}", 0.5) for n in (32, 8, 4, 2, 1)
    }
    for row in results["rows"]:
        assert row["cost"]["images_per_second"] > 0
        assert row["cost"]["peak_memory_mib"] > 50
    for key in (
        "prompts_sha256",
        "feature_extractor_sha256",
        "resize",
        "seed",
        "config_sha256",
        "real_images_key",
    ):
        assert results["protocol"][key], key


@pytest.mark.slow
def test_distances_to_the_teacher_are_to_other_seeds_and_paired_ones_to_equal_noise(finished_run):
    """For the teacher's row the distance to other seeds is the floor and the paired distance is 0; the teacher with other
    noise is the yardstick of the paired measures. FID is the same number in both, because both compare the same images."""
    results = saved(finished_run)
    rows, floor = {row["row"]: row for row in results["rows"]}, results["floor"]["fid_to_teacher"]
    teacher, other_noise = rows["teacher-32"], results["other_noise"]
    assert teacher["fid_to_teacher"] == floor > 0
    assert teacher["kid_to_teacher"] == results["floor"]["kid_to_teacher"]
    assert teacher["paired_fid_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert teacher["latent_mse_to_teacher"] == 0.0
    assert teacher["agreement"] == 1.0
    assert teacher["relations_kept"] == pytest.approx(1.0, abs=1e-6)
    assert rows["student-1"]["relations_kept"] < rows["teacher-8"]["relations_kept"] < 1
    assert 0 <= rows["student-1"]["agreement"] <= 1
    assert other_noise["paired_fid_to_teacher"] == pytest.approx(floor, rel=1e-6)
    assert other_noise["latent_mse_to_teacher"] > rows["teacher-8"]["latent_mse_to_teacher"] > 0
    assert other_noise["colour_drift"] > 0
    assert results["protocol"]["teacher_images"] == "other seeds"


@pytest.mark.slow
def test_measuring_again_gives_the_same_numbers_without_drawing(finished_run):
    # the run is a copy, and its results have the sha256 of a config with another folder
    before = json.loads(json.dumps(evaluate(finished_run)))
    stamp = (finished_run.run_dir / "evaluation/student-4/images/000003.png").stat().st_mtime_ns
    assert json.loads(json.dumps(evaluate(finished_run))) == before == saved(finished_run)
    assert (finished_run.run_dir / "evaluation/student-4/images/000003.png").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_the_stage_script_under_torchrun_measures_what_one_process_does(copy_of):
    """Two processes draw every row again and the first measures: all numbers but the costs are those of one process."""
    config = copy_of("evaluation.num_images=12", "evaluation.batch_size=4")
    repository, alone = Path(__file__).parents[2], evaluate(config)
    shutil.rmtree(config.run_dir / "evaluation")
    open_run(config)
    arguments = [str(config.run_dir / "config.yaml"), f"output_dir={config.output_dir}"]
    code, errors = ended(TORCHRUN, str(repository / "pipelines" / "evaluate.py"), *arguments)
    assert code == 0, errors[-3000:]
    count = " ".join(errors.split()).count("12 images of teacher-2 are in")
    assert count == 2  # once for the row and once for the floor: only one process prints it
    together = saved(config)
    for ours, theirs in zip(alone["rows"], together["rows"], strict=True):
        for key in ("fid_to_real", "fid_to_teacher", "kid_to_real", "precision", "prompt_accuracy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3), (ours["row"], key)


@pytest.mark.slow
def test_hostile_prompts_are_drawn_and_reported_as_text(copy_of, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(HOSTILE), encoding="utf-8")
    lora = f"{{name: other, path: {rung_folder(tmp_path / 'letters', 4)}, steps: 2, scheduler: LCMScheduler}}"
    scorer = "import sys, pathlib, json; print(json.dumps({'lines': len(open(sys.argv[2]).readlines()), "
    scorer += "'pngs': len(list(pathlib.Path(sys.argv[1]).glob('*.png')))}))"
    (tmp_path / "scorer.py").write_text(scorer)
    config = copy_of(
        f"evaluation.prompts={tmp_path / 'prompts.txt'}",
        f"evaluation.loras=[{lora}]",
        f"evaluation.score_cmd='{sys.executable} {tmp_path / 'scorer.py'} {{images}} {{prompts}}'",
    )
    stages.evaluate(config)
    folder = stages.report(config)
    results = saved(config)
    assert [row["row"] for row in results["rows"]][-1] == "other"
    assert results["rows"][-1]["score_lines"] == 8
    assert results["rows"][-1]["score_pngs"] == 8
    assert "prompt_accuracy" not in results["rows"][0]
    assert "fid_to_real" not in results["rows"][0]
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "onerror=alert(1)>" not in page
    assert html.escape(HOSTILE[0], quote=False).replace("'", "&#39;") in page
    assert not list(tmp_path.parent.glob("x*"))


@pytest.mark.slow
def test_without_other_seeds_only_paired_distances_are_measured(copy_of):
    config = copy_of("evaluation.floor=false", "evaluation.diversity_prompts=0", "evaluation.lora_scales=[]")
    results = evaluate(config)
    assert not (config.run_dir / "evaluation" / "floor").exists()
    assert not any(
        key.endswith("_to_teacher") and key.startswith(("fid", "kid")) for key in results["metrics"]
    )
    assert "paired_fid_to_teacher" in results["metrics"]
    assert results["other_noise"] == {}
    stages.report(config)


@pytest.mark.slow
def test_an_interrupted_evaluation_shows_the_measured_rows_on_the_page(copy_of, tmp_path):
    """A scorer fails at the third row, as Ctrl-C or a full disk would."""
    scorer = "import sys\nif 'student-32' in sys.argv[1]: sys.exit('gone')\nprint('{\"taste\": 1}')\n"
    (tmp_path / "scorer.py").write_text(scorer)
    scorer = f"evaluation.score_cmd='{sys.executable} {tmp_path / 'scorer.py'} {{images}}'"
    few = ("evaluation.diversity_prompts=0", "evaluation.lora_scales=[]", "evaluation.cost_batch_sizes=[]")
    few = (*few, "evaluation.floor=false")
    config = copy_of(scorer, *few)
    with pytest.raises(ValueError, match=r"score_cmd: .* exited with code 1: gone"):
        evaluate(config)
    results = saved(config)
    assert [row["row"] for row in results["rows"]] == ["teacher-2", "teacher-1"]
    assert results["rows"][1]["paired_fid_to_teacher"] > 0
    assert results["unmeasured"] == [f"student-{n}" for n in (32, 8, 4, 2, 1)]
    folder = stages.report(config)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "no numbers yet" not in page
    assert (
        "is only partly evaluated; `stepdistill evaluate` continues. Missing: student-32, student-8" in page
    )
    assert "Not measured yet: student-32, student-8" in (folder / "results.md").read_text()
    (tmp_path / "scorer.py").write_text("print('{\"taste\": 1}')")
    assert evaluate(config)["unmeasured"] == []
    assert "only partly evaluated" not in (stages.report(config) / "index.html").read_text(encoding="utf-8")
    complete = saved(config)
    (tmp_path / "scorer.py").write_text("import sys; sys.exit('gone again')")
    with pytest.raises(ValueError, match="gone again"):
        evaluate(config)
    assert saved(config) == complete  # complete results are not replaced by a part of the same rows


@pytest.mark.slow
def test_a_stored_net_measures_and_without_any_extractor_the_table_says_what_is_missing(copy_of, tmp_path):
    """Prompts that are not letters captions: first with the net of another run, then without any extractor."""
    noise = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    net, accuracy = train_small_net(noise, noise[:8], TrainingSettings(steps=1, batch_size=8))
    write_small_net(tmp_path / "extractor", net, {"grades": dataclasses.asdict(accuracy)})
    (tmp_path / "prompts.txt").write_text("a wall\na door\n")
    few = ("evaluation.diversity_prompts=0", "evaluation.lora_scales=[]", "evaluation.cost_batch_sizes=[]")
    config = copy_of(f"evaluation.prompts={tmp_path / 'prompts.txt'}", "evaluation.floor=false", *few)
    named = config.evaluation.model_copy(update={"features": f"trained:{tmp_path / 'extractor'}"})
    results = evaluate(config.model_copy(update={"evaluation": named}))
    assert results["protocol"]["feature_extractor"] == "trained"
    assert results["rows"][1]["paired_fid_to_teacher"] > 0
    other = config.data.model_copy(update={"source": str(tmp_path / "prompts.txt")})
    results = evaluate(config.model_copy(update={"data": other}))
    assert results["protocol"]["feature_extractor"] == "none"
    assert not [key for key in results["metrics"] if "fid" in key or "kid" in key]
    assert results["rows"][1]["latent_mse_to_teacher"] > 0
    page = (build_report(config.run_dir) / "index.html").read_text(encoding="utf-8")
    assert "Missing columns, and why" in page
    assert "there are no weights of Inception at" in page


def test_mistakes_are_reported_before_anything_is_drawn(copy_of):
    config = copy_of("evaluation.features=vgg")
    with pytest.raises(ValueError, match="allowed: reader, pairs_reader, inception"):
        evaluate(config)
    assert not (config.run_dir / "evaluation" / "teacher-2").exists()
    named = config.evaluation.model_copy(update={"features": "reader", "prompts": "nowhere.txt"})
    with pytest.raises(ConfigError, match="nowhere"):
        evaluate(config.model_copy(update={"evaluation": named}))


@pytest.mark.parametrize("wrong", ["prompts=nowhere.txt", "features=clip:nowhere", "real_images=nowhere"])
def test_a_table_that_cannot_be_measured_stops_the_run_before_training(tmp_path, wrong):
    config = tiny_config(tmp_path, f"evaluation.{wrong}")
    with pytest.raises(ValueError, match=r"evaluation\..*nowhere"):
        stages.run_all(config)
    assert not config.run_dir.exists()
