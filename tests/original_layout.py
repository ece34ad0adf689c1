"""A pipeline's weights in the layout of the original repositories (CompVis, Stability), as a single file has them.

The inverse of what diffusers' `from_single_file` reads, from the names in the original configs: input_blocks, middle_block,
output_blocks of a U-Net with two layers a block; encoder.down and decoder.up of the VAE; OpenCLIP's names for SD2.x's text
encoder and SDXL's second; the transformers of SD3 and Z-Image alone.
"""

import re

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_state(pipeline) -> dict[str, torch.Tensor]:
    """Every weight of a StableDiffusionPipeline (one CLIP text encoder) or StableDiffusionXLPipeline."""
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    attended = {key.split(".")[1] for key in unet if re.match(r"up_blocks\.\d+\.attentions", key)}
    state = {f"model.diffusion_model.{unet_name(k, attended)}": v for k, v in unet.items()}
    levels = len(pipeline.vae.config.block_out_channels)
    for key, value in vae.items():
        name = vae_name(key, levels)
        state[f"first_stage_model.{name}"] = (
            value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
        )
    if hasattr(pipeline, "text_encoder_2"):
        state |= _clip("conditioner.embedders.0.transformer", pipeline.text_encoder)
        state |= _open_clip("conditioner.embedders.1.model", pipeline.text_encoder_2)
    elif pipeline.unet.config.use_linear_projection:  # SD2.x, which has OpenCLIP's encoder
        state |= _open_clip("cond_stage_model.model", pipeline.text_encoder)
    else:
        state |= _clip("cond_stage_model.transformer", pipeline.text_encoder)
    return {key: value.contiguous() for key, value in state.items()}


def unet_name(key: str, attended: set[str]) -> str:
    """The original name of a U-Net weight. attended: numbers of the up blocks with attention, whose upsampler is one place
    further down."""
    for ours, theirs in OUTSIDE.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    kind, rest = key.split(".", 1)
    if kind == "mid_block":
        part, number, tail = rest.split(".", 2)
        place = {"resnets": 2 * int(number), "attentions": 1}[part]
        return f"middle_block.{place}.{_inner(part, tail)}"
    block, part, number, tail = rest.split(".", 3)
    if kind == "down_blocks" and part == "downsamplers":
        return f"input_blocks.{3 * (int(block) + 1)}.0.op.{tail.removeprefix('conv.')}"
    if kind == "up_blocks" and part == "upsamplers":
        return f"output_blocks.{3 * int(block) + 2}.{2 if block in attended else 1}.{tail}"
    place = 3 * int(block) + int(number) + (1 if kind == "down_blocks" else 0)
    side = "input_blocks" if kind == "down_blocks" else "output_blocks"
    return f"{side}.{place}.{0 if part == 'resnets' else 1}.{_inner(part, tail)}"


def _inner(part: str, tail: str) -> str:
    if part != "resnets":
        return tail
    name, suffix = tail.rsplit(".", 1)
    return f"{RESNET[name]}.{suffix}"


def vae_name(key: str, levels: int) -> str:
    for ours, theirs in (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2")):
        key = key.replace(ours, theirs)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in ATTENTION.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    last = levels - 1
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)


def _clip(prefix: str, encoder) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.text_model.{key.removeprefix('text_model.')}": value
        for key, value in encoder.state_dict().items()
    }


def _open_clip(prefix: str, encoder) -> dict[str, torch.Tensor]:
    ours = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    state = {
        "token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "ln_final.weight": ours["final_layer_norm.weight"],
        "ln_final.bias": ours["final_layer_norm.bias"],
    }
    if "text_projection.weight" in ours:
        state["text_projection"] = ours["text_projection.weight"].T
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"self_attn.out_proj": "attn.out_proj"}
    for layer in range(encoder.config.num_hidden_layers):
        layer_name, place = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for name, theirs in names.items():
                state[f"{place}.{theirs}.{kind}"] = ours[f"{layer_name}.{name}.{kind}"]
            parts = [ours[f"{layer_name}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
    return {f"{prefix}.{key}": value for key, value in state.items()}


FLOW_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FLOW_OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
FUSED = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
}


def original_sd3(transformer, prefix="model.diffusion_model.") -> dict[str, torch.Tensor]:
    """Every weight of an SD3Transformer2DModel. Shift and scale of its last two modulations are in the other order there."""
    weights, last = dict(transformer.state_dict()), transformer.config.num_layers - 1
    swapped = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    weights = {
        k: torch.cat(list(reversed(v.chunk(2)))) if k.startswith(swapped) else v for k, v in weights.items()
    }
    state = {}
    for block in range(last + 1):
        ours, theirs = f"transformer_blocks.{block}.", f"joint_blocks.{block}."
        for parts, fused in FUSED.items():
            for kind in ("weight", "bias"):
                names = [f"{ours}{parts.format(part)}.{kind}" for part in "qkv"]
                if names[0] in weights:
                    state[f"{theirs}{fused}.{kind}"] = torch.cat([weights.pop(name) for name in names])
        for key in [key for key in weights if key.startswith(ours)]:
            name, _, kind = key.removeprefix(ours).rpartition(".")
            state[f"{theirs}{FLOW_BLOCK[name]}.{kind}"] = weights.pop(key)
    for key, value in weights.items():
        name = next(name for name in FLOW_OUTSIDE if key.startswith(name))
        state[key.replace(name, FLOW_OUTSIDE[name], 1)] = value
    return {f"{prefix}{key}": value.contiguous() for key, value in state.items()}


def original_z_image(transformer, prefix="model.diffusion_model.") -> dict[str, torch.Tensor]:
    """Every weight of a ZImageTransformer2DModel."""
    weights = dict(transformer.state_dict())
    for key in [key for key in weights if key.endswith("attention.to_q.weight")]:
        parts = [weights.pop(key.replace("to_q", f"to_{part}")) for part in "qkv"]
        weights[key.replace("to_q", "qkv")] = torch.cat(parts)
    renames = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder."}
    renames |= {".attention.to_out.0.": ".attention.out.", ".norm_k.": ".k_norm.", ".norm_q.": ".q_norm."}
    state = {}
    for key, value in weights.items():
        for ours, theirs in renames.items():
            key = key.replace(ours, theirs)
        state[f"{prefix}{key}"] = value.contiguous()
    return state
