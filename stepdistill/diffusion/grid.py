"""The timesteps that samplers visit, as plain numbers: the plan counts with the same code that trains. No torch.

node      a timestep that an N-step sampler evaluates the network at; T = num_train_timesteps
CLEAN     -1: where the last move of a sampling leads; x there is the clean sample
move      (timestep, prev_timestep), from noisier to cleaner
"""

CLEAN = -1


def trailing_nodes(steps: int, *, num_train_timesteps: int = 1000) -> list[int]:
    """The nodes of an N-step sampler, noisiest first: round(T - k T / N) - 1 for k in 0 .. N - 1.

    `trailing` of Lin et al. 2023 (arXiv 2305.08891, table 2). ValueError for fewer than one or more than T steps.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps: got {steps}; allowed: 1 to {num_train_timesteps}")
    stride = num_train_timesteps / steps
    return [round(num_train_timesteps - k * stride) - 1 for k in range(steps)]


def next_node(timestep: int, steps: int, *, num_train_timesteps: int = 1000) -> int:
    """Where one move of an N-step student leads.

    That is the next node of its grid, or CLEAN after the last one. From a timestep between two nodes it is T / N further
    down, at most to CLEAN (section 2 of the recipe: 250 - 500 -> 0).
    """
    nodes = [*trailing_nodes(steps, num_train_timesteps=num_train_timesteps), CLEAN]
    if timestep in nodes[:-1]:
        return nodes[nodes.index(timestep) + 1]
    return max(CLEAN, timestep - round(num_train_timesteps / steps))


def substeps(timestep: int, prev_timestep: int, steps: int, *, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps that an N-step teacher visits on the way of one student's move, both ends among them.

    ValueError for a move that does not go from noisier to cleaner.
    """
    if prev_timestep >= timestep:
        raise ValueError(
            f"a move goes from noisy to clean; got timestep {timestep} -> prev_timestep {prev_timestep}"
        )
    nodes = trailing_nodes(steps, num_train_timesteps=num_train_timesteps)
    return [timestep, *(node for node in nodes if prev_timestep < node < timestep), prev_timestep]
