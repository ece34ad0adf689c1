"""The inputs of a network besides sample and timestep: text embeddings, and for SDXL also the sizes of the image."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Conditioning:
    """encoder_hidden_states (B, tokens, width); added_cond_kwargs: SDXL's text_embeds (B, width), time_ids (B, 6).

    captions: the prompts of the rows, for several teachers, which choose by them; empty if nobody asks for them.
    """

    encoder_hidden_states: torch.Tensor
    added_cond_kwargs: dict[str, torch.Tensor] = field(default_factory=dict)
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def rows(self, index: torch.Tensor) -> "Conditioning":
        """The rows at index (n,), int64."""
        here = index.to(self.encoder_hidden_states.device, non_blocking=True)
        return Conditioning(
            self.encoder_hidden_states[here],
            {name: value[here] for name, value in self.added_cond_kwargs.items()},
            tuple(self.captions[row] for row in index.tolist()) if self.captions else (),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Conditioning":
        """A copy on another device in another dtype; time_ids stay float32, since bfloat16 cannot represent 1023."""
        return Conditioning(
            self.encoder_hidden_states.to(device, dtype),
            {
                name: value.to(device, torch.float32 if name == "time_ids" else dtype)
                for name, value in self.added_cond_kwargs.items()
            },
            self.captions,
        )

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Conditioning":
        """The conditioning with every tensor changed."""
        added = {name: change(value) for name, value in self.added_cond_kwargs.items()}
        return Conditioning(change(self.encoder_hidden_states), added, self.captions)

    def beside(self, conditional: "Conditioning") -> "Conditioning":
        """Repeats this unconditional row once per row of `conditional`, with the time_ids of that row."""
        device = self.encoder_hidden_states.device
        rows = self.rows(torch.zeros(len(conditional), dtype=torch.int64, device=device))
        sizes = {k: v for k, v in conditional.added_cond_kwargs.items() if k == "time_ids"}
        return Conditioning(rows.encoder_hidden_states, rows.added_cond_kwargs | sizes, conditional.captions)

    def without_prompts(self, rows: torch.Tensor, unconditional: "Conditioning") -> "Conditioning":
        """The same with these rows, a mask (B,), replaced by the unconditional row; their time_ids stay."""
        other = unconditional.beside(self)

        def mixed(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return torch.where(rows.view(-1, *[1] * (ours.ndim - 1)), theirs.to(ours.dtype), ours)

        added = {
            name: mixed(value, other.added_cond_kwargs[name])
            for name, value in self.added_cond_kwargs.items()
        }
        hidden = mixed(self.encoder_hidden_states, other.encoder_hidden_states)
        return Conditioning(hidden, added, self.captions)

    @staticmethod
    def concat(*parts: "Conditioning") -> "Conditioning":
        """The rows of all parts in order, such as the unconditional and the conditional half of one forward pass."""
        return Conditioning(
            torch.cat([part.encoder_hidden_states for part in parts]),
            {
                name: torch.cat([part.added_cond_kwargs[name] for part in parts])
                for name in parts[0].added_cond_kwargs
            },
            tuple(itertools.chain.from_iterable(part.captions for part in parts)),
        )
