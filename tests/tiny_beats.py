# SPDX-License-Identifier: Apache-2.0
"""BEATs checkpoints of random weights in the published format, and sounds to hear."""

from pathlib import Path

import numpy as np
import torch

RATE = 16_000


def published_cfg(**changes):
    """The fields of a published ``cfg``, shrunk; some only matter in training."""
    return {
        "input_patch_size": 16,
        "embed_dim": 24,
        "conv_bias": False,
        "encoder_layers": 2,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 48,
        "encoder_attention_heads": 4,
        "activation_fn": "gelu",
        "layer_wise_gradient_decay_ratio": 0.6,
        "layer_norm_first": False,
        "deep_norm": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.05,
        "dropout_input": 0.0,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "relative_position_embedding": True,
        "num_buckets": 20,
        "max_distance": 40,
        "gru_rel_pos": True,
        "finetuned_model": False,
        "predictor_dropout": 0.0,
        "predictor_class": 527,
    } | changes


def published_shapes(cfg):
    """Every key of a published checkpoint and its shape."""
    embed, width, mlp = cfg["embed_dim"], cfg["encoder_embed_dim"], cfg["encoder_ffn_embed_dim"]
    heads, patch = cfg["encoder_attention_heads"], cfg["input_patch_size"]
    shapes = {
        "post_extract_proj.weight": (width, embed),
        "post_extract_proj.bias": (width,),
        "patch_embedding.weight": (embed, 1, patch, patch),
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, cfg["conv_pos"]),
        "encoder.pos_conv.0.weight_v": (width, width // cfg["conv_pos_groups"], cfg["conv_pos"]),
        "encoder.layer_norm.weight": (width,),
        "encoder.layer_norm.bias": (width,),
        "layer_norm.weight": (embed,),
        "layer_norm.bias": (embed,),
    }
    for layer in range(cfg["encoder_layers"]):
        at = f"encoder.layers.{layer}"
        shapes[f"{at}.self_attn.grep_a"] = (1, heads, 1, 1)
        shapes[f"{at}.self_attn.relative_attention_bias.weight"] = (cfg["num_buckets"], heads)
        shapes[f"{at}.self_attn.grep_linear.weight"] = (8, width // heads)
        shapes[f"{at}.self_attn.grep_linear.bias"] = (8,)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{at}.self_attn.{name}.weight"] = (width, width)
            shapes[f"{at}.self_attn.{name}.bias"] = (width,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"{at}.{name}.weight"] = (width,)
            shapes[f"{at}.{name}.bias"] = (width,)
        shapes |= {f"{at}.fc1.weight": (mlp, width), f"{at}.fc1.bias": (mlp,)}
        shapes |= {f"{at}.fc2.weight": (width, mlp), f"{at}.fc2.bias": (width,)}
    if cfg["finetuned_model"]:
        shapes["predictor.weight"] = (cfg["predictor_class"], width)
        shapes["predictor.bias"] = (cfg["predictor_class"],)
    return shapes


def seeded_weights(cfg, seed=0):
    """Weights drawn in the order of their names; one position bias for all layers."""
    rng = np.random.default_rng(seed)
    weights, shared = {}, None
    for key, shape in sorted(published_shapes(cfg).items()):
        drawn = rng.standard_normal(shape)
        if "relative_attention_bias" in key:
            shared = drawn if shared is None else shared
            drawn = shared
        elif key.endswith(("norm.weight", "grep_a", "weight_g")):
            drawn = 1 + 0.2 * drawn
        elif len(shape) > 1:
            drawn = drawn / np.sqrt(np.prod(shape[1:]))
        else:
            drawn = 0.1 * drawn
        weights[key] = torch.from_numpy(drawn.astype(np.float32))
    return weights


def write_checkpoint(path: Path, seed=0, labels=None, **changes) -> Path:
    """A pre-trained checkpoint, or with ``labels`` a fine-tuned one."""
    if labels:
        changes |= {"finetuned_model": True, "predictor_class": len(labels)}
    cfg = published_cfg(**changes)
    checkpoint = {"cfg": cfg, "model": seeded_weights(cfg, seed)}
    if labels:
        checkpoint["label_dict"] = dict(enumerate(labels))
    torch.save(checkpoint, path)
    return path


def seeded_sound(seconds=1.0, seed=0):
    """A chirp in noise, float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    chirp = 0.3 * np.sin(2 * np.pi * (200 * t + 900 * t**2))
    return (chirp + 0.05 * rng.standard_normal(len(t))).astype(np.float32)
