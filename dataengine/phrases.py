# SPDX-License-Identifier: Apache-2.0
"""Labels -> plain phrases, and phrases -> keys by which "playing guitar" and "play the guitar" are one.

The words of a phrase are freed of inflection by steps 1 and 5a of Porter's algorithm (1980, "An
algorithm for suffix stripping"), which undo -s, -ed and -ing and leave derivation alone, and by a
table of irregular forms. English only: words of other scripts stay as they are.
"""

import html
import re
import unicodedata
from functools import lru_cache


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ARTICLES = _set("a an the")
_OWNERS = _set("his her its their your my our some")
_SUBJECTS = _set("person people someone somebody man woman men women he she they i we you")
_AUXILIARIES = _set("is are was were be been being am to will can")
FUNCTION_WORDS = (
    _ARTICLES
    | _OWNERS
    | _set(
        "and or of to in into on onto off out over under up down at by for from with without about "
        "across along around away back behind through together upon against between near next "
        "it them him something someone is are be being"
    )
)
"""Words that say nothing by themselves: which of them stand in a phrase is grammar."""

_FORMS = """
ate eaten eat, beat beaten beat, became become, began begun begin, bent bend, bit bitten bite, bled bleed,
blew blown blow, broke broken break, brought bring, built build, bought buy, caught catch, chose chosen choose,
came come, crept creep, did done does do, dug dig, drew drawn draw, drank drunk drink, drove driven drive,
fell fallen fall, fed feed, felt feel, fought fight, found find, flew flown fly, froze frozen freeze, gave given give,
went gone goes go, ground grind, grew grown grow, hung hang, had has have, held hold, hid hidden hide, kept keep,
knelt kneel, lit light, lost lose, made make, met meet, paid pay, ran run, rang rung ring, rode ridden ride,
rose risen rise, sang sung sing, sank sunk sink, sat sit, saw seen see, sold sell, sent send, sewn sew, shook shaken shake,
shone shine, shot shoot, shown show, slept sleep, slid slide, spoke spoken speak, spun spin, spent spend, split split,
sprang sprung spring, stood stand, stole stolen steal, stuck stick, strode stride, struck strike, swam swum swim,
swept sweep, swung swing, taught teach, threw thrown throw, told tell, took taken take, tore torn tear, woke woken wake,
wore worn wear, wove woven weave, won win, wound wind, wrote written write,
tying ties tied tie, dying dies died die, lying lies lied lie, buses bus, skis ski,
children child, men man, women woman, people person, feet foot, teeth tooth, knives knife, mice mouse, geese goose
"""
_IRREGULAR = {form: entry.split()[-1] for entry in _FORMS.split(",") for form in entry.split()[:-1]}

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_TAG = re.compile(r"<[/!]?[a-zA-Z][^<>]*>|<!--.*?-->")
_UNCLASSIFIED = re.compile(r"[,;(]?\s*\bn\.\s?e\.\s?c\b\.?\s*\)?\s*\**", re.IGNORECASE)
"""How the American Time Use Survey marks leftovers: "Sports, n.e.c.*"."""


def plain_phrase(label: str) -> str:
    """Returns a label as a lower-case phrase without markup, punctuation, and article and subject before it.

    ``ApplyEyeMakeup``, ``climb_stairs`` and ``Putting [something] on a table`` become words; "A man is
    riding a horse." becomes "riding a horse". Empty if nothing is left.
    """
    text = _TAG.sub(" ", html.unescape(unicodedata.normalize("NFKC", label)))
    text = _UNCLASSIFIED.sub(" ", text).replace("\u2019", "'").replace("&", " and ")
    if not re.search(r"\s", text.strip()):
        text = _CAMEL.sub(" ", text)
    words = [
        word for piece in "".join(map(_letter, text.lower())).split() if (word := piece.strip("'"))
    ]
    return " ".join(words[_num_leading(words) :])


def _letter(character: str) -> str:
    """Returns a letter, mark, digit or apostrophe as it is, all else as a blank."""
    return character if character == "'" or unicodedata.category(character)[0] in "LMN" else " "


def _num_leading(words: list[str]) -> int:
    """Returns how many words before the action are an article, a subject or an auxiliary."""
    place = 1 if len(words) > 1 and words[0] in _ARTICLES else 0
    if len(words) > place + 1 and words[place] in _SUBJECTS:
        after = words[place + 1]
        if after in _AUXILIARIES or after.endswith(("ing", "s")):
            place += 1
    while len(words) > place + 1 and words[place] in _AUXILIARIES:
        place += 1
    return place


def phrase_stems(phrase: str) -> tuple[str, ...]:
    """Returns the stems of a plain phrase's words, without articles and possessives."""
    words = [word.removesuffix("'s") for word in phrase.split()]
    return tuple(
        word_stem(word) for word in words if word not in _ARTICLES and word not in _OWNERS
    ) or tuple(words)


def _shape(word: str) -> str:
    """Returns ``c`` or ``v`` for each letter; a y after a consonant is a vowel."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if vowel else "c"
    return shape


def _measure(word: str) -> int:
    """Returns Porter's m: how often a consonant follows a vowel."""
    return _shape(word).count("vc")


def _ends_short(word: str) -> bool:
    """Returns Porter's ``*o``: consonant, vowel, consonant other than w, x and y."""
    return _shape(word).endswith("cvc") and word[-1] not in "wxy"


@lru_cache(maxsize=1 << 17)
def word_stem(word: str) -> str:
    """Returns what a lower-case word has in common with its other inflections: rides, rode -> ride."""
    word = _IRREGULAR.get(word, word)
    if len(word) < 3 or not (word.isascii() and word.isalpha()):
        return word
    if word.endswith(("sses", "xes", "zzes", "ches", "shes", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) else word
    else:
        for ending in ("ing", "ed"):
            bare = word.removesuffix(ending)
            if bare != word and "v" in _shape(bare):
                word = _mended(bare)
                break
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    if word.endswith("e"):
        bare = word[:-1]
        if _measure(bare) > 1 or (_measure(bare) == 1 and not _ends_short(bare)):
            word = bare
    return word


def _mended(bare: str) -> str:
    """Returns a verb that lost -ing or -ed with its own ending: runn -> run, rid -> ride."""
    if bare.endswith(("at", "bl", "iz")):
        return bare + "e"
    if len(bare) > 2 and bare[-1] == bare[-2] and _shape(bare)[-1] == "c":
        # Past one syllable, the second l is inflection too: travelling.
        return bare if bare[-1] in "sz" or (bare[-1] == "l" and _measure(bare) < 2) else bare[:-1]
    return bare + "e" if _measure(bare) == 1 and _ends_short(bare) else bare
