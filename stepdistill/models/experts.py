"""Several teachers as one denoiser: each prompt is answered by those whose prompts it belongs to (`teachers`).

    output(x_t, t, c) = sum_i w_i(c) output_i(x_t, t, c),   w_i(c): weight i if its pattern has the prompt c, normalised

A teacher of LoRAs is an adapter on the shared base and costs no second model; another pipeline's U-Net is loaded beside it.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from stepdistill.config import ConfigError, Expert, RunConfig
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.identity import layer_shapes
from stepdistill.models.lora_file import Lora, check_fits, read_lora, weighted_sum
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import kind_of, load_network
from stepdistill.models.shared_network import SharedNetwork
from stepdistill.teacher.experts import lora_files, shares_of


@dataclass(frozen=True)
class Experts(Denoiser):
    """A denoiser whose predictions are those of its members.

    members   one for each of `teachers`
    teachers  their weights and patterns
    The other fields are those of the base model. The conditioning must have captions.
    """

    members: tuple[Denoiser, ...] = ()
    teachers: tuple[Expert, ...] = ()

    @property
    def tapped_network(self) -> SharedNetwork:
        """The network of the only member; the features of several are not comparable, which the config's checks refuse."""
        (member,) = self.members
        return member.network

    def output(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The weighted mean of the members' guided outputs (B, C, H, W), each asked for its own rows alone."""
        assert len(conditioning.captions) == len(sample), "several teachers choose by the captions"
        shares = torch.tensor([shares_of(self.teachers, caption) for caption in conditioning.captions])
        total = torch.zeros_like(sample)
        for member, share in zip(self.members, shares.unbind(dim=1), strict=True):
            rows = share.nonzero().squeeze(1)  # on the CPU, so that nothing waits for the GPU
            if len(rows) == 0:
                continue
            index = rows.to(sample.device, non_blocking=True)
            answer = member.output(sample[index], timesteps[index], conditioning.rows(rows))
            weight = share[rows].to(sample.device, sample.dtype, non_blocking=True).view(-1, 1, 1, 1)
            total = total.index_add(0, index, weight * answer)
        return total


def with_experts(base: Denoiser, config: RunConfig) -> Denoiser:
    """The teacher of the first rung: the base itself, or the config's `teachers` on it. ConfigError if one does not fit."""
    if not config.teachers:
        return base
    members = tuple(
        _member(base, f"expert{index}", teacher, config) for index, teacher in enumerate(config.teachers)
    )
    of_base: dict[str, Any] = {field.name: getattr(base, field.name) for field in fields(Denoiser)}
    return Experts(**of_base, members=members, teachers=config.teachers)


def _member(base: Denoiser, adapter: str, teacher: Expert, config: RunConfig) -> Denoiser:
    network, name = base.network, None
    if teacher.path is not None:
        folder = Path(teacher.path).expanduser()
        model = load_network(folder, dtype=network.dtype, quantization=config.training.base_quantization)
        network = SharedNetwork(model.to(network.device))
    elif teacher.loras:
        network.add_frozen_lora(adapter, lora_of(teacher))
        name = adapter
    return Denoiser(
        network,
        name,
        base.noise_path,
        base.prediction_type,
        guidance_scale=base.guidance_scale,
        unconditional=base.unconditional,
    )


def lora_of(teacher: Expert) -> Lora:
    """The weighted sum of a teacher's LoRAs; ValueError if one cannot be read."""
    return weighted_sum(
        [read_lora(file) for file in lora_files(teacher)], [lora.weight for lora in teacher.loras]
    )


def check_loras_fit(config: RunConfig, unet: torch.nn.Module) -> None:
    """ConfigError if a teacher's LoRA cannot be read, or changes layers that the base does not have or nobody adapts.

    unet: the base model, which may be without numbers.
    """
    shapes, targets = layer_shapes(unet), kind_of(unet).lora_targets
    for index, teacher in enumerate(config.teachers):
        if not teacher.loras:
            continue
        try:
            lora = lora_of(teacher)
            check_fits(lora, shapes, name=f"the LoRA of {teacher.name}")
        except ValueError as error:
            raise ConfigError(f"teachers.{index}.loras: {error}") from None
        other = sorted(name for name in lora.layers if not name.endswith(tuple(f".{t}" for t in targets)))
        if other:
            raise ConfigError(
                f"teachers.{index}.loras: {len(other)} layers are none of those that a LoRA is trained on here, first "
                f"{other[0]}; allowed: LoRAs on attention, feed-forward and residual layers, or teacher.loras for all others"
            )
