"""8 -> 4 -> 2 steps in one compiled pipeline: nothing is recompiled, and each rung draws what it draws when loaded alone."""

import pytest
import torch
from diffusers import DiffusionPipeline

from stepdistill.export.rung import export_rung
from stepdistill.sampling import load_few_step
from tests.integration.exported import rung_of, write_rung

PROMPT = "a red letter a"


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline(PROMPT, generator=generator, output_type="latent", height=32, width=32).images


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_rungs_are_swapped_without_compiling_again(tmp_path, backend):
    config, teacher, _ = rung_of(tmp_path, "sd15", steps=8)
    for steps in (4, 2):
        write_rung(config, teacher, steps, seed=steps)
    folders = [export_rung(config, steps) for steps in (8, 4, 2)]
    alone = []
    for folder in folders:
        pipeline = DiffusionPipeline.from_pretrained(teacher)
        load_few_step(pipeline, folder)
        alone.append(draw(pipeline))
    torch._dynamo.reset()
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    load_few_step(pipeline, folders[0])
    pipeline.unet.compile(backend=backend, fullgraph=True)
    assert torch.allclose(draw(pipeline), alone[0], atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for folder, expected in zip(folders[1:], alone[1:], strict=True):
            load_few_step(pipeline, folder, hotswap=True)
            assert torch.allclose(draw(pipeline), expected, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    assert not torch.allclose(alone[1], alone[2], atol=1e-2)
