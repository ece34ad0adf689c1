"""Names, formats and descriptions of the table's metrics, and the latent MSE."""

from collections.abc import Iterable

import torch

# In table order: title, format, which way is better, one sentence.
_TABLE = (
    ("fid_to_real", "FID to real", ".1f", "lower", "Frechet distance to real images."),
    (
        "fid_to_real_std",
        "its standard error",
        ".2g",
        "",
        "Standard error of FID, by a jackknife over 8 groups of images.",
    ),
    (
        "fid_to_teacher",
        "FID to teacher",
        ".2f",
        "lower",
        "Frechet distance to the teacher's images of the same prompts with other seeds: how well the teacher's look is "
        "kept. The teacher itself is at the floor.",
    ),
    (
        "fid_to_teacher_std",
        "its standard error",
        ".2g",
        "",
        "Standard error of FID, by a jackknife over 8 groups of images.",
    ),
    (
        "paired_fid_to_teacher",
        "paired FID to teacher",
        ".2f",
        "lower",
        "Frechet distance to the teacher's images of the same prompts and noise: how well the teacher's map from noise to "
        "image is kept. 0 for the teacher itself; meaningless for samplers that add noise.",
    ),
    (
        "patch_fid_to_real",
        "patch FID to real",
        ".1f",
        "lower",
        "FID of centre crops without resize: measures detail.",
    ),
    (
        "patch_fid_to_teacher",
        "patch FID to teacher",
        ".2f",
        "lower",
        "The same, to the teacher's images with other seeds.",
    ),
    ("kid_to_real", "KID to real", ".4g", "lower", "Kernel distance, unbiased at any number of images."),
    ("kid_to_real_std", "its deviation", ".2g", "", "Standard deviation of KID over subsets."),
    (
        "kid_to_teacher",
        "KID to teacher",
        ".4g",
        "lower",
        "Kernel distance to the teacher's images with other seeds.",
    ),
    ("kid_to_teacher_std", "its deviation", ".2g", "", "Standard deviation of KID over subsets."),
    ("cmmd_to_real", "CMMD to real", ".3f", "lower", "MMD to real images on CLIP embeddings."),
    (
        "cmmd_to_teacher",
        "CMMD to teacher",
        ".3f",
        "lower",
        "The same, to the teacher's images with other seeds.",
    ),
    (
        "fd_dinov2_to_real",
        "FD-DINOv2 to real",
        ".1f",
        "lower",
        "Frechet distance to real images on DINOv2 features.",
    ),
    (
        "fd_dinov2_to_teacher",
        "FD-DINOv2 to teacher",
        ".2f",
        "lower",
        "The same, to the teacher's images with other seeds.",
    ),
    ("precision", "precision", ".3f", "higher", "Share of images that lie among the real ones."),
    ("recall", "recall", ".3f", "higher", "Share of real images that lie among the drawn ones."),
    ("density", "density", ".3f", "higher", "How densely real images surround the drawn ones."),
    ("coverage", "coverage", ".3f", "higher", "Share of real images with a drawn one nearby."),
    (
        "prompt_accuracy",
        "prompt accuracy",
        ".3f",
        "higher",
        "Share of images whose letter, ink and paper match the prompt.",
    ),
    ("clip_score", "CLIP score", ".2f", "higher", "100 x cosine between image and prompt."),
    (
        "pickscore",
        "PickScore",
        ".2f",
        "higher",
        "PickScore's estimate of how people like the image for its prompt.",
    ),
    (
        "diversity",
        "diversity",
        ".2f",
        "one",
        "Mean distance between images of one prompt, divided by the teacher's.",
    ),
    (
        "latent_mse_to_teacher",
        "latent MSE to teacher",
        ".4f",
        "lower",
        "Mean squared error between final latents of the same prompts and noise; 0 for the teacher itself.",
    ),
    (
        "agreement",
        "agreement",
        ".3f",
        "higher",
        "Share of images that are read as the teacher's of the same prompt and noise are: letter, ink and paper, or with "
        "CLIP the nearest of the table's prompts. 1 for the teacher itself.",
    ),
    (
        "relations_kept",
        "relations kept",
        ".3f",
        "higher",
        "Rank correlation of the distances between pairs of images with those between the teacher's of the same noise: "
        "whether what is alike stays alike. 1 for the teacher itself.",
    ),
    (
        "colour_drift",
        "colour drift",
        ".1f",
        "lower",
        "Distance between mean colours and the teacher's, for the same noise, in grey levels.",
    ),
    (
        "contrast_drift",
        "contrast drift",
        "+.3f",
        "zero",
        "Standard deviation of luma, divided by the teacher's, minus 1.",
    ),
    (
        "sharpness_drift",
        "sharpness drift",
        "+.3f",
        "zero",
        "Variance of the Laplacian, divided by the teacher's, minus 1.",
    ),
)
METRICS = {
    key: {"title": title, "format": form, "better": better, "about": about}
    for key, title, form, better, about in _TABLE
}


BY_EXPERT = "accuracy_of_"
"""Keys of the metric of one of several teachers' prompts begin with this, and its name follows."""


def described(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The entries of METRICS for `keys`, in table order, followed by those of several teachers' prompts (keys
    accuracy_of_NAME), and by those of an outside scorer (keys score_NAME)."""
    occurring = set(keys)
    experts = {
        key: {
            "title": f"accuracy of {key.removeprefix(BY_EXPERT)}",
            "format": ".3f",
            "better": "higher",
            "about": "Share of images that show their prompt, of the prompts that this teacher is asked for.",
        }
        for key in sorted(occurring)
        if key.startswith(BY_EXPERT)
    }
    outside = sorted(key for key in occurring if key.startswith("score_"))
    known = {key: about for key, about in METRICS.items() if key in occurring}
    return (
        known
        | experts
        | {
            key: {
                "title": key.removeprefix("score_"),
                "format": ".3f",
                "better": "",
                "about": "Computed by evaluation.score_cmd.",
            }
            for key in outside
        }
    )


def latent_mse(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean squared error between final latents (N, C, h, w) that were drawn from the same noise."""
    return float((latents.double() - reference.double()).square().mean())
