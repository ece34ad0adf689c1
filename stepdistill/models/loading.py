"""A teacher from its folder: owns what is loaded through diffusers."""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, TorchAoConfig, UNet2DConditionModel

from stepdistill.config.section import ConfigError
from stepdistill.diffusion.noise_path import VariancePreserving, make_betas
from stepdistill.diffusion.prediction import PREDICTION_TYPES
from stepdistill.messages import first_line
from stepdistill.models.folder import DEFAULT_TIMESTEPS, weights_variant
from stepdistill.run.durable import read_json

_LOOK = "`stepdistill doctor` looks at all of its files"


@contextmanager
def loading(key: str, what: object, *, mend: str = _LOOK) -> Iterator[None]:
    """ConfigError in one line for whatever diffusers, transformers and peft raise at files that they cannot use.

    Args:
        key: of the config, which names the files.
        what: is being loaded, for the message.
        mend: the remedy.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they raise a dozen kinds, as a broken file leads them to
        raise ConfigError(f"{key}: cannot load {what}: {first_line(error)}; mend: {mend}") from error


def load_pipeline(folder: Path, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The vanilla pipeline, safetensors only, never from the network, without its progress bar; ConfigError."""
    with loading("teacher.path", folder):
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **local_options(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_encoders(folder: Path, *, vae_dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline without its U-Net: what turns pictures into latents and texts into embeddings; ConfigError."""
    with loading("teacher.path", folder):
        pipeline = DiffusionPipeline.from_pretrained(
            folder, unet=None, dtype=torch.float32, **local_options(folder)
        )
    if vae_dtype != torch.float32:
        pipeline.vae.to(vae_dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) in pixels that the pipeline draws where nobody asks for another; ValueError where it is not said."""
    unet, vae = (read_json(folder / part / "config.json") or {} for part in ("unet", "vae"))
    side, blocks = unet.get("sample_size"), vae.get("block_out_channels")
    if side is None or blocks is None:
        raise ValueError(
            f"{folder}: unet/config.json has no sample_size or vae/config.json no block_out_channels"
        )
    height, width = (side, side) if isinstance(side, int) else side
    return height * 2 ** (len(blocks) - 1), width * 2 ** (len(blocks) - 1)


def size_multiple(folder: Path) -> int:
    """Sides of pictures in pixels must be multiples of it: the VAE's factor times the U-Net's."""
    unet, vae = (read_json(folder / part / "config.json") or {} for part in ("unet", "vae"))
    levels = len(vae.get("block_out_channels", [0])) - 1 + len(unet.get("block_out_channels", [0])) - 1
    return 2**levels


def latent_shape(folder: Path, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of pictures of a size (height, width) in pixels."""
    vae = read_json(folder / "vae" / "config.json") or {}
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    return int(vae.get("latent_channels", 4)), size[0] // factor, size[1] // factor


def load_unet(
    folder: Path, *, dtype: torch.dtype = torch.float32, quantization: str = "none"
) -> UNet2DConditionModel:
    """The pipeline's U-Net, frozen, in eval mode; ConfigError where it cannot be loaded to the last weight, and where "int8"
    is asked for and torchao is not installed."""
    options = local_options(folder)
    if quantization == "int8":
        options["quantization_config"] = _int8()
    return _whole(UNet2DConditionModel, folder, "unet", dtype=dtype, **options)


def _whole(kind: type[Any], folder: Path, part: str, **options: Any) -> Any:
    """A part of the pipeline, frozen, in eval mode; ConfigError for weights that its files lack, which diffusers would leave
    without numbers."""
    with loading("teacher.path", folder / part):
        model, loaded = kind.from_pretrained(folder, subfolder=part, output_loading_info=True, **options)
        if loaded["missing_keys"]:
            raise ConfigError(
                f"teacher.path: {folder / part} lacks {len(loaded['missing_keys'])} weights, first "
                f"{min(loaded['missing_keys'])}"
            )
    return model.eval().requires_grad_(False)


def _int8() -> TorchAoConfig:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "training.base_quantization: got int8, which needs the torchao package; mend: "
            'pip install "stepdistill[quantize]"'
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def load_vae(folder: Path, *, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The pipeline's VAE, frozen, in eval mode; ConfigError where it cannot be loaded to the last weight."""
    return _whole(AutoencoderKL, folder, "vae", dtype=dtype, **local_options(folder, "vae"))


def vae_dtype(folder: Path, weight_dtype: torch.dtype) -> torch.dtype:
    """What a VAE decodes in without overflow: `weight_dtype` where its config.json has force_upcast: false, as those for
    half precision do; float32 elsewhere, as diffusers has it for SDXL's."""
    config = read_json(folder / "vae" / "config.json") or {}
    return weight_dtype if config.get("force_upcast") is False else torch.float32


def local_options(folder: Path, part: str = "unet") -> dict:
    """Of every from_pretrained: safetensors alone, nothing from the network."""
    return {"use_safetensors": True, "local_files_only": True, "variant": weights_variant(folder, part)}


def read_scheduler_config(folder: Path) -> dict:
    """The pipeline's scheduler_config.json; ValueError where it cannot be read."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'scheduler' / 'scheduler_config.json'} is missing or is no JSON object")
    return config


def load_noise_path(scheduler_config: dict) -> tuple[VariancePreserving, str]:
    """(noise schedule, prediction_type) that a scheduler_config.json describes; ValueError for what is not supported."""
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
    """sha256 over the U-Net's weight files, 16 hexadecimal digits: which base a LoRA belongs to."""
    return _fingerprint(folder, "unet")


def encoder_fingerprint(folder: Path) -> str:
    """sha256 over the weights of VAE and text encoders: which latents and embeddings go together."""
    return _fingerprint(folder, "vae", "text_encoder", "text_encoder_2")


def _fingerprint(folder: Path, *parts: str) -> str:
    digest = hashlib.sha256()
    for path in (path for part in parts for path in sorted((folder / part).glob("*.safetensors"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
