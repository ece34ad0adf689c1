"""Distances between two sets of features (N, D), computed in float64. FID and KID come from torchmetrics."""

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchmetrics.functional.regression import spearman_corrcoef
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from stepdistill.teacher.files import require_file

# Under torchrun only the main process measures; torchmetrics would wait for the other processes to synchronise.
ALONE = {"sync_on_compute": False}
_STATS = "evaluation.reference_stats"
_MAX_BYTES = 2**28  # for mu and for sigma each; Inception's sigma has 2048 x 2048 numbers
_CHUNK = 1024  # rows of a distance matrix that are in memory at a time


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of num_samples features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor
    num_samples: int

    @classmethod
    def from_features(cls, features: torch.Tensor) -> "Moments":
        """The moments of features (N, D); ValueError if N < 2."""
        x = _checked(features)
        return cls(x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), len(x))

    @classmethod
    def from_npz(cls, path: Path) -> "Moments":
        """The moments in the usual .npz file with `mu` and `sigma`, which evaluation.reference_stats names; ValueError if
        these are missing or not valid moments."""
        try:
            require_file(path)
            with zipfile.ZipFile(path) as members:
                large = [info.filename for info in members.infolist() if info.file_size > _MAX_BYTES]
            if large:
                raise ValueError(f"{large[0]} has more than {_MAX_BYTES} bytes")
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (
                    torch.from_numpy(np.asarray(file[k], dtype=np.float64)) for k in ("mu", "sigma")
                )
        except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{_STATS}: cannot read {path}: {error}; allowed: an .npz with mu and sigma"
            ) from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{_STATS}: {path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not match"
            )
        finite = bool(mean.isfinite().all() and covariance.isfinite().all())
        # a sigma that was computed in float32 is symmetric only up to rounding
        if not finite or (covariance - covariance.T).norm() > 1e-4 * covariance.norm():
            raise ValueError(
                f"{_STATS}: {path}: mu and sigma are not valid moments: not finite, or sigma is not symmetric"
            )
        return cls(mean, covariance, 2)


class _Identity(nn.Module):
    """Returns its input: lets torchmetrics' metrics work on features that are already computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def fid(first: torch.Tensor | Moments, second: torch.Tensor | Moments) -> float:
    """Frechet distance between the Gaussians with the sets' moments, never below 0 (Heusel et al. 2017, Eq 6).

    ValueError if the sets differ in the number of features, or one has fewer than 2 samples.
    """
    moments = [x if isinstance(x, Moments) else Moments.from_features(x) for x in (first, second)]
    size = len(moments[0].mean)
    if len(moments[1].mean) != size:
        raise ValueError(f"FID of {size} and {len(moments[1].mean)} features: the extractors differ")
    return max(0.0, float(_filled(moments, size).compute()))


def _filled(moments: Sequence[Moments], size: int) -> FrechetInceptionDistance:
    """torchmetrics' FID with its state set from two moments, real and fake, because its update() accepts samples only.

    This is the only place that writes torchmetrics' state: the sums, the dtype of the result, and the update count, without
    which compute() warns. tests/parity/test_distances.py compares the result with that of torchmetrics' update().
    """
    metric = FrechetInceptionDistance(feature=_Identity(size), **ALONE).set_dtype(torch.float64)
    for name, m in zip(("real", "fake"), moments, strict=True):
        outer = (m.num_samples - 1) * m.covariance + m.num_samples * torch.outer(m.mean, m.mean)
        setattr(metric, f"{name}_features_sum", m.mean * m.num_samples)
        setattr(metric, f"{name}_features_cov_sum", outer)
        setattr(metric, f"{name}_features_num_samples", torch.tensor(m.num_samples))
    metric.orig_dtype = torch.float64
    metric._update_count = 1
    return metric


def relations_kept(features: torch.Tensor, reference: torch.Tensor, *, most: int = 512) -> float | None:
    """Spearman's rank correlation between the pairwise distances of features (N, D) and those of reference (N, D), image by
    image, over the first `most` images. None for fewer than 3 images, or if all distances of one set are equal."""
    distances = [torch.pdist(_checked(x)[:most]) for x in (features, reference)]
    if len(features) < 3 or any(bool(d.max() == d.min()) for d in distances):
        return None
    return float(spearman_corrcoef(*distances))


def fid_without_each_group(images: torch.Tensor, reference: torch.Tensor, *, groups: int = 8) -> list[float]:
    """FID of images (N, D) to a reference (M, D) with every `groups`-th image left out, once for each of the groups.

    These are the replicates of jackknife.py: their spread gives the standard error of the FID, and, for two rows with the
    same prompts, the spread of their differences gives the standard error of the rows' difference. There are fewer groups
    if a group would have fewer than two images. The reference is always complete.
    """
    x, mean, root = _checked(images), _checked(reference).mean(dim=0), _root_of_covariance(reference)
    groups = min(groups, len(x) // 2)
    parts = [x[g::groups] for g in range(groups)]
    total, outer = x.sum(dim=0), x.T @ x
    replicates = []
    for part in parts:
        count = len(x) - len(part)
        rest = (total - part.sum(dim=0)) / count
        covariance = (outer - part.T @ part - count * torch.outer(rest, rest)) / (count - 1)
        replicates.append(_frechet(mean, root, rest, covariance))
    return replicates


def _root_of_covariance(features: torch.Tensor) -> torch.Tensor:
    """The symmetric square root (D, D) of the covariance of features (N, D)."""
    values, vectors = torch.linalg.eigh(Moments.from_features(features).covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _frechet(
    mean: torch.Tensor, root: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Frechet distance between two Gaussians: |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2).

    root: S^1/2, the symmetric square root of the first covariance.
    """
    inner = root @ other_covariance @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    squared = (mean - other_mean).square().sum()
    return max(0.0, float(squared + root.square().sum() + other_covariance.trace() - 2 * cross))


def kid(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    paired: bool = False,
    gamma: float | None = None,
) -> tuple[float, float]:
    """KID: (mean, standard deviation) over random subsets of the unbiased squared MMD with the kernel (gamma x.y + 1)^3
    (Binkowski et al. 2018, Section 4). The global random state is not changed.

    gamma: default 1 / D, as published.
    subset_size: reduced to the size of the smaller set.
    paired: whether the k-th images of both sets share something (prompt, noise). The estimate assumes independent images, so
        the even images of the first set are then compared with the odd ones of the second, in subsets of at most half of
        those.
    ValueError if there are too few features.
    """
    x, y = _checked_pair(first, second)
    if paired:
        x, y = x[::2], y[1::2]
        subset_size = min(subset_size, len(y) // 2)
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"KID of {len(first)} and {len(second)} features: too few")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns that it stores all features
        identity = _Identity(x.shape[1])
        metric = KernelInceptionDistance(
            feature=identity, subsets=subsets, subset_size=size, gamma=gamma, **ALONE
        )
        torch.manual_seed(seed)
        metric.update(x, real=True)
        metric.update(y, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def precision_recall(real: torch.Tensor, generated: torch.Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq 1-2).

    Each feature has a ball that reaches to its k-th nearest neighbour in its set. Precision is the share of generated
    features inside the ball of a real one, recall the share of real features inside the ball of a generated one.
    """
    x, y = _checked_pair(real, generated)
    return _share_inside(y, x, _radii(x, k)), _share_inside(x, y, _radii(y, k))


def density_coverage(real: torch.Tensor, generated: torch.Tensor, *, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, Eq 3-4).

    The ball of a real feature reaches to its k-th nearest real neighbour. Density is the mean number of real balls that a
    generated feature lies in, divided by k; coverage is the share of real balls with a generated feature inside.
    """
    x, y = _checked_pair(real, generated)
    radii = _radii(x, k)
    inside, covered = 0, 0
    for start in range(0, len(x), _CHUNK):
        hits = _distances(x[start : start + _CHUNK], y) < radii[start : start + _CHUNK, None]
        inside += int(hits.sum())
        covered += int(hits.any(dim=1).sum())
    return inside / (k * len(y)), covered / len(x)


def cmmd(first: torch.Tensor, second: torch.Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared MMD of unit-length embeddings under a Gaussian kernel, times 1000 (Jayasumana et al. 2024, Section 4).

    This is the V-statistic, as in the authors' code: pairs of a sample with itself count, so it is never below 0.
    """
    x, y = (nn.functional.normalize(features, dim=1) for features in _checked_pair(first, second))
    gamma = 1 / (2 * sigma**2)

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        # For unit vectors |x - y|^2 = 2 - 2 x.y: a matrix product is as exact here, and many times faster.
        total = sum(float(torch.exp(-2 * gamma * (1 - part @ b.T)).sum()) for part in a.split(_CHUNK))
        return total / (len(a) * len(b))

    return scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def diversity(features: torch.Tensor) -> float:
    """Mean distance between the features of two seeds of one prompt, averaged over prompts; features (P, S, D).

    ValueError if there are fewer than 2 seeds.
    """
    seeds = features.shape[1]
    if seeds < 2:
        raise ValueError(f"diversity of {seeds} seeds a prompt; allowed: 2 or more")
    x = _checked(features.flatten(0, 1)).view_as(features)
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return float(apart.sum(dim=(1, 2)).mean() / (seeds * (seeds - 1)))


def _checked(features: torch.Tensor) -> torch.Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {tuple(features.shape)}; allowed: (N, D) with N >= 2")
    if not torch.isfinite(features).all():
        raise ValueError("features are not finite: the extractor or an image is broken")
    return features.double()


def _checked_pair(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = _checked(first), _checked(second)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"a distance of {x.shape[1]} and {y.shape[1]} features: the extractors differ")
    return x, y


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances by a matrix product: exact to about 14 digits in float64, 18 times faster for 2048 features."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Distance (N,) of every feature (N, D) to its k-th nearest neighbour; ValueError unless N > k."""
    if len(x) <= k:
        raise ValueError(f"{len(x)} features have no {k}-th neighbour; allowed: more than {k}")
    return torch.cat([_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(_CHUNK)])


def _share_inside(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    inside = sum(int((_distances(part, centres) <= radii).any(dim=1).sum()) for part in points.split(_CHUNK))
    return inside / len(points)
