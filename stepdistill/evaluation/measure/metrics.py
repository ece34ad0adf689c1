"""What the table's metrics are called, how they are shown, and those that are one line of their own."""

from collections.abc import Iterable

import torch

# In table order: title, format, which way is better, one sentence.
_TABLE = (
    ("fid_to_real", "FID to real", ".1f", "lower", "Frechet distance to real images."),
    ("fid_to_real_std", "its standard error", ".2g", "", "By a jackknife over 8 groups of images."),
    (
        "fid_to_teacher",
        "FID to teacher",
        ".2f",
        "lower",
        "Frechet distance to the teacher's images of the same prompts from other seeds: how well its look is kept. "
        "The teacher itself is at the floor.",
    ),
    ("fid_to_teacher_std", "its standard error", ".2g", "", "By a jackknife over 8 groups of images."),
    (
        "paired_fid_to_teacher",
        "paired FID to teacher",
        ".2f",
        "lower",
        "Frechet distance to the teacher's images of the same prompts and noise: how well its map from noise to image is "
        "kept. 0 for the teacher itself; of no meaning for samplers that add noise of their own.",
    ),
    ("patch_fid_to_real", "patch FID to real", ".1f", "lower", "FID of centre crops without resize: detail."),
    (
        "patch_fid_to_teacher",
        "patch FID to teacher",
        ".2f",
        "lower",
        "Centre crops against the teacher's of other seeds.",
    ),
    ("kid_to_real", "KID to real", ".4g", "lower", "Kernel distance, unbiased at any number of images."),
    ("kid_to_real_std", "its deviation", ".2g", "", "Standard deviation of KID over subsets."),
    ("kid_to_teacher", "KID to teacher", ".4g", "lower", "Kernel distance to the teacher's of other seeds."),
    ("kid_to_teacher_std", "its deviation", ".2g", "", "Standard deviation of KID over subsets."),
    ("cmmd_to_real", "CMMD to real", ".3f", "lower", "MMD of CLIP embeddings to real images."),
    ("cmmd_to_teacher", "CMMD to teacher", ".3f", "lower", "The same to the teacher's of other seeds."),
    ("fd_dinov2_to_real", "FD-DINOv2 to real", ".1f", "lower", "Frechet distance on DINOv2 features."),
    (
        "fd_dinov2_to_teacher",
        "FD-DINOv2 to teacher",
        ".2f",
        "lower",
        "The same to the teacher's of other seeds.",
    ),
    ("precision", "precision", ".3f", "higher", "Share of images that lie among the real ones."),
    ("recall", "recall", ".3f", "higher", "Share of real images that lie among the drawn ones."),
    ("density", "density", ".3f", "higher", "How deep among the real ones images lie."),
    ("coverage", "coverage", ".3f", "higher", "Share of real images with a drawn one near."),
    ("prompt_accuracy", "prompt accuracy", ".3f", "higher", "Letter, ink and paper all as the prompt says."),
    ("clip_score", "CLIP score", ".2f", "higher", "100 x cosine between image and prompt."),
    ("diversity", "diversity", ".2f", "one", "Spread over seeds, as a share of the teacher's."),
    (
        "latent_mse_to_teacher",
        "latent MSE to teacher",
        ".4f",
        "lower",
        "Between final latents of the same prompts and noise; 0 for the teacher itself.",
    ),
    (
        "colour_drift",
        "colour drift",
        ".1f",
        "lower",
        "Distance of mean colours to the teacher's at equal noise, grey levels.",
    ),
    ("contrast_drift", "contrast drift", "+.3f", "zero", "Luma deviation over the teacher's, minus 1."),
    ("sharpness_drift", "sharpness drift", "+.3f", "zero", "Laplacian variance over the teacher's, minus 1."),
)
METRICS = {
    key: {"title": title, "format": form, "better": better, "about": about}
    for key, title, form, better, about in _TABLE
}


def described(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """METRICS of the keys that occur, in table order; an outside scorer's follow under their own names."""
    occurring = set(keys)
    outside = sorted(key for key in occurring if key.startswith("score_"))
    return {key: about for key, about in METRICS.items() if key in occurring} | {
        key: {"title": key.removeprefix("score_"), "format": ".3f", "better": "", "about": "By score_cmd."}
        for key in outside
    }


def latent_mse(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean squared error between final latents (N, C, h, w) from equal noise."""
    return float((latents.double() - reference.double()).square().mean())
