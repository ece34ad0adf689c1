"""Every distance against an independent reference on the same features, to 1e-6."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from stepdistill.evaluation.measure.distances import (
    Moments,
    _filled,
    _Identity,
    cmmd,
    density_coverage,
    diversity,
    fid,
    kid,
    precision_recall,
    relations_kept,
)


def two_sets(n=150, m=130, size=12):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(size, size))
    first = rng.normal(size=(n, size)) @ root + 3
    second = 1.2 * rng.normal(size=(m, size)) @ root + rng.normal(size=size)
    return torch.from_numpy(first), torch.from_numpy(second)


def test_relations_kept_is_scipys_rank_correlation_of_distances():
    x, _ = two_sets()
    noisy = x + torch.from_numpy(np.random.default_rng(1).normal(size=x.shape)) * 4
    expected = scipy.stats.spearmanr(*(scipy.spatial.distance.pdist(a.numpy()) for a in (noisy, x))).statistic
    assert 0.2 < expected < 0.95
    assert relations_kept(noisy, x) == pytest.approx(expected, abs=1e-6)


def test_relations_are_kept_by_turning_scaling_and_moving_features_and_not_by_others():
    x, _ = two_sets()
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))
    assert relations_kept(3 * x @ torch.from_numpy(turn) + 5, x) == pytest.approx(1.0, abs=1e-6)
    other = torch.from_numpy(np.random.default_rng(3).normal(size=x.shape))
    assert abs(relations_kept(other, x)) < 0.05
    assert relations_kept(x[:2], x[:2]) is None
    assert relations_kept(torch.ones_like(x), x) is None


def test_fid_equals_scipys_matrix_square_root():
    x, y = two_sets()
    (m1, c1), (m2, c2) = ((a.numpy().mean(0), np.cov(a.numpy().T)) for a in (x, y))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert fid(x, y) == pytest.approx(expected, rel=1e-6)
    assert fid(x.float(), y.float()) == pytest.approx(expected, rel=1e-5)


def test_fid_of_moments_equals_torchmetrics_fid_of_the_samples():
    """distances._filled sets torchmetrics' state by hand: fails if torchmetrics stores other sums, or warns."""
    x, y = two_sets()
    theirs = FrechetInceptionDistance(feature=_Identity(12), normalize=True).set_dtype(torch.float64)
    for features, real in ((x, True), (y, False)):
        theirs.update(features, real=real)
    ours = _filled([Moments.from_features(x), Moments.from_features(y)], 12)
    assert ours.metric_state.keys() == theirs.metric_state.keys()
    for name, value in theirs.metric_state.items():
        assert torch.allclose(ours.metric_state[name].double(), value.double(), rtol=1e-9), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_fid_equals_the_closed_form_of_two_diagonal_gaussians():
    size = 64
    mean, deviation = torch.linspace(-2, 3, size).double(), torch.linspace(0.1, 4, size).double()
    first = Moments(torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64), 1000)
    second = Moments(mean, torch.diag(deviation**2), 777)
    expected = float((mean**2).sum() + ((deviation - 1) ** 2).sum())
    assert fid(first, second) == pytest.approx(expected, rel=1e-9)


def test_fid_of_a_set_with_itself_is_zero():
    x, _ = two_sets(n=2000, size=48)
    assert fid(x, x) < 1e-6 * float(x.var(dim=0).sum())


def test_the_bias_of_fid_is_as_documented_in_the_protocol():
    generator, text = torch.Generator().manual_seed(0), " ".join(Path("eval/protocol.md").read_text().split())
    for count in (1000, 5000, 10_000, 30_000):
        apart = fid(*(torch.randn(count, 256, generator=generator) for _ in range(2)))
        documented = re.search(rf"([\d.]+)(?: apart)? at {count:,}", text)
        assert apart == pytest.approx(float(documented[1]), rel=0.03)


def test_fid_from_a_file_of_moments(tmp_path):
    x, y = two_sets()
    np.savez(tmp_path / "stats.npz", mu=x.double().mean(0).numpy(), sigma=np.cov(x.double().numpy().T))
    assert fid(Moments.from_npz(tmp_path / "stats.npz"), y) == pytest.approx(fid(x, y), rel=1e-9)


@pytest.mark.parametrize(
    "content", ["text", "missing", "shapes", "nan", "asymmetric", "cut", "flipped", "array"]
)
def test_a_file_without_moments_is_named(tmp_path, content):
    path = tmp_path / "stats.npz"
    if content == "text":
        path.write_text("not numpy")
    elif content == "missing":
        np.savez(path, mu=np.zeros(3))
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, np.eye(3))
    else:
        sigma = {"shapes": np.zeros((2, 2)), "asymmetric": np.array([[1, 5, 0], [0, 1, 0], [0, 0, 1]])}
        mean = np.full(3, np.nan) if content == "nan" else np.zeros(3)
        np.savez(path, mu=mean, sigma=sigma.get(content, np.eye(3)))
        intact = bytearray(path.read_bytes())
        if content == "cut":
            path.write_bytes(intact[: len(intact) // 2])
        elif content == "flipped":
            intact[intact.index(b"sigma.npy") + 9 + 140] ^= 1
            path.write_bytes(intact)
    with pytest.raises(ValueError, match=r"^evaluation\.reference_stats: .*stats\.npz"):
        Moments.from_npz(path)


def test_kid_equals_a_direct_loop_over_pairs():
    x, y = two_sets(n=40, m=40, size=7)

    def kernel(a, b):
        return (float(a @ b) / 7 + 1) ** 3

    n = 40
    within = [
        sum(kernel(s[i], s[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1)) for s in (x, y)
    ]
    across = sum(kernel(a, b) for a in x for b in y) / n**2
    mean, deviation = kid(x, y, subsets=3, subset_size=1000)
    assert mean == pytest.approx(sum(within) - 2 * across, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-6 * abs(mean))  # every subset is the whole set


def test_kid_is_unbiased_and_has_a_deviation():
    rng = np.random.default_rng(1)
    x, y = (torch.from_numpy(rng.normal(size=(400, 16))) for _ in range(2))
    mean, deviation = kid(x, y, subsets=50, subset_size=100)
    assert abs(mean) < deviation
    assert kid(x, y, subsets=5, subset_size=100, seed=1) == kid(x, y, subsets=5, subset_size=100, seed=1)
    assert kid(x, y, subsets=5, subset_size=100, seed=1) != kid(x, y, subsets=5, subset_size=100, seed=2)


def test_kid_of_paired_sets_is_not_lowered_by_what_pairs_have_in_common():
    rng = np.random.default_rng(2)
    common = rng.normal(size=(1000, 16))
    x, y = (torch.from_numpy(common + 0.1 * rng.normal(size=common.shape)) for _ in range(2))
    plain, deviation = kid(x, y, subsets=20)[0], kid(x, y, subsets=20, paired=True)[1]
    assert (
        plain < -0.5 * float(((x * x).sum(1) / 16 + 1).pow(3).mean()) / 1000
    )  # the diagonal, which is contained in one term only
    assert abs(kid(x, y, subsets=20, paired=True)[0]) < 3 * deviation


def brute_radii(x, k):
    apart = np.linalg.norm(x[:, None] - x[None], axis=-1)
    return np.sort(apart, axis=1)[:, k]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_coverage_equal_brute_force(k):
    x, y = two_sets()
    a, b = x.numpy(), y.numpy()
    across = np.linalg.norm(b[:, None] - a[None], axis=-1)
    precision = np.mean([(across[i] <= brute_radii(a, k)).any() for i in range(len(b))])
    recall = np.mean([(across[:, j] <= brute_radii(b, k)).any() for j in range(len(a))])
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert precision_recall(x, y, k=k) == pytest.approx((precision, recall), rel=1e-6)
    inside = across < brute_radii(a, k)[None]
    expected = (inside.sum() / (k * len(b)), inside.any(axis=0).mean())
    assert density_coverage(x, y, k=k) == pytest.approx(expected, rel=1e-6)


def test_points_on_the_edge_of_a_ball_count_for_precision_but_not_for_density():
    real, generated = (torch.tensor(values)[:, None].double() for values in ([0, 1, 2, 3], [4, 6]))
    assert precision_recall(real, generated, k=1) == (0.5, 0.5)  # 4 is 1 from 3; 2 and 3 are up to 2 from 4
    assert density_coverage(real, generated, k=1) == (0, 0)


def test_chunks_do_not_change_a_distance(monkeypatch):
    x, y = two_sets()
    unchunked = [f(x, y) for f in (precision_recall, density_coverage, cmmd)]
    monkeypatch.setattr("stepdistill.evaluation.measure.distances._CHUNK", 7)
    for before, now in zip(
        unchunked, [f(x, y) for f in (precision_recall, density_coverage, cmmd)], strict=True
    ):
        assert now == pytest.approx(before, rel=1e-12)


def test_cmmd_equals_a_direct_loop_over_pairs():
    x, y = two_sets(n=30, m=25)
    a, b = ((s / s.norm(dim=1, keepdim=True)).numpy() for s in (x, y))

    def mean_kernel(s, t):
        return np.mean([np.exp(-((u - v) ** 2).sum() / 200) for u in s for v in t])

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_diversity_is_the_mean_distance_of_two_seeds():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4, 3)))
    pairs = [float((p[i] - p[j]).norm()) for p in x for i in range(4) for j in range(4) if i != j]
    assert diversity(x) == pytest.approx(np.mean(pairs), rel=1e-9)
    assert diversity(x[:, :1].expand(5, 4, 3)) == 0


def test_no_metric_touches_global_randomness():
    x, y = two_sets()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    fid(x, y), kid(x, y), precision_recall(x, y), density_coverage(x, y), cmmd(x, y)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_impossible_measurements_raise_errors():
    x, _ = two_sets()
    for metric in (fid, kid, precision_recall, density_coverage, cmmd):
        with pytest.raises(ValueError, match="extractors differ"):
            metric(x, x[:, :5])
    with pytest.raises(ValueError, match="not finite"):
        diversity(x[:10].reshape(5, 2, -1) / 0)
    with pytest.raises(ValueError, match="N >= 2"):
        fid(x, x[:1])
    with pytest.raises(ValueError, match="no 3-th neighbour"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="not finite"):
        fid(x, x / 0)
