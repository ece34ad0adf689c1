"""The inputs of a network besides sample and timestep: text embeddings, and for SDXL also the sizes of the image."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional

MASK = "attention_mask"


@dataclass(frozen=True)
class Conditioning:
    """encoder_hidden_states (B, tokens, width), and what else the network is given, by name, B rows each.

    added_cond_kwargs: SDXL's text_embeds (B, width) and time_ids (B, 6); SD3's pooled_projections (B, width); and of texts
    of different lengths attention_mask (B, tokens), bool, which is False at the zeros that fill a row up.
    captions: the prompts of the rows, for several teachers, which choose by them; empty if nobody asks for them.
    least_tokens: no row's text has fewer, as far as the host knows; 0 if it does not.
    """

    encoder_hidden_states: torch.Tensor
    added_cond_kwargs: dict[str, torch.Tensor] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    least_tokens: int = 0

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def rows(self, index: torch.Tensor) -> "Conditioning":
        """The rows at index (n,), int64."""
        here = index.to(self.encoder_hidden_states.device, non_blocking=True)
        return Conditioning(
            self.encoder_hidden_states[here],
            {name: value[here] for name, value in self.added_cond_kwargs.items()},
            tuple(self.captions[row] for row in index.tolist()) if self.captions else (),
            self.least_tokens,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Conditioning":
        """A copy on another device in another dtype; time_ids stay float32, since bfloat16 cannot represent 1023, and masks
        stay bool."""
        kept = {"time_ids": torch.float32, MASK: torch.bool}
        return Conditioning(
            self.encoder_hidden_states.to(device, dtype),
            {name: value.to(device, kept.get(name, dtype)) for name, value in self.added_cond_kwargs.items()},
            self.captions,
            self.least_tokens,
        )

    def filled_up(self, tokens: int) -> "Conditioning":
        """The same with texts of so many tokens: zeros, and False in the mask, behind those that are there."""
        missing = tokens - self.encoder_hidden_states.shape[1]
        if not missing:
            return self
        added = dict(self.added_cond_kwargs)
        added[MASK] = functional.pad(added[MASK], (0, missing))
        return Conditioning(
            functional.pad(self.encoder_hidden_states, (0, 0, 0, missing)),
            added,
            self.captions,
            self.least_tokens,
        )

    def cut(self, multiple: int = 32) -> "Conditioning":
        """The same without what fills up even the longest text, on the CPU; the texts keep a multiple of so many tokens.
        Without a mask, the conditioning itself."""
        mask = self.added_cond_kwargs.get(MASK)
        if mask is None:
            return self
        lengths = mask.sum(1)
        tokens = int(lengths.max()) + -int(lengths.max()) % multiple
        added = {**self.added_cond_kwargs, MASK: mask[:, :tokens]}
        return Conditioning(self.encoder_hidden_states[:, :tokens], added, self.captions, int(lengths.min()))

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Conditioning":
        """The conditioning with every tensor changed."""
        added = {name: change(value) for name, value in self.added_cond_kwargs.items()}
        return Conditioning(change(self.encoder_hidden_states), added, self.captions, self.least_tokens)

    def beside(self, conditional: "Conditioning") -> "Conditioning":
        """Repeats this unconditional row once per row of `conditional`, with the time_ids of that row."""
        device = self.encoder_hidden_states.device
        rows = self.rows(torch.zeros(len(conditional), dtype=torch.int64, device=device))
        sizes = {k: v for k, v in conditional.added_cond_kwargs.items() if k == "time_ids"}
        added = rows.added_cond_kwargs | sizes
        return Conditioning(rows.encoder_hidden_states, added, conditional.captions, self.least_tokens)

    def without_prompts(self, rows: torch.Tensor, unconditional: "Conditioning") -> "Conditioning":
        """The same with these rows, a mask (B,), replaced by the unconditional row; their time_ids stay."""
        tokens = max(part.encoder_hidden_states.shape[1] for part in (self, unconditional))
        ours, other = self.filled_up(tokens), unconditional.filled_up(tokens).beside(self)

        def mixed(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return torch.where(rows.view(-1, *[1] * (ours.ndim - 1)), theirs.to(ours.dtype), ours)

        added = {
            name: mixed(value, other.added_cond_kwargs[name])
            for name, value in ours.added_cond_kwargs.items()
        }
        hidden = mixed(ours.encoder_hidden_states, other.encoder_hidden_states)
        return Conditioning(hidden, added, self.captions, min(ours.least_tokens, other.least_tokens))

    @staticmethod
    def concat(*parts: "Conditioning") -> "Conditioning":
        """The rows of all parts in order, such as the unconditional and the conditional half of one forward pass; filled up
        to the longest text."""
        tokens = max(part.encoder_hidden_states.shape[1] for part in parts)
        parts = tuple(part.filled_up(tokens) for part in parts)
        return Conditioning(
            torch.cat([part.encoder_hidden_states for part in parts]),
            {
                name: torch.cat([part.added_cond_kwargs[name] for part in parts])
                for name in parts[0].added_cond_kwargs
            },
            tuple(itertools.chain.from_iterable(part.captions for part in parts)),
            min(part.least_tokens for part in parts),
        )
