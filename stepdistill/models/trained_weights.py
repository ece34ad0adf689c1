"""The weights that one role trains: float32 masters in one flat tensor, and the parameters that the network computes with.

master      what the optimiser updates, a moving average averages and files store
parameter   what a forward pass reads: a view of the master, or a copy of it in the network's dtype

A bfloat16 number has 8 bits, and most updates of Adam are smaller than its last bit. So the masters are float32, and after
each update the copies are written again. One flat tensor per role makes an update, a norm and a sum over processes one
operation instead of one per parameter.
"""

from collections.abc import Collection, Mapping

import torch

_ALIGNED = 64
"""Each parameter begins at a multiple of so many elements, 128 bytes in bfloat16, which the GPU's matrix units need."""


_BLOCK = 256
"""The master's length is a multiple of this, the block in which 8-bit optimisers keep a common scale."""


class TrainedWeights:
    """Takes over parameters: their values move into the master, and their data become views or copies of it.

    Args:
        parameters: by name, all on one device.
        dtype: in which the network computes with them.
        float32: names of those that stay in float32.

    parameters: the same parameters, by name.
    master: float32 (N,), with requires_grad; the gap behind a parameter holds zeros.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        dtype: torch.dtype = torch.float32,
        float32: Collection[str] = (),
    ) -> None:
        self.parameters = dict(parameters)
        stays = set(parameters) if dtype == torch.float32 else set(float32)
        copied = [name for name in parameters if name not in stays]
        self._places: dict[str, slice] = {}
        end = self._copied = 0
        for name in (*copied, *(name for name in parameters if name in stays)):
            count = parameters[name].numel()
            self._places[name] = slice(end, end + count)
            end += -(-count // _ALIGNED) * _ALIGNED
            if name not in stays:
                self._copied = end
        end = -(-end // _BLOCK) * _BLOCK
        device = next(iter(parameters.values())).device if parameters else None
        flat = torch.zeros(end, dtype=torch.float32, device=device)
        self._copy = torch.zeros(self._copied, dtype=dtype, device=device)
        self.master = torch.nn.Parameter(flat)
        with torch.no_grad():
            for name, view in self.masters().items():
                view.copy_(parameters[name])
            for name, parameter in parameters.items():
                parameter.data = self._of(flat if name in stays else self._copy, name)
        self.refresh()

    def _of(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        return flat[self._places[name]].view(self.parameters[name].shape)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The part of each parameter in a tensor (N,) that is laid out as the master, by name, in the parameter's shape."""
        return {name: self._of(flat, name) for name in self.parameters}

    def masters(self) -> dict[str, torch.Tensor]:
        """The float32 weights by name. After changing one, call `refresh`."""
        return self.views(self.master.detach())

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the copies again, after the masters have changed."""
        self._copy.copy_(self.master[: self._copied])

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the parameters by name."""
        return {name: parameter.shape for name, parameter in self.parameters.items()}
