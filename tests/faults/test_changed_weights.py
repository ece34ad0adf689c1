"""A teacher whose weights files change after `prepare` checked them is refused when it is loaded."""

import shutil

import pytest

from stepdistill.config import ConfigError
from stepdistill.models.network.kind import load_network
from stepdistill.teacher.loading import load_encoders, load_pipeline, load_vae
from tests.faults.hostile_folders import TEXT, UNET, VAE, retyped, with_another_weight, without

LOADERS = {
    "text encoder, pipeline": (TEXT, load_pipeline),
    "text encoder, to encode": (TEXT, load_encoders),
    "VAE, pipeline": (VAE, load_pipeline),
    "VAE, alone": (VAE, load_vae),
    "U-Net, pipeline": (UNET, load_pipeline),
    "U-Net, alone": (UNET, load_network),
}
CHANGES = {
    "lacks 1 of": without("bias"),
    "has no place, first extra.weight": with_another_weight,
}


@pytest.mark.parametrize("says", CHANGES)
@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_or_additional_weight_is_named(name, says, tiny_teacher, tmp_path):
    """transformers would fill the missing weight with random numbers, and leave out the additional one."""
    file, load = LOADERS[name]
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    retyped(file, CHANGES[says])(tmp_path / "teacher")
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path / "teacher")
    assert "\n" not in str(caught.value)
