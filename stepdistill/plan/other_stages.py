"""The memory of what a run does besides training: previews, encoding the data, and drawing the images of the table."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stepdistill.config import RunConfig
from stepdistill.data.buckets import Sizes
from stepdistill.data.encode import images_at_once
from stepdistill.data.records import is_prompts_only
from stepdistill.diffusion.grid import passes_per_step
from stepdistill.plan.cards import Card
from stepdistill.plan.tracker import Tracker, Work, gpu_kernels
from stepdistill.runtime import WEIGHT_DTYPES
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import vae_dtype

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class OtherStages:
    """Counts on the meta device, as DryRun does for training.

    Args:
        config: the run.
        facts: the teacher's configs.
        card: gives the time of each kernel.
    """

    def __init__(self, config: RunConfig, facts: TeacherFacts, card: Card) -> None:
        self._config, self._facts, self._card = config, facts, card
        size = Sizes(config.data, teacher_size=facts.image_size, multiple=facts.size_multiple).target
        self._size, self._latent = size, facts.latent_shape(size)
        with torch.device("meta"):
            self._vae = AutoencoderKL.from_config(dict(facts.configs["vae"])).eval().requires_grad_(False)

    def decode_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the VAE, and of decoding one image, of a network in this dtype."""
        dtype = vae_dtype(self._facts, dtype)
        vae = self._vae.to(dtype)
        with torch.device("meta"):
            latents = torch.empty(1, *self._latent, dtype=dtype)
        return _peak(self._card, vae, lambda: vae.decode(latents))

    def prepare_bytes(self) -> int:
        """Bytes of encoding the data (VAE, text encoders, a batch of images), or of drawing them if there are only prompts
        (VAE, text encoders, a guided pass of the base model)."""
        dtype = _DTYPES[self._config.data.vae_dtype]
        vae, (height, width) = self._vae.to(dtype), self._size
        rows = images_at_once(height * width)
        with torch.device("meta"):
            pixels = torch.empty(rows, 3, height, width, dtype=dtype)
        encoding = self._text_bytes(torch.float32) + _peak(self._card, vae, lambda: vae.encode(pixels))
        if not is_prompts_only(self._config.data.source):
            return encoding
        config = self._config
        rows = config.training.train_batch_size * passes_per_step(config.teacher.guidance_scale)
        _, drawing = self._unet_pass(rows, WEIGHT_DTYPES[config.training.mixed_precision])
        weights = sum(p.numel() * p.itemsize for p in vae.parameters())
        return max(encoding, weights + self._text_bytes(torch.float32) + drawing)

    def evaluate_bytes(self) -> int:
        """Bytes of drawing a batch of images: the pipeline's networks, and the larger of a guided pass and decoding."""
        options = self._config.evaluation
        dtype, rows = _DTYPES[options.dtype], options.batch_size
        unet, work = self._unet_pass(rows * passes_per_step(self._config.teacher.guidance_scale), dtype)
        decoding = self.decode_bytes(dtype)
        vae = sum(p.numel() for p in self._vae.parameters()) * vae_dtype(self._facts, dtype).itemsize
        weights = sum(p.numel() * p.itemsize for p in unet.parameters()) + self._text_bytes(dtype)
        return max(weights + decoding, vae + self._text_bytes(dtype) + work)

    def seconds_per_pass(self) -> float:
        """The least seconds of a pass of the bare network for one sample, at the evaluation's batch size."""
        options = self._config.evaluation
        _, _, done = self._traced_pass(options.batch_size, _DTYPES[options.dtype])
        return done.seconds / options.batch_size

    def _unet_pass(self, rows: int, dtype: torch.dtype) -> tuple[torch.nn.Module, int]:
        unet, peak, _ = self._traced_pass(rows, dtype)
        return unet, peak

    def _traced_pass(self, rows: int, dtype: torch.dtype) -> tuple[torch.nn.Module, int, Work]:
        """The bare U-Net, the peak of a pass of it, and its work."""
        options: dict[str, Any] = dict(self._facts.unet)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(options).to(dtype).eval().requires_grad_(False)
            hidden = torch.empty(rows, 77, int(options.get("cross_attention_dim", 768)), dtype=dtype)
            sample, timesteps = torch.empty(rows, *self._latent, dtype=dtype), torch.empty(rows)
            added = None
            if options.get("addition_embed_type") == "text_time":
                width = (
                    options["projection_class_embeddings_input_dim"] - 6 * options["addition_time_embed_dim"]
                )
                added = {
                    "text_embeds": torch.empty(rows, width, dtype=dtype),
                    "time_ids": torch.empty(rows, 6),
                }
        tracker = Tracker(self._card)
        tracker.hold(unet.parameters(), "weights")
        with torch.no_grad(), gpu_kernels(), tracker, torch.device("meta"):
            unet(sample, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added)
        return unet, tracker.peak, sum(tracker.work.values(), Work())

    def _text_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the text encoders' weights."""
        total = 0
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            options = dict(self._facts.configs[name])
            if options:
                with torch.device("meta"):
                    model = kind(CLIPTextConfig(**options))
                total += sum(p.numel() for p in model.parameters()) * dtype.itemsize
        return total


@torch.no_grad()
def _peak(card: Card, module: torch.nn.Module, run: Callable[[], object]) -> int:
    """Bytes of a module's weights and of a computation with it, at most at once."""
    tracker = Tracker(card)
    tracker.hold(module.parameters(), "weights")
    with gpu_kernels(), tracker:
        run()
    return tracker.peak
