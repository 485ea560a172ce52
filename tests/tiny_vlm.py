# SPDX-License-Identifier: Apache-2.0
# transformers' configs are typed more narrowly than they take.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false
"""A tiny random vision-language model, made on the spot in the format of the real ones."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny_captioners import word_tokenizer
from tests.tiny_llm import SPECIALS

VISION_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

VISION_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with pictures, as Qwen's models have it."""


def save_tiny_vlm(
    folder: Path, seed: int = 0, lessons: Sequence[tuple[Any, str]] = (), steps: int = 60
) -> Path:
    """Saves a random Qwen3-VL-class model (about 0.3 M parameters) and its processor.

    Its answers are a few English words. Pictures of any size become at most 16 patches of 16 pixels a
    side, which makes 4 tokens.

    Args:
        folder: Where to.
        seed: Of the weights.
        lessons: Requests (`dataengine.models.llm.Request`) with the answers in `WORDS` that it learns
            to give, so that it can be told whether it saw the pictures in their order.
        steps: Of learning.

    Returns:
        The folder.
    """
    import torch
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = word_tokenizer(
        *SPECIALS, "<unk>", *VISION_SPECIALS,
        unk_token="<unk>", pad_token="<|pad|>", eos_token="<|im_end|>",
    )  # fmt: skip
    tokenizer.chat_template = VISION_CHAT_TEMPLATE
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in VISION_SPECIALS}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "initializer_range": 0.1,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
            "max_position_embeddings": 4096, "initializer_range": 0.1,
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, **patches),
        tokenizer,
        Qwen3VLVideoProcessor(size=size, **patches),
        chat_template=VISION_CHAT_TEMPLATE,
    )
    if lessons:
        _teach(model, processor, lessons, steps)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _teach(model: Any, processor: Any, lessons: Sequence[tuple[Any, str]], steps: int) -> None:
    import torch
    from PIL import Image

    texts = []
    for request, answer in lessons:
        pictures = [{"type": "image"} for _ in request.images]
        turns = [
            {"role": "system", "content": [{"type": "text", "text": request.system}]},
            {"role": "user", "content": [*pictures, {"type": "text", "text": request.prompt}]},
        ]
        asked = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        texts.append(f"{asked}{answer}<|im_end|>")
    images = [[Image.open(io.BytesIO(jpeg)) for jpeg in r.images] for r, _ in lessons]
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    num = max(len(answer.split()) for _, answer in lessons) + 1
    labels[:, :-num] = -100
    labels[inputs["attention_mask"] == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
    model.eval()
