"""Thousands of mutated files, through the readers that the command line uses. Each is read, or refused by one of the errors
that the command line shows as one line; nothing in it is run, and no reader takes long."""

import contextlib
import json
import random
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from safetensors.torch import save, save_file

from eval.random_teacher import build
from stepdistill.cli import _OF_THE_DISK, _raised_here
from stepdistill.config.load import load_config
from stepdistill.config.saved import read_run_config
from stepdistill.data.cache import TEXT, LatentCache, open_cache, pack
from stepdistill.data.shards import Shard, _header_sum, caption_bytes, is_intact, write_shard
from stepdistill.disk.durable import sealed, sha256_file, write_sealed
from stepdistill.errors import EXPECTED
from stepdistill.evaluation.draw.rows import lora_row
from stepdistill.evaluation.measure.kept_features import read_features, write_features
from stepdistill.export.exported import is_exported, write_facts
from stepdistill.export.kohya import HASH, read_kohya, tensors_hash
from stepdistill.export.rung import HEADER
from stepdistill.models.identity import BaseIdentity
from stepdistill.models.lora_file import read_lora
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.report.build import build_report
from stepdistill.report.read import read_run
from stepdistill.run.folder import check_folder
from stepdistill.run.log import read_log
from stepdistill.run.rungs import RECORD_NAME, WEIGHT_NAME, RungRecord, finished_rungs, require_rung
from stepdistill.sampling.few_step import _read
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import broken_files, missing_parts, unsupported
from stepdistill.teacher.source import check_teacher
from stepdistill.training.checkpoint import Checkpoints, Identity, newest
from tests.browser.synthetic_run import make_run
from tests.conftest import randn
from tests.faults.bounds import bounded
from tests.faults.fuzzing import (
    Audit,
    mutated,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_safetensors,
    tagged_yaml,
)

AUDIT = Audit()
LONGEST = 30.0  # seconds of one file, on a busy machine; a report takes 4
IDENTITY = Identity({"lora.rank": 4}, {"8": "sha256"}, "base", "cache", 4, {"torch": "1"})


@contextlib.contextmanager
def refusals():
    """Lets the errors pass that the command line shows as one line; others are raised."""
    try:
        yield
    except EXPECTED:
        pass
    except ValueError as error:
        if not _raised_here(error) or isinstance(error, UnicodeEncodeError):
            raise
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise


def write_lora_file(path, **metadata):
    layers = {
        f"unet.mid_block.{name}.lora_{side}.weight": randn(4, 4) for name in ("to_q", "to_k") for side in "AB"
    }
    config = {
        "unet.r": 4,
        "unet.lora_alpha": 4,
        "unet.alpha_pattern": {"to_q": 2},
        "unet.target_modules": ["to_q", "to_k"],
    }
    save_file(layers, path, metadata={"lora_adapter_metadata": json.dumps(config), **metadata})


def rung(folder):
    """A run's folder with one finished, exported rung."""
    place = folder / "rungs" / "4"
    place.mkdir(parents=True)
    write_lora_file(place / WEIGHT_NAME)
    RungRecord(4, 8, "epsilon", 4, "base", sha256_file(place / WEIGHT_NAME), 1.0).write(place)
    write_facts(
        place, DDIMScheduler(beta_start=0.00085, beta_end=0.012), BaseIdentity(3, {"a": 0.5}).as_json()
    )


def read_rung_folder(folder):
    finished_rungs(folder)
    require_rung(folder, 4)
    is_exported(folder / "rungs" / "4")
    _read(folder / "rungs" / "4")


def kohya(folder):
    state = {
        f"lora_unet_mid_block_attentions_0_to_q.lora_{side}.weight": randn(4, 4) for side in ("down", "up")
    }
    state["lora_unet_mid_block_attentions_0_to_q.alpha"] = torch.tensor(4.0)
    scheduler = dict(DDIMScheduler(beta_start=0.00085, beta_end=0.012).config)
    record = vars(RungRecord(4, 8, "epsilon", 4, "base", ""))
    facts = {**record, "scheduler": scheduler, "base": BaseIdentity(1, {}).as_json()}
    save_file(
        state,
        folder / "a.safetensors",
        metadata={HEADER: json.dumps(sealed(facts)), HASH: tensors_hash(state)},
    )


def read_kohya_file(folder):
    read_kohya(folder / "a.safetensors", ["mid_block.attentions.0.to_q"], {})
    _read(folder / "a.safetensors")


def cache(folder):
    one, other = Conditioning(randn(1, 6, 16)), Conditioning(randn(1, 6, 16))
    (folder / TEXT).write_bytes(save(pack("cond", one) | pack("uncond", other)))
    tensors = {
        "latents/32x32": randn(2, 4, 4, 4),
        "rows/32x32": torch.zeros(2, 5, dtype=torch.int32),
        "text/encoder_hidden_states": randn(1, 6, 16),
        "captions": caption_bytes(["a"]),
    }
    digest = write_shard(folder / "a.safetensors", tensors, {"key": "k", "bad": "[{}, {}]", "seen": "2"})
    shards = [{"file": "a.safetensors", "sha256": digest}]
    facts = {"shards": shards, "prompts": ["a"], "samples": 2, "text_sha256": sha256_file(folder / TEXT)}
    write_sealed(folder / "manifest.json", facts)


def read_cache(folder):
    opened = open_cache(folder)
    assert len(opened.draw([0, 1], seed=0, group=2).latents) == 2


def shard(folder):
    cache(folder)
    (folder / "manifest.json").unlink()


def mutated_shard(content, seed):
    """A shard with a changed header, whose checksum lets the change in."""
    changed = mutated_safetensors(content, 4 * seed + 2)
    length = int.from_bytes(changed[:8], "little")
    header = json.loads(changed[8 : 8 + length])
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        sums = _header_sum(header)
        sums.update(changed[8 + length :])
        header["__metadata__"]["sha256"] = sums.hexdigest()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + changed[8 + length :]


def read_shard(folder):
    if is_intact(folder / "a.safetensors"):
        conditioning = Conditioning(randn(1, 6, 16))
        shards = [Shard(folder / "a.safetensors")]
        opened = LatentCache(shards, prompts=["a"], conditioning=conditioning, unconditional=conditioning)
        opened.draw([0, 1], seed=0, group=2)
        assert len(shards[0].captions)


def checkpoint(folder):
    writer = Checkpoints(folder / "checkpoints", lambda *_: IDENTITY, every_minutes=0, keep=2, seconds=0)
    writer.save(0, 3, {"student": {"a": randn(2)}, "step": 3, "list": [1, {"b": randn(2)}]}, None)
    writer.wait()


def finished_run(folder):
    make_run(folder / "run", size=8, prompts=("a", "b"), columns=2)


def teacher(folder):
    build("sd15", tiny=True).save_pretrained(folder, safe_serialization=True)


def config_file(folder):
    text = Path("configs/letters.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("name: letters", f"name: {folder.name}", 1))


def read_config(folder):
    for read in (load_config, read_run_config):
        with refusals():
            read(folder / "config.yaml" if read is load_config else folder)
    check_folder(load_config("configs/letters.yaml", [f"output_dir={folder.parent}", f"name={folder.name}"]))


def mutated_yaml(content, seed):
    """A YAML file changed as bytes, as plain data, or by a tag in front of one of its values."""
    if seed % 3 == 0:
        return mutated_bytes(content, seed)
    if seed % 3 == 1:
        return tagged_yaml(content, seed)
    return yaml.dump(mutated(yaml.safe_load(content), seed), sort_keys=False).encode("utf-8", "replace")


def lora(folder):
    write_lora_file(folder / WEIGHT_NAME)


def lora_beside_a_scheduler(folder):
    lora(folder)
    (folder / "scheduler").mkdir()
    DDIMScheduler().save_config(folder / "scheduler")


def row_of(folder):
    settings = [f"evaluation.loras=[{{name: a, path: {folder}, steps: 4}}]"]
    lora_row(load_config("configs/letters.yaml", settings).evaluation.loras[0])


def features(folder):
    write_features(folder / "a.safetensors", randn(3, 4), "key")


def read_teacher(folder):
    check_teacher(
        load_config("configs/letters.yaml", [f"teacher.path={folder}", f"output_dir={folder}/none"])
    )
    if not missing_parts(folder) and not [*broken_files(folder)] and not unsupported(folder):
        facts = TeacherFacts.of_folder(folder)
        with refusals():
            assert facts.image_size
        assert facts.size_multiple, facts.num_train_timesteps
        assert all(map(str, examine_pipeline(folder)))


# name -> (makes intact files in a folder, reads them, the files that are changed and how, share of the mutations)
SUBJECTS = {
    "config": (config_file, read_config, {"config.yaml": mutated_yaml}, 3),
    "LoRA": (lora, lambda folder: read_lora(folder / WEIGHT_NAME), {WEIGHT_NAME: mutated_safetensors}, 30),
    "row": (
        lora_beside_a_scheduler,
        row_of,
        {WEIGHT_NAME: mutated_safetensors, "scheduler/scheduler_config.json": mutated_json},
        6,
    ),
    "rung": (
        rung,
        read_rung_folder,
        {
            f"rungs/4/{name}": mutated_json
            for name in (RECORD_NAME, "base.json", "scheduler/scheduler_config.json")
        },
        14,
    ),
    "kohya": (kohya, read_kohya_file, {"a.safetensors": mutated_safetensors}, 14),
    "cache": (
        cache,
        read_cache,
        {"manifest.json": mutated_json, "a.safetensors": mutated_safetensors, TEXT: mutated_safetensors},
        14,
    ),
    "shard": (shard, read_shard, {"a.safetensors": mutated_shard}, 10),
    "checkpoint": (
        checkpoint,
        lambda folder: newest(folder / "checkpoints", lambda *_: IDENTITY),
        {
            "checkpoints/phase0-step000003/manifest.json": mutated_json,
            "checkpoints/phase0-step000003/state.safetensors": mutated_safetensors,
        },
        14,
    ),
    "log": (
        lambda folder: (folder / "log.jsonl").write_text(
            '{"rung": 4, "phase": 0, "step": 1, "loss": 0.5}\n' * 3
        ),
        lambda folder: read_log(folder / "log.jsonl"),
        {"log.jsonl": mutated_lines},
        14,
    ),
    "features": (
        features,
        lambda folder: read_features(folder / "a.safetensors", "key"),
        {"a.safetensors": mutated_safetensors},
        8,
    ),
}


def fuzz(place, make, read, files, count, *, first=0):
    """Reads `count` mutations of the files that `make` makes. Only one file is changed at a time."""
    intact = place / "intact"
    intact.mkdir(parents=True)
    make(intact)
    contents = {name: (intact / name).read_bytes() for name in files}
    read(intact)
    names, failures = sorted(contents), []
    for seed in range(first, first + count):
        name = names[seed % len(names)]
        (intact / name).write_bytes(
            files[name](contents[name], random.Random(f"{place.name} {seed}").randrange(10**9))
        )
        started = time.monotonic()
        try:
            with AUDIT.watching(place) as seen, refusals():
                read(intact)
        except Exception as error:
            failures.append(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:300]}")
        if seen or time.monotonic() - started > LONGEST:
            failures.append(f"{name}, seed {seed}: {seen} in {time.monotonic() - started:.1f} s")
        (intact / name).write_bytes(contents[name])
    assert not failures, "\n".join([f"{len(failures)} of {count}", *failures[:20]])


OF_A_RUN = {
    "run/config.yaml": mutated_yaml,
    "run/log.jsonl": mutated_lines,
    **dict.fromkeys(
        (
            "run/environment.json",
            "run/evaluation/results.json",
            "run/rungs/4/rung.json",
            "run/rungs/4/previews/phase0-mse-end.json",
        ),
        mutated_json,
    ),
}
OF_A_TEACHER = {
    **dict.fromkeys(("unet", "vae", "text_encoder"), "config.json"),
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
}
SUBJECTS["run"] = (finished_run, lambda folder: read_run(folder / "run"), OF_A_RUN, 4)
SLOW = {
    "report": (finished_run, lambda folder: build_report(folder / "run", folder / "out"), OF_A_RUN, 0.125),
    "teacher": (
        teacher,
        read_teacher,
        {"model_index.json": mutated_json}
        | {f"{part}/{name}": mutated_json for part, name in OF_A_TEACHER.items()}
        | {"vae/diffusion_pytorch_model.safetensors": mutated_safetensors},
        0.5,
    ),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_some_mutated_files_are_read_or_refused(subject, tmp_path):
    make, read, files, share = SUBJECTS[subject]
    with bounded(60):
        fuzz(tmp_path / subject, make, read, files, min(30, 4 * share))


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS | SLOW)
def test_many_mutated_files_are_read_or_refused(subject, tmp_path):
    make, read, files, share = (SUBJECTS | SLOW)[subject]
    with bounded(170):
        fuzz(tmp_path / subject, make, read, files, round(30 * share), first=1000)
