"""What a network gets besides sample and time: text embeddings, and the sizes of the picture where it is SDXL."""

from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline


@dataclass(frozen=True)
class Conditioning:
    """encoder_hidden_states (B, tokens, width); added_cond_kwargs: SDXL's text_embeds (B, width), time_ids (B, 6)."""

    encoder_hidden_states: torch.Tensor
    added_cond_kwargs: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def rows(self, index: torch.Tensor) -> "Conditioning":
        """The rows named by index (n,), int64."""
        return Conditioning(
            self.encoder_hidden_states[index],
            {name: value[index] for name, value in self.added_cond_kwargs.items()},
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Conditioning":
        """On another device, in another dtype; time ids stay float32: bfloat16 has no 1023."""
        return Conditioning(
            self.encoder_hidden_states.to(device, dtype),
            {
                name: value.to(device, torch.float32 if name == "time_ids" else dtype)
                for name, value in self.added_cond_kwargs.items()
            },
        )

    def beside(self, conditional: "Conditioning") -> "Conditioning":
        """Repeats the unconditional row once per row of `conditional`, with that row's time_ids."""
        device = self.encoder_hidden_states.device
        rows = self.rows(torch.zeros(len(conditional), dtype=torch.int64, device=device))
        sizes = {k: v for k, v in conditional.added_cond_kwargs.items() if k == "time_ids"}
        return Conditioning(rows.encoder_hidden_states, rows.added_cond_kwargs | sizes)

    @staticmethod
    def concat(first: "Conditioning", second: "Conditioning") -> "Conditioning":
        """The rows of both, for one forward over the unconditional and the conditional half."""
        return Conditioning(
            torch.cat([first.encoder_hidden_states, second.encoder_hidden_states]),
            {k: torch.cat([v, second.added_cond_kwargs[k]]) for k, v in first.added_cond_kwargs.items()},
        )


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: list[str], *, image_size: tuple[int, int], batch_size: int = 32
) -> Conditioning:
    """Embeddings of prompts by the pipeline's own encode_prompt; image_size is (height, width), for SDXL's time_ids."""
    parts: list[torch.Tensor] = []
    pooled: list[torch.Tensor] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        encoded = pipeline.encode_prompt(
            prompt=chunk, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        parts.append(encoded[0])
        if isinstance(pipeline, StableDiffusionXLPipeline):
            pooled.append(encoded[2])
    if not pooled:
        return Conditioning(torch.cat(parts))
    time_ids = torch.tensor([[*image_size, 0, 0, *image_size]], dtype=torch.float32, device=pooled[0].device)
    return Conditioning(
        torch.cat(parts),
        {"text_embeds": torch.cat(pooled), "time_ids": time_ids.expand(len(prompts), -1).clone()},
    )


@torch.no_grad()
def encode_unconditional(
    pipeline: DiffusionPipeline, *, image_size: tuple[int, int], kind: str = "auto"
) -> Conditioning:
    """One row that stands for no prompt: the embedding of "" or zeros; auto: zeros for SDXL where its config says so."""
    empty = encode_prompts(pipeline, [""], image_size=image_size)
    if not unconditional_is_zeros(pipeline, kind):
        return empty
    added = {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in empty.added_cond_kwargs.items()}
    return Conditioning(torch.zeros_like(empty.encoder_hidden_states), added)


def unconditional_is_zeros(pipeline: DiffusionPipeline, kind: str) -> bool:
    """Of `teacher.unconditional`: whether no prompt is zeros with this pipeline."""
    return kind == "zeros" or (
        kind == "auto" and bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False))
    )
