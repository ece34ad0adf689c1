"""Lower ranks by singular values, against closed forms and numpy."""

import numpy as np
import pytest
import torch

from stepdistill.export.rank import extract_lora, reduce_rank
from stepdistill.models.lora_file import Lora, LoraLayer


def random_layer(out, inside, rank, *, kernel=(), scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *[1] * len(kernel), generator=generator)
    return LoraLayer(torch.randn(rank, inside, *kernel, generator=generator), up, scale)


def of_singular_values(values, out=12, inside=9):
    """A layer whose product has these singular values."""
    left, _ = torch.linalg.qr(torch.randn(out, len(values), generator=torch.Generator().manual_seed(1)))
    right, _ = torch.linalg.qr(torch.randn(inside, len(values), generator=torch.Generator().manual_seed(2)))
    return LoraLayer(right.T, left * torch.tensor(values), 1.0)


def test_the_energy_kept_is_that_of_the_largest_singular_values():
    lora = Lora({"a": of_singular_values([4.0, 2.0, 1.0]), "b": of_singular_values([3.0, 3.0, 0.0])}, {})
    reduced = reduce_rank(lora, 1)
    assert reduced.energy_by_module == pytest.approx({"a": 16 / 21, "b": 9 / 18})
    assert reduced.energy_kept == pytest.approx(25 / 39)
    assert reduce_rank(lora, 2).energy_by_module["b"] == pytest.approx(1.0)


@pytest.mark.parametrize("layer", [random_layer(20, 14, 8, scale=0.3), random_layer(6, 5, 4, kernel=(3, 3))])
def test_the_reduced_layer_is_the_best_matrix_of_its_rank(layer):
    reduced = reduce_rank(Lora({"x": layer}, {"r": layer.rank, "use_rslora": True}), 3)
    result = reduced.lora.layers["x"]
    u, s, vh = np.linalg.svd(layer.delta().double().flatten(1).numpy(), full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    assert result.delta().shape == layer.delta().shape
    assert np.abs(result.delta().flatten(1).numpy() - best).max() < 1e-5
    assert (result.rank, result.scale) == (3, 1.0)
    config = reduced.lora.config
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)


def test_every_layer_gets_the_rank_even_if_its_matrix_has_a_lower_rank():
    lora = Lora({"small": random_layer(2, 9, 2), "large": random_layer(9, 9, 8)}, {})
    reduced = reduce_rank(lora, 4)
    assert {layer.rank for layer in reduced.lora.layers.values()} == {4}
    assert torch.allclose(reduced.lora.layers["small"].delta(), lora.layers["small"].delta(), atol=1e-5)


def test_a_rank_that_is_not_lower_is_refused():
    with pytest.raises(ValueError, match=r"export\.rank: got 4; allowed: below 4"):
        reduce_rank(Lora({"x": random_layer(9, 9, 4)}, {}), 4)


def test_a_lora_is_recovered_from_the_weights_that_it_was_merged_into():
    layers = {"line": random_layer(10, 8, 3), "conv": random_layer(6, 5, 3, kernel=(3, 3), seed=4)}
    base = {f"{name}.weight": torch.randn(layer.weight_shape) for name, layer in layers.items()}
    tuned = {f"{name}.weight": base[f"{name}.weight"] + layer.delta() for name, layer in layers.items()}
    extracted = extract_lora(base, tuned, layers, 3, {"peft_type": "LORA"})
    assert extracted.energy_kept == pytest.approx(1.0, abs=1e-9)
    for name, layer in layers.items():
        assert torch.allclose(extracted.lora.layers[name].delta(), layer.delta(), atol=1e-5)
    less = extract_lora(base, tuned, layers, 1, {})
    assert 0 < less.energy_kept < 0.95
    assert less.left_out == 0
    for weights, value in ((base, 0.0), (tuned, 2.0)):
        weights["norm.bias"] = torch.full((5,), value)
    with_others = extract_lora(base, tuned, layers, 3, {})
    changed = sum(float(layer.delta().double().square().sum()) for layer in layers.values())
    assert with_others.left_out == pytest.approx(20 / (20 + changed), rel=1e-5)
    assert with_others.energy_kept == pytest.approx(changed / (20 + changed), rel=1e-5)
