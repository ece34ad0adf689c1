"""training.channels_last changes how images lie in memory, and nothing else."""

import pytest
import torch

from stepdistill.data.prepare import prepare
from stepdistill.ladder import load_shared
from stepdistill.models.shared_network import STUDENT
from stepdistill.runtime import Runtime
from stepdistill.stages import open_run
from tests.conftest import randn
from tests.integration.conftest import tiny_config
from tests.unit.test_gradients import fill


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_outputs_and_gradients_are_equal_but_for_rounding(tmp_path, precision):
    config = tiny_config(tmp_path, f"training.mixed_precision={precision}")
    open_run(config)
    prepare(config)

    def outcome(config):
        shared = load_shared(config, Runtime(mixed_precision=precision))
        network = shared.network
        fill(network, STUDENT, 100)
        convolution = network.model.conv_in.weight
        row = shared.cache.unconditional.to(network.device, network.dtype)
        sample = randn(2, 4, shared.cache.smallest_side, shared.cache.smallest_side)
        with network.using(STUDENT):
            output = network.ask(sample, torch.tensor([900, 300]), row.rows(torch.tensor([0, 0])))
            output.square().mean().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in network.group(STUDENT).values()])
        return convolution, output.detach(), gradient

    plain = outcome(config)
    training = config.training.model_copy(update={"channels_last": True})
    other = outcome(config.model_copy(update={"training": training}))
    assert plain[0].is_contiguous()
    assert other[0].is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-4 if precision == "no" else 0.03
    for before, after in zip(plain[1:], other[1:], strict=True):
        assert float((after - before).norm() / before.norm()) < tolerance
