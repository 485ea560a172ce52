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
