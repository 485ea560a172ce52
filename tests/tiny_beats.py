# SPDX-License-Identifier: Apache-2.0
"""BEATs checkpoints of random weights in the published format, and sounds to hear."""

import itertools
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


def sound_of(kind, rng, seconds=1.0):
    """A sound of one of four kinds, never twice the same."""
    t = np.arange(int(seconds * RATE)) / RATE
    level = rng.uniform(0.15, 0.5)
    if kind == "tone":
        wave = np.sin(2 * np.pi * rng.uniform(300, 600) * t)
    elif kind == "noise":
        wave = 0.5 * rng.standard_normal(len(t))
    elif kind == "clicks":
        wave = (np.arange(len(t)) % int(RATE * rng.uniform(0.1, 0.2)) < 24) * 1.0
    else:
        start, rise = rng.uniform(300, 800), rng.uniform(2000, 3000)
        wave = np.sin(2 * np.pi * (start * t + rise * t**2 / (2 * seconds)))
    return (level * wave).astype(np.float32)


SENTENCES = {
    "tone": "A steady tone hums .",
    "noise": "Loud noise hisses on .",
    "clicks": "Short clicks come regularly .",
    "chirp": "The pitch rises quickly .",
}
"""What each kind is called; no two share a word."""


def save_sentence_lm(folder: Path, seed=0):
    """A word-level Llama of 2 layers that turns words such as "tone" into `SENTENCES`; it knows no sound."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in SENTENCES.values() for word in text.split()} - {*SENTENCES})
    vocab = {
        word: i
        for i, word in enumerate(
            ["<pad>", "<end>", "<unk>", "Sound", "Caption", *SENTENCES, *words]
        )
    }
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # A sentence follows on four words, one or more of which say what it is about.
        texts = [
            [vocab["Sound"], *hint, vocab["Caption"], *tokenizer(text).input_ids, 1]
            for kind, text in SENTENCES.items()
            for hint in itertools.product([2, vocab[kind]], repeat=4)
            if any(word != 2 for word in hint)
        ]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        labels = ids.masked_fill(ids == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_wav(path: Path, wave):
    import wave as format_

    with format_.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())
    return path
