"""The timesteps that samplers visit, as plain integers without torch: the plan counts with the same code that trains.

node      a timestep at which an N-step sampler evaluates the network; T = num_train_timesteps
CLEAN     -1: the end of a sampler's last move; x at CLEAN is the clean sample
move      (timestep, prev_timestep), from noisier to cleaner
"""

import math

CLEAN = -1


def passes_per_step(guidance_scale: float) -> int:
    """Passes of the network for a sampler's step: 2 with classifier-free guidance, which guidance_scale > 1 turns on."""
    return 2 if guidance_scale > 1 else 1


def trailing_nodes(steps: int, *, num_train_timesteps: int = 1000) -> list[int]:
    """The nodes of an N-step sampler, noisiest first: round(T - k T / N) - 1 for k in 0 .. N - 1.

    This is the `trailing` spacing of Lin et al. 2023 (arXiv 2305.08891, table 2). ValueError unless 1 <= N <= T.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps: got {steps}; allowed: 1 to {num_train_timesteps}")
    stride = num_train_timesteps / steps
    return [round(num_train_timesteps - k * stride) - 1 for k in range(steps)]


def next_node(timestep: int, steps: int, *, num_train_timesteps: int = 1000) -> int:
    """The timestep that one move of an N-step student leads to.

    From a node of the student's grid: the next node, or CLEAN after the last one. From a timestep between two nodes: T / N
    lower, but not below CLEAN (N = 2: the paper's time 250 - 500 becomes 0).
    """
    nodes = [*trailing_nodes(steps, num_train_timesteps=num_train_timesteps), CLEAN]
    if timestep in nodes[:-1]:
        return nodes[nodes.index(timestep) + 1]
    return max(CLEAN, timestep - round(num_train_timesteps / steps))


def substeps(timestep: int, prev_timestep: int, steps: int, *, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps that an N-step teacher visits during one move of the student, including both ends.

    ValueError if the move does not go from noisier to cleaner.
    """
    if prev_timestep >= timestep:
        raise ValueError(
            f"a move goes from noisy to clean; got timestep {timestep} -> prev_timestep {prev_timestep}"
        )
    nodes = trailing_nodes(steps, num_train_timesteps=num_train_timesteps)
    return [timestep, *(node for node in nodes if prev_timestep < node < timestep), prev_timestep]


def shift_of_length(
    length: int,
    *,
    base_length: int,
    max_length: int,
    base_shift: float,
    max_shift: float,
    kind: str = "exponential",
) -> float:
    """The shift for latents of `length` patches, as pipelines with a dynamic shift compute it.

    mu is linear in the length, from base_shift at base_length to max_shift at max_length. The shift is exp(mu) (kind
    exponential), or mu itself (linear). ValueError for another kind.
    """
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type: got {kind!r}; allowed: exponential, linear")
    slope = (max_shift - base_shift) / (max_length - base_length)
    mu = base_shift + slope * (length - base_length)
    return math.exp(mu) if kind == "exponential" else mu
