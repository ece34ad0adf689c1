"""Which models can be distilled, by their names."""

import pytest

from stepdistill.teacher.layouts import base_of_distilled


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("/models/Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
        ("/models/z_image_turbo_bf16.safetensors", "Tongyi-MAI/Z-Image"),
        ("sd_xl_turbo_1.0_fp16.safetensors", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("~/sd3.5_large_turbo.safetensors", "stabilityai/stable-diffusion-3.5-large"),
        ("/hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/0123", "Tongyi-MAI/Z-Image"),
        ("/hub/models--Tongyi-MAI--Z-Image/snapshots/0123", None),
        ("/models/Z-Image-De-Turbo", None),
        ("/turbo/sdxl", None),
        ("letters", None),
    ],
)
def test_a_distilled_model_is_known_by_its_name_wherever_it_lies(path, base):
    assert base_of_distilled(path) == base
