"""The LoRA that a rung's student begins with in place of the rung before's (`ladder.N.init`), such as a merged one."""

from collections.abc import Mapping

import torch

from stepdistill.config import ConfigError, RunConfig, Rung
from stepdistill.models.lora_file import Lora, LoraLayer, read_lora
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.plan.rehearsal import Rehearsal
from stepdistill.run.rung_order import initial_file, is_current
from stepdistill.run.rungs import RungRecord
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import fingerprint


def check_initial_loras(config: RunConfig, facts: TeacherFacts) -> None:
    """ConfigError if a rung that is still to be trained begins with a LoRA that is missing, damaged, or does not fit."""
    rungs = [rung for rung in config.ladder if rung.init is not None and not is_current(config, rung)]
    if not rungs:
        return
    network = Rehearsal(config, facts, device="meta").network
    for rung in rungs:
        _check_record(config, facts, rung)
        _check_fits(config, rung, _read(config, rung), network.adapter_shapes(STUDENT))


def initial_state(config: RunConfig, rung: Rung, network: SharedNetwork) -> dict[str, torch.Tensor]:
    """The weights of the LoRA that a rung begins with, for the student's adapter of the network.

    Where a layer's update has a lower rank than the adapter, the rest of lora_A keeps the adapter's values: with zeros in
    both factors it could not learn.
    """
    lora, fresh = _read(config, rung), network.adapter_state(STUDENT)
    layers = {}
    for name, layer in lora.layers.items():
        unused = ~(layer.down.flatten(1).any(dim=1) | layer.up.flatten(1).any(dim=0))
        down = layer.down.clone()
        down[unused] = fresh[f"{name}.lora_A.weight"][unused].to(down.dtype)
        layers[name] = LoraLayer(down, layer.scale * layer.up, scale=1.0)
    return lora.plain(layers).state()


def _read(config: RunConfig, rung: Rung) -> Lora:
    try:
        return read_lora(initial_file(rung))
    except ValueError as error:
        raise ConfigError(f"{_key(config, rung)}: {error}") from None


def _key(config: RunConfig, rung: Rung) -> str:
    return f"ladder.{config.ladder.index(rung)}.init"


def _check_record(config: RunConfig, facts: TeacherFacts, rung: Rung) -> None:
    """ConfigError if the LoRA is missing, or is a rung's of another base or prediction type."""
    key, file = _key(config, rung), initial_file(rung)
    if not file.is_file():
        raise ConfigError(
            f"{key}: got {rung.init!r}, but there is no file {file}; allowed: a rung's folder, such as "
            f"runs/NAME/rungs/8, or a LoRA's file"
        )
    record = RungRecord.read(file.parent)
    if record is None:
        return
    index = config.ladder.index(rung)
    predicted = [facts.prediction_type, *config.prediction_types(facts.prediction_type)]
    converts = "convert" in rung.phases[0].kinds
    expected = {
        "prediction_type": predicted[index if converts else index + 1],
        "base_fingerprint": fingerprint(facts.folder),
    }
    smaller = "; the base is smaller here, because of shrink" if config.shrink else ""
    for name, value in expected.items():
        if getattr(record, name) != value:
            raise ConfigError(
                f"{key}: got {rung.init!r}, a rung with {name} {getattr(record, name)}; allowed: one with {value}, as "
                f"this rung has{smaller if name == 'base_fingerprint' else ''}"
            )


def _check_fits(config: RunConfig, rung: Rung, lora: Lora, shapes: Mapping[str, torch.Size]) -> None:
    key = _key(config, rung)
    if lora.rank != config.lora.rank:
        raise ConfigError(
            f"{key}: got {rung.init!r}, a LoRA of rank {lora.rank}; allowed: {config.lora.rank}, the lora.rank; fix: "
            f"stepdistill merge {rung.init} --rank {config.lora.rank} --output FOLDER"
        )
    given = {name: tensor.shape for name, tensor in lora.state().items()}
    odd = sorted(name for name in given.keys() | shapes.keys() if given.get(name) != shapes.get(name))
    if odd:
        raise ConfigError(
            f"{key}: got {rung.init!r}, a LoRA on other layers: {len(odd)} tensors differ, first {odd[0]}; allowed: a "
            f"LoRA on the layers that are trained here"
        )
