"""The extractor that is trained on the run's images: it sees damage and lost classes, and is reproducible."""

import dataclasses

import pytest
import torch
from torch.nn.functional import avg_pool2d

from stepdistill.demo import letters
from stepdistill.evaluation.measure.distances import fid
from stepdistill.evaluation.measure.features import build_extractor, extract_features
from stepdistill.evaluation.measure.small_net import (
    DAMAGES,
    SIDES,
    SmallNet,
    TrainingSettings,
    damaged,
    read_small_net,
    side_for,
    train_small_net,
    write_small_net,
)
from tests.unit.test_sensitivity import rendered

N = 200


def damages(images):
    """Images with each kind of damage, in order of growing strength."""
    plain = images.float()
    grain = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    mixed = {share: share * plain + (1 - share) * plain.roll(7, 0) for share in (0.8, 0.5)}
    blurred = {k: avg_pool2d(plain, k, stride=1, padding=k // 2, count_include_pad=False) for k in (3, 7)}
    growing = {
        "blur": list(blurred.values()),
        "noise": [plain + strength * grain for strength in (25, 60)],
        "two at once": list(mixed.values()),
    }
    return {name: [x.round().clamp(0, 255).to(torch.uint8) for x in those] for name, those in growing.items()}


def distances(settings, folder):
    """FID to other images of the same kind, for undamaged images, each damage, and a third of the letters only."""
    triples = letters.sample_triples(N, seed=0)
    few = [dataclasses.replace(t, letter=t.letter % 8) for t in triples]
    net, accuracy = train_small_net(
        rendered(letters.sample_triples(400, seed=9), 9), rendered(triples[:100], 5), settings
    )
    write_small_net(folder, net, {})
    extractor = build_extractor(f"trained:{folder}")
    real, same = rendered(triples, 1), rendered(triples, 2)
    sets = {"same": [same], "lost letters": [rendered(few, 2)], **damages(same)}
    reference = extract_features([real], extractor, resize="pil_bicubic")
    fids = {
        name: [fid(reference, extract_features([x], extractor, resize="pil_bicubic")) for x in those]
        for name, those in sets.items()
    }
    return fids, accuracy


def check(fids, times):
    (floor,) = fids.pop("same")
    assert fids.pop("lost letters")[0] > times["lost letters"] * floor
    for name, grown in fids.items():
        assert floor < grown[0] < grown[1], (name, floor, grown)
        assert grown[1] > times[name] * floor, (name, floor, grown)


@pytest.mark.slow
def test_fid_grows_with_every_damage_after_short_training(tmp_path):
    fids, _ = distances(TrainingSettings(steps=40, batch_size=24), tmp_path)
    check(fids, {"lost letters": 2, "blur": 5, "noise": 1.8, "two at once": 4})


@pytest.mark.slow
def test_fid_grows_with_every_damage_and_unseen_images_are_recognised(tmp_path):
    fids, accuracy = distances(TrainingSettings(), tmp_path)
    check(fids, {"lost letters": 4, "blur": 50, "noise": 10, "two at once": 50})
    assert accuracy.among == 100
    assert accuracy.found_again > 0.7
    assert accuracy.damage_named > 2 / len(DAMAGES)


@pytest.mark.parametrize("side", SIDES)
def test_every_input_size_gives_128_features_and_small_images_are_not_enlarged_much(side):
    assert SmallNet(side)(torch.zeros(2, 3, side, side)).shape == (2, 128)
    assert side_for((side, side - 8)) == side
    assert side_for((768, 1024)) == 128


def test_the_same_images_give_a_bit_identical_net_and_global_randomness_is_unchanged(tmp_path):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    before = torch.get_rng_state()
    for name in ("first", "second"):
        net, _ = train_small_net(images[:30], images[30:], TrainingSettings(steps=3, batch_size=8))
        write_small_net(tmp_path / name, net, {"pictures": 30})
    assert torch.equal(before, torch.get_rng_state())
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    other, _ = train_small_net(images[:30], images[30:], TrainingSettings(steps=3, batch_size=8, seed=1))
    assert not torch.equal(other.trunk[0].weight, net.trunk[0].weight)


def test_a_stored_net_reads_back_and_a_damaged_one_is_refused(tmp_path):
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    net, _ = train_small_net(images, images, TrainingSettings(steps=1, batch_size=8))
    write_small_net(tmp_path, net, {})
    again, sha256 = read_small_net(tmp_path)
    extractor = build_extractor(f"trained:{tmp_path}")
    assert (extractor.sha256, extractor.input_size) == (sha256, 32)
    x = torch.rand(4, 3, 32, 32) * 255
    assert torch.equal(extractor(x), again(x / 127.5 - 1))
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"evaluation\.features: cannot read the trained extractor"):
        build_extractor(f"trained:{tmp_path}")
    with pytest.raises(ValueError, match="not as they were written"):
        build_extractor("trained:nowhere")


def test_every_damage_changes_only_its_own_images():
    batch = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kind, name in enumerate(DAMAGES):
        kinds = torch.zeros(12, dtype=torch.int64)
        kinds[::2] = kind
        result = damaged(batch, kinds, torch.Generator().manual_seed(1))
        assert torch.equal(result[1::2], batch[1::2])
        assert torch.equal(result[::2], batch[::2]) == (name == "none"), name
