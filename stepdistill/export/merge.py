"""The weighted mean of LoRAs: `stepdistill merge`, for rounds of training on data that stay apart (docs/federated.md).

What is averaged is the change of the weights, sum_i w_i dW_i with sum_i w_i = 1. The mean of the factors would not be the
mean of their products. The sum of k LoRAs of rank r has rank k r at most; it is cut to the asked rank by singular values.

OUTPUT/                                 of runs: rungs/<steps>/ for each step count that all of them have
  pytorch_lora_weights.safetensors      the merged LoRA
  rung.json  scheduler/  base.json      of the first rung; all have its steps, prediction, start and base
  merged.json                           weight and sha256 of each LoRA, and the energy kept
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stepdistill.config import ConfigError
from stepdistill.disk.durable import sha256_file, whole_folder, write_sealed
from stepdistill.export.exported import BASE, scheduler_file
from stepdistill.export.rank import Reduced, cut_product
from stepdistill.models.lora_file import Lora, lora_path, read_lora, weighted_sum, write_lora
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, finished_rungs, rung_folder

logger = logging.getLogger(__name__)
MERGED = "merged.json"


@dataclass(frozen=True)
class Source:
    """A LoRA to merge. record: of its rung; None for a LoRA that is no rung's."""

    path: Path
    lora: Lora
    record: RungRecord | None

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Reads a rung's folder or its LoRA's file, or another LoRA's file or folder; ConfigError if it is damaged, or of
        another kind."""
        if path.name == WEIGHT_NAME and RungRecord.read(path.parent) is not None:
            path = path.parent
        try:
            lora = read_lora(path)
        except ValueError as error:
            raise ConfigError(f"merge: {error}") from None
        record = RungRecord.read(path) if path.is_dir() else None
        if record is not None and sha256_file(lora_path(path)) != record.sha256:
            raise ConfigError(f"merge: {lora_path(path)} is not as it was written; fix: another copy of it")
        return cls(path, lora, record)


def merge(
    sources: Sequence[Path], output: Path, *, weights: Sequence[float] | None = None, rank: int | None = None
) -> dict[Path, Reduced]:
    """Merges rungs or LoRAs into the folder `output`, or, of runs, each rung that all of them have into a rung below it.

    Args:
        sources: runs, or rungs' folders and LoRA files.
        output: the folder to write; it may not exist yet.
        weights: of each source, 0 or more; only their ratios matter. Default: equal ones.
        rank: of the merged LoRAs; default: the largest rank of the sources.
    Returns each written folder with the LoRA and the energy kept. ConfigError, with nothing written, if a source cannot be
    read or they do not belong together.
    """
    if output.exists():
        raise ConfigError(f"--output: got {output}, which exists; allowed: a new folder")
    for path in sources:
        if not path.exists():
            raise ConfigError(
                f"merge: got {path}, which does not exist; allowed: a run, a rung's folder or a LoRA"
            )
    shares = _shares(weights, len(sources))
    steps = _common_steps(sources)
    together = {
        rung_folder(output, n) if n else output: [Source.read(rung_folder(p, n) if n else p) for p in sources]
        for n in steps
    }
    merged = {folder: merged_lora(each, shares, rank) for folder, each in together.items()}
    for folder, each in together.items():
        _write(folder, merged[folder], each, shares)
    return merged


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = list(weights or [1.0] * count)
    if len(given) != count:
        raise ConfigError(f"--weights: got {len(given)}; allowed: {count}, one for each source")
    total = sum(given)
    if min(given) < 0 or not 0 < total < float("inf"):
        raise ConfigError(
            f"--weights: got {','.join(f'{w:g}' for w in given)}; allowed: finite numbers of 0 or more, not all 0"
        )
    return [weight / total for weight in given]


def _common_steps(sources: Sequence[Path]) -> list[int]:
    """The step counts of which every run has a finished rung; [0] if the sources are rungs or LoRAs."""
    runs = [path for path in sources if (path / "rungs").is_dir()]
    if not runs:
        return [0]
    if len(runs) < len(sources):
        other = next(path for path in sources if path not in runs)
        raise ConfigError(
            f"merge: got the run {runs[0]} and {other}, which is none; allowed: runs alone, or none"
        )
    finished = [set(finished_rungs(run)) for run in runs]
    common = sorted(set.intersection(*finished), reverse=True)
    if not common:
        raise ConfigError(
            f"merge: {' and '.join(map(str, runs))} have no finished rung of equal steps; allowed: runs that do"
        )
    return common


def merged_lora(sources: Sequence[Source], shares: Sequence[float], rank: int | None) -> Reduced:
    """The weighted mean of the sources' updates at a rank, by default the largest of theirs; ConfigError if they do not
    belong together, or if the rank is higher than the mean's can be."""
    first = sources[0]
    for other in sources[1:]:
        _check_alike(first, other)
    mean = weighted_sum([source.lora for source in sources], shares)
    if rank is not None and not 1 <= rank <= mean.rank:
        raise ConfigError(f"--rank: got {rank}; allowed: 1 to {mean.rank}, the sum of the sources' ranks")
    return cut_product(mean, max(source.lora.rank for source in sources) if rank is None else rank)


def _check_alike(first: Source, other: Source) -> None:
    shapes, others = (
        {name: layer.weight_shape for name, layer in source.lora.layers.items()} for source in (first, other)
    )
    odd = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if odd:
        raise ConfigError(
            f"merge: {first.path} and {other.path} differ in {len(odd)} layers, first {odd[0]} "
            f"({shapes.get(odd[0])} and {others.get(odd[0])}); allowed: LoRAs on the same layers of the same base"
        )
    if first.record is None or other.record is None:
        if first.record is not other.record:
            raise ConfigError(
                f"merge: one of {first.path} and {other.path} is no rung; allowed: rungs alone, or none"
            )
        return
    for name in ("student_steps", "prediction_type", "start_timestep", "base_fingerprint"):
        ours, theirs = (getattr(source.record, name) for source in (first, other))
        if ours != theirs:
            raise ConfigError(
                f"merge: {first.path} has {name} {ours}, {other.path} {theirs}; allowed: rungs of equal steps on one base"
            )


def _write(folder: Path, merged: Reduced, sources: Sequence[Source], shares: Sequence[float]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as partial:
        write_lora(partial, merged.lora.state(), merged.lora.config, part=merged.lora.part)
        first = sources[0]
        if first.record is not None:
            _copy_facts(first.path, partial)
            replace(
                first.record,
                lora_rank=merged.lora.rank,
                sha256=sha256_file(partial / WEIGHT_NAME),
                training_seconds=None,
                samples_per_update=None,
                teacher_sha256=None,
            ).write(partial)
        about = [
            {"weight": share, "sha256": sha256_file(lora_path(source.path))}
            for source, share in zip(sources, shares, strict=True)
        ]
        write_sealed(partial / MERGED, {"sources": about, "energy_kept": merged.energy_kept})


def _copy_facts(rung: Path, folder: Path) -> None:
    """Copies the files of an export by which load_few_step samples and knows the base."""
    if (rung / BASE).is_file() and scheduler_file(rung).is_file():
        scheduler_file(folder).parent.mkdir()
        shutil.copyfile(scheduler_file(rung), scheduler_file(folder))
        shutil.copyfile(rung / BASE, folder / BASE)
