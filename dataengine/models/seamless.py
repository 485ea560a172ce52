# SPDX-License-Identifier: Apache-2.0
"""SeamlessM4T, text to English text, and a language model for what it should not be trusted with.

Transcripts are cut at the end of sentences, and the pieces of all transcripts of a language share
every call of the model.
"""

from collections.abc import Sequence
from typing import Any

from dataengine.errors import DependencyError
from dataengine.models.answers import BAD_OUTPUT, Author, Batcher, Failure, Written
from dataengine.models.llm_translator import LLMTranslator
from dataengine.models.pretrained import load_model, load_processor, model_id, model_revision
from dataengine.models.translator import (
    LANGUAGE_UNSUPPORTED,
    LANGUAGE_UNSURE,
    Foreign,
    SeamlessConfig,
    split_text,
)

# ISO 639-1 codes (639-3 where there is none) of what can be told -> SeamlessM4T's code of the written
# language, as in the tables of its paper and in its tokenizer's special tokens.
SEAMLESS_CODES = {
    "af": "afr", "am": "amh", "ar": "arb", "ary": "ary", "arz": "arz", "as": "asm", "az": "azj",
    "be": "bel", "bg": "bul", "bn": "ben", "bs": "bos", "ca": "cat", "ceb": "ceb", "ckb": "ckb",
    "cs": "ces", "cy": "cym", "da": "dan", "de": "deu", "el": "ell", "et": "est", "eu": "eus",
    "fa": "pes", "ff": "fuv", "fi": "fin", "fil": "tgl", "fr": "fra", "ga": "gle", "gl": "glg",
    "gu": "guj", "he": "heb", "hi": "hin", "hr": "hrv", "hu": "hun", "hy": "hye", "id": "ind",
    "ig": "ibo", "is": "isl", "it": "ita", "ja": "jpn", "jv": "jav", "ka": "kat", "kk": "kaz",
    "km": "khm", "kn": "kan", "ko": "kor", "ky": "kir", "lg": "lug", "lo": "lao", "lt": "lit",
    "luo": "luo", "lv": "lvs", "mai": "mai", "mk": "mkd", "ml": "mal", "mn": "khk", "mni": "mni",
    "mr": "mar", "ms": "zsm", "mt": "mlt", "my": "mya", "nb": "nob", "ne": "npi", "nl": "nld",
    "nn": "nno", "no": "nob", "ny": "nya", "om": "gaz", "or": "ory", "pa": "pan", "pl": "pol",
    "ps": "pbt", "pt": "por", "ro": "ron", "ru": "rus", "sat": "sat", "sd": "snd", "sh": "hrv",
    "sk": "slk", "sl": "slv", "sn": "sna", "so": "som", "sr": "srp", "sv": "swe", "sw": "swh",
    "ta": "tam", "te": "tel", "tg": "tgk", "th": "tha", "tl": "tgl", "tr": "tur", "uk": "ukr",
    "ur": "urd", "uz": "uzn", "vi": "vie", "yo": "yor", "yue": "yue", "zh": "cmn", "zu": "zul",
}  # fmt: skip
_ENGLISH = "eng"
_OTHER_HALVES = ("speech_encoder.", "t2u_model.", "vocoder.")
"""Weights of speech in and speech out, which whole checkpoints carry."""


class SeamlessTranslator:
    """SeamlessM4T of the first or second version, as the checkpoint says.

    Args:
        config: Which, and how.
        llm: Translates what is not sure, where it is not the one that the config names.

    Raises:
        DependencyError: If the weights are missing or unfit, or the language model is missing.
    """

    def __init__(self, config: SeamlessConfig, llm: LLMTranslator | None = None) -> None:
        try:
            import sentencepiece  # noqa: F401 (its tokenizer's files are read with it)
            from transformers import AutoConfig, SeamlessM4TTokenizer
            from transformers.models.seamless_m4t import SeamlessM4TForTextToText
            from transformers.models.seamless_m4t_v2 import SeamlessM4Tv2ForTextToText
        except ImportError as error:
            raise DependencyError(
                f"Missing package: {error.name} (translation)", "uv sync --extra ingest"
            ) from error
        classes = {
            "seamless_m4t": SeamlessM4TForTextToText,
            "seamless_m4t_v2": SeamlessM4Tv2ForTextToText,
        }
        version = load_processor(AutoConfig, config.model, config.revision).model_type
        if version not in classes:
            raise DependencyError(
                f"{config.model} is no SeamlessM4T model, but {version}",
                f"name one of {', '.join(classes)}, e.g. facebook/seamless-m4t-v2-large",
            )
        self._config = config
        self._tokenizer: Any = load_processor(SeamlessM4TTokenizer, config.model, config.revision)
        self._model: Any = load_model(
            classes[version],
            config.model,
            config.revision,
            device=config.device,
            unused=_OTHER_HALVES,
        )
        english = self._tokenizer.convert_tokens_to_ids(f"__{_ENGLISH}__")
        if english == self._tokenizer.unk_token_id:
            raise DependencyError(
                f"The tokenizer of {config.model} has no token __{_ENGLISH}__",
                "name a whole SeamlessM4T checkpoint, with its tokenizer's files",
            )
        generation = self._model.generation_config
        # transformers drops this table from some generation_config.json; its ids are the tokenizer's.
        targets = getattr(generation, "text_decoder_lang_to_code_id", None) or {}
        generation.text_decoder_lang_to_code_id = {_ENGLISH: english} | targets
        self._known = {
            language: code
            for language, code in SEAMLESS_CODES.items()
            if self._tokenizer.convert_tokens_to_ids(f"__{code}__") != self._tokenizer.unk_token_id
        }
        self._batcher = Batcher(config.batch_size)
        self._llm = llm or (LLMTranslator(config.llm) if config.llm else None)
        self.model = model_id(config.model)
        self.revision = model_revision(config.model, self._model)

    def translate(self, texts: Sequence[Foreign]) -> list[Written | Failure]:
        """Returns the English of each text, or why there is none.

        Raises:
            EngineError: If the language model cannot be asked at all.
        """
        answers: dict[int, Written | Failure] = {}
        for_llm: list[int] = []
        by_code: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            code = self._known.get(text.language or "")
            if self._llm and (code is None or not self._is_sure(text)):
                for_llm.append(index)
            elif code is None:
                answers[index] = Failure(LANGUAGE_UNSUPPORTED, str(text.language))
            else:
                by_code.setdefault(code, []).append(index)
        for code, indices in by_code.items():
            said = self._translate([texts[index].text for index in indices], code)
            for index, answer in zip(indices, said, strict=True):
                note = None if self._is_sure(texts[index]) else LANGUAGE_UNSURE
                answers[index] = (
                    answer
                    if isinstance(answer, Failure)
                    else Written(answer, Author(self.model, self.revision), note)
                )
        if self._llm and for_llm:
            written = self._llm.translate([texts[index] for index in for_llm])
            answers |= dict(zip(for_llm, written, strict=True))
        return [answers[index] for index in range(len(texts))]

    def _is_sure(self, text: Foreign) -> bool:
        return (text.language_score or 0.0) >= self._config.min_language_score

    def _translate(self, texts: Sequence[str], code: str) -> list[str | Failure]:
        """Returns the English of texts in one language, or why there is none."""
        pieces, owners = [], []
        for index, text in enumerate(texts):
            for piece in split_text(text, self._size, self._config.max_tokens):
                pieces.append(piece)
                owners.append(index)
        # Of like length, a batch is not mostly padding.
        order = sorted(range(len(pieces)), key=lambda at: (len(pieces[at]), at))
        said = self._batcher.run(
            [pieces[at] for at in order], lambda part: self._generate(part, code)
        )
        translated = dict(zip(order, said, strict=True))
        results: list[str | Failure] = []
        for index in range(len(texts)):
            parts = [translated[at] for at, owner in enumerate(owners) if owner == index]
            failure = next((part for part in parts if isinstance(part, Failure)), None)
            english = " ".join(part for part in parts if isinstance(part, str) and part)
            results.append(failure or english or Failure(BAD_OUTPUT, "empty translation"))
        return results

    def _size(self, piece: str) -> int:
        return len(self._tokenizer.tokenize(piece))

    def _generate(self, pieces: Sequence[str], code: str) -> list[str]:
        import torch

        inputs = self._tokenizer(list(pieces), src_lang=code, padding=True, return_tensors="pt").to(
            self._model.device
        )
        with torch.inference_mode():
            tokens = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                tgt_lang=_ENGLISH,
                num_beams=self._config.num_beams,
                max_new_tokens=self._config.max_new_tokens,
                do_sample=False,
            )
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
