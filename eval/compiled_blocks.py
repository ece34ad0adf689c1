"""What `training.compile` saves on a GPU: kernels, memory traffic and least time of SDXL's student pass, counted.

    python eval/compiled_blocks.py [--config configs/sdxl_24gb.yaml] [--batch 4] [--gpu h100]

The pass is a forward and a backward pass of the student, whole and with recomputation. Eager operations are counted as in
`stepdistill plan`. Of each kind of compiled block one is compiled for the CPU, at full size in bfloat16, and what its
compiler leaves after fusion is counted: every fused loop and every call of a library is one kernel. The compiler for GPUs
fuses by the same rules and has other limits, so its numbers will differ. What lies outside of these blocks stays eager.

The last two rows are a teacher's pass, and the same if starting kernels took no time: what CUDA graphs could save at most.
"""

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.virtualized import V
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from stepdistill.config import RunConfig
from stepdistill.config.load import load_config
from stepdistill.models.adapters import lora_layers
from stepdistill.models.shared_network import STUDENT, TEACHER, SharedNetwork
from stepdistill.plan.cards import GIB, Card, card_of
from stepdistill.plan.dry_update import DryRun
from stepdistill.plan.rehearsal import Rehearsal
from stepdistill.plan.tracker import Tracker, Work, gpu_kernels
from stepdistill.runtime import environment
from stepdistill.teacher.families import plannable_facts


@dataclass(frozen=True)
class Call:
    """One call of a compiled block: its module, positional and keyword arguments, on the meta device."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for calls that are compiled to the same code: class, shapes of the weights and of the inputs."""
        weights = tuple(tuple(p.shape) for p in self.module.parameters())
        inputs = tuple(
            (key, tuple(x.shape)) if isinstance(x, torch.Tensor) else (key, x)
            for key, x in (*enumerate(self.args), *self.kwargs.items())
        )
        return type(self.module).__name__, weights, inputs


@dataclass(frozen=True)
class BlockWork:
    """The work of one call of a block: of its forward and of its backward pass."""

    forward: Work
    backward: Work


def calls(network: SharedNetwork, forward: Callable[[], object]) -> list[Call]:
    """The calls of compiled blocks in a forward pass."""
    noted: list[Call] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted.append(Call(module, args, kwargs))

    blocks = [m for m in network.model.modules() if isinstance(m, network.kind.compiled_blocks)]
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    forward()
    for hook in hooks:
        hook.remove()
    return noted


def passes(call: Call, device: str) -> tuple[Callable[[], torch.Tensor], torch.nn.Module]:
    """A forward pass of a copy of the call's module on a device, and that copy. Gradients reach the hidden states and the
    trained weights, as in training."""
    module = copy.deepcopy(call.module).to_empty(device=device)
    for layer in lora_layers(module):
        layer.active.name = STUDENT
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)

    def placed(name: Any, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        new = torch.randn(x.shape, dtype=x.dtype, device=device)
        return new.requires_grad_(name == 0)

    args = [placed(k, x) for k, x in enumerate(call.args)]
    kwargs = {k: placed(k, x) for k, x in call.kwargs.items()}
    return lambda: module(*args, **kwargs), module


def eager_work(call: Call, card: Card) -> BlockWork:
    """The work of a block without compiling, by the plan's tracker."""
    forward, _ = passes(call, "meta")
    of_forward, of_backward = Tracker(card), Tracker(card)
    with of_forward:
        output = forward()
    gradient = torch.empty_like(output)
    with of_backward:
        output.backward(gradient)
    return BlockWork(total(of_forward), total(of_backward))


def total(tracker: Tracker) -> Work:
    """The work of all parts."""
    return sum(tracker.work.values(), Work())


def compiled_work(call: Call, card: Card, eager: BlockWork) -> BlockWork:
    """The work of a block as torch's compiler fuses it; it must do the arithmetic of the eager block."""
    torch._dynamo.reset()
    forward, module = passes(call, "cpu")
    module.compile(fullgraph=True)
    work = {False: Work(), True: Work()}  # by whether it is the backward pass
    with counted(work, card):
        output = forward()
        output.backward(torch.ones_like(output))
    assert work[True].kernels, "the backward pass was not compiled"
    for before, after in zip((eager.forward, eager.backward), (work[False], work[True]), strict=True):
        assert abs(after.flop / before.flop - 1) < 0.02, "the compiled block does other arithmetic"
    return BlockWork(work[False], work[True])


@contextmanager
def counted(work: dict[bool, Work], card: Card) -> Iterator[None]:
    """Inside it, the kernels of all graphs that are compiled are added to `work`."""

    def count(nodes: list[Any]) -> list[Any]:
        for node in nodes:
            moved = node.get_read_write_buffers_sizes()
            if not moved:
                continue  # a view, or memory that is only named
            flop = flop_of(node)
            seconds = card.seconds(flop, moved, is_half=True)
            work[V.graph.is_backward] += Work(1, flop, moved, 0, seconds)
        return nodes

    options: dict[str, Any] = {"_post_fusion_custom_pass": count, "force_disable_caches": True}
    options |= {"cpp.max_horizontal_fusion_size": 1, "layout_optimization": False}  # both concern CPUs
    with torch._inductor.config.patch(options):
        yield


def flop_of(node: Any) -> int:
    """The arithmetic of a scheduled kernel that counts: products, convolutions and attention."""
    if not node.is_extern():
        return 0
    known = node.estimate_flops()
    if known is not None:
        return int(known)
    aten = torch.ops.aten
    for origin in node.node.origins:
        packet = getattr(origin.target, "overloadpacket", None)
        values = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in origin.args]
        shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            return int(sdpa_flop_count(*shapes[:3]))
        if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            return int(sdpa_backward_flop_count(*shapes[:4]))
        if packet is aten.convolution_backward:
            return int(flop_registry[packet](*values, out_val=origin.meta["val"]))
    return 0


class StudentPass:
    """A forward and backward pass of the student, and a pass of the teacher, on the meta device.

    Args:
        config: the run.
        card: gives the time of each kernel.
    """

    def __init__(self, config: RunConfig, card: Card) -> None:
        facts = plannable_facts(config)
        self._card = card
        self._segments = [segment.name for segment in DryRun(config, facts, card).segments()]
        rehearsal = Rehearsal(config, facts, device="meta")
        self._network = rehearsal.network
        with torch.device("meta"):
            self._batch = rehearsal.inputs.micro_batch()

    def _forward(self, role: str = STUDENT) -> torch.Tensor:
        with self._network.using(role):
            return self._network.ask(self._batch.noise, self._batch.timesteps, self._batch.conditioning)

    def calls(self) -> list[Call]:
        """The calls of compiled blocks in a forward pass."""
        self._network.keep_activations(self._segments)
        return calls(self._network, self._forward)

    def work(self, *, recomputes: bool) -> Work:
        """The work of the student's eager pass, whole or with all activations computed again."""
        self._network.keep_activations([] if recomputes else self._segments)
        tracker = Tracker(self._card)
        with tracker:
            self._forward().square().mean().backward()
        return total(tracker)

    def teacher_work(self, card: Card) -> Work:
        """The work of a pass of an earlier rung's LoRA without gradients."""
        tracker = Tracker(card)
        with torch.no_grad(), tracker:
            self._forward(TEACHER)
        return total(tracker)


def counts(config: RunConfig, card: Card) -> dict[str, Any]:
    """The student's pass, eager and compiled, whole and with recomputation; the teacher's pass."""
    passed = StudentPass(config, card)
    with torch.device("meta"), gpu_kernels():
        block_calls = passed.calls()
        kinds = {call.kind: call for call in block_calls}
        eager = {kind: eager_work(call, card) for kind, call in kinds.items()}
        whole, recomputing = (passed.work(recomputes=recomputes) for recomputes in (False, True))
        cards = {"eager": card, "without launches": replace(card, launch=0.0)}
        teacher = {name: vars(passed.teacher_work(of)) for name, of in cards.items()}
    compiled = {kind: compiled_work(call, card, eager[kind]) for kind, call in kinds.items()}
    many = Counter(call.kind for call in block_calls)

    def row(work: Work, forwards: int) -> dict[str, Any]:
        """The pass eager, and with each of its blocks, whose forward pass runs so many times, replaced by compiled code."""
        change = Work()
        for kind, count in many.items():
            before, after = eager[kind], compiled[kind]
            change += (after.forward + before.forward * -1) * (forwards * count)
            change += (after.backward + before.backward * -1) * count
        return {"eager": vars(work), "compiled": vars(work + change)}

    result = {"card": card.name, "batch": config.training.train_batch_size}
    result |= {"blocks": len(block_calls), "kinds": len(kinds)}
    return result | {"whole": row(whole, 1), "recomputing": row(recomputing, 2), "teacher": teacher}


def table(result: dict[str, Any]) -> str:
    """A Markdown row per pass."""
    lines = [
        "| pass | blocks | kernels | GiB moved | TFLOP | least ms |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    names = {
        "whole": "student, forward and backward",
        "recomputing": "the same, all activations computed again",
        "teacher": "teacher, without gradients",
    }
    for key, name in names.items():
        for kind, work in result[key].items():
            lines.append(
                f"| {name} | {kind} | {work['kernels']:,.0f} | {work['moved'] / GIB:.0f} | {work['flop'] / 1e12:.1f} | "
                f"{1000 * work['seconds']:.1f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Counts what compiled blocks do on a GPU, without one.")
    parser.add_argument("--config", default="configs/sdxl_24gb.yaml")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--output", type=Path, default=Path("eval/results/compiled_blocks"))
    args = parser.parse_args(argv)
    options = [f"training.train_batch_size={args.batch}", "training.gradient_checkpointing=true"]
    result = counts(load_config(args.config, options), card_of(args.gpu))
    payload = result | {"environment": environment()}
    args.output.with_suffix(".json").write_text(json.dumps(payload, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(table(result) + "\n")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
