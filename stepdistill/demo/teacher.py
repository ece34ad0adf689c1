"""Trains the embedded teacher: a complete but small StableDiffusionPipeline, trained from scratch on the letters world.

The parts are small instances of the usual classes: AutoencoderKL (latents 4 x 8 x 8), CLIPTokenizer and CLIPTextModel, and
a UNet2DConditionModel that predicts epsilon under Stable Diffusion's scaled_linear noise schedule.
`pipelines/train_teacher.py` trains the reader, the VAE and the U-Net in this order and writes the folder that the package
ships.
"""

import copy
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepdistill.demo.letters import (
    IMAGE_SIZE,
    INKS,
    LETTERS,
    PAPERS,
    WORLD,
    Style,
    render_at,
    sample_triples,
)
from stepdistill.demo.reader import OF_LETTERS, Questions, Reader

logger = logging.getLogger(__name__)

MAX_TOKENS = 10
TEXT_WIDTH = 64
CAPTION_DROPOUT = 0.1


def rendered_batch(num_images: int, *, seed: int, style: Style = WORLD) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 3, 32, 32) and int64 triples (N, 3): letter, ink, paper."""
    triples = sample_triples(num_images, seed=seed)
    images = np.stack(
        [np.asarray(render_at(t, seed=seed, index=i, style=style)) for i, t in enumerate(triples)]
    )
    labels = torch.tensor([[t.letter, t.ink, t.paper] for t in triples])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


WORDS = ("a", "letter", "on", *INKS, *PAPERS, *(letter.lower() for letter in LETTERS))
"""Of the captions."""


def build_tokenizer(words: Sequence[str] = WORDS, *, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges give one token per word of the captions; other words become several tokens."""
    alphabet = [chr(code) for code in range(33, 127)]
    vocab = {token: index for index, token in enumerate([*alphabet, *(f"{char}</w>" for char in alphabet)])}
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for earlier in merges:
            pieces = _apply_merge(pieces, earlier)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges.append(pair)
            vocab.setdefault(pair[0] + pair[1], len(vocab))
            pieces = _apply_merge(pieces, pair)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def _apply_merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIPTextModel with 2 layers."""
    return CLIPTextModel(text_config(tokenizer, layers=2))


def text_config(tokenizer: CLIPTokenizer, *, layers: int) -> CLIPTextConfig:
    """Of a text encoder of width TEXT_WIDTH, for sequences as long as the tokenizer's."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_vae(image_size: int = IMAGE_SIZE) -> AutoencoderKL:
    """An AutoencoderKL with widths (24, 48, 48): S x S pixels <-> latents 4 x S/4 x S/4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=image_size,
    )


WIDTHS = (64, 128)


def build_unet(widths: tuple[int, int] = WIDTHS) -> UNet2DConditionModel:
    """A UNet2DConditionModel of these widths; cross-attention only at the 4 x 4 level, which keeps CPU steps short."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def build_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """A DDIMScheduler with Stable Diffusion's betas, trailing timesteps and no clipping."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )


def _batches(size: int, batch_size: int, *, generator: torch.Generator) -> Iterator[torch.Tensor]:
    while True:
        order = torch.randperm(size, generator=generator)
        for start in range(0, size - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _train(
    name: str,
    modules: list[nn.Module],
    loss_at: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    decay_steps: int | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Minimises `loss_at(step)` by AdamW with 100 steps of warm-up and cosine decay to 2 % of the learning rate.

    decay_steps: of the decay; default: `steps`. A longer one is stopped on the way.
    """
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min((step + 1) / 100, 1.0) * (0.02 + 0.49 * (1 + np.cos(np.pi * step / (decay_steps or steps))))
        ),
    )
    started = time.monotonic()
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step)
        if step % 100 == 0 or step == steps - 1:
            logger.info(
                "%s %d/%d loss %.4f %.0f s", name, step, steps, loss.item(), time.monotonic() - started
            )


def train_reader(
    images: torch.Tensor, labels: torch.Tensor, *, steps: int, seed: int, questions: Questions = OF_LETTERS
) -> Reader:
    """Trains a reader by cross-entropy on its questions; images uint8 (N, 3, S, S), labels int64 (N, questions)."""
    torch.manual_seed(seed)
    reader = Reader(questions)
    batches = _batches(len(images), 64, generator=torch.Generator().manual_seed(seed))

    def loss_at(step: int) -> torch.Tensor:
        rows = next(batches)
        logits = reader.logits(images[rows])
        return sum(
            (nn.functional.cross_entropy(head, labels[rows, k]) for k, head in enumerate(logits)),
            start=torch.zeros(()),
        )

    _train("reader", [reader], loss_at, steps=steps, learning_rate=2e-3)
    return reader.eval()


def train_vae(images: torch.Tensor, *, steps: int, seed: int) -> AutoencoderKL:
    """Trains the VAE by L1 + MSE reconstruction and 1e-4 times the KL per latent element; sets scaling_factor to 1 / std."""
    torch.manual_seed(seed)
    vae = build_vae(images.shape[-1])
    batches = _batches(len(images), 32, generator=torch.Generator().manual_seed(seed))
    noise = torch.Generator().manual_seed(seed + 1)

    def loss_at(step: int) -> torch.Tensor:
        pixels = images[next(batches)].float() / 127.5 - 1.0
        posterior = vae.encode(pixels).latent_dist
        reconstruction = vae.decode(posterior.sample(generator=noise)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = reconstruction - pixels
        return error.abs().mean() + error.square().mean() + 1e-4 * kl

    _train("vae", [vae], loss_at, steps=steps, learning_rate=2e-3)
    vae.eval().requires_grad_(False)
    latents = encode_images(vae, images[:4096], scaling_factor=1.0)
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor, *, scaling_factor: float) -> torch.Tensor:
    """uint8 (N, 3, S, S) -> scaled posterior means (N, 4, S/4, S/4)."""
    parts = [vae.encode(chunk.float() / 127.5 - 1.0).latent_dist.mean for chunk in images.split(256)]
    return torch.cat(parts) * scaling_factor


def train_unet(
    latents: torch.Tensor,
    captions: Sequence[str],
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    seed: int,
    widths: tuple[int, int] = WIDTHS,
    device: torch.device | str = "cpu",
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trains U-Net and text encoder together by epsilon MSE; returns their exponential moving averages, on the CPU.

    10 % of the captions are dropped, for classifier-free guidance.
    """
    torch.manual_seed(seed)
    unet, text_encoder = build_unet(widths).to(device), build_text_encoder(tokenizer).to(device)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample

    encoded = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    modules: list[nn.Module] = [unet, text_encoder]
    return train_denoiser(modules, predict, latents, encoded, updates=Updates(steps, seed))


def target_of(
    prediction_type: str, original: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """What a denoiser is to predict: epsilon, or v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0."""
    if prediction_type == "epsilon":
        return noise
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * original


@dataclass(frozen=True)
class Updates:
    """How many updates are made, of how many images, from which seed. The learning rate decays over decay_steps, by default
    over all updates; a longer decay is stopped on the way."""

    steps: int
    seed: int
    batch_size: int = 64
    decay_steps: int | None = None


Noising = Callable[
    [torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]
"""From latents and noise, both (B, C, H, W), and a source of random numbers: noisy latents, timesteps (B,), the target."""


def noised_by_diffusion(
    original: torch.Tensor,
    noise: torch.Tensor,
    generator: torch.Generator,
    *,
    prediction_type: str = "epsilon",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A Noising of Stable Diffusion's schedule at uniform timesteps; the target is epsilon, or v (Salimans and Ho, arXiv
    2202.00512, appendix D)."""
    timesteps = torch.randint(0, 1000, (len(original),), generator=generator)
    alpha_bar = build_scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * original + (1 - alpha_bar).sqrt() * noise
    return noisy, timesteps, target_of(prediction_type, original, noise, alpha_bar)


def train_denoiser(
    modules: Sequence[nn.Module],
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    encoded: torch.Tensor,
    *,
    updates: Updates,
    noised: Noising = noised_by_diffusion,
) -> Any:
    """Trains the modules of a denoiser together by MSE; returns their exponential moving averages, on the CPU.

    Args:
        modules: all on one device.
        predict: from noisy latents, timesteps (B,) and tokens (B, L) to the prediction, of the latents' shape.
        latents: (N, C, H, W), not noisy.
        encoded: int64 (N + 1, L), the tokens of each image's caption, and last those of the empty one, which takes the
            place of 10 % of the captions.
        noised: draws timesteps, and gives noisy latents and what is to be predicted from them.
    """
    device = next(modules[0].parameters()).device
    generator = torch.Generator().manual_seed(updates.seed)
    batches = _batches(len(latents), updates.batch_size, generator=generator)

    def loss_at(_step: int) -> torch.Tensor:
        rows = next(batches)
        ids = encoded[rows].clone()
        ids[torch.rand(len(rows), generator=generator) < CAPTION_DROPOUT] = encoded[-1]
        original = latents[rows]
        noise = torch.randn(original.shape, generator=generator)
        noisy, timesteps, target = noised(original, noise, generator)
        predicted = predict(noisy.to(device), timesteps.to(device), ids.to(device))
        return nn.functional.mse_loss(predicted, target.to(device))

    average = [copy.deepcopy(module).eval().requires_grad_(False) for module in modules]
    _train(
        "unet",
        list(modules),
        loss_at,
        steps=updates.steps,
        decay_steps=updates.decay_steps,
        learning_rate=1e-3,
        after_step=functools.partial(_average, average, modules),
    )
    return tuple(module.cpu() for module in average)


@torch.no_grad()
def _average(average: Sequence[nn.Module], modules: Sequence[nn.Module], step: int) -> None:
    """Moves the average towards the modules, by a thousandth or, in the first steps, by more."""
    decay = min(0.999, (1 + step) / (10 + step))
    for mean, module in zip(average, modules, strict=True):
        for target, source in zip(mean.parameters(), module.parameters(), strict=True):
            target.lerp_(source.detach(), 1 - decay)
