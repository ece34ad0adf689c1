"""Standard errors of statistics and of their differences by a delete-a-group jackknife. No torch.

theta_g  the statistic with group g of G left out        se^2 = (G - 1) / G * sum_g (theta_g - mean theta)^2
(Efron and Tibshirani 1993, An Introduction to the Bootstrap, Eq 11.5, with groups instead of single samples)
"""

from collections.abc import Sequence


def standard_error(replicates: Sequence[float]) -> float:
    """Standard error of a statistic from its replicates theta_g; 0 for fewer than 2 replicates."""
    count = len(replicates)
    if count < 2:
        return 0.0
    mean = sum(replicates) / count
    return ((count - 1) / count * sum((value - mean) ** 2 for value in replicates)) ** 0.5


def difference_error(first: Sequence[float], second: Sequence[float]) -> float:
    """Standard error of the difference of two statistics whose replicates leave out the same groups, so that variation which
    both share cancels. ValueError if they have different numbers of replicates."""
    return standard_error([a - b for a, b in zip(first, second, strict=True)])
