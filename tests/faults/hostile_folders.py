"""Ways in which a teacher's folder is hostile or broken: how an intact folder is changed, and what the message must say."""

import json
import os
import re
import shutil
import struct

import torch
from safetensors.torch import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


def replaced(name, content):
    """A change that replaces a file's bytes."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return change


def removed(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def cut(name, size):
    """A change that keeps only the first `size` bytes of a file; if negative, drops that many at its end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edited(name, **values):
    """A change that sets values in a JSON object; Ellipsis as a value removes the key."""

    def change(folder):
        content = json.loads((folder / name).read_text()) | values
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(content))

    return change


def retyped(name, change_state):
    """A change that applies `change_state` to a file's tensors."""

    def change(folder):
        state = load_file(folder / name)
        save_file(change_state(state), folder / name, metadata={"format": "pt"})

    return change


def without(fragment):
    def change(state):
        key = min(key for key in state if re.search(fragment, key))
        return {k: v for k, v in state.items() if k != key}

    return change


def with_number(fragment, number):
    def change(state):
        key = min(key for key in state if re.search(fragment, key))
        state[key].view(-1)[0] = number
        return state

    return change


def narrower(fragment):
    def change(state):
        key = min(key for key in state if re.search(fragment, key))
        return state | {key: state[key][:-1].contiguous()}

    return change


def in_place_of(name, make):
    """A change that replaces a file by what `make` creates at its path."""

    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


def with_header(name, length, header=b""):
    """A change that writes a weights file whose header claims to be `length` bytes long."""
    return replaced(name, struct.pack("<Q", length) + header)


def tensors(**entries):
    """The bytes of a weights file that consists of the header only."""
    header = json.dumps(entries).encode()
    return with_header(UNET, len(header), header)


def sharded(weight_map, *, with_first=True):
    def change(folder):
        state = load_file(folder / UNET)
        (folder / UNET).unlink()
        if with_first:
            save_file(state, folder / "unet" / "first.safetensors", metadata={"format": "pt"})
        files = weight_map(state) if callable(weight_map) else weight_map
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / f"{UNET}.index.json").write_text(json.dumps(index))

    return change


def in_two_files(folder):
    sharded(of_two)(folder)
    shutil.copy(folder / "unet" / "first.safetensors", folder / "unet" / "second.safetensors")


def of_two(state):
    return {key: f"{'first' if number % 2 else 'second'}.safetensors" for number, key in enumerate(state)}


def pickled(folder):
    torch.save(load_file(folder / UNET), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


def code_beside(folder):
    (folder / "my_unet.py").write_text("raise SystemExit('ran')")
    edited("model_index.json", unet=["my_unet", "MyUnet"])(folder)


def custom_pipeline(folder):
    (folder / "my_pipeline.py").write_text("raise SystemExit('ran')")
    edited("model_index.json", _class_name=["my_pipeline", "MyPipeline"])(folder)


def tokenizer_with_code(folder):
    (folder / "tokenizer" / "mine.py").write_text("raise SystemExit('ran')")
    tokens = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    edited("tokenizer/tokenizer_config.json", **tokens)(folder)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def without_words(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "tokenizer" / "merges.txt").write_text("")


def in_two_tokenizer_files(change):
    """A change of a tokenizer that is stored as vocab.json and merges.txt in place of tokenizer.json."""

    def apply(folder):
        place = folder / "tokenizer"
        model = json.loads((place / "tokenizer.json").read_text())["model"]
        (place / "tokenizer.json").unlink()
        (place / "vocab.json").write_text(json.dumps(model["vocab"]))
        lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
        (place / "merges.txt").write_text("\n".join(lines) + "\n")
        change(folder)

    return apply


def with_few_letters(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    known = content["model"]["vocab"]
    content["model"]["vocab"] = {k: v for k, v in known.items() if k.startswith("<|") or k in ("a", "a</w>")}
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))


def with_another_weight(state):
    return state | {"extra.weight": torch.zeros(2)}


def index(**parts):
    return edited("model_index.json", **parts)


def unet(**values):
    return edited("unet/config.json", **values)


def vae(**values):
    return edited("vae/config.json", **values)


def text(**values):
    return edited("text_encoder/config.json", **values)


def scheduler(**values):
    return edited(SCHEDULER, **values)


# name -> (how an intact folder is changed, pattern that the message must match)
FOLDERS = {
    # weights: files
    "no weights": (removed(UNET), r"lacks unet/diffusion_pytorch_model\.safetensors"),
    "empty weights": (replaced(UNET, b""), r"unet/.*cannot be read as safetensors"),
    "weights cut short": (cut(UNET, -100), r"unet/.*cannot be read as safetensors.*[Ii]ncomplete"),
    "weights cut in the header": (cut(VAE, 500), r"vae/.*cannot be read as safetensors"),
    "weights with a tail": (
        lambda folder: (folder / TEXT).open("ab").write(b"tail"),
        r"text_encoder/.*cannot be read as safetensors",
    ),
    "a web page as weights": (replaced(UNET, b"<html>404</html>"), r"unet/.*cannot be read as safetensors"),
    "a pointer of Git LFS": (
        replaced(UNET, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        r"is a pointer of Git LFS.*git lfs pull",
    ),
    "a header of exabytes": (with_header(UNET, 2**62, b"{}"), r"unet/.*cannot be read as safetensors"),
    "a header that is not JSON": (with_header(UNET, 8, b"not JSON"), r"unet/.*cannot be read as safetensors"),
    "a tensor of exabytes": (
        tensors(x={"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}),
        r"unet/.*cannot be read as safetensors",
    ),
    "a tensor that lies about its bytes": (
        tensors(x={"dtype": "F32", "shape": [10], "data_offsets": [0, 0]}),
        r"unet/.*cannot be read as safetensors",
    ),
    "pickled weights alone": (pickled, r"lacks unet/diffusion_pytorch_model\.safetensors"),
    "a directory as weights": (in_place_of(UNET, os.mkdir), r"unet/.* is a directory, not a file"),
    "a pipe as weights": (in_place_of(UNET, os.mkfifo), r"unet/.* is a pipe or a device, not a file"),
    "a link to nothing as weights": (
        in_place_of(UNET, lambda path: path.symlink_to("/nowhere/at/all")),
        r"unet/.* is a link to nothing",
    ),
    "a link in a circle as weights": (
        in_place_of(UNET, lambda path: path.symlink_to(path.name)),
        r"unet/.* is a link to nothing",
    ),
    "an endless device as weights": (
        in_place_of(UNET, lambda path: path.symlink_to("/dev/zero")),
        r"unet/.* is a pipe or a device, not a file",
    ),
    "broken weights beside the right ones": (
        replaced("unet/diffusion_pytorch_model.non_ema.safetensors", b"half"),
        r"non_ema\.safetensors cannot be read as safetensors",
    ),
    "shards outside the folder": (
        sharded({"conv_in.weight": "../../../etc/passwd"}),
        r"names '\.\./\.\./\.\./etc/passwd'; allowed: \.safetensors files beside it",
    ),
    "a shard that is missing": (
        sharded(lambda state: dict.fromkeys(state, "second.safetensors")),
        r"lacks unet/diffusion_pytorch_model\.safetensors|second\.safetensors does not exist",
    ),
    "an index without shards": (sharded([]), r"lacks unet/|names no file"),
    "a tensor in two shards": (in_two_files, r"lacks unet/|which another file beside it holds too"),
    # weights: tensors
    "a tensor of the U-Net is missing": (
        retyped(UNET, without("mid_block.*weight")),
        r"unet: .* lacks 1 of \d+ weights, first mid_block",
    ),
    "a tensor of the VAE is missing": (retyped(VAE, without("decoder")), r"vae: .* lacks 1 of \d+ weights"),
    "a tensor of the text encoder is missing": (
        retyped(TEXT, without("layers.1")),
        r"text_encoder: .* lacks 1 of \d+ weights",
    ),
    "a tensor too many in the U-Net": (
        retyped(UNET, with_another_weight),
        r"unet: .* holds 1 weights for which its config\.json has no place, first extra\.weight",
    ),
    "a tensor too many in the VAE": (
        retyped(VAE, with_another_weight),
        r"vae: .*has no place, first extra\.weight",
    ),
    "a tensor too many in the text encoder": (
        retyped(TEXT, with_another_weight),
        r"text_encoder: .*has no place, first extra\.weight",
    ),
    "a tensor of another shape": (
        retyped(UNET, narrower("conv_in.weight")),
        r"unet: 1 weights of .* other shapes, first conv_in\.weight, which is \(15, 4, 3, 3\) in",
    ),
    "a row of embeddings is missing": (
        retyped(TEXT, narrower("token_embedding")),
        r"text_encoder: 1 weights .* other shapes",
    ),
    "weights of another model": (
        retyped(UNET, lambda _state: {"lora.weight": torch.zeros(2)}),
        r"unet/config\.json asks for \d+ layers, but the weights beside it have only 1 tensors",
    ),
    "weights that are whole numbers": (
        retyped(UNET, lambda state: {k: v.to(torch.int32) for k, v in state.items()}),
        r"unet/.* is stored as I32",
    ),
    "a weight that is not a number": (
        retyped(UNET, with_number("conv_in.weight", float("nan"))),
        r"unet: conv_in\.weight .* not finite",
    ),
    "an infinite weight of the VAE": (
        retyped(VAE, with_number("decoder.conv_in.weight", float("inf"))),
        r"vae: decoder\.conv_in\.weight .* not finite",
    ),
    "a weight of the text encoder that is not a number": (
        retyped(TEXT, with_number("position_embedding", float("nan"))),
        r"text_encoder: .*position_embedding\.weight .* not finite",
    ),
    # the U-Net's config
    "no config": (removed("unet/config.json"), r"lacks unet/config\.json"),
    "a config that is not JSON": (replaced("unet/config.json", b"{"), r"unet/config\.json is not JSON"),
    "a config that is a list": (
        replaced("unet/config.json", b"[]"),
        r"config\.json holds list; allowed: a JSON",
    ),
    "a config that is not text": (replaced("unet/config.json", b"\xff\xfe{"), r"config\.json is not UTF-8"),
    "a config in 100,000 brackets": (
        replaced("unet/config.json", b'{"a":' + b"[" * 100_000),
        r"config\.json is not JSON: RecursionError",
    ),
    "a config with a number of 5,000 digits": (
        replaced("unet/config.json", b'{"sample_size": ' + b"9" * 5000 + b"}"),
        r"config\.json is not JSON",
    ),
    "a pipe as config": (
        in_place_of("unet/config.json", os.mkfifo),
        r"unet/config\.json is a pipe or a device",
    ),
    "a directory as config": (in_place_of("vae/config.json", os.mkdir), r"vae/config\.json is a directory"),
    "a billion layers": (unet(layers_per_block=10**9), r"unet/config\.json: layers_per_block is 1000000000"),
    "many thousand layers": (unet(layers_per_block=10**5), r"asks for 400000 layers, but the weights"),
    "many thousand transformer layers": (unet(transformer_layers_per_block=5000), r"asks for \d+ layers"),
    "many thousand blocks": (unet(block_out_channels=[16] * 10**5), r"asks for \d+ layers"),
    "channels of trillions": (
        unet(block_out_channels=[10**12, 10**12, 10**12, 10**12]),
        r"block_out_channels is 1000000000000; allowed: up to 1048576",
    ),
    "channels of a million": (unet(block_out_channels=[10**6] * 4), r"unet: .*(shapes|weights)"),
    "images of a billion pixels": (unet(sample_size=10**9), r"sample_size"),
    "images of many thousand pixels": (unet(sample_size=10**5), r"sample_size: 100000; allowed: 1 to 2048"),
    "images of no pixel": (unet(sample_size=0), r"sample_size: 0; allowed"),
    "images of words": (unet(sample_size="large"), r"sample_size: 'large'; allowed"),
    "channels that are words": (
        unet(block_out_channels="wide"),
        r"unet: .*describes no unet that can be built",
    ),
    "no group of a norm": (unet(norm_num_groups=0), r"unet: .*describes no unet that can be built"),
    "no head": (unet(attention_head_dim=0), r"unet: .*describes no unet that can be built"),
    "a norm that is a word": (unet(norm_eps="small"), r"unet: .*"),
    "an unknown activation": (unet(act_fn="rm -rf"), r"unet: .*describes no unet that can be built"),
    "an unknown block": (unet(down_block_types=["Evil"] * 4), r"unet: .*describes no unet that can be built"),
    "texts of another width": (
        unet(cross_attention_dim=768),
        r"cross_attention_dim: 768 and text encoders of",
    ),
    "an inpainting U-Net": (unet(in_channels=9), r"9 input channels"),
    "a U-Net of another class": (unet(_class_name="UNet3DConditionModel"), r"a UNet3DConditionModel"),
    "a quantised U-Net": (unet(quantization_config={"quant_method": "x"}), r"quantised weights in unet"),
    # the configs of the VAE and of the text encoder
    "a VAE that scales by nothing": (vae(scaling_factor=0), r"scaling_factor: 0; allowed: a number above 0"),
    "a VAE that scales by no number": (vae(scaling_factor=float("nan")), r"scaling_factor: nan"),
    "a VAE of other channels": (vae(latent_channels=16), r"4 channels and a VAE of 16"),
    "a VAE of words": (vae(block_out_channels="x"), r"a VAE with block_out_channels: 'x'"),
    "a VAE of a hundred levels": (vae(block_out_channels=[8] * 100), r"(asks for|block_out_channels)"),
    "a text encoder of a billion layers": (text(num_hidden_layers=10**9), r"num_hidden_layers is 1000000000"),
    "a text encoder of thousands of layers": (text(num_hidden_layers=5000), r"asks for 5000 layers"),
    "a text encoder of few words": (text(vocab_size=10), r"text_encoder: 1 weights .* other shapes"),
    "a text encoder whose words are a list": (text(vocab_size=[1]), r"text_encoder"),
    "a text encoder of short texts": (text(max_position_embeddings=5), r"text_encoder: .* other shapes"),
    "a text encoder with an unknown activation": (
        text(hidden_act="evil"),
        r"text_encoder: .*describes no text_encoder that can be built",
    ),
    "a text encoder whose width is a word": (text(hidden_size="wide"), r"text_encoder"),
    # tokenizers
    "a tokenizer that is not JSON": (replaced("tokenizer/tokenizer.json", b"{"), r"tokenizer: cannot load"),
    "a tokenizer that is another JSON": (replaced("tokenizer/tokenizer.json", b"{}"), r"tokenizer: cannot"),
    "no vocabulary": (
        removed("tokenizer/tokenizer.json"),
        r"lacks tokenizer/tokenizer\.json, or vocab\.json",
    ),
    "an empty vocabulary": (without_words, r"tokenizer: .*"),
    "no vocab.json": (
        in_two_tokenizer_files(removed("tokenizer/vocab.json")),
        r"lacks tokenizer/tokenizer\.json, or vocab\.json and merges\.txt",
    ),
    "no merges.txt": (
        in_two_tokenizer_files(removed("tokenizer/merges.txt")),
        r"lacks tokenizer/tokenizer\.json, or vocab\.json and merges\.txt",
    ),
    "an empty vocab.json": (
        in_two_tokenizer_files(replaced("tokenizer/vocab.json", b"")),
        r"tokenizer: cannot load",
    ),
    "an empty merges.txt": (
        in_two_tokenizer_files(replaced("tokenizer/merges.txt", b"")),
        r"tokenizer: .* merges for 0 of its \d+ words",
    ),
    "a merges.txt cut short": (
        in_two_tokenizer_files(cut("tokenizer/merges.txt", 60)),
        r"tokenizer: .* merges for \d of its \d+ words",
    ),
    "an empty tokenizer.json": (replaced("tokenizer/tokenizer.json", b""), r"tokenizer: cannot load"),
    "a vocabulary of one letter": (with_few_letters, r"tokenizer: .* encodes '.*' as the same tokens"),
    "a tokenizer's config that is not JSON": (
        replaced("tokenizer/tokenizer_config.json", b"}"),
        r"tokenizer_config\.json is not JSON",
    ),
    "texts of any length": (
        edited("tokenizer/tokenizer_config.json", model_max_length=10**30),
        r"model_max_length .*; allowed: 2 to 77",
    ),
    "texts of no length": (
        edited("tokenizer/tokenizer_config.json", model_max_length=0),
        r"model_max_length 0; allowed",
    ),
    "a tokenizer with code": (tokenizer_with_code, r"tokenizer: cannot"),
    "more words than rows of embeddings": (
        edited("tokenizer/tokenizer_config.json", pad_token="<|nothing|>"),
        r"tokenizer: .* has a token with id 227; its text encoder has 227 rows",
    ),
    # the scheduler
    "no scheduler": (removed(SCHEDULER), r"lacks scheduler/scheduler_config\.json"),
    "a scheduler that is not JSON": (replaced(SCHEDULER, b"beta"), r"scheduler_config\.json is not JSON"),
    "a billion timesteps": (
        scheduler(num_train_timesteps=10**9),
        r"num_train_timesteps: 1000000000; allowed",
    ),
    "no timestep": (scheduler(num_train_timesteps=0), r"num_train_timesteps: 0; allowed"),
    "fewer timesteps than none": (scheduler(num_train_timesteps=-5), r"num_train_timesteps: -5; allowed"),
    "half a timestep": (scheduler(num_train_timesteps=1000.5), r"num_train_timesteps: 1000\.5; allowed"),
    "timesteps in words": (scheduler(num_train_timesteps="1000"), r"num_train_timesteps: '1000'; allowed"),
    "timesteps of null": (scheduler(num_train_timesteps=None), r"num_train_timesteps: None; allowed"),
    "no betas": (scheduler(beta_start=...), r"without betas"),
    "a beta that is not a number": (scheduler(beta_start=float("nan")), r"beta_start: nan; allowed"),
    "a beta that is a word": (scheduler(beta_end="much"), r"beta_end: 'much'; allowed"),
    "a beta above 1": (scheduler(beta_end=2.0), r"beta_end: 2\.0; allowed"),
    "a negative beta": (scheduler(beta_start=-0.1), r"beta_start: -0\.1; allowed"),
    "betas that fall": (scheduler(beta_start=0.5, beta_end=0.1), r"beta_start: 0\.5 and beta_end: 0\.1"),
    "trained betas that are words": (scheduler(trained_betas=["a"] * 1000), r"'a' among its trained_betas"),
    "too few trained betas": (scheduler(trained_betas=[0.1]), r"trained_betas: 1 numbers; allowed: 1000"),
    "trained betas that are a word": (scheduler(trained_betas="all"), r"trained_betas: 'all'"),
    "an unknown prediction": (scheduler(prediction_type="flow"), r"prediction_type: 'flow'; allowed"),
    "an unknown schedule of betas": (
        scheduler(beta_schedule="sigmoid"),
        r"beta_schedule: 'sigmoid'; allowed",
    ),
    "zero terminal SNR, maybe": (
        scheduler(rescale_betas_zero_snr="maybe"),
        r"rescale_betas_zero_snr: 'maybe'",
    ),
    # model_index.json
    "no index": (removed("model_index.json"), r"lacks model_index\.json"),
    "an index that is not JSON": (replaced("model_index.json", b"{"), r"a readable model_index\.json"),
    "an index that is a list": (replaced("model_index.json", b"[1]"), r"model_index\.json.* holds list"),
    "a pipe as index": (in_place_of("model_index.json", os.mkfifo), r"model_index\.json is a pipe"),
    "another pipeline": (index(_class_name="FluxPipeline"), r"model_index\.json says 'FluxPipeline'"),
    "a pipeline of its own": (custom_pipeline, r"model_index\.json says \['my_pipeline', 'MyPipeline'\]"),
    "a part of no class": (index(unet=[]), r"unet in model_index\.json"),
    "a part of nothing": (index(unet=[None, None]), r"lacks unet in model_index\.json"),
    "a part that is a number": (index(vae=7), r"lacks vae in model_index\.json"),
    "a part that is a word": (index(vae="AutoencoderKL"), r"lacks vae in model_index\.json"),
    "a part without its class": (index(unet=["diffusers"]), r"\['diffusers'\] as its unet; allowed"),
    "a part in lists": (index(unet=[["diffusers"], ["x"]]), r"code of its own"),
    "a part of the system": (index(unet=["os", "system"]), r"code of its own \(unet: os\)"),
    "a part with code beside it": (code_beside, r"code of its own \(unet: my_unet\)"),
    "a whole pipeline as a part": (index(unet=["diffusers", "DiffusionPipeline"]), r"as its unet; allowed"),
    "any model as text encoder": (index(text_encoder=["transformers", "AutoModel"]), r"as its text_encoder"),
    "an optional part that is a number": (index(safety_checker=7), r"7 as its safety_checker; allowed"),
    "a version that is a number": (unet(_diffusers_version=1.5), r"a unet of _diffusers_version 1\.5"),
    "an unknown scheduler": (index(scheduler=["diffusers", "EvilScheduler"]), r"'EvilScheduler'; allowed"),
    "a scheduler that is none": (index(scheduler=["diffusers", "logging"]), r"as its scheduler; allowed"),
    "a tokenizer that is none": (index(tokenizer=["transformers", "EvilTokenizer"]), r"'EvilTokenizer'"),
}
