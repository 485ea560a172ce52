# SPDX-License-Identifier: Apache-2.0
# transformers' configs are typed more narrowly than they take.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false
"""Tiny random captioners and summarisers, made on the spot in the format of the real ones.

They write nonsense, but other nonsense for other pictures, and the same every time.
"""

from pathlib import Path
from typing import Any

_SENTENCE = (
    "a the man woman dog cat car red green blue ball runs walks sits on in with and of sky sea road "
    "tree house plays music cooks food front street what does image describe summarize picture"
)
WORDS = _SENTENCE.split()


def word_tokenizer(*specials: str, **roles: Any) -> Any:
    """A tokenizer of whole words: the specials come first, then `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=roles["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def save_tiny_blip(folder: Path, seed: int = 1, **text: Any) -> Path:
    """Saves a random BLIP captioner of 32-pixel pictures and its processor; returns the folder."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    # As in the real one, the tokens that begin a caption lie behind the tokenizer's words.
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    config = BlipConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8, projection_dim=16, initializer_range=0.5,
        ),
        text_config=dict(
            vocab_size=len(words) + 2, hidden_size=32, encoder_hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=2, projection_dim=16, initializer_range=0.5,
            max_position_embeddings=64, bos_token_id=len(words), eos_token_id=3, sep_token_id=3, pad_token_id=0,
        ) | text,
    )  # fmt: skip
    model = _seeded(lambda: BlipForConditionalGeneration(config), seed)
    _stir(model, seed, ("text_decoder.bert.embeddings.position",))
    model.save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    processor.save_pretrained(folder)
    return folder


def save_tiny_blip2(folder: Path, language: str = "opt", seed: int = 0) -> Path:
    """Saves a random BLIP-2 with an OPT or a T5 behind it, and its processor; returns the folder."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        OPTConfig,
        T5Config,
    )

    tokenizer = word_tokenizer(
        "<pad>", "<s>", "</s>", "<unk>", "<image>",
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    tokenizer.padding_side = "left"
    if language == "opt":
        text = OPTConfig(
            vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.5,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    else:
        text = T5Config(
            vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
            decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, bos_token_id=1, initializer_factor=2.0,
        )  # fmt: skip
    config = Blip2Config(
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8, initializer_range=0.5,
        ),
        qformer_config=dict(
            vocab_size=len(tokenizer), hidden_size=32, encoder_hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5,
        ),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = _seeded(lambda: Blip2ForConditionalGeneration(config), seed)
    _stir(
        model,
        seed,
        (
            "language_projection",
            "query_tokens",
            "language_model.encoder.block.0.layer.0.SelfAttention.relative",
            "language_model.decoder.block.0.layer.0.SelfAttention.relative",
        ),
    )
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder


def save_tiny_florence2(folder: Path, seed: int = 0) -> Path:
    """Saves a random Florence-2 and its processor; returns the folder."""
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        Florence2VisionConfig,
    )

    tokenizer = word_tokenizer(
        "<s>", "<pad>", "</s>", "<unk>", "<image>",
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    vision = Florence2VisionConfig(
        depths=(1, 1, 1, 1), embed_dim=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), num_groups=(1, 1, 2, 2),
        window_size=4, projection_dim=32, max_position_embeddings=8, max_temporal_embeddings=4,
        initializer_range=0.5,
    )  # fmt: skip
    text = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.5,
        max_position_embeddings=64, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    config = Florence2Config(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    _seeded(lambda: Florence2ForConditionalGeneration(config), seed).save_pretrained(folder)
    images = CLIPImageProcessor(
        size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64}
    )
    images.image_seq_length = 5  # 2 x 2 cells, and their mean
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def save_tiny_t5(folder: Path, seed: int = 6) -> Path:
    """Saves a random T5 and its tokenizer; returns the folder."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = word_tokenizer(
        "<pad>", "</s>", "<unk>", unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, initializer_factor=2.0,
    )  # fmt: skip
    model = _seeded(lambda: T5ForConditionalGeneration(config), seed)
    _stir(
        model,
        seed,
        (
            "encoder.block.0.layer.0.SelfAttention.relative",
            "decoder.block.0.layer.0.SelfAttention.relative",
        ),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _seeded(make: Any, seed: int) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _stir(model: Any, seed: int, names: tuple[str, ...]) -> None:
    """Draws parameters anew and wider, where the library begins with zeros or next to them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith(names):
            parameter.data.normal_(0, 1.0, generator=generator)
