"""Tiny real classes that the tests share."""

import fcntl
import os
import shutil
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as a shell without job control sets it in the background; the programs that the tests start would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from diffusers import UNet2DConditionModel

from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.models.network.conditioning import Conditioning


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow the tests that are slow_after_first, with all parameters but the first."""
    fast = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if item.get_closest_marker("slow_after_first") and item.get_closest_marker("slow") is None:
            if test in fast:
                item.add_marker("slow")
            fast.add(test)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function (name, make) -> folder: what `make(folder)` puts into it, made by the first of the test processes that asks
    and copied by each, which may then change its copy."""

    def copied(name, make):
        own = tmp_path_factory.getbasetemp()
        shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
        folder, is_made = shared / f"{name}-once", shared / f"{name}-once.made"
        with (shared / f"{name}-once.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made.exists():
                make(folder)
                is_made.touch()
        return shutil.copytree(folder, tmp_path_factory.mktemp(name), dirs_exist_ok=True)

    return copied


def build_tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """Two levels, cross-attention in both the second level and the mid-block, about 200,000 parameters."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return unet.eval().requires_grad_(False)


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    return build_tiny_unet()


@pytest.fixture
def noise_path() -> VariancePreserving:
    """Stable Diffusion's noise schedule."""
    return VariancePreserving.from_betas(
        make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    )


def ends_of(noise_path, timesteps: torch.Tensor, student_steps: int) -> torch.Tensor:
    """The timestep (B,) at which one move of the student from each of `timesteps` (B,) ends."""
    return torch.tensor(noise_path.jump(timesteps.tolist(), student_steps))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_conditioning(batch: int, seed: int = 5) -> Conditioning:
    return Conditioning(randn(batch, 6, 16, seed=seed))
