"""Loads a teacher and its parts from its folder, through diffusers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, TorchAoConfig

from stepdistill.config.section import ConfigError
from stepdistill.config.sections import Quantization
from stepdistill.diffusion.noise_path import NoisePath
from stepdistill.diffusion.prediction import PREDICTION_TYPES
from stepdistill.diffusion.rectified_flow import RectifiedFlow
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.messages import first_line
from stepdistill.teacher.facts import DEFAULT_TIMESTEPS, TeacherFacts
from stepdistill.teacher.fingerprints import TEXT_ENCODERS, network_fingerprint, weights_fingerprint
from stepdistill.teacher.folder import WEIGHTS, pipeline_parts, weights_variant
from stepdistill.teacher.quantization import quantization_config
from stepdistill.teacher.scheduler import is_flow_scheduler
from stepdistill.teacher.weights import check_weights

_LOOK = "`stepdistill doctor` checks all of its files"


@contextmanager
def loading(key: str, what: object, *, fix: str = _LOOK) -> Iterator[None]:
    """Turns whatever diffusers, transformers and peft raise for files that they cannot use into a one-line ConfigError.

    Args:
        key: the config's key that names the files.
        what: what is being loaded, for the message.
        fix: the remedy, for the message.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they raise many kinds of errors for broken files
        raise ConfigError(f"{key}: cannot load {what}: {first_line(error)}; fix: {fix}") from error


def load_pipeline(folder: Path, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The unchanged pipeline, from safetensors on this disk, without progress bar; ConfigError if it cannot be loaded."""
    with loading("teacher.path", folder):
        check_weights(folder, *_parts(folder))
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **local_options(folder))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # decoding an image of 1024 px takes 3 GiB
    return pipeline


def load_encoders(
    folder: Path, *, vae_dtype: torch.dtype = torch.float32, text_dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """The pipeline without its network, to encode images and texts; ConfigError if it cannot be loaded."""
    with loading("teacher.path", folder):
        network = TeacherFacts.of_folder(folder).network_part
        check_weights(folder, *(part for part in _parts(folder) if part != network))
        dtypes = {"default": text_dtype, "vae": vae_dtype}
        without: dict[str, Any] = {network: None, "dtype": dtypes}
        pipeline = DiffusionPipeline.from_pretrained(folder, **without, **local_options(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_part(
    part_class: type[Any],
    folder: Path,
    part: str,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = "none",
) -> Any:
    """A part of the pipeline, such as "unet", frozen, in eval mode.

    ConfigError if its files lack weights or have some too many.
    """
    options = local_options(folder, part)
    if quantization != "none":
        options["quantization_config"] = TorchAoConfig(quantization_config(quantization))
    with loading("teacher.path", folder / part):
        check_weights(folder, part)
        model = part_class.from_pretrained(folder, subfolder=part, dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def _parts(folder: Path) -> list[str]:
    """The parts with weights of a pipeline's folder."""
    index = TeacherFacts.of_folder(folder).configs["pipeline"]
    return [part for part in pipeline_parts(index) if part in WEIGHTS]


def load_vae(folder: Path, *, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The pipeline's VAE, frozen, in eval mode; ConfigError if any of its weights cannot be loaded."""
    return load_part(AutoencoderKL, folder, "vae", dtype=dtype)


def vae_dtype(facts: TeacherFacts, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the teacher's VAE does not overflow: `weight_dtype` if made for half precision, else float32."""
    return torch.float32 if facts.vae_overflows_in_half else weight_dtype


def local_options(folder: Path, part: str | None = None) -> dict:
    """Options for every from_pretrained call: safetensors only, nothing from the network."""
    return {"use_safetensors": True, "local_files_only": True, "variant": weights_variant(folder, part)}


def load_noise_path(scheduler_config: Mapping[str, Any]) -> tuple[NoisePath, str]:
    """(noise path, prediction_type) that a scheduler_config.json describes; ValueError if either is not supported."""
    if is_flow_scheduler(scheduler_config):
        count = scheduler_config.get("num_train_timesteps", DEFAULT_TIMESTEPS)
        return RectifiedFlow(float(scheduler_config.get("shift", 1.0)), count), "velocity"
    return load_schedule(scheduler_config)


def load_schedule(scheduler_config: Mapping[str, Any]) -> tuple[VariancePreserving, str]:
    """The same of a noise schedule of betas."""
    prediction_type = scheduler_config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"the teacher's scheduler has prediction_type {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}"
        )
    if scheduler_config.get("trained_betas") is not None:
        betas = torch.tensor(scheduler_config["trained_betas"], dtype=torch.float64)
    else:
        betas = make_betas(
            scheduler_config.get("beta_schedule", "scaled_linear"),
            beta_start=scheduler_config["beta_start"],
            beta_end=scheduler_config["beta_end"],
            num_train_timesteps=scheduler_config.get("num_train_timesteps", DEFAULT_TIMESTEPS),
        )
    zero_snr = bool(scheduler_config.get("rescale_betas_zero_snr", False))
    return VariancePreserving.from_betas(betas, zero_terminal_snr=zero_snr), prediction_type


def fingerprint(folder: Path) -> str:
    """sha256 over the network's weight files, 16 hexadecimal digits: it identifies the base that a LoRA belongs to."""
    return network_fingerprint(folder)


def encoder_fingerprint(folder: Path) -> str:
    """sha256 over the weight files of VAE and text encoders: it identifies the source of latents and embeddings."""
    return weights_fingerprint(folder, "vae", *TEXT_ENCODERS)
