"""What one update computes: where x_t comes from, which timesteps a network is given, what the discriminator sees."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.config import ConfigError, Phase
from stepdistill.config.load import load_config
from stepdistill.config.objective_kinds import OBJECTIVES, ObjectiveKind
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.models.scores import build_scores
from stepdistill.models.shared_network import DISCRIMINATOR, STUDENT
from stepdistill.plan import phase_forwards
from stepdistill.plan.passes import _LORA_FORWARD
from stepdistill.training.samples import Samples
from tests.unit.test_gradients import (
    BATCH,
    MSE,
    forward,
    losses_of,
    make_batch,
    make_discriminator,
    make_pair,
)


def student_sample(pair, batch):
    return Samples(batch, student=pair.student, teacher=pair.teacher).student_sample.detach()


def test_the_network_is_given_the_start_timestep_only_for_pure_noise(noise_path):
    """x_s = a_s x_0 + s_s e with x_0 = (z - s_499 e) / a_499, and e from the U-Net at 499; other rows are unchanged."""
    plain = make_pair(noise_path)
    pair = plain._replace(student=dataclasses.replace(plain.student, start_timestep=499))
    batch = dataclasses.replace(make_batch(noise_path), prev_timesteps=torch.tensor([CLEAN, 249, CLEAN]))
    moved = student_sample(pair, batch)
    assert torch.equal(moved[1:], student_sample(plain, batch)[1:])
    with torch.no_grad(), pair.network.using(STUDENT):
        epsilon = pair.network.ask(batch.noise, torch.tensor([499] * BATCH), batch.conditioning)
    alpha, sigma = noise_path.alpha_sigma(torch.tensor([499]), ndim=4, dtype=torch.float32)
    assert torch.allclose(moved[:1], ((batch.noise - sigma * epsilon) / alpha)[:1], atol=1e-5)


def test_each_sample_is_computed_once(noise_path, monkeypatch):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    adapters = []
    ask = pair.network.ask
    monkeypatch.setattr(
        pair.network, "ask", lambda *a: adapters.append(pair.network.state.adapter) or ask(*a)
    )
    samples = Samples(batch, student=pair.student, teacher=pair.teacher)
    assert adapters == []
    for _ in range(2):
        losses_of(samples, MSE)
    assert adapters == ["teacher"] * len(batch.teacher_moves) + ["student"]


def test_cached_teacher_samples_are_reused(noise_path):
    pair, batch, stored = make_pair(noise_path), make_batch(noise_path), {}
    first = pair.losses(batch, MSE, teacher_samples=stored, number=7).by_role["student"]
    assert set(stored) == {7}
    without_teacher = dataclasses.replace(batch, teacher_moves=None)  # a roll-out would fail
    again = pair.losses(without_teacher, MSE, teacher_samples=stored, number=7).by_role["student"]
    assert torch.equal(again, first)


@pytest.mark.parametrize("count", [1000, 512])
def test_the_teacher_moves_as_ddim_does_on_a_path_of_any_length(count):
    """Two moves of an 8-step teacher within one 4-step move, against diffusers' sampler with `count` training timesteps."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    noise_path = VariancePreserving.from_betas(make_betas(**betas, num_train_timesteps=count))
    pair = make_pair(noise_path)
    nodes = noise_path.nodes(4)[:BATCH].tolist()
    batch = make_batch(noise_path, timesteps=nodes, ends=noise_path.jump(nodes, 4))
    bare = dataclasses.replace(pair.teacher, adapter=None)
    moved = Samples(batch, student=pair.student, teacher=bare).teacher_sample
    scheduler = DDIMScheduler(
        **betas, num_train_timesteps=count, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(8)
    state = batch.noise[:1]
    with torch.no_grad():
        for t in scheduler.timesteps[:2]:
            row = batch.conditioning.rows(torch.tensor([0]))
            state = scheduler.step(forward(pair.network.model, state, t[None], row), t, state).prev_sample
    assert torch.allclose(moved[:1], state, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_automatic_loss_space_is_what_the_student_predicts(noise_path, kind):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    pair = pair._replace(student=dataclasses.replace(pair.student, prediction_type=kind))
    automatic, named, other = (
        pair.losses(batch, Phase(objective="mse", loss_space=space)).by_role["student"]
        for space in ("auto", kind, "prev_sample")
    )
    assert torch.equal(automatic, named)
    assert automatic != other


def test_the_losses_of_several_objectives_are_summed_on_the_same_samples(noise_path):
    """Gradients are the weighted sum over objectives; the discriminator's loss has no weight; the student moves once."""
    weighted = ({"kind": "mse", "weight": 2.0}, {"kind": "single", "weight": 0.25})
    phases = {"both": Phase(objectives=weighted), "mse": MSE, "single": Phase(objective="single")}
    losses, gradients = {}, {}
    for name, phase in phases.items():
        pair = make_pair(noise_path)
        discriminator = make_discriminator(pair.network, paired=False) if phase.adversary else None
        losses[name] = pair.losses(make_batch(noise_path), phase, discriminator)
        for role, loss in losses[name].by_role.items():
            gradients[name, role] = torch.autograd.grad(
                loss, list(pair.network.group(role).values()), retain_graph=True
            )
    ours, by_mse, by_single = (gradients[name, STUDENT] for name in phases)
    for total, first, second in zip(ours, by_mse, by_single, strict=True):
        assert torch.allclose(total, 2.0 * first + 0.25 * second, rtol=1e-4, atol=1e-7)
    metrics = losses["both"].metrics
    for name in ("mse", "single"):
        assert torch.allclose(metrics[f"{name}_loss"], losses[name].by_role[STUDENT].detach(), rtol=1e-5)
        assert f"{name}_loss" not in losses[name].metrics
    of_both, of_single = (gradients[name, DISCRIMINATOR] for name in ("both", "single"))
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-8) for x, y in zip(of_both, of_single, strict=True))


def test_the_student_moves_once_for_all_objectives(noise_path, monkeypatch):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    discriminator = make_discriminator(pair.network, paired=False)
    adapters, ask = [], pair.network.ask
    monkeypatch.setattr(
        pair.network, "ask", lambda *a: adapters.append(pair.network.state.adapter) or ask(*a)
    )
    pair.losses(batch, Phase(objectives=({"kind": "mse"}, {"kind": "single"})), discriminator)
    assert adapters == [*["teacher"] * len(batch.teacher_moves), "student"]


class NoWaiting(TorchDispatchMode):
    """Fails on operations for which the CPU waits until the GPU has computed a value."""

    WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.WAITING, f"{function} waits for the GPU"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_and_gradients_never_wait_for_the_gpu(noise_path, kind):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    phase = Phase(objective=kind)
    discriminator = make_discriminator(pair.network, paired=kind == "paired") if phase.adversary else None
    batch = dataclasses.replace(batch, score=batch.perturbation)
    undistilled = dataclasses.replace(pair.teacher, adapter=None)
    scores = build_scores(phase, undistilled, rank=4, seed=0)
    with NoWaiting():
        losses = pair.losses(batch, phase, discriminator, scores=scores)
        for loss in losses.by_role.values():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.student_parameters, 1.0)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the GPU"):
        losses.by_role["student"].item()


def test_a_new_objective_is_one_file_and_one_line(noise_path, monkeypatch, tmp_path):
    """A toy objective from outside the package: make the student's sample small."""
    (tmp_path / "small_objective.py").write_text(
        "from stepdistill.training.losses import Loss\n\n\n"
        "def small(samples, phase):\n"
        "    return Loss(samples.student_sample.square().mean())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(OBJECTIVES, "small", ObjectiveKind("small_objective:small", "nothing"))

    changes = ["ladder.1.phases.0.objective=small", "ladder.1.phases.0.cached_updates=null"]
    config = load_config("configs/letters.yaml", changes)
    rung, phase = config.ladder[1], config.ladder[1].phases[0]
    student_alone = phase_forwards(config, rung, phase)
    assert student_alone == phase_forwards(config, rung, Phase(objective="convert")) - _LORA_FORWARD
    assert not phase.needs_teacher_moves
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    loss = pair.losses(batch, phase).by_role["student"]
    assert torch.allclose(loss, student_sample(pair, batch).square().mean())
    loss.backward()
    assert all(p.grad is not None for p in pair.student_parameters)
    several = ["ladder.1.phases=[{objectives: [{kind: small}, {kind: mse}]}]"]
    both = load_config("configs/letters.yaml", several)
    assert both.ladder[1].phases[0].title == "small+mse"


def test_an_unknown_objective_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"objective: got 'mze'.*allowed: mse, convert, paired, single"):
        load_config("configs/letters.yaml", ["ladder.0.phases.0.objective=mze"])
