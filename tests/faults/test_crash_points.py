"""A process that dies, tears a write or meets a full disk at any of its file operations leaves the old or the new state, and
after the next successful run no hidden file is left."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from stepdistill import stages
from stepdistill.config.saved import saved_config
from stepdistill.data.shards import is_intact, read_about, write_shard
from stepdistill.disk.durable import put_back_replaced, read_sealed, write_sealed
from stepdistill.disk.places import clear_half_written
from stepdistill.ladder.rung_files import finish_rung
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.run.checkpoint_files import CHECKPOINTS
from stepdistill.run.folder import open_folder
from stepdistill.run.lock import locked
from stepdistill.run.log import TrainingLog, read_log
from stepdistill.run.rungs import read_rung, rung_folder
from stepdistill.teacher.make import make_teacher
from stepdistill.training.checkpoint import Checkpoints, Identity, newest
from tests.conftest import build_tiny_unet
from tests.faults.crashes import CRASHED, crash_points, fresh, hidden, in_fork, interrupted
from tests.faults.small_run import small_config, tree

OLD, NEW = "old", "new"
FEWEST = 5
"""Of an enumeration; fewer operations would mean that the counter misses them."""


EVERY = [pytest.param(8, id="some"), pytest.param(None, id="all", marks=pytest.mark.slow)]
"""How many crash points of each writer are tried."""


@pytest.fixture(params=EVERY)
def most(request):
    return request.param


def enumerate_crashes(place, template, act, state, *, most, again=None):
    """Interrupts `act` on a copy of `template` at each of its operations, or at `most` of them, evenly spread. `state` reads
    what is there afterwards; `again` is the next run, by default the same act."""
    fresh(template, place)
    points = list(crash_points(act))
    assert len(points) >= FEWEST
    chosen = points if most is None else [points[k * (len(points) - 1) // (most - 1)] for k in range(most)]
    seen, codes = set(), set()
    for number, how in chosen:
        fresh(template, place)
        codes.add(interrupted(act, number, how))
        there = state()
        assert there in (OLD, NEW), (number, how, there)
        seen.add(there)
        (again or act)()
        assert state() == NEW, (number, how)
        assert hidden(place) == [], (number, how)
    assert CRASHED in codes
    assert seen == {OLD, NEW}


@pytest.fixture
def folders(tmp_path):
    """(folder to work in, folder with the old state)."""
    template = tmp_path / "template"
    template.mkdir()
    return tmp_path / "place", template


@pytest.mark.parametrize("is_first", [True, False])
def test_config(folders, is_first, most):
    place, template = folders
    (old, new) = (small_config(place, f"evaluation.num_images={n}") for n in (8, 9))
    if not is_first:
        open_folder(small_config(template, "evaluation.num_images=8"))

    def state():
        saved = new.run_dir / "config.yaml"
        if is_first and not saved.exists():
            return OLD
        return NEW if saved_config(new.run_dir)["evaluation"]["num_images"] == 9 else OLD

    def act():
        with locked(new.run_dir):
            open_folder(new)

    enumerate_crashes(place, template, act, state, most=most)
    assert old.run_dir == new.run_dir


def line(rung, step):
    return {"rung": rung, "phase": 0, "objective": "mse", "step": step, "student_loss": 0.5}


def test_log(folders, most):
    """The lines of the finished rung, and of updates that are not made again, are never lost."""
    place, template = folders
    kept = [line(8, 0), line(8, 1), line(4, 0)]
    (template / "log.jsonl").write_text("".join(f"{text}\n" for text in map(as_json, [*kept, line(4, 1)])))
    path = place / "log.jsonl"

    def act():
        log = TrainingLog(path)
        log.begin(4, phase=0, step=1)
        for step in (1, 2):
            log.write(line(4, step))
        log.close()
        clear_half_written(place)

    def state():
        lines = read_log(path)
        assert lines[:3] == kept
        rest = [record["step"] for record in lines[3:]]
        assert rest in ([], [1], [1, 2])
        return NEW if rest == [1, 2] else OLD

    enumerate_crashes(place, template, act, state, most=most)


def as_json(value):
    return str(value).replace("'", '"')


IDENTITY = Identity(settings={}, rungs={}, base="b", cache="l", samples=4, versions={})


def identity(_phase, _step):
    return IDENTITY


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoint(folders, keep, most):
    place, template = folders

    def save(folder, step):
        checkpoints = Checkpoints(folder, identity, every_minutes=0, keep=keep, seconds=0)
        checkpoints.save(0, step, {"student": {"a": torch.full((50,), float(step))}}, None)
        checkpoints.wait()
        clear_half_written(folder)

    save(template, 1)

    def state():
        there = newest(place, identity)
        assert torch.all(there.state["student"]["a"] == there.step)
        return {1: OLD, 2: NEW}[there.step]

    enumerate_crashes(place, template, lambda: save(place, 2), state, most=most)
    assert len(list(place.iterdir())) == keep


@pytest.fixture(scope="module")
def network():
    return SharedNetwork.with_student_and_teacher(build_tiny_unet(), rank=2, seed=3)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.slow_after_first
def test_rung(folders, network, monkeypatch, exchange, has_old, most):
    """Until the rung's new folder stands, its checkpoints stay, or the rung's old folder."""
    place, template = folders
    if not exchange:
        monkeypatch.setattr("stepdistill.disk.durable._exchange", lambda *_folders: False)
    state_of_new = network.adapter_state(STUDENT)
    if has_old:
        finish(template, network)
        other = {name: tensor + 1 for name, tensor in state_of_new.items()}
        network.load_adapter_state(STUDENT, other)
    checkpoint = partial(template) / CHECKPOINTS / "phase1-step000000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state").write_text("x")
    before = read_rung(template, 8)

    def state():
        put_back_replaced(place / "rungs")
        record = read_rung(place, 8)
        if record is None or (before is not None and record.sha256 == before.sha256):
            assert (partial(place) / checkpoint.relative_to(partial(template))).is_dir()
            assert (record is None) == (before is None)
            return OLD
        return NEW

    def again():
        if state() == OLD:
            finish(place, network)
        shutil.rmtree(rung_folder(place, 8) / CHECKPOINTS, ignore_errors=True)
        clear_half_written(place)

    enumerate_crashes(place, template, lambda: finish(place, network), state, again=again, most=most)
    assert sorted(tree(place)) == ["rungs/8/pytorch_lora_weights.safetensors", "rungs/8/rung.json"]
    network.load_adapter_state(STUDENT, state_of_new)


def partial(run_dir):
    return run_dir / "rungs" / ".8.partial"


def finish(run_dir, network):
    """The end of a rung's training, without the training."""
    partial(run_dir).mkdir(parents=True, exist_ok=True)
    rung = SimpleNamespace(student_steps=8, teacher_steps=16, start_timestep=None, init=None)
    config = SimpleNamespace(run_dir=run_dir, lora=SimpleNamespace(rank=2), ladder=[rung])
    about = {"base_fingerprint": "b", "samples_per_update": 4, "image_size": None}
    shared = SimpleNamespace(config=config, network=network, **about)
    finish_rung(shared, rung, partial(run_dir), prediction_type="epsilon", seconds=1.0)


def test_shard(folders, most):
    place, template = folders
    tensors = {
        "latents/8x8": torch.arange(400.0).reshape(-1, 4, 1, 1),
        "rows/8x8": torch.zeros(100, 5, dtype=torch.int32),
        "text/encoder_hidden_states": torch.zeros(1, 2, 3),
    }
    write_shard(template / "0.safetensors", tensors, {"captions": "old"})

    def act():
        write_shard(place / "0.safetensors", tensors, {"captions": "new"})
        clear_half_written(place)

    def state():
        assert is_intact(place / "0.safetensors")
        return read_about(place / "0.safetensors")["captions"]

    enumerate_crashes(place, template, act, state, most=most)


def test_a_record_beside_others(folders, most):
    """As teacher.json and environment.json are written."""
    place, template = folders
    write_sealed(template / "teacher.json", {"folder": OLD})

    def act():
        write_sealed(place / "teacher.json", {"folder": NEW})
        clear_half_written(place, names=["teacher.json"], is_alone=True)

    enumerate_crashes(place, template, act, lambda: read_sealed(place / "teacher.json")["folder"], most=most)


def test_lock(folders, monkeypatch, most):
    """Whatever a killed process leaves, the next one takes the folder, and leaves nothing."""
    place, template = folders
    monkeypatch.setattr("stepdistill.run.lock._PATIENCE", 0.05)

    def act():
        with locked(place):
            (place / "work").touch()

    def state():
        return NEW if (place / "work").exists() else OLD

    enumerate_crashes(place, template, act, state, most=most)
    assert [path.name for path in place.iterdir()] == ["work"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "distill"])
def test_a_whole_stage(tmp_path, stage):
    """Interrupted anywhere, the same command gives the same files."""
    place, template = tmp_path / "place", tmp_path / "template"
    config = small_config(place)
    template.mkdir()
    fresh(template, place)
    run = getattr(stages, stage)
    if stage == "distill":
        assert in_fork(lambda: stages.prepare(config) or 0) == 0
        shutil.copytree(place, template, dirs_exist_ok=True)
    assert in_fork(lambda: run(config) or 0) == 0
    part = {"prepare": "cache", "distill": "rungs"}[stage]

    def files():
        every = tree(config.run_dir / part) if (config.run_dir / part).exists() else {}
        return {name: digest for name, digest in every.items() if not name.endswith("rung.json")}

    whole = files()

    def state():
        return NEW if files() == whole else OLD

    enumerate_crashes(place, template, lambda: run(config), state, most=10)


@pytest.mark.slow
def test_teacher(tmp_path):
    """A teacher's folder with a LoRA baked in."""
    from stepdistill.ladder import save_lora
    from stepdistill.teacher.folder import embedded_folder
    from tests.integration.exported import random_student

    save_lora(random_student(embedded_folder("teacher")), tmp_path / "lora")
    place, template = tmp_path / "place", tmp_path / "template"
    config = small_config(place, f"teacher.loras=[{{path: {tmp_path / 'lora'}}}]")
    template.mkdir()

    def act():
        open_folder(config)
        make_teacher(config)
        clear_half_written(config.run_dir)

    def state():
        record = read_sealed(config.run_dir / "teacher.json")
        assert record is None or (config.run_dir / "teacher" / "model_index.json").is_file()
        return OLD if record is None else NEW

    enumerate_crashes(place, template, act, state, most=10)
