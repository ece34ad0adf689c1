"""What the configs of a pipeline's folder say; they are read once. No torch.

A file that is missing or broken counts as empty here, so its values are diffusers' defaults; folder.py reports such files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.diffusion.grid import shift_of_length
from stepdistill.teacher.files import read_object
from stepdistill.teacher.layouts import Layout, layout_of
from stepdistill.teacher.scheduler import DYNAMIC_SHIFT, is_flow_scheduler

DEFAULT_TIMESTEPS = 1000
"""num_train_timesteps of every Stable Diffusion model, and of a scheduler_config.json without that key."""
_CLIP_TOKENS = 77
_CONFIG_FILES = {
    "pipeline": "model_index.json",
    "unet": "unet/config.json",
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "text_encoder_2": "text_encoder_2/config.json",
    "text_encoder_3": "text_encoder_3/config.json",
    "tokenizer_3": "tokenizer_3/tokenizer_config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@dataclass(frozen=True)
class TeacherFacts:
    """folder: where the configs were read. configs: by part ("pipeline" is model_index.json); {} if missing or broken."""

    folder: Path
    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of_folder(cls, folder: Path) -> "TeacherFacts":
        """Reads every config of a pipeline's folder."""
        return cls(folder, {part: _config(folder / name) for part, name in _CONFIG_FILES.items()})

    @property
    def pipeline_class(self) -> str:
        """The pipeline's class in model_index.json, such as StableDiffusionPipeline."""
        return str(self.configs["pipeline"].get("_class_name"))

    @property
    def layout(self) -> Layout:
        """The parts of the pipeline."""
        return layout_of(self.configs["pipeline"].get("_class_name"))

    @property
    def network_part(self) -> str:
        """The part of the pipeline that is distilled, and its folder: unet or transformer."""
        return self.layout.network

    @property
    def network(self) -> Mapping[str, Any]:
        """The config of that part."""
        return self.configs[self.network_part]

    @property
    def unet(self) -> Mapping[str, Any]:
        """unet/config.json."""
        return self.configs["unet"]

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """scheduler/scheduler_config.json; ValueError if it is missing or broken."""
        if not self.configs["scheduler"]:
            path = self.folder / _CONFIG_FILES["scheduler"]
            raise ValueError(f"{path} is missing or is not a JSON object")
        return self.configs["scheduler"]

    def scheduler_at(self, size: tuple[int, int]) -> Mapping[str, Any]:
        """The scheduler's config for images of this size, (height, width) in pixels: a dynamic shift is fixed there."""
        config = self.scheduler
        if not config.get("use_dynamic_shifting"):
            return config
        lengths = {key: config.get(key, default) for key, default in DYNAMIC_SHIFT.items()}
        shift = shift_of_length(
            (size[0] // self.size_multiple) * (size[1] // self.size_multiple),
            base_length=lengths["base_image_seq_len"],
            max_length=lengths["max_image_seq_len"],
            base_shift=lengths["base_shift"],
            max_shift=lengths["max_shift"],
            kind=config.get("time_shift_type", "exponential"),
        )
        return {**config, "shift": shift, "use_dynamic_shifting": False}

    @property
    def prediction_type(self) -> str:
        """What the network predicts, by the scheduler's config: epsilon, sample or v_prediction, or a flow's velocity."""
        if self.matches_flows:
            return "velocity"
        return str(self.configs["scheduler"].get("prediction_type", "epsilon"))

    @property
    def matches_flows(self) -> bool:
        """Whether the noise path is a rectified flow (diffusion/rectified_flow.py)."""
        return is_flow_scheduler(self.configs["scheduler"])

    @property
    def is_zero_snr(self) -> bool:
        """Whether the noise schedule ends in pure noise (Lin et al. 2023, arXiv 2305.08891), as a flow always does."""
        return self.matches_flows or bool(self.configs["scheduler"].get("rescale_betas_zero_snr", False))

    @property
    def num_train_timesteps(self) -> int:
        """T of the noise schedule."""
        betas = self.configs["scheduler"].get("trained_betas")
        if betas is not None:
            return len(betas)
        return int(self.configs["scheduler"].get("num_train_timesteps", DEFAULT_TIMESTEPS))

    @property
    def image_size(self) -> tuple[int, int]:
        """The pipeline's default image size, (height, width) in pixels; ValueError if the configs do not give it."""
        side, blocks = self.network.get("sample_size"), self.configs["vae"].get("block_out_channels")
        if side is None and self.layout.image_side is not None:
            return self.layout.image_side, self.layout.image_side
        if side is None or blocks is None:
            raise ValueError(
                f"{self.folder}: {self.network_part}/config.json has no sample_size or vae/config.json no block_out_channels"
            )
        height, width = (side, side) if isinstance(side, int) else side
        return height * self._vae_factor, width * self._vae_factor

    @property
    def size_multiple(self) -> int:
        """Sides of images in pixels must be multiples of this: the VAE's downsampling factor times the U-Net's, or times the
        side of the transformer's patches."""
        if self.network_part == "transformer":
            patches = self.network.get("all_patch_size") or [self.network.get("patch_size", 2)]
            return self._vae_factor * int(patches[0])
        return self._vae_factor * 2 ** (len(self.unet.get("block_out_channels", [0])) - 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images whose size is (height, width) in pixels."""
        channels = int(self.configs["vae"].get("latent_channels", 4))
        return channels, size[0] // self._vae_factor, size[1] // self._vae_factor

    @property
    def text_tokens(self) -> int:
        """Tokens of the longest text: the pipeline's default number, or the tokenizer's limit if that is lower."""
        name, count = self.layout.text or ("tokenizer", _CLIP_TOKENS)
        limit = self.configs.get(name, {}).get("model_max_length", count)
        return min(count, limit) if type(limit) is int else count

    @property
    def call_options(self) -> dict[str, int]:
        """Arguments of the pipeline's call without which its text is longer than the tokenizer's limit."""
        name, _ = self.layout.text or ("tokenizer", 0)
        return self.layout.call_options(self.configs.get(name, {}).get("model_max_length"))

    @property
    def vae_overflows_in_half(self) -> bool:
        """Whether the VAE must decode in float32, like SDXL's own VAE, which overflows in half precision.

        False only if its config.json has force_upcast: false, as VAEs made for half precision have.
        """
        return self.configs["vae"].get("force_upcast") is not False

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self.configs["vae"].get("block_out_channels", [0])) - 1)


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError:
        return {}
