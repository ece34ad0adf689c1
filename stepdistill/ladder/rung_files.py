"""A rung's folder: opened before training, with its LoRA and record at the end; and reading the LoRA again."""

import shutil
from pathlib import Path

from safetensors.torch import load_file

from stepdistill.config import Rung
from stepdistill.disk.durable import replace_folder, sha256_file, writing
from stepdistill.disk.guarded_folder import make_folder
from stepdistill.disk.places import clear_half_written
from stepdistill.disk.space import check_space, folder_bytes
from stepdistill.ladder.shared import Shared
from stepdistill.models import adapters
from stepdistill.models.lora_file import write_lora
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.run.checkpoint_files import CHECKPOINTS, partial_rung
from stepdistill.run.rung_order import begun_from
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, read_rung, rung_folder
from stepdistill.training.disk_bytes import encoder_parameters, rung_bytes

_PARTS = ("unet.", "transformer.")


def open_partial(shared: Shared, rung: Rung, *, is_resumed: bool) -> None:
    """Makes the folder of a rung that is about to be trained, empty unless the rung continues from a checkpoint. ValueError
    if the disk has no room for the rung."""
    config = shared.config
    partial = partial_rung(config.run_dir, rung.student_steps)
    if not is_resumed:
        shutil.rmtree(partial, ignore_errors=True)
    with writing(partial):
        make_folder(partial)
    clear_half_written(partial)
    need = rung_bytes(
        config,
        rung,
        parameters=sum(p.numel() for p in shared.network.group(STUDENT).values()),
        encoder=encoder_parameters(shared.network.model),
        size=max(shared.cache.sizes),
    )
    check_space(partial, need - folder_bytes(partial), f"the {rung.student_steps}-step rung")


def finish_rung(shared: Shared, rung: Rung, partial: Path, *, prediction_type: str, seconds: float) -> None:
    """Writes the LoRA and its record into the folder `partial`, which then becomes the rung's folder. The checkpoints are
    removed after that, so that nothing is lost if it fails."""
    save_lora(shared.network, partial)
    record = RungRecord(
        student_steps=rung.student_steps,
        teacher_steps=rung.teacher_steps,
        prediction_type=prediction_type,
        lora_rank=shared.config.lora.rank,
        base_fingerprint=shared.base_fingerprint,
        sha256=sha256_file(partial / WEIGHT_NAME),
        training_seconds=seconds,
        start_timestep=rung.start_timestep,
        samples_per_update=shared.samples_per_update,
        teacher_sha256=begun_from(shared.config, rung),
        image_size=shared.image_size,
    )
    record.write(partial)
    final = rung_folder(shared.config.run_dir, rung.student_steps)
    with writing(final):
        replace_folder(partial, final)
    shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)


def save_lora(network: SharedNetwork, folder: Path) -> None:
    """Writes the student's LoRA into a folder."""
    state = network.adapter_state(STUDENT)
    config = adapters.adapter_metadata(network.model, STUDENT)
    write_lora(folder, state, config, part=network.kind.component)


def read_rung_lora(run_dir: Path, student_steps: int) -> dict:
    """The weights of a finished rung's LoRA by peft's keys; ValueError if the rung is missing or damaged."""
    if read_rung(run_dir, student_steps) is None:
        raise ValueError(
            f"the {student_steps}-step rung in {run_dir} is missing or changed; fix: `stepdistill distill` trains it again"
        )
    return read_lora_file(rung_folder(run_dir, student_steps) / WEIGHT_NAME)


def read_lora_file(path: Path) -> dict:
    """The weights in a file that `save_lora` wrote, by peft's keys."""
    state = load_file(path)
    prefix = next((part for part in _PARTS if all(key.startswith(part) for key in state)), "")
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}
