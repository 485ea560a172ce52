# SPDX-License-Identifier: Apache-2.0
"""Tiny random chat models, made on the spot in the format of the real ones.

They answer nonsense, but the same nonsense every time: greedy answers can be compared.
"""

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, with contents as a string or as parts."""

SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(extra: tuple[str, ...] = (), chat_template: str = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer without merges: one token per byte, any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIALS, *extra])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    return fast


def speak_ascii(lm_head: Any, tokenizer: Any, urge_to_end: float = 2.5) -> None:
    """Makes a random model answer printable ASCII, and end most answers after some ten characters."""
    import torch

    letters = [token for token in tokenizer.get_vocab() if len(token) == 1 and token.isascii()]
    rows = tokenizer.convert_tokens_to_ids(letters)
    with torch.no_grad():
        kept = lm_head.weight[rows].clone()
        end = lm_head.weight[tokenizer.eos_token_id] * urge_to_end
        lm_head.weight.zero_()
        lm_head.weight[rows] = kept
        lm_head.weight[tokenizer.eos_token_id] = end


def save_tiny_llm(folder: Path, seed: int = 3, max_positions: int = 512) -> Path:
    """Saves a random Llama-class chat model (370 k parameters) and its tokenizer; returns the folder.

    Heads are 64 wide, the least that vLLM takes on a CPU. With other seeds some answers are empty.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=max_positions,
        initializer_range=0.2,  # so that other prompts get other answers
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    speak_ascii(model.lm_head, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


VISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AUDIO_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if 'audio_url' in part %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_vlm(folder: Path, seed: int = 0) -> Path:
    """Saves a random Qwen2.5-VL-class model with its processor; returns the folder."""
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = byte_tokenizer(
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"), VISION_TEMPLATE
    )
    # The smallest pictures it can take: 4 to 16 tokens each.
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=VISION_TEMPLATE,
    )
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(tokenizer)
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            }
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    return _save(folder, model, processor)


def save_tiny_audio_llm(folder: Path, seed: int = 0) -> Path:
    """Saves a random Qwen2-Audio-class model with its processor; returns the folder."""
    import torch
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = byte_tokenizer(("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"), AUDIO_TEMPLATE)
    # Two seconds of sound instead of thirty.
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    processor = Qwen2AudioProcessor(extractor, tokenizer, chat_template=AUDIO_TEMPLATE)
    config = Qwen2AudioConfig(
        text_config=_qwen_text(tokenizer),
        audio_config={
            "num_mel_bins": 80,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 100,
            "initializer_range": 0.2,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2AudioForConditionalGeneration(config)
    return _save(folder, model, processor)


def _qwen_text(tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _save(folder: Path, model: Any, processor: Any) -> Path:
    speak_ascii(model.get_output_embeddings(), processor.tokenizer)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
