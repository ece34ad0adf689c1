"""A denoiser: the shared network with one adapter, its prediction type, noise path, guidance and start timestep.

Teacher, student and the undistilled base are denoisers. Each one holds these settings itself, so that no other code has to
pass them around.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from stepdistill.diffusion.noise_path import Move, NoisePath
from stepdistill.diffusion.prediction import convert_prediction
from stepdistill.diffusion.solver import guide, move, rollout
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import SharedNetwork


@dataclass(frozen=True)
class Denoiser:
    """Predicts with one adapter of the shared network, and takes sampler steps with the predictions.

    network          the base network that all denoisers of a run share
    adapter          the adapter that is active while this denoiser runs; None: the base alone
    noise_path       alpha_t and sigma_t
    prediction_type  what the network predicts with this adapter
    guidance_scale   classifier-free guidance (Ho and Salimans 2022); 1: off, which costs one pass instead of two
    unconditional    one row of conditioning that stands for no prompt; needed if guidance is on
    start_timestep   the timestep that the network is given for pure noise (DMD2's conditioning timestep); None: the last one
    trains           False: no gradient is computed
    """

    network: SharedNetwork
    adapter: str | None
    noise_path: NoisePath
    prediction_type: str
    guidance_scale: float = 1.0
    unconditional: Conditioning | None = None
    start_timestep: int | None = None
    trains: bool = False

    def __post_init__(self) -> None:
        """ValueError if the output says nothing about x_0 at the last timestep: epsilon at zero terminal SNR."""
        if (
            self.prediction_type == "epsilon"
            and self.start_timestep is None
            and self.noise_path.ends_in_pure_noise
        ):
            raise ValueError(
                "epsilon says nothing about x_0 at zero terminal SNR (alpha_T = 0); use v_prediction or sample"
            )

    @property
    def tapped_network(self) -> SharedNetwork:
        """The network whose features are this denoiser's."""
        return self.network

    def network_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timesteps (B,) that the network is given: start_timestep in place of the last one."""
        if self.start_timestep is None:
            return timesteps
        return torch.where(timesteps == self.noise_path.last_timestep, self.start_timestep, timesteps)

    def output(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The guided output (B, C, H, W), of type prediction_type; the network is given exactly these timesteps (B,), in the
        form that the noise path has for it."""
        times = self.noise_path.network_times(timesteps)
        with self._active():
            if self.guidance_scale == 1.0:
                return self.network.ask(sample, times, conditioning)
            assert self.unconditional is not None, "guidance needs a row for no prompt"
            both = Conditioning.concat(self.unconditional.beside(conditioning), conditioning)
            output = self.network.ask(torch.cat([sample, sample]), torch.cat([times, times]), both)
        without_prompt, with_prompt = output.chunk(2)
        return guide(without_prompt, with_prompt, self.guidance_scale)

    def predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, *, target: str
    ) -> torch.Tensor:
        """Predicts `target` ("sample", "epsilon" or "v_prediction") from sample at timesteps (B,); both (B, C, H, W)."""
        output = self.output(sample, self.network_timesteps(timesteps), conditioning)
        return self.converted(output, sample, timesteps, target=target)

    def converted(
        self, output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor, *, target: str
    ) -> torch.Tensor:
        """`predict` from the output (B, C, H, W) that the network gave for sample at these timesteps (B,)."""
        return convert_prediction(
            output,
            sample,
            self.network_timesteps(timesteps),
            noise_path=self.noise_path,
            prediction_type=self.prediction_type,
            target=target,
        )

    def move(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """One solver step from timesteps (B,) to prev_timesteps (B,); returns prev_sample (B, C, H, W)."""
        output = self.output(sample, self.network_timesteps(timesteps), conditioning)
        return self.moved(output, sample, timesteps, prev_timesteps)

    def moved(
        self,
        output: torch.Tensor,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """`move` with the output (B, C, H, W) that the network gave for sample at these timesteps (B,)."""
        return move(
            output,
            sample,
            self.network_timesteps(timesteps),
            prev_timesteps,
            noise_path=self.noise_path,
            prediction_type=self.prediction_type,
        )

    def rollout(
        self, sample: torch.Tensor, moves: Sequence[Move], conditioning: Conditioning
    ) -> torch.Tensor:
        """Moves sample (B, C, H, W) along `moves`, with one evaluation per move (two passes if guidance is on)."""

        def step(rows: torch.Tensor | None, state: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.output(state, timesteps, conditioning if rows is None else conditioning.rows(rows))

        seen = [Move(m.rows, self.network_timesteps(m.timesteps), m.prev_timesteps) for m in moves]
        with self._active():
            return rollout(
                step, sample, seen, noise_path=self.noise_path, prediction_type=self.prediction_type
            )

    @contextmanager
    def _active(self) -> Iterator[None]:
        with (
            torch.set_grad_enabled(self.trains and torch.is_grad_enabled()),
            self.network.using(self.adapter),
        ):
            yield
