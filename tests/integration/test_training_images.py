"""Drawing images during training takes little memory: one is decoded at a time, and no encoder is kept in memory."""

import gc
import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from stepdistill import stages
from stepdistill.ladder import load_shared
from stepdistill.runtime import Runtime
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.loading import load_vae, vae_dtype
from stepdistill.training.painter import Painter, decode_latents
from tests.conftest import randn
from tests.integration.conftest import student_of, tiny_config


@pytest.fixture
def vae():
    return load_vae(embedded_folder("teacher"))


def calls_of(module):
    """(rows, dtype, device) of the first argument of every call of a module, filled as it is called."""
    calls = []

    def note(_module, args):
        calls.append((len(args[0]), args[0].dtype, args[0].device.type))

    module.register_forward_pre_hook(note)
    return calls


def test_decoding_one_image_at_a_time_equals_decoding_all_together(vae):
    latents = randn(3, 4, 8, 8, seed=1)
    with torch.no_grad():
        together = vae.decode(latents / vae.config.scaling_factor).sample
    calls = calls_of(vae.decoder)
    images = decode_latents(vae, latents)
    assert calls == [(1, torch.float32, "cpu")] * 3
    assert images.dtype == torch.uint8
    exact = ((together + 1) * 127.5).clamp(0, 255)
    rounding = 0.5 + 1e-3  # of the same numbers, up to the kernels' last digits
    assert (images - exact).abs().max() < rounding


def test_the_vae_stays_on_the_cpu_while_another_device_decodes(vae):
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    calls = calls_of(vae.decoder)
    with pytest.raises(NotImplementedError, match="meta"):  # a meta tensor has no data to bring back
        decode_latents(vae, torch.empty(3, 4, 8, 8, device="meta"))
    assert calls == [(1, torch.float32, "meta")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"force_upcast": True}, torch.float32), ({}, torch.float32), ({"force_upcast": False}, torch.float16)],
)
def test_a_vae_decodes_in_half_precision_only_if_its_config_allows_it(tmp_path, config, expected):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert vae_dtype(TeacherFacts.of_folder(tmp_path), torch.float16) == expected


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What the rungs share, and the models alive, after `prepare` in the same process with the garbage collector off."""
    config = tiny_config(tmp_path_factory.mktemp("shared"))
    models = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel)
    # a list keeps these objects alive, so that no new object gets the id of an old one
    before = [o for o in gc.get_objects() if isinstance(o, models)]
    gc.disable()
    try:
        stages.prepare(config)
        shared = load_shared(config, Runtime())
        ids_before = set(map(id, before))
        alive = [type(o) for o in gc.get_objects() if isinstance(o, models) and id(o) not in ids_before]
    finally:
        gc.enable()
    return shared, alive


def test_no_encoder_of_prepare_is_alive_while_the_ladder_trains(shared):
    _, alive = shared
    assert sorted(kind.__name__ for kind in alive) == ["AutoencoderKL", "UNet2DConditionModel"]


def test_drawing_gives_the_unet_no_more_rows_than_training(shared, vae):
    shared, _ = shared
    conditioning = shared.cache.samples((32, 32), [0, 1, 2]).conditioning
    noise = randn(3, *shared.cache.latent_shapes[32, 32], seed=2)
    calls = calls_of(shared.network.model)
    drawn = {}
    for batch_size in (2, 3):
        calls.clear()
        painter = Painter(vae, batch_size)
        teacher = painter.draw(shared.undistilled, noise, conditioning, steps=2)
        assert max(rows for rows, *_ in calls) == 2 * batch_size  # guidance needs two rows per sample
        calls.clear()
        drawn[batch_size] = teacher, painter.draw(student_of(shared), noise, conditioning, steps=1)
        assert max(rows for rows, *_ in calls) == batch_size
    for few, many in zip(*drawn.values(), strict=True):
        assert (few.int() - many.int()).abs().max() <= 1
