"""The LoRA layers of the shared base: peft's modules and parameter names, with a forward pass in few operations.

y = W x + b + B A x     A: rank x in, B: out x rank; the scale alpha / rank is 1, because alpha equals the rank

In float32, where it loses nothing, a layer whose weight is small for its input computes (W + B A) x instead.

peft's own forward pass casts, scales and adds in separate operations, and looks up its active adapters in every layer. Here
the last product and the sum are one operation, everything is computed in the dtype of x, and all layers of a network read
one `ActiveAdapter`: changing it switches all of them at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d as PeftConv2d
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stepdistill.teacher.quantization import dequantized


@dataclass
class ActiveAdapter:
    """Which adapter all LoRA layers of a network use; they share this object.

    name       None: the base alone
    is_frozen  True: gradients pass through the adapter, and its own parameters receive none
    """

    name: str | None = None
    is_frozen: bool = False


class _Layer(BaseTunerLayer):
    """What both kinds of layers share. active: the adapter in use; `add_adapter` gives all layers of a network the same."""

    active: ActiveAdapter

    def _is_cheaper_merged(self, first: torch.Tensor, second: torch.Tensor, rows: int) -> bool:
        """Whether forming W + B A takes less arithmetic than the two products with A and B, for an input of so many rows.

        Only in float32: rounded to bfloat16, W + B A would lose the small B A. With gradients, the merged weight costs the
        product that gives its own gradient, and the factors cost four times their forward pass.
        """
        if first.dtype != torch.float32:
            return False
        rank, reads, writes = len(first), first.numel() // len(first), len(second)
        factors, forming = rank * (reads + writes), rank * reads * writes
        if not torch.is_grad_enabled():
            return rows * factors > forming
        return rows * (3 * factors - reads * writes) > 3 * forming

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The weights A and B of the active adapter; None if this layer does not have it."""
        name = self.active.name
        if name is None or name not in self.lora_A:
            return None
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        return (first.detach(), second.detach()) if self.active.is_frozen else (first, second)


class _Linear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for rows x, of which W and b are frozen.

    With g = dL/dy:   dL/dA = (g B)^T x     dL/dB = g^T (x A^T)     dL/dx = g W + (g B) A

    autograd alone would compute the two terms of dL/dx apart and add them in one more pass over memory, which takes a sixth
    of the memory traffic of SDXL's backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
    ) -> torch.Tensor:
        reduced = functional.linear(x, first)
        ctx.save_for_backward(x, weight, first, second, reduced)
        return torch.addmm(functional.linear(x, weight, bias), reduced, second.t())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, first, second, reduced = ctx.saved_tensors
        gradient = gradients[0]
        of_x, _, _, of_first, of_second = ctx.needs_input_grad
        of_reduced = gradient @ second
        return (
            torch.addmm(gradient @ weight, of_reduced, first) if of_x else None,
            None,
            None,
            of_reduced.t() @ x if of_first else None,
            gradient.t() @ reduced if of_second else None,
        )


class _QuantizedLinear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for rows x and a quantised W, which is converted again in the backward pass.

    autograd alone would keep every layer's converted W from the forward to the backward pass: more memory than without
    quantisation. Without factors, y = x W^T + b.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor | None,
        second: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.weight = weight  # frozen, and of a class that save_for_backward need not know
        y = functional.linear(x, weight, bias)
        if first is None or second is None:
            ctx.save_for_backward()
            return y
        reduced = functional.linear(x, first)
        ctx.save_for_backward(x, first, second, reduced)
        return torch.addmm(y, reduced, second.t())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0]
        of_x = gradient @ dequantized(ctx.weight).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.saved_tensors:
            return of_x, None, None, None, None
        x, first, second, reduced = ctx.saved_tensors
        _, _, _, needs_first, needs_second = ctx.needs_input_grad
        of_reduced = gradient @ second
        return (
            None if of_x is None else torch.addmm(of_x, of_reduced, first),
            None,
            None,
            of_reduced.t() @ x if needs_first else None,
            gradient.t() @ reduced if needs_second else None,
        )


class LoraLinear(PeftLinear, _Layer):
    """A linear layer with LoRA adapters."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.active = ActiveAdapter()
        self._is_quantized = is_traceable_wrapper_subclass(self.get_base_layer().weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        base, factors = self.base_layer, self._factors()
        if self._is_quantized:
            return self._quantized(x, factors)
        if factors is None:
            return functional.linear(x, base.weight, base.bias)
        rows = x if x.ndim == 2 else x.flatten(0, -2)
        if self._is_cheaper_merged(*factors, len(rows)):
            return functional.linear(x, torch.addmm(base.weight, factors[1], factors[0]), base.bias)
        if torch.is_grad_enabled():
            y = _Linear.apply(rows, base.weight, base.bias, *factors)
        else:
            y = functional.linear(rows, base.weight, base.bias)
            y = torch.addmm(y, functional.linear(rows, factors[0]), factors[1].t())
        return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])

    def _quantized(self, x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        base, rows = self.base_layer, x if x.ndim == 2 else x.flatten(0, -2)
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # which chooses itself what it keeps
            y = _QuantizedLinear.apply(rows, base.weight, base.bias, *(factors or (None, None)))
        else:
            y = functional.linear(rows, base.weight, base.bias)
            if factors is not None:
                y = torch.addmm(y, functional.linear(rows, factors[0]), factors[1].t())
        return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])


class LoraConv2d(PeftConv2d, _Layer):
    """A convolution with LoRA adapters: A has the kernel, stride and padding of the base, B is 1 x 1."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.active = ActiveAdapter()
        plain = self.get_base_layer()
        if plain.groups != 1 or plain.padding_mode != "zeros":
            raise ValueError(
                f"a LoRA on a convolution with groups={plain.groups}, padding_mode={plain.padding_mode!r}; "
                f"allowed: groups=1, padding_mode='zeros'"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, in, H, W) -> (B, out, H', W'), in the dtype of x."""
        base, factors = self.base_layer, self._factors()
        geometry = (base.stride, base.padding, base.dilation)
        if factors is not None and self._is_cheaper_merged(*factors, x.numel() // x.shape[1]):
            product = factors[1].flatten(1) @ factors[0].flatten(1)
            return functional.conv2d(x, base.weight + product.view_as(base.weight), base.bias, *geometry)
        y = functional.conv2d(x, base.weight, base.bias, *geometry)
        if factors is None:
            return y
        reduced = functional.conv2d(x, factors[0], None, *geometry)
        second = factors[1].flatten(1)
        if y.is_contiguous():
            rows = second.expand(len(y), -1, -1)
            return torch.baddbmm(y.flatten(2), rows, reduced.flatten(2)).view(y.shape)
        last = y.permute(0, 2, 3, 1)  # in channels_last memory format, the rows of one matrix
        pixels = reduced.permute(0, 2, 3, 1).flatten(0, -2)
        return torch.addmm(last.flatten(0, -2), pixels, second.t()).view(last.shape).permute(0, 3, 1, 2)


def lora_config(rank: int, *, targets: list[str] | str) -> LoraConfig:
    """peft's config of a LoRA with alpha = rank, because some tools assume that. Its layers are those of this file.

    targets: module names, or a regular expression that they match
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    config._register_custom_module({nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d})
    return config
