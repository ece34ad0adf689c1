"""The tracker of operations and memory, against closed forms."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stepdistill.plan.cards import CARDS, card_of, nearest_card
from stepdistill.plan.tracker import Tracker, gpu_kernels

H100 = CARDS["h100"]


def meta(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


def only(tracker):
    (work,) = tracker.work.values()
    return work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_product_has_its_known_arithmetic_and_traffic(dtype):
    a, b = meta(64, 128, dtype=dtype), meta(128, 256, dtype=dtype)
    with Tracker(H100) as tracker:
        _ = a @ b
    work = only(tracker)
    assert (work.kernels, work.flop) == (1, 2 * 64 * 128 * 256)
    assert work.moved == dtype.itemsize * (64 * 128 + 128 * 256 + 64 * 256)
    assert work.cast == 0


def test_the_time_of_a_kernel_is_its_largest_bound():
    assert H100.seconds(0, 0, is_half=True) == 4e-6
    assert H100.seconds(0.7 * 989e12, 0, is_half=True) == pytest.approx(1)
    assert H100.seconds(0.7 * 67e12, 0, is_half=False) == pytest.approx(1)
    assert H100.seconds(0, 0.85 * 3.35e12, is_half=False) == pytest.approx(1)


def test_live_memory_rises_and_falls_with_the_tensors():
    kib = 256  # float32 elements
    with Tracker(H100) as tracker:
        a = meta(4 * kib)
        b = a + 1
        assert tracker.now == 8 * 1024
        view = b.view(2, -1)
        assert tracker.now == 8 * 1024
        del b
        assert tracker.now == 8 * 1024  # the view holds the storage
        del view
        assert tracker.now == 4 * 1024
        assert tracker.peak == 8 * 1024
        tracker.reset_peak()
        c = meta(1)
        assert tracker.peak == tracker.now == 4 * 1024 + 512  # CUDA's smallest block
        del a, c
    assert tracker.now == 0


def test_memory_that_was_there_before_belongs_to_its_part():
    weight = meta(1024, dtype=torch.bfloat16)
    tracker = Tracker(H100)
    tracker.hold([weight, weight.view(2, -1)], "weights")
    tracker.hold_bytes(512, "elsewhere")
    with tracker:
        _ = weight + 1
    assert tracker.peak_parts == {"weights": 2048, "elsewhere": 512, "all": 2048}


def mlp(x, weights):
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x


def test_autograd_keeps_each_layers_output_and_checkpointing_one_layers():
    """A layer's output is kept for tanh's backward pass, its input for the product's: one tensor per layer."""
    layers, size = 8, 64 * 1024
    one = size * 4

    def peak(checkpointed):
        x = meta(64, 1024, requires_grad=True)
        weights = [meta(1024, 1024) for _ in range(layers)]
        tracker = Tracker(H100)
        tracker.hold([x, *weights], "before")
        with tracker:
            y = x
            for weight in weights:
                y = checkpoint(mlp, y, [weight], use_reentrant=False) if checkpointed else mlp(y, [weight])
            kept = tracker.now - tracker.peak_parts["before"]
            y.sum().backward()
        return kept, tracker.peak - tracker.peak_parts["before"]

    kept, most = peak(False)
    assert kept == layers * one
    assert kept < most <= kept + 4 * one
    kept, most = peak(True)
    assert (
        kept == layers * one
    )  # each segment's input, which is the output of the one before, and the last output
    assert most <= kept + 5 * one


def test_repeated_operations_have_the_same_results_as_the_first():
    """From the second time on, the shape of a result comes from a table."""

    def run():
        x = meta(2, 8, 16, 16, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = meta(4, 8, 3, 3, dtype=torch.bfloat16)
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        z = torch.nn.functional.group_norm(y.float(), 2)
        return [(t.shape, t.stride(), t.dtype) for t in (x, y, z)]

    expected = run()
    with Tracker(H100) as first:
        assert run() == expected
    with Tracker(H100) as second:
        assert run() == expected
    assert only(first) == only(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_one_kernel_without_a_matrix_of_tokens(dtype):
    q = meta(1, 8, 4096, 64, dtype=dtype, requires_grad=True)
    with gpu_kernels(), Tracker(H100) as tracker:
        output = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        forward = only(tracker)
        output.sum().backward()
    assert output.shape == q.shape
    assert forward.kernels == 1
    assert forward.flop == 4 * 8 * 4096 * 4096 * 64
    assert tracker.peak < 8 * 4096 * 4096  # bytes of a matrix of tokens, if an element had one byte


def test_an_adam_step_is_one_kernel():
    weight = torch.nn.Parameter(meta(1000))
    weight.grad = torch.zeros_like(weight)
    with gpu_kernels():
        optimizer = torch.optim.Adam([weight], fused=True)
        optimizer.step()
        with Tracker(H100) as tracker:
            optimizer.step()
    work = only(tracker)
    assert work.kernels == 2  # and the count of steps
    # reads weight, gradient and two moments, and writes them: the gradient too, which a kernel with a loss scale changes
    assert work.moved == pytest.approx(8 * 4000, rel=0.01)
    assert tracker.peak <= 512


def test_cards_by_name_and_by_size():
    assert card_of("H100") == card_of("NVIDIA h100") == CARDS["h100"]
    assert card_of("rtx-4090") == card_of("GeForce RTX 4090") == CARDS["rtx4090"]
    assert card_of("A100 40GB") == CARDS["a100-40gb"]
    by_size = card_of("24 GB")
    assert by_size == card_of("24")
    assert (by_size.memory_gib, by_size.half) == (24, CARDS["rtx4090"].half)
    assert card_of("20GiB").half == CARDS["rtx4080"].half  # of two sizes that are as near, the smaller
    here = nearest_card("NVIDIA GeForce RTX 3090", 23.7)
    assert (here.memory_gib, here.half) == (23.7, CARDS["rtx3090"].half)
    assert nearest_card("NVIDIA A100-SXM4-40GB", 39.4).bandwidth == CARDS["a100-40gb"].bandwidth
    assert nearest_card("Some New Card", 80).half == CARDS["h100"].half


@pytest.mark.parametrize("text", ["", "gpu", "0GB", "-1GB", "0", "24TB", "x" * 9999])
def test_an_unknown_card_is_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match=r"--gpu: got .*; allowed: h100, .* or a size such as 24GB"):
        card_of(text)
