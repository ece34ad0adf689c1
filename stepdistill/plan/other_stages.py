"""The memory of what a run does besides training: previews, encoding the data, and drawing the images of the table."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL

from stepdistill.config import RunConfig
from stepdistill.data.buckets import Sizes
from stepdistill.data.encode import images_at_once
from stepdistill.data.records import is_prompts_only
from stepdistill.diffusion.grid import passes_per_step
from stepdistill.models.network.encode import prompts_at_once
from stepdistill.models.network.kind import build_network, kind_of_facts
from stepdistill.plan.cards import Card
from stepdistill.plan.tracker import Tracker, Work, gpu_kernels
from stepdistill.runtime import WEIGHT_DTYPES
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.fingerprints import TEXT_ENCODERS
from stepdistill.teacher.loading import vae_dtype
from stepdistill.teacher.weights import build_part

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
        dtype, text_dtype = (
            _DTYPES[name] for name in (self._config.data.vae_dtype, self._config.data.text_dtype)
        )
        vae, (height, width) = self._vae.to(dtype), self._size
        rows = images_at_once(height * width)
        with torch.device("meta"):
            pixels = torch.empty(rows, 3, height, width, dtype=dtype)
        encoding = self._text_bytes(text_dtype)
        encoding += max(_peak(self._card, vae, lambda: vae.encode(pixels)), self._hidden_bytes(text_dtype))
        if not is_prompts_only(self._config.data.source):
            return encoding
        config = self._config
        rows = config.training.train_batch_size * passes_per_step(config.teacher.guidance_scale)
        _, drawing = self._network_pass(rows, WEIGHT_DTYPES[config.training.mixed_precision])
        weights = sum(p.numel() * p.itemsize for p in vae.parameters())
        return max(encoding, weights + self._text_bytes(text_dtype) + drawing)

    def evaluate_bytes(self) -> int:
        """Bytes of drawing a batch of images: the pipeline's networks, and the larger of a guided pass and decoding."""
        options = self._config.evaluation
        dtype, rows = _DTYPES[options.dtype], options.batch_size
        network, work = self._network_pass(rows * passes_per_step(self._config.teacher.guidance_scale), dtype)
        decoding = self.decode_bytes(dtype)
        vae = sum(p.numel() for p in self._vae.parameters()) * vae_dtype(self._facts, dtype).itemsize
        weights = sum(p.numel() * p.itemsize for p in network.parameters()) + self._text_bytes(dtype)
        return max(weights + decoding, vae + self._text_bytes(dtype) + work)

    def seconds_per_pass(self) -> float:
        """The least seconds of a pass of the bare network for one sample, at the evaluation's batch size."""
        options = self._config.evaluation
        _, _, done = self._traced_pass(options.batch_size, _DTYPES[options.dtype])
        return done.seconds / options.batch_size

    def _network_pass(self, rows: int, dtype: torch.dtype) -> tuple[torch.nn.Module, int]:
        network, peak, _ = self._traced_pass(rows, dtype)
        return network, peak

    def _traced_pass(self, rows: int, dtype: torch.dtype) -> tuple[torch.nn.Module, int, Work]:
        """The bare network, the peak of a pass of it, and its work."""
        kind = kind_of_facts(self._facts)
        with torch.device("meta"):
            network = build_network(self._facts).to(dtype)
            conditioning = kind.random_conditioning(self._facts, rows, dtype=dtype)
            sample, timesteps = torch.empty(rows, *self._latent, dtype=dtype), torch.empty(rows)
        tracker = Tracker(self._card)
        tracker.hold([*network.parameters(), *network.buffers()], "weights")
        with torch.no_grad(), gpu_kernels(), tracker, torch.device("meta"):
            kind.ask(network, sample, timesteps, conditioning)
        return network, tracker.peak, sum(tracker.work.values(), Work())

    def _text_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the text encoders' weights."""
        with torch.device("meta"):
            models = [build_part(self._facts, name) for name in TEXT_ENCODERS if self._facts.configs[name]]
        return sum(p.numel() for model in models for p in model.parameters()) * dtype.itemsize

    def _hidden_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the hidden states of all layers, which a language model keeps while it encodes prompts."""
        if not self._facts.layout.is_chat:
            return 0
        text, rows = self._facts.configs["text_encoder"], prompts_at_once(self._facts.pipeline_class)
        each = (int(text["num_hidden_layers"]) + 1) * int(text["hidden_size"])
        return rows * self._facts.text_tokens * each * dtype.itemsize


@torch.no_grad()
def _peak(card: Card, module: torch.nn.Module, run: Callable[[], object]) -> int:
    """Bytes of a module's weights and of a computation with it, at most at once."""
    tracker = Tracker(card)
    tracker.hold(module.parameters(), "weights")
    with gpu_kernels(), tracker:
        run()
    return tracker.peak
