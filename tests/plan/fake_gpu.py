"""A pretended GPU: torch's backend for devices written in Python, with tensors that have no values.

Unlike on the meta device, an operation on tensors of the pretended GPU and of the CPU fails, as it would on a real one.

    python -m tests.plan.fake_gpu CONFIG [--shallow]     prints the peak bytes of every kind of phase, and on the meta device

--shallow: with few layers of the network's full width, which takes a fraction of the time.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from stepdistill.config.load import load_config
from stepdistill.plan.cards import CARDS
from stepdistill.plan.dry_update import DryRun
from stepdistill.plan.passes import is_base_teacher
from stepdistill.plan.whole_run import phases_of
from stepdistill.teacher.families import plannable_facts

NAME = "pretended"


@contextmanager
def pretended_gpu():
    """Inside it, the device NAME exists. It can be set up once in a process."""
    _setup_privateuseone_for_python_backend(NAME)
    module = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork = lambda: False
    before, torch.nn.Module._apply = torch.nn.Module._apply, _apply
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.nn.Module._apply = before


def _apply(self, change, recurse=True):
    """Module._apply without swap_tensors, which tensors without values do not support."""
    for child in self.children():
        child._apply(change)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                new = change(parameter)
            if new is not parameter:
                self._parameters[name] = torch.nn.Parameter(
                    new.detach(), requires_grad=parameter.requires_grad
                )
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self


FEW = {
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 1],
    "num_layers": 4,
    "dual_attention_layers": [0, 1],
    "n_layers": 4,
    "n_refiner_layers": 1,
}
"""Numbers of layers of a network with few, by the key of its config."""


def shallow(facts):
    """The facts of a network with few layers."""
    few = {key: FEW[key] for key in FEW.keys() & facts.network.keys()}
    if isinstance(facts.network.get("transformer_layers_per_block", []), int):
        del few["transformer_layers_per_block"]
    return replace(facts, configs={**facts.configs, facts.network_part: {**facts.network, **few}})


def peaks(config, *, device, facts=None):
    """The peak bytes of a config's phases by title; of phases that differ in steps, timesteps and rates alone, the first."""
    dry_run = DryRun(config, facts or plannable_facts(config), CARDS["h100"], device=device)
    found, seen = {}, set()
    for rung, _, phase in phases_of(config):
        is_base = phase.needs_teacher_moves and is_base_teacher(config, rung, phase)
        alike = (phase.title, phase.discriminator.model_copy(update={"learning_rate": None}), is_base)
        if alike not in seen:
            seen.add(alike)
            found[f"{rung.teacher_steps} -> {rung.student_steps} {phase.title}"] = dry_run.update(
                rung, phase
            ).peak
    return found


if __name__ == "__main__":
    path, *options = sys.argv[1:]
    config = load_config(path, [option for option in options if option != "--shallow"])
    facts = plannable_facts(config)
    facts = shallow(facts) if "--shallow" in options else facts
    with pretended_gpu():  # first, because a backward pass fixes which devices there are
        found = peaks(config, device=NAME, facts=facts)
    on_meta = peaks(config, device="meta", facts=facts)
    print(json.dumps({"pretended": found, "meta": on_meta}, indent=2))
