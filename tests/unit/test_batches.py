"""An update sees the same samples and noise for any number of processes and any micro-batch, with prefetching."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch

from stepdistill.config import Phase, Rung, Training
from stepdistill.data.batches import ahead, draw_batch
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.variance_preserving import VariancePreserving
from stepdistill.errors import OutOfMemoryError
from stepdistill.models.denoiser import Denoiser
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.phase_setup import PhaseSetup
from tests.unit.test_cache import cache, shard


@pytest.mark.parametrize(("processes", "micro", "accumulation"), [(1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 1, 2)])
def test_an_update_sees_the_same_samples_and_noise_however_it_is_split(
    tmp_path, processes, micro, accumulation
):
    expected = [numbers for update in split(tmp_path / "a", 1, 8, 1) for numbers in update]
    parts = [
        numbers for update in split(tmp_path / "b", processes, micro, accumulation) for numbers in update
    ]
    assert len(expected) == 3 * 8
    for ours, theirs in zip(parts, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("cached", [0, 2])
def test_every_update_takes_the_same_samples_however_it_is_split(tmp_path, cached):
    """Also if updates are repeated (cached_updates)."""
    expected = [set(range(8 * (n % (cached or 5)), 8 * (n % (cached or 5)) + 8)) for n in range(5)]
    for processes, micro, accumulation in ((1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 1, 2), (8, 1, 1)):
        setup = setup_of(tmp_path / f"{processes} {micro}", micro, accumulation)
        phase = setup.phase.model_copy(update={"max_train_steps": 5, "cached_updates": cached})
        setup = dataclasses.replace(setup, phase=phase)
        updates = [set() for _ in range(5)]
        for index in range(processes):
            runtime = one_process(num_processes=processes, process_index=index)
            for step in range(5):
                for first in MicroBatches(setup, runtime).firsts(step):
                    updates[step].update(range(first, first + micro))
        assert updates == expected, (processes, micro, accumulation)


def two_sizes(folder):
    folder.mkdir()
    square = shard(folder / "0", list(range(20)))
    wide = shard(folder / "1", list(range(100, 130)), size=(16, 24))
    return cache([square, wide])


def setup_of(folder, micro, accumulation):
    """The setup of an adversarial phase with three updates."""
    training = Training(train_batch_size=micro, gradient_accumulation_steps=accumulation)
    phase = Phase(objective="single", max_train_steps=3)
    rung = Rung(teacher_steps=8, student_steps=4, phases=(phase,))
    path = VariancePreserving(torch.linspace(1, 0, 1000, dtype=torch.float64))
    student = teacher = Denoiser(None, None, path, "v_prediction")
    return PhaseSetup(rung, phase, 0, training, 5, student, teacher, None, two_sizes(folder), preview=print)


def split(folder, processes, micro, accumulation):
    """The samples of three updates with eight samples each, in order, gathered from all processes."""
    setup = setup_of(folder, micro, accumulation)
    updates = [[] for _ in range(3)]
    for index in range(processes):
        runtime = SimpleNamespace(
            num_processes=processes,
            process_index=index,
            device=torch.device("cpu"),
            weight_dtype=torch.float32,
        )
        drawn = list(MicroBatches(setup, runtime))
        for place, (_, batch) in enumerate(drawn):
            for row in range(micro):
                values = vars(batch) | {f"perturbed {k}": v for k, v in vars(batch.perturbation).items()}
                fields = {k: v[row] for k, v in values.items() if isinstance(v, torch.Tensor)}
                updates[place // accumulation].append(fields)
    return updates


def test_resuming_at_an_update_gives_the_batches_from_there_on(tmp_path):
    runtime = one_process()
    setup = setup_of(tmp_path / "a", 2, 2)
    expected = list(MicroBatches(setup, runtime))
    rest = list(MicroBatches(setup, runtime, first_step=1))
    assert [first for first, _ in rest] == [first for first, _ in expected[2:]]
    assert all(torch.equal(a.noise, b.noise) for (_, a), (_, b) in zip(rest, expected[2:], strict=True))


def one_process(**more):
    about = {"num_processes": 1, "process_index": 0, "is_main": True}
    return SimpleNamespace(**(about | more), device=torch.device("cpu"), weight_dtype=torch.float32)


def test_an_update_is_begun_again_with_the_same_samples_in_smaller_micro_batches(tmp_path, caplog):
    setup = setup_of(tmp_path / "a", 6, 1)
    expected = [batch for _, batch in MicroBatches(setup, one_process())]
    batches = MicroBatches(setup, one_process())
    next(batches)
    next(batches)  # the second update, which does not fit
    sizes = []
    for _ in range(2):
        batches.split(1)
        sizes.append((batches.size, batches.per_update))
    assert sizes == [(3, 2), (1, 6)]
    assert "training.train_batch_size=3 training.gradient_accumulation_steps=2" in caplog.text
    rest = list(batches)
    assert [first for first, _ in rest] == list(range(6, 18))
    for name in ("original_samples", "noise", "timesteps"):
        joined = torch.cat([getattr(batch, name) for _, batch in rest])
        assert torch.equal(joined, torch.cat([getattr(batch, name) for batch in expected[1:]]))
    with pytest.raises(OutOfMemoryError, match="after 1 updates, with one sample in a micro-batch"):
        batches.split(1)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "fix: the same command with training.gradient_checkpointing=true, which continues there"),
        (
            {"gradient_checkpointing": True, "memory_budget": "16GiB"},
            "fix: the same command with a smaller training.memory_budget, now 16GiB, or null, which continues there",
        ),
        (
            {"gradient_checkpointing": True},
            r"fix: another run \(name=...\) with training.mixed_precision=bf16",
        ),
    ],
)
def test_what_lets_one_sample_fit_is_named_the_same_run_first(tmp_path, settings, remedy):
    setup = setup_of(tmp_path / "cache", 1, 1)
    setup = dataclasses.replace(setup, training=setup.training.model_copy(update=settings))
    batches = MicroBatches(setup, one_process())
    with pytest.raises(OutOfMemoryError, match=remedy):
        batches.split(1)
    batches.close()


def test_the_next_batch_is_drawn_in_order_while_the_last_one_is_processed():
    started = [threading.Event() for _ in range(4)]

    def draw(number):
        started[number].set()
        return number * 10

    received = []
    for first, batch in ahead(draw, range(4)):
        if first < 3:
            assert started[first + 1].wait(10)
        received.append((first, batch))
    assert received == [(0, 0), (1, 10), (2, 20), (3, 30)]


def test_a_failed_draw_is_raised_when_its_batch_is_used():
    def draw(number):
        if number == 2:
            raise ValueError("a broken shard")
        return number

    batches = ahead(draw, range(4))
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="a broken shard"):
        next(batches)


def test_perturbation_timesteps_exist_on_a_path_of_500_timesteps(tmp_path):
    """With 500 timesteps the largest t* is 374, at three quarters of the schedule."""
    path = VariancePreserving(torch.linspace(1, 0, 500, dtype=torch.float64))
    batch = draw_batch(
        two_sizes(tmp_path / "a"),
        list(range(64)),
        noise_path=path,
        student_steps=4,
        node_steps=4,
        perturbation_weights=(0.0, 0.0, 0.0, 1.0),
        seed=1,
        keys=("short",),
        dtype=torch.float32,
    )
    clean = batch.prev_timesteps == CLEAN
    assert 0 < clean.sum() < 64
    seen_at = batch.perturbation.timesteps
    assert seen_at[clean].unique().tolist() == [374]
    assert torch.equal(seen_at[~clean], batch.prev_timesteps[~clean])
    assert batch.timesteps.unique().tolist() == [124, 249, 374, 499]
