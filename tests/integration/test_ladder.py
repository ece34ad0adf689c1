"""The whole ladder in small, on the embedded teacher."""

import ast
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from stepdistill import rng, stages
from stepdistill.config import Export, LoraRow
from stepdistill.data.cache import load_cache
from stepdistill.data.prepare import prepare
from stepdistill.data.shards import read_about, write_shard
from stepdistill.disk.durable import read_sealed, write_sealed
from stepdistill.errors import NonFiniteError
from stepdistill.evaluation.draw.rows import Row, lora_row
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.export.card import model_card
from stepdistill.export.rung import export_rung
from stepdistill.ladder import distill, read_rung_lora
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.network.encode import encode_prompts
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.run.log import read_log
from stepdistill.run.rungs import WEIGHT_NAME, finished_rungs, read_rung, rung_folder
from stepdistill.sampling import load_rung
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.loading import load_noise_path, load_pipeline
from tests.integration.conftest import tiny_config

RUNGS = [32, 8, 4, 2, 1]


def weights(config, steps):
    return (rung_folder(config.run_dir, steps) / WEIGHT_NAME).read_bytes()


def test_a_run_writes_its_files_and_the_rows_of_its_table(finished_run):
    run_dir = finished_run.run_dir
    for steps in RUNGS:
        folder = rung_folder(run_dir, steps)
        for name in (WEIGHT_NAME, "rung.json", "README.md", "scheduler/scheduler_config.json"):
            assert (folder / name).stat().st_size > 0, (steps, name)
        assert list((folder / "previews").glob("*.png"))
    for name in ("config.yaml", "environment.json", "log.jsonl", "report/results.md", "report/grid.png"):
        assert (run_dir / name).stat().st_size > 0, name
    assert not list((run_dir / "rungs").glob(".*"))
    results = json.loads((run_dir / "report" / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == [
        *(f"teacher-{n}" for n in (32, 8, 4, 2, 1)),
        *(f"student-{n}" for n in RUNGS),
    ]
    reference = results["rows"][0]
    assert abs(reference["paired_fid_to_teacher"]) < 1e-6
    assert reference["latent_mse_to_teacher"] == 0.0
    assert [row["nfe"] for row in results["rows"]] == [64, 16, 8, 4, 2, 32, 8, 4, 2, 1]


@pytest.mark.slow
def test_two_runs_of_one_seed_are_bit_identical_and_another_seed_is_not(finished_run, tmp_path):
    again = tiny_config(tmp_path)
    other = tiny_config(tmp_path, "name=other", "seed=1")
    other = other.model_copy(update={"ladder": other.ladder[:2]})
    for config in (again, other):
        prepare(config)
        distill(config)
    for steps in RUNGS:
        assert weights(again, steps) == weights(finished_run, steps), steps
    for rung in other.ladder:
        assert weights(other, rung.student_steps) != weights(finished_run, rung.student_steps)


@pytest.mark.slow
def test_an_interrupted_run_resumes_after_the_last_finished_rung(finished_run, tmp_path):
    config = tiny_config(tmp_path)
    shutil.copytree(finished_run.run_dir, config.run_dir)
    for steps in (2, 1):
        shutil.rmtree(rung_folder(config.run_dir, steps))
    (config.run_dir / "rungs" / ".2.partial").mkdir()
    assert finished_rungs(config.run_dir) == [32, 8, 4]
    assert distill(config) == [2, 1]
    for steps in RUNGS:
        assert weights(config, steps) == weights(finished_run, steps), steps
    logged = [(r["rung"], r["phase"], r["step"]) for r in read_log(config.run_dir / "log.jsonl")]
    assert len(logged) == len(set(logged)) == 12
    assert distill(config) == []


@pytest.mark.slow
def test_a_rung_with_a_damaged_lora_is_trained_again(finished_run, tmp_path):
    config = tiny_config(tmp_path)
    shutil.copytree(finished_run.run_dir, config.run_dir)
    path = rung_folder(config.run_dir, 1) / WEIGHT_NAME
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    assert read_rung(config.run_dir, 1) is None
    assert distill(config) == [1]
    assert weights(config, 1) == weights(finished_run, 1)


def test_training_one_rung_again_gives_the_same_rung(finished_run, tmp_path):
    config = tiny_config(tmp_path)
    shutil.copytree(finished_run.run_dir, config.run_dir)
    shutil.rmtree(rung_folder(config.run_dir, 8))
    assert distill(config, only=(32, 8)) == [8]
    assert weights(config, 8) == weights(finished_run, 8)


@pytest.mark.slow
def test_an_update_does_not_depend_on_the_micro_batch(tmp_path):
    results = []
    for name, batch, accumulation in (("whole", 4, 1), ("split", 2, 2)):
        config = tiny_config(
            tmp_path,
            f"name={name}",
            f"training.train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
            "ladder.0.phases.0.objective=paired",
        )
        config = config.model_copy(update={"ladder": config.ladder[:1]})
        prepare(config)
        distill(config)
        results.append(
            (load_file(rung_folder(config.run_dir, 32) / WEIGHT_NAME), read_log(config.run_dir / "log.jsonl"))
        )
    for key, tensor in results[0][0].items():
        assert torch.allclose(tensor, results[1][0][key], atol=2e-4), key
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        for name in ("student_loss", "discriminator_loss", "student_grad_norm", "discriminator_grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.slow
def test_a_carried_discriminator_continues_from_the_earlier_phase(tmp_path):
    """The same rung with D carried over an mse phase between two adversarial ones, and with a fresh D."""
    logs = {}
    for start in ("fresh", "carried"):
        # one step from noise compared with data at nearly no noise, which D tells apart at once
        options = {"trunk": "full", "real": "data", "learning_rate": 3e-3}
        options["perturbation_weights"] = [1, 0, 0, 0]
        phase = {"objective": "single", "max_train_steps": 8, "learning_rate": 1e-6, "discriminator": options}
        mse = {"objective": "mse", "max_train_steps": 1, "learning_rate": 1e-5}
        phases = [phase, mse, phase | {"discriminator": options | {"start": start}}]
        ladder = json.dumps([{"teacher_steps": 2, "student_steps": 1, "phases": phases}])
        config = tiny_config(
            tmp_path, f"name={start}", f"ladder={ladder}", "training.lr_warmup_steps=0", "data.num_images=8"
        )
        prepare(config)
        distill(config)
        logs[start] = {(r["phase"], r["step"]): r for r in read_log(config.run_dir / "log.jsonl")}
    losses = {
        start: {at: r["discriminator_loss"] for at, r in log.items() if r["objective"] == "single"}
        for start, log in logs.items()
    }
    assert all(losses["fresh"][0, k] == losses["carried"][0, k] for k in range(8))
    assert losses["carried"][2, 0] < losses["fresh"][2, 0] - 0.05
    assert losses["carried"][2, 0] < losses["carried"][0, 0] - 0.05


@pytest.mark.parametrize("steps", RUNGS)
@pytest.mark.slow_after_first
def test_the_exported_lora_draws_in_a_fresh_pipeline_what_was_trained(finished_run, steps):
    """diffusers' pipeline with the LoRA from disk against our roll-out of the trained adapter, from equal noise."""
    folder = rung_folder(finished_run.run_dir, steps)
    prompts = ["a purple letter m on pink", "a green letter q on yellow"]
    noise = rng.normal((4, 8, 8), [0, 1], seed=3, keys=("test",))
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_folder("teacher"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    theirs = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images

    network = SharedNetwork(load_network(embedded_folder("teacher")))
    network.add_adapter(STUDENT, rank=32, seed=0)
    network.load_adapter_state(STUDENT, read_rung_lora(finished_run.run_dir, steps))
    conditioning = encode_prompts(load_pipeline(embedded_folder("teacher")), prompts, image_size=(32, 32))
    noise_path, _ = load_noise_path(dict(pipeline.scheduler.config))
    kind = read_rung(finished_run.run_dir, steps).prediction_type
    student = Denoiser(network, STUDENT, noise_path, kind)
    ours = student.rollout(noise, noise_path.sampling(steps, 2), conditioning)
    # diffusers' DDIM pairs of timesteps differ from ours by one at a quarter of 32 steps; at 8, 4, 2 and 1 they are equal.
    assert torch.allclose(ours, theirs, atol=0.05 if steps == 32 else 2e-4)
    plain = StableDiffusionPipeline.from_pretrained(embedded_folder("teacher"), dtype=torch.float32)
    plain.scheduler = pipeline.scheduler
    plain.set_progress_bar_config(disable=True)
    without = plain(
        prompts, num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images
    assert (without - theirs).abs().max() > 1e-3


@pytest.mark.slow
def test_one_step_with_an_earlier_conditioning_timestep_draws_what_was_trained(tmp_path):
    """diffusers' pipeline with the exported scheduler: x_0 = (z - sigma_499 epsilon(z, 499)) / alpha_499."""
    config = tiny_config(
        tmp_path,
        "ladder=[{teacher_steps: 2, student_steps: 1, start_timestep: 499, phases: [{objective: mse, max_train_steps: 2}]}]",
    )
    stages.prepare(config)
    stages.distill(config)
    stages.export(config)
    folder = rung_folder(config.run_dir, 1)
    noise, prompts = rng.normal((4, 8, 8), [0, 1], seed=3, keys=("test",)), ["a red letter a on white"] * 2
    pipeline = load_pipeline(embedded_folder("teacher"))
    base_schedule, _ = load_noise_path(dict(pipeline.scheduler.config))
    load_rung(pipeline, folder)
    theirs = pipeline(
        prompts, num_inference_steps=1, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images
    conditioning = encode_prompts(pipeline, prompts, image_size=(32, 32))
    start = torch.full((2,), 499)
    with torch.no_grad():
        epsilon = pipeline.unet(noise, start, conditioning.encoder_hidden_states).sample
    alpha, sigma = base_schedule.alpha_sigma(start, ndim=4, dtype=torch.float32)
    assert torch.allclose((noise - sigma * epsilon) / alpha, theirs, atol=1e-4)

    lora = LoraRow(name="copy", path=str(folder), steps=1)
    sampler = Sampler(config)
    rows = [lora_row(lora), Row("student-1", 1, 1.0, 1)]
    (_, copied), (_, student) = (sampler.draw(row, prompts, seed=1) for row in rows)
    assert torch.equal(copied, student)
    _, two = sampler.draw(dataclasses.replace(rows[1], steps=2), prompts, seed=1)
    assert torch.isfinite(two).all()


@pytest.mark.parametrize("page", ["README.md", "card"])
def test_the_lines_that_the_readme_and_the_card_show_draw_an_image(finished_run, page):
    folder = rung_folder(finished_run.run_dir, 4)
    text = (folder / "README.md" if page == "card" else Path(page)).read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(lines.replace("runs/letters/rungs/4", folder.as_posix()), names)
    assert names["image"].size == (32, 32)
    assert names["pipeline"].get_active_adapters()


def test_the_card_has_the_numbers_and_the_image_of_a_measured_run(finished_run, tmp_path):
    folder = rung_folder(finished_run.run_dir, 4)
    card = (folder / "README.md").read_text()
    rows = re.findall(r"^\| ([a-z]+-\d+) \|", card, flags=re.MULTILINE)
    assert rows == ["teacher-32", "teacher-4", "student-4"]
    assert "](grid.png)" in card
    for text in (
        "FID to teacher: against images of teacher-32 with other seeds",
        "Floor of FID to teacher",
        "with other noise",
    ):
        assert text in card
    assert "Real images: 16 renderings of the prompts." in card
    assert (folder / "grid.png").read_bytes() == (finished_run.run_dir / "report" / "grid.png").read_bytes()
    shutil.copytree(finished_run.run_dir, tmp_path / finished_run.name)
    copy = finished_run.model_copy(update={"export": Export(rank=2), "output_dir": str(tmp_path)})
    lower = export_rung(copy, 4)
    assert "student-4" not in (lower / "README.md").read_text()
    assert re.search(
        r"keeps \d+\.\d % of the energy .*\n.* was not evaluated", (lower / "README.md").read_text()
    )
    assert not (lower / "grid.png").exists()


def test_the_card_is_python_whatever_the_prompt_and_the_path_are(finished_run, tmp_path):
    prompt, path = """a "red" letter's\n\\ end""", str(tmp_path / "it's mine")
    (tmp_path / "it's mine").symlink_to(embedded_folder("teacher"))
    config = finished_run.model_copy(
        update={
            "preview": finished_run.preview.model_copy(update={"prompts": (prompt,)}),
            "teacher": finished_run.teacher.model_copy(update={"path": path}),
        }
    )
    record = read_rung(finished_run.run_dir, 4)
    folder = rung_folder(finished_run.run_dir, 4)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    card = model_card(config, record, folder, scheduler)
    (lines,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    texts = [node.value for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Constant)]
    assert prompt in texts
    assert path in texts
    assert "in stages: 128 steps with guidance 3 -> 32 -> 8 -> 4." in card


def test_a_non_finite_loss_stops_training_before_the_update(tmp_path):
    config = tiny_config(tmp_path)
    prepare(config)
    path = config.run_dir / "cache" / "shards" / "00000.safetensors"
    tensors = load_file(path)
    tensors["latents/32x32"][:] = float("nan")
    manifest = config.run_dir / "cache" / "manifest.json"
    content = read_sealed(manifest)
    content["shards"][0]["sha256"] = write_shard(path, tensors, read_about(path))
    write_sealed(manifest, content)
    with pytest.raises(NonFiniteError, match=r"128 -> 32 mse, phase 0, step \d: student_loss = nan"):
        distill(config)
    assert finished_rungs(config.run_dir) == []


@pytest.mark.parametrize("changed", ["text.safetensors", "shards/00000.safetensors"])
def test_a_cache_that_was_changed_is_refused(tmp_path, changed):
    config = tiny_config(tmp_path)
    prepare(config)
    assert prepare(config) is False
    path = config.run_dir / "cache" / changed
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"no intact cache.*{changed} is missing or changed"):
        load_cache(config)
    assert prepare(config) is True
    assert len(load_cache(config)) == 40


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_adversarial_ladder_trains_every_role_and_logs_it(tmp_path, mixed_precision):
    updates = 2 if mixed_precision == "no" else 1  # a CPU takes long for bfloat16
    phases = f"[{{objective: paired, max_train_steps: {updates}}}, {{objective: single, max_train_steps: {updates}}}]"
    overrides = [f"ladder.{k}.phases={phases}" for k in (1, 2)]
    overrides += [
        "training.train_batch_size=2",
        "training.ema_decay=0.9",
        f"training.mixed_precision={mixed_precision}",
        "training.gradient_checkpointing=true",
        "ladder.2.phases.1.discriminator.trunk=full",
        "ladder.2.phases.1.teacher_steps=32",
        "ladder.2.node_steps=8",
        "ladder.1.phases.0.discriminator.heads=multi",
    ]
    config = tiny_config(tmp_path, *overrides)
    config = config.model_copy(update={"ladder": config.ladder[:3]})
    prepare(config)
    assert distill(config) == [32, 8, 4]
    records = [r for r in read_log(config.run_dir / "log.jsonl") if r["objective"] != "mse"]
    assert len(records) == 4 * updates
    for record in records:
        assert record["student_grad_norm"] > 0
        assert record["discriminator_grad_norm"] > 0
        assert 0 <= record["discriminator_accuracy_real"] <= 1
        assert 0 <= record["discriminator_accuracy_student"] <= 1
        assert record["images_per_second"] > 0


def test_sample_writes_a_png(finished_run, tmp_path):
    from PIL import Image

    output = stages.sample(
        finished_run.run_dir,
        steps=4,
        prompt="a red letter a on white",
        seed=0,
        output=tmp_path / "a" / "x.png",
    )
    assert Image.open(output).size == (32, 32)
    with pytest.raises(ValueError, match="got 16; allowed: 32, 8, 4, 2, 1, the rungs of this run"):
        stages.sample(finished_run.run_dir, steps=16, prompt="x", seed=0, output=tmp_path / "y.png")
