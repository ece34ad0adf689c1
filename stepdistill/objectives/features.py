"""Distances between features of the student and of the teacher at one place of the network. No gradient reaches the teacher.

Each function takes features (B, C, H, W) of the same x_t and returns a scalar, in float32:

l2          || s - t ||^2 / || t ||^2              (BK-SDM, Kim et al. 2023, 2305.15798, divided by the teacher's size)
attention   || q_s - q_t ||^2                      q: the mean over channels of squared features, (H W), of norm 1
                                                   (Zagoruyko and Komodakis 2017, 1612.03928)
gram        || G_s - G_t ||^2 / || G_t ||^2        G = F F^T / (H W), F: (C, H W) (Gatys, Ecker and Bethge 2016)
kernel      1 - k(s_p, t_p), mean over positions   k: exp(-d^2 / 2 h^2) or exp(-d / h), d: distance of the two features at p
                                                   h: of a sample, the median distance of the teacher's features at two of at
                                                   most 256 positions (after PKKD, Xu et al. 2020, 2009.13044)
patches     (cos(s_i, s_j) - cos(t_i, t_j))^2      s_i: mean feature of a sample's patch i, on grids of 2, 4 and 8 a side
samples     huber(d_s - d_t) + 2 huber(a_s - a_t)  d: distance of two samples of a batch, divided by the mean distance
                                                   a: cosine of the angle of three (RKD, Park et al. 2019, 1904.05068)
"""

import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize, smooth_l1_loss

KERNELS = ("gaussian", "laplace")
_GRIDS = (2, 4, 8)
_MAX_POSITIONS = 256
"""How many positions of a sample the bandwidth is taken over: their number squared is how many distances that needs."""
_TINY = 1e-12


def l2_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The squared error divided by the mean square of the teacher's features, averaged over the batch."""
    error = (student.float() - teacher.float()).square().flatten(1).mean(dim=1)
    return (error / teacher.float().square().flatten(1).mean(dim=1).clamp_min(_TINY)).mean()


def attention_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The squared distance of two normalised spatial maps, averaged over the batch: 0 to 2, as the maps are not negative."""
    maps = [normalize(f.float().square().mean(dim=1).flatten(1), dim=1) for f in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(dim=1).mean()


def gram_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The relative squared error of the channels' Gram matrices, averaged over the batch."""
    grams = [_gram(f) for f in (student, teacher)]
    error = (grams[0] - grams[1]).square().sum(dim=(1, 2))
    return (error / grams[1].square().sum(dim=(1, 2)).clamp_min(_TINY)).mean()


def _gram(features: torch.Tensor) -> torch.Tensor:
    rows = features.float().flatten(2)
    return rows @ rows.transpose(1, 2) / rows.shape[2]


def kernel_distance(student: torch.Tensor, teacher: torch.Tensor, *, kind: str = "gaussian") -> torch.Tensor:
    """1 - k of the student's and the teacher's features at the same position, averaged over positions and batch: 0 to 1.

    The bandwidth of a sample is the median distance between the teacher's features at two of its positions. ValueError for
    an unknown kernel.
    """
    if kind not in KERNELS:
        raise ValueError(f"kernel: got {kind!r}; allowed: {', '.join(KERNELS)}")
    points, targets = (f.float().flatten(2).transpose(1, 2) for f in (student, teacher))
    bandwidth = _median_distance(targets).clamp_min(_TINY)
    squared = (points - targets).square().sum(dim=2) / bandwidth.square()[:, None]
    if kind == "gaussian":
        return (1 - torch.exp(-squared / 2)).mean()
    # at 0 the slope of a square root is infinite
    return (1 - torch.exp(-(squared + _TINY).sqrt())).mean()


def _median_distance(points: torch.Tensor) -> torch.Tensor:
    """The median distance (B,) between two different rows of points (B, N, C); 1 if there is only one row."""
    points = points[:, :: max(1, -(-points.shape[1] // _MAX_POSITIONS))]
    count = points.shape[1]
    if count == 1:
        return torch.ones(len(points), device=points.device)
    first, second = torch.triu_indices(count, count, offset=1, device=points.device)
    return torch.cdist(points, points)[:, first, second].median(dim=1).values


def patch_relations(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of cosines between patches of one sample, averaged over grids and batch.

    Patches are means of features over the cells of a grid; grids finer than the features are left out. Features with a side
    of 1 have no patches: the result is 0.
    """
    grids = [grid for grid in _GRIDS if grid <= min(student.shape[2:])]
    errors = [(_cosines(student, grid) - _cosines(teacher, grid)).square().mean() for grid in grids]
    return torch.stack(errors).mean() if errors else 0.0 * student.float().sum()


def _cosines(features: torch.Tensor, grid: int) -> torch.Tensor:
    patches = normalize(adaptive_avg_pool2d(features.float(), grid).flatten(2), dim=1)
    return patches.transpose(1, 2) @ patches


def sample_relations(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """How distances and angles between the samples of a batch differ; each sample is the mean of its features.

    The angles count twice, as in RKD. With one sample there are no distances, with two no angles.
    """
    points = [f.float().mean(dim=(2, 3)) for f in (student, teacher)]
    distances, angles = [_relative_distances(p) for p in points], [_angles(p) for p in points]
    return smooth_l1_loss(distances[0], distances[1]) + 2 * smooth_l1_loss(angles[0], angles[1])


def _relative_distances(points: torch.Tensor) -> torch.Tensor:
    """The distances (B, B) of points (B, C), divided by the mean distance of two different ones."""
    count = len(points)
    distances = _differences(points).square().sum(dim=2)
    apart = 1 - torch.eye(count, device=points.device)
    distances = (distances + _TINY).sqrt() * apart  # the slope of a square root at 0 is infinite
    return distances * (count * (count - 1)) / distances.sum().clamp_min(_TINY)


def _angles(points: torch.Tensor) -> torch.Tensor:
    """The cosines (B, B, B) of the angles at the first point between the other two."""
    directions = normalize(_differences(points), dim=2)
    return directions @ directions.transpose(1, 2)


def _differences(points: torch.Tensor) -> torch.Tensor:
    return points[None] - points[:, None]
