"""Distances between features: closed forms, what they do not see, finite differences, and the passes they come from."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from stepdistill.config import ConfigError, Phase
from stepdistill.config.load import load_config
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import STUDENT, TEACHER, as_map
from stepdistill.objectives import features
from stepdistill.plan.cards import card_of
from stepdistill.plan.dry_update import DryRun
from stepdistill.plan.taps import check_taps
from stepdistill.teacher.families import plannable_facts
from stepdistill.training.samples import Samples
from tests.conftest import make_conditioning, randn
from tests.unit.test_gradients import BATCH, make_batch, make_pair

KINDS = ("l2", "attention", "gram", "kernel", "relations")
DISTANCES = {
    "l2": features.l2_distance,
    "attention": features.attention_distance,
    "gram": features.gram_distance,
    "gaussian": features.kernel_distance,
    "laplace": lambda s, t: features.kernel_distance(s, t, kind="laplace"),
    "patches": features.patch_relations,
    "samples": features.sample_relations,
}


def turned(features_, seed=0):
    """The features with their channels multiplied by an orthogonal matrix."""
    count = features_.shape[1]
    turn, _ = torch.linalg.qr(randn(count, count, seed=seed))
    return torch.einsum("cd,bdhw->bchw", turn, features_)


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_features_have_no_distance_and_others_have_one(name):
    student, teacher = randn(3, 6, 4, 4), randn(3, 6, 4, 4, seed=1)
    assert DISTANCES[name](teacher, teacher) == pytest.approx(0.0, abs=2e-6)
    assert DISTANCES[name](student, teacher) > 1e-3


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_those_of_finite_differences(name):
    student, teacher, direction = (randn(3, 6, 4, 4, seed=seed) for seed in (0, 1, 2))
    student.requires_grad_(True)
    DISTANCES[name](student, teacher).backward()
    with torch.no_grad():
        ahead, behind = (DISTANCES[name](student + side * 1e-2 * direction, teacher) for side in (1, -1))
    assert float((student.grad * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-2, rel=2e-2)


def test_l2_is_the_squared_relative_error():
    teacher = randn(2, 3, 4, 4)
    assert features.l2_distance(1.3 * teacher, teacher) == pytest.approx(0.09, rel=1e-4)


def test_attention_sees_where_features_are_large_but_not_how_large():
    left, right = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    left[..., 0], right[..., 1] = 1.0, 5.0
    assert features.attention_distance(7 * left, left) == pytest.approx(0.0, abs=1e-6)
    assert features.attention_distance(left, right) == pytest.approx(2.0)


def test_gram_sees_channels_together_but_not_where():
    teacher = randn(2, 3, 4, 4)
    moved = teacher.flatten(2)[:, :, torch.randperm(16)].view_as(teacher)
    assert features.gram_distance(moved, teacher) == pytest.approx(0.0, abs=1e-6)
    assert features.gram_distance(2 * teacher, teacher) == pytest.approx((4 - 1) ** 2)


@pytest.mark.parametrize(
    ("kind", "expected"), [("gaussian", 1 - math.exp(-0.5)), ("laplace", 1 - math.exp(-1))]
)
def test_a_kernels_bandwidth_is_the_median_distance_of_the_teachers_positions(kind, expected):
    teacher = torch.zeros(1, 2, 1, 3)  # positions at 0, 1 and 10 on a line: distances 1, 9 and 10
    teacher[0, 0, 0] = torch.tensor([0.0, 1.0, 10.0])
    student = teacher.clone()
    student[0, 1] = 9.0  # each position is moved by the median
    assert features.kernel_distance(student, teacher, kind=kind) == pytest.approx(expected, rel=1e-5)


def test_a_kernel_of_many_positions_takes_the_median_over_some_of_them():
    teacher = randn(1, 4, 40, 40)
    points = teacher.flatten(2)[0].T
    whole = torch.pdist(points).median()
    assert float(features._median_distance(points[None])) == pytest.approx(float(whole), rel=0.05)


def test_relations_of_patches_do_not_depend_on_the_channels_basis():
    teacher = randn(2, 6, 4, 4)
    assert features.patch_relations(3 * turned(teacher), teacher) == pytest.approx(0.0, abs=1e-6)
    same, apart = torch.ones(1, 4, 2, 2), torch.eye(4).view(1, 4, 2, 2)
    assert features.patch_relations(apart, same) == pytest.approx(12 / 16)  # all pairs of different patches


def test_features_of_one_position_have_no_patches():
    student = randn(2, 4, 1, 1).requires_grad_(True)
    features.patch_relations(student, randn(2, 4, 1, 1, seed=1)).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_relations_of_samples_are_those_of_rkd():
    student, teacher = randn(4, 5, 2, 2), randn(4, 5, 2, 2, seed=1)
    assert features.sample_relations(3 * turned(teacher) + 2, teacher) == pytest.approx(0.0, abs=1e-5)
    found = []
    for batch in (student, teacher):
        points = batch.mean(dim=(2, 3)).double()
        distances = torch.cdist(points, points)
        mean = distances.sum() / (4 * 3)
        angles = torch.zeros(4, 4, 4, dtype=torch.float64)
        for i, j, k in itertools.product(range(4), repeat=3):
            if i not in (j, k):
                first, second = points[j] - points[i], points[k] - points[i]
                angles[i, j, k] = first @ second / (first.norm() * second.norm())
        found.append((distances / mean, angles))
    (d_s, a_s), (d_t, a_t) = found
    expected = smooth_l1_loss(d_s, d_t) + 2 * smooth_l1_loss(a_s, a_t)
    assert features.sample_relations(student, teacher) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_relations_of_few_samples_are_finite(count):
    student = randn(count, 5, 2, 2).requires_grad_(True)
    features.sample_relations(student, randn(count, 5, 2, 2, seed=1)).backward()
    assert student.grad.isfinite().all()


def phase_of(*kinds, taps=("encoder", "middle", "decoder"), **options):
    objectives = [{"kind": "mse"}] * ("mse" in kinds)
    objectives += [{"kind": kind, "taps": taps, **options} for kind in kinds if kind != "mse"]
    return Phase(objectives=tuple(objectives))


@pytest.fixture
def asked(monkeypatch):
    """Counts the forward passes of a pair by adapter."""

    def watch(pair):
        adapters, ask = [], pair.network.ask

        def counted(*args):
            adapters.append(pair.network.state.adapter)
            return ask(*args)

        monkeypatch.setattr(pair.network, "ask", counted)
        return adapters

    return watch


def test_features_take_no_passes_beside_mse(noise_path, asked):
    counts = []
    for phase in (phase_of("mse"), phase_of("mse", *KINDS)):
        pair = make_pair(noise_path)
        adapters = asked(pair)
        pair.losses(make_batch(noise_path), phase)
        counts.append(adapters)
    assert counts[0] == counts[1]
    assert counts[0].count(STUDENT) == 1


def test_features_alone_take_one_pass_of_student_and_teacher(noise_path, asked):
    pair, phase = make_pair(noise_path), phase_of(*KINDS)
    adapters = asked(pair)
    batch = dataclasses.replace(make_batch(noise_path), teacher_moves=None)
    pair.losses(batch, phase)
    assert sorted(adapters) == [STUDENT, TEACHER]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_loss(noise_path, kind):
    pair, phase = make_pair(noise_path), phase_of(kind)
    unequal = pair.losses(make_batch(noise_path), phase).by_role[STUDENT]
    pair.network.load_adapter_state(STUDENT, pair.network.adapter_state(TEACHER))
    equal = pair.losses(make_batch(noise_path), phase).by_role[STUDENT]
    assert abs(float(equal)) < 1e-5 < float(unequal)


def test_features_are_those_of_the_blocks_at_x_t(noise_path):
    """Against hooks on the blocks of the same network, with the student's adapter active."""
    pair, phase, batch = make_pair(noise_path), phase_of("l2"), make_batch(noise_path)
    samples = Samples(batch, student=pair.student, teacher=pair.teacher, taps=phase.taps)
    outputs, model = {}, pair.network.model
    names = [*(f"down_blocks.{k}" for k in range(len(model.down_blocks))), "mid_block"]
    names += [f"up_blocks.{k}" for k in range(len(model.up_blocks))]
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: outputs.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
        for name in names
    ]
    with torch.no_grad(), pair.network.using(STUDENT):
        pair.network.ask(samples.noisy, batch.timesteps, batch.conditioning)
    for hook in hooks:
        hook.remove()
    assert list(samples.student_features) == names
    for name in names:
        assert torch.allclose(samples.student_features[name], outputs[name], atol=1e-5)
        assert samples.student_features[name].requires_grad
        assert not samples.teacher_features[name].requires_grad


def test_a_guided_teachers_features_are_those_with_prompts(noise_path):
    """The pass with guidance also has rows without prompts, which the student never sees."""
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    unconditional = Conditioning(make_conditioning(1).encoder_hidden_states + 3.0)
    guided = dataclasses.replace(pair.teacher, guidance_scale=3.0, unconditional=unconditional)
    plain, with_guidance = (
        Samples(batch, student=pair.student, teacher=teacher, taps=("middle",)).teacher_features["mid_block"]
        for teacher in (pair.teacher, guided)
    )
    assert with_guidance.shape[0] == BATCH
    assert torch.allclose(plain, with_guidance, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_with_recomputation(noise_path, kind):
    gradients = []
    for checkpointing in (False, True):
        pair, phase = make_pair(noise_path, checkpointing=checkpointing), phase_of(kind)
        loss = pair.losses(make_batch(noise_path), phase).by_role[STUDENT]
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in pair.student_parameters]))
    assert gradients[0].norm() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))


def test_a_transformer_blocks_output_becomes_a_map():
    tokens = randn(2, 16, 5)
    assert torch.equal(as_map(tokens)[:, :, 1, 2], tokens[:, 6])
    assert as_map(randn(2, 7, 5)).shape == (2, 5, 7, 1)


LETTERS = "configs/letters.yaml"


def several(objectives, *more):
    return load_config(LETTERS, [f"ladder.1.phases=[{{objectives: {objectives}}}]", *more])


@pytest.mark.parametrize("tap", ["up_blocks.1.resnets.0", "down_blocks.1.attentions.0.transformer_blocks.0"])
def test_a_module_of_the_network_is_a_tap(tap):
    config = several(f"[{{kind: mse}}, {{kind: l2, taps: [middle, {tap}]}}]")
    check_taps(config, plannable_facts(config))


@pytest.mark.parametrize(
    ("tap", "expected", "more"),
    [
        (
            "up_blocks.9",
            "got 'up_blocks.9', which names no module of the UNet2DConditionModel; allowed: encoder",
            [],
        ),
        ("time_embedding", "got 'time_embedding', whose output is no map of features", []),
        ("up_blocks.1.resnets.0", "which training.compile compiles", ["training.compile=true"]),
    ],
)
def test_a_tap_that_gives_no_features_is_refused(tap, expected, more):
    config = several(f"[{{kind: mse}}, {{kind: l2, taps: [{tap}]}}]", *more)
    with pytest.raises(ConfigError, match=r"ladder\.1\.phases\.0\.objectives\.1\.taps: ") as error:
        check_taps(config, plannable_facts(config))
    assert expected in str(error.value)


def test_relations_of_samples_need_two_of_them():
    objectives = "[{kind: mse}, {kind: relations, between: samples}]"
    with pytest.raises(
        ConfigError, match=r"objectives\.1\.between: got samples with a training\.train_batch_size of 1"
    ):
        several(objectives, "training.train_batch_size=1")


def test_taps_add_less_than_two_percent_to_an_update():
    """FLOP of an mse update of the letters, whose passes are small, and with all feature objectives at all taps."""
    config = load_config(LETTERS)
    dry_run, rung = DryRun(config, plannable_facts(config), card_of("24GB")), config.ladder[1]
    alone, with_features = (
        dry_run.update(rung, phase).total.flop for phase in (phase_of("mse"), phase_of("mse", *KINDS))
    )
    assert alone < with_features < 1.02 * alone
