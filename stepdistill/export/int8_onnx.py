"""The ONNX U-Net in 8 bits, by onnxruntime's own static quantiser: int8 weights with a scale per channel, uint8 activations.

The ranges of activations come from calibration: the student draws from noise with text embeddings of the run's cache, and
what the U-Net is given on the way is what it will be given when it is used. Products and convolutions are quantised, the
rest stays float32.

onnx-int8/unet.onnx    the quantised U-Net
onnx-int8/int8.json    its size and error beside the float32 file's
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from stepdistill.config import ConfigError
from stepdistill.data.cache import LatentCache
from stepdistill.disk.durable import whole_folder, write_sealed
from stepdistill.export.onnx_unet import FILE
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.rng import normal

FOLDER, ABOUT = "onnx-int8", "int8.json"
_CALIBRATED, _COMPARED = 64, 16
"""Images whose U-Net inputs give the ranges, and others whose inputs give the error."""
_BATCH = 8
_QUANTISED = ["Conv", "Gemm", "MatMul"]


def check_quantiser() -> None:
    """ConfigError if onnxruntime's quantiser is not installed."""
    if importlib.util.find_spec("onnxruntime.quantization") is None:
        raise ConfigError(
            "export.quantize: got int8, which needs onnxruntime with its quantization tools; fix: pip install "
            '"stepdistill[onnx]"'
        )


def write_int8(
    folder: Path,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    cache: LatentCache,
    *,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Writes a rung's onnx-int8/ from its onnx/.

    Args:
        folder: the rung's folder.
        unet: the U-Net of onnx/ in torch, in float32.
        scheduler: samples the student.
        cache: gives the text embeddings.
        steps: of the student.
        seed: of the noise.
    Returns the content of int8.json: {"bytes", "float32_bytes", "error"}. The error is the root mean square of the
    difference from float32's output, over that of the output, on inputs that were not calibrated with.
    """

    def inputs(first: int, count: int) -> Iterator[dict[str, Any]]:
        numbers = range(first, first + count)
        return _inputs(unet, scheduler, cache, steps=steps, seed=seed, numbers=numbers)

    source = folder / "onnx" / FILE
    with whole_folder(folder / FOLDER) as partial:
        _quantise(source, partial / FILE, inputs(0, _CALIBRATED))
        about = {
            "bytes": _bytes(partial),
            "float32_bytes": _bytes(source.parent),
            "error": _error(source, partial / FILE, inputs(_CALIBRATED, _COMPARED)),
        }
        write_sealed(partial / ABOUT, about)
    return about


def _bytes(folder: Path) -> int:
    """The size of the U-Net's file and of the file with its weights, if there is one."""
    return sum(file.stat().st_size for file in folder.glob(f"{FILE}*"))


def _quantise(source: Path, target: Path, inputs: Iterator[dict[str, Any]]) -> None:
    """Folds constants and infers shapes, as the quantiser expects, then quantises."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    is_large = any(source.parent.glob(f"{source.name}.data"))
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        prepared = Path(place) / source.name
        quant_pre_process(
            source,
            prepared,
            skip_symbolic_shape=True,
            save_as_external_data=is_large,
            all_tensors_to_one_file=True,
        )
        _quantise_prepared(prepared, target, inputs, is_large=is_large)


def _quantise_prepared(
    prepared: Path, target: Path, inputs: Iterator[dict[str, Any]], *, is_large: bool
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Inputs(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(inputs, None)

    quantize_static(
        prepared,
        target,
        Inputs(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # one bit less of the weights: without it, sums of products overflow on CPUs without VNNI instructions
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=_QUANTISED,
        use_external_data_format=is_large,
    )


@torch.no_grad()
def _inputs(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    cache: LatentCache,
    *,
    steps: int,
    seed: int,
    numbers: range,
) -> Iterator[dict[str, Any]]:
    """What the U-Net is given when the student draws these images, by the names in the ONNX file, as numpy arrays."""
    size = cache.commonest_size
    shape = cache.latent_shapes[size]
    for first in numbers[::_BATCH]:
        batch = [k % cache.sizes[size] for k in range(first, min(first + _BATCH, numbers.stop))]
        conditioning = cache.samples(size, batch).conditioning.to(torch.device("cpu"), torch.float32)
        sample = normal(shape, list(range(first, first + len(batch))), seed=seed, keys=("int8",))
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            named = _named(sample, timestep, conditioning)
            yield {name: tensor.numpy() for name, tensor in named.items()}
            added = conditioning.added_cond_kwargs or None
            output = unet(
                sample, timestep, conditioning.encoder_hidden_states, added_cond_kwargs=added
            ).sample
            sample = scheduler.step(output, timestep, sample).prev_sample


def _named(
    sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
) -> dict[str, torch.Tensor]:
    timesteps = timestep.to(torch.int64).expand(len(sample)).contiguous()
    inputs = {
        "sample": sample,
        "timestep": timesteps,
        "encoder_hidden_states": conditioning.encoder_hidden_states,
    }
    return {name: tensor.contiguous() for name, tensor in (inputs | conditioning.added_cond_kwargs).items()}


def _error(exact: Path, rounded: Path, inputs: Iterator[dict[str, Any]]) -> float:
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for path in (exact, rounded)
    ]
    wrong = whole = 0.0
    for named in inputs:
        right, near = (torch.from_numpy(session.run(None, named)[0]).double() for session in sessions)
        wrong, whole = wrong + float((near - right).square().sum()), whole + float(right.square().sum())
    return (wrong / whole) ** 0.5
