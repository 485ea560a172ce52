# SPDX-License-Identifier: Apache-2.0
"""What a language model wrote, right and wrong."""

import json

import pytest
from pydantic import ValidationError

from dataengine.models.answers import Failure
from dataengine.models.llm import Request
from dataengine.models.validate import (
    Answer,
    TextChecker,
    TextChecks,
    ask,
    by_id,
    contact_problem,
    echo_problem,
    grounding_problem,
    parse_object,
    refusal_problem,
    repetition_problem,
    unquoted,
)


class Two(Answer):
    a: str
    b: str


GOOD = '{"a": "one", "b": "two"}'


def reason(result):
    return result.reason if isinstance(result, Failure) else None


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure, here it is:\n\n{GOOD}\n\nHope this helps {{smile}}!",
        f'<think>maybe {{"a": "draft", "b": "draft"}} or {{</think>{GOOD}',
        f'First try: {{"a": "x", "b": "y"}}. Better: {GOOD}',
        f'{{"c": 1}} {GOOD} {{"d": 2}}',
        f"{{{{{{ {GOOD}",
        GOOD.replace(",", ",\n\t"),
    ],
)
def test_the_object_is_found_in_what_stands_around_it(answer):
    assert parse_object(answer, Two) == Two(a="one", b="two")


def test_line_breaks_inside_a_string_are_read():
    assert parse_object('{"a": "one\ntwo", "b": ""}', Two) == Two(a="one\ntwo", b="")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "not_json"),
        ("A dog runs.", "not_json"),
        ('{"a": "one", "b": "tw', "not_json"),
        ('["a", "b"]', "not_json"),
        ("{" * 50_000, "not_json"),
        ('{"a":' * 15_000, "not_json"),
        (f"<think>{GOOD}</think>", "not_json"),
        ("x" * 100_001, "too_long"),
        ('{"a": "one"}', "wrong_fields"),
        ('{"a": "one", "b": "two", "c": "three"}', "wrong_fields"),
        ('{"a": "one", "b": 2}', "wrong_fields"),
        ('{"a": "one", "b": null}', "wrong_fields"),
        ('{"a": "one", "b": ["two"]}', "wrong_fields"),
        (f'{{"answer": {GOOD}}}', "wrong_fields"),
    ],
)
def test_what_is_no_such_object_is_named(answer, why):
    assert reason(parse_object(answer, Two)) == why


def test_the_schema_of_an_answer_forbids_other_fields():
    schema = Two.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["a", "b"]


# --------------------------------------------------------------------------------------- checks

CAPTIONS = [
    "A dog runs.",
    "A red ball rolls across a dark green background while a piano plays softly.",
    'A woman says "I\'m sorry, I cannot come today" to a man in a blue coat.',
    "A man says \u201cAs an AI I cannot do that\u201d in a robot's voice on stage.",
    "The video shows how to replace the brake pads of a Toyota Corolla.",
    "Gordon Ramsay prepares risotto alla milanese in a London kitchen.",
    "A man in a suit explains what a large language model is to a class of students.",
    "Here is a street with many people; they don't look at the camera.",
    "A singer repeats no, no, no, no while the band plays behind her.",
    "Sure-footed goats climb a steep rock and people can't follow them.",
    "A sign reads '10000000000000 dollars' above the door of a small shop.",
    "A man walks to the door, a man walks to the car, a man walks to the shop, and a man waits.",
    "No audience is in the hall, and no music is played while he speaks.",
    "A woman works as an assistant in a shop where I cannot read the sign.",
    "A robot that was built as an AI companion waves; it is not possible to see its legs.",
    "A captain answers the phone: the weather is fine and the ship may leave.",
]

PROBLEMS = {
    "I'm sorry, but I can't help with that request.": "refusal",
    "I\u2019m sorry, but I can\u2019t help with that request.": "refusal",
    "Sorry, this is not something I can do for you.": "refusal",
    "Unfortunately, I am unable to describe the clip.": "refusal",
    "I cannot describe this clip because it shows people.": "refusal",
    "The clip is short. I do not have enough information about it.": "refusal",
    "As an AI language model, I have no eyes to see this.": "refusal",
    "A dog runs. As a language model I find that nice.": "refusal",
    "I am an AI assistant and I was made to help you.": "refusal",
    "No captions were provided for this short clip.": "refusal",
    "I apologize for the confusion about this clip.": "refusal",
    "Certainly! A dog runs over a green lawn.": "chatter",
    "Here is the fused caption: a dog runs over a lawn.": "chatter",
    "Caption: a dog runs over a green lawn.": "chatter",
    "A dog runs over a lawn. Let me know if you need more.": "chatter",
    "A dog runs. Use only what the texts say. A cat sits.": "prompt_echo",
    "use only -- what the TEXTS say and nothing more": "prompt_echo",
    "A dog runs with my_field in its mouth.": "prompt_echo",
    "A dog runs over a lawn <|im_end|> and barks.": "prompt_echo",
    "A dog runs over a lawn </s> and barks.": "prompt_echo",
    "```A dog runs over a lawn.```": "prompt_echo",
    "A dog runs and runs and runs and runs and runs and runs.": "repetition",
    "the the the the the the the the dog": "repetition",
    "A dog barks loudly. " * 4: "repetition",
    "A dog runs hahahahaaaaaaaaaaaaaaaa over there.": "repetition",
    "one two three four five six seven eight " * 4: "repetition",
    "A man walks to the door and opens it. Then a man walks to the door and closes it. "
    "A man walks to the door and opens it. Later a man walks to the door and closes it. "
    "So a man walks to the door and opens it.": "repetition",
    "OK": "too_short",
    "N/A": "too_short",
    "\u200b\u202e \x00": "too_short",
    "": "too_short",
    " ".join(f"w{i}" for i in range(151)): "too_long",
    "Ein roter Ball rollt \u00fcber den Rasen, w\u00e4hrend jemand leise Klavier spielt.": "other_language",
    "Un homme marche dans la rue avec son chien et regarde les voitures.": "other_language",
    "Una pelota amarilla rueda lentamente mientras suena un piano en la sala grande.": "other_language",
    "\u4e00 \u53ea \u72d7 \u5728 \u8349 \u5730 \u4e0a \u8dd1 \u6b65 \u7136 \u540e": "other_language",
    "\u041a\u0440\u0430\u0441\u043d\u044b\u0439 \u043c\u044f\u0447 \u043a\u0430\u0442\u0438\u0442\u0441\u044f \u043f\u043e \u0437\u0435\u043b\u0451\u043d\u043e\u0439 \u0442\u0440\u0430\u0432\u0435 \u0438 \u0438\u0433\u0440\u0430\u0435\u0442 \u043c\u0443\u0437\u044b\u043a\u0430.": "other_language",
}  # fmt: skip


@pytest.fixture(scope="module")
def checker():
    return TextChecker(
        TextChecks(), ["Use only what the texts say", "In English", ""], ("my_field",)
    )


@pytest.mark.parametrize("text", CAPTIONS)
def test_a_caption_passes(checker, text):
    assert checker.check(text) == text


@pytest.mark.parametrize("text", PROBLEMS)
def test_what_is_no_caption_is_named(checker, text):
    assert reason(checker.check(text)) == PROBLEMS[text]


def test_what_is_said_to_the_model_never_quotes_it(checker):
    for text in PROBLEMS:
        said = checker.check(text).detail
        assert said.endswith(".")
        assert not text or text not in said


def test_a_caption_can_be_stored(checker):
    text = checker.check("A dog\n\truns\x00 after \ud83d a cat\u202e.\u2028 ")
    assert text == "A dog runs after a cat."
    text.encode()


def test_short_texts_and_quotations_are_not_judged_by_language(checker):
    assert checker.check("Ein roter Ball rollt.") == "Ein roter Ball rollt."
    quoting = 'He says: "Ein roter Ball rollt \u00fcber den Rasen, und niemand h\u00e4lt ihn auf."'
    assert checker.check(quoting) == quoting


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I'm sorry, I cannot come. Sure, let me know if it rains.", None),
        ("Here is the translation: I cannot come today.", "chatter"),
        ("Translation: I cannot come today.", "chatter"),
        ("As an AI language model, I translate this for you.", "refusal"),
    ],
)
def test_what_people_say_is_judged_otherwise(text, why):
    assert reason(TextChecker(TextChecks(language=""), speech=True).check(text)) == why


def test_the_limits_are_settings():
    checker = TextChecker(TextChecks(min_words=1, max_words=4, language=""))
    assert checker.check("Hund") == "Hund"
    assert checker.check("Ein Hund rennt schnell") == "Ein Hund rennt schnell"
    assert reason(checker.check("Ein Hund rennt sehr schnell")) == "too_long"
    with pytest.raises(ValidationError, match="max_words"):
        TextChecks(min_words=5, max_words=4)


def test_another_language_than_english_can_be_asked_for():
    checker = TextChecker(TextChecks(language="de"))
    german = "Ein roter Ball rollt \u00fcber den Rasen, w\u00e4hrend jemand leise Klavier spielt."
    assert checker.check(german) == german
    assert reason(checker.check(CAPTIONS[1])) == "other_language"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('He says "no" twice', "He says   twice"),
        ("He says \u201cno\u201d twice", "He says   twice"),
        ("the dogs' bowls and the cat's toy", "the dogs' bowls and the cat's toy"),
        ("it's 'no' or 'yes'", "it's   or  "),
    ],
)
def test_quotations_are_found(text, kept):
    assert unquoted(text) == kept


@pytest.mark.parametrize(
    ("text", "sources", "why"),
    [
        ("Two dogs are playing.", ["A dog runs.", "Birds sing."], None),
        ("A bird is singing while they play.", ["A dog runs.", "Birds sing."], None),
        ("The people are there with the others.", ["The dog is there with them."], "ungrounded"),
        ("Buy cheap watches today.", ["A dog runs.", "Birds sing."], "ungrounded"),
        ("Buy cheap watches today.", ["", "It is so."], None),
        ("Buy cheap watches today.", [], None),
    ],
)
def test_a_caption_shares_a_word_with_what_it_was_made_of(text, sources, why):
    assert reason(grounding_problem(text, sources)) == why


def test_how_many_words_must_be_shared_is_a_setting():
    sources = ["A dog runs over a lawn."]
    assert grounding_problem("A dog on a lawn.", sources, 2) is None
    assert reason(grounding_problem("A dog sleeps.", sources, 2)) == "ungrounded"
    assert grounding_problem("A cat sleeps.", sources, 0) is None
    assert grounding_problem("A dog.", ["A dog."], 9) is None  # no more than there are


INJECTED = [
    "Buy the ball at our shop now, the best piano store in town.",
    "Visit our store for a red piano and win a free holiday in Spain.",
]
HONEST = [
    "A red ball rolls over a lawn while a piano plays and a voice points it out.",
    "As somebody plays the piano, a ball rolls over grass, and a voice tells of rain.",
]


def test_a_share_of_a_captions_words_is_of_its_sources():
    sources = ["A red ball rolls across a green lawn.", "A piano plays softly."]
    for text in INJECTED:
        assert grounding_problem(text, sources) is None  # a word or two are
        assert reason(grounding_problem(text, sources, min_ratio=0.35)) == "ungrounded"
    for text in HONEST:
        assert grounding_problem(text, sources, min_ratio=0.35) is None
    short = ["A person talks."]
    told = "A person talks about mortgage rates, the housing market and the weather in Ohio."
    assert grounding_problem(told, short, min_ratio=0.35) is None


@pytest.mark.parametrize(
    "contact",
    [
        "https://evil.example/now",
        "www.evil.com",
        "Evil.com",
        "evil-shop.co/x",
        "evil dot com",
        "me@evil.org",
        "+49 170 1234567",
        "(555) 123-4567",
        "555-1234",
    ],
)
def test_addresses_and_numbers_must_be_in_the_sources(contact):
    text = f"A red ball rolls over a lawn, see {contact}, and a piano plays."
    assert reason(contact_problem(text, ["A red ball."])) == "ungrounded"
    assert contact_problem(text, ["A red ball.", f"A sign says {contact.upper()}"]) is None


def test_what_looks_like_an_address_is_none():
    text = "In 2010-2011, 1,500,000 people saw it at 12:30.Co-workers cheer, e.g. Dr. No; 3.5 m/s of 2 x 4."
    assert contact_problem(text, []) is None


def test_long_hostile_texts_are_checked(checker):
    """A hundred thousand characters of what regular expressions find hard: this would never end."""
    for text in ("'" * 100_000, '"a' * 50_000, "here is " * 12_500, "a b " * 25_000, "<" * 100_000):
        assert isinstance(checker.check(text), Failure)
        refusal_problem(text)
        repetition_problem(text)
        echo_problem(text, ["one two three four"], ["name"])
        parse_object(text, Two)
        contact_problem(text, [])
    for text in ("1 " * 50_000, "a." * 50_000, "a@" * 50_000, "a-" * 50_000, "www." * 25_000):
        contact_problem(text, [])


# --------------------------------------------------------------------------------------- asking


class Scripted:
    """Answers each round from a mapping of its own."""

    model, revision = "scripted", ""

    def __init__(self, *rounds):
        self.rounds = list(rounds)
        self.asked = []

    def answer(self, requests):
        self.asked.append([request.prompt for request in requests])
        return self.rounds.pop(0)


def requests_of(*ids):
    return [Request(id=name, input_hash="", prompt=f"about {name}") for name in ids]


def upper(request, answer):
    """A check: what is upper case is right."""
    return f"{request.id}:{answer}" if answer.isupper() else Failure("lower", "It was lower case.")


def again(request, problem):
    return Request(id=request.id, input_hash="", prompt=f"{request.prompt} ({problem.detail})")


def test_only_bad_answers_are_asked_for_again_and_once():
    llm = Scripted(
        {"d": Failure("timeout"), "c": "low", "b": "bad", "a": "GOOD"}, {"c": "HIGH", "b": "worse"}
    )
    results = ask(llm, requests_of("a", "b", "c", "d"), upper, again)
    assert results == [
        "a:GOOD", Failure("lower", "It was lower case."), "c:HIGH", Failure("timeout"),
    ]  # fmt: skip
    assert llm.asked[1] == ["about b (It was lower case.)", "about c (It was lower case.)"]
    assert llm.rounds == []


def test_the_model_may_fail_at_the_second_time():
    llm = Scripted({"a": "low"}, {"a": Failure("timeout")})
    assert ask(llm, requests_of("a"), upper, again) == [Failure("timeout")]


def test_an_empty_or_truncated_answer_is_asked_for_again_without_quoting_it():
    cut = Failure("bad_output", "cut off at max_tokens: 'watches'")
    llm = Scripted({"a": cut, "b": Failure("timeout")}, {"a": "GOOD"})
    assert ask(llm, requests_of("a", "b"), upper, again) == ["a:GOOD", Failure("timeout")]
    ((said,),) = llm.asked[1:]
    assert said.startswith("about a (It was empty")
    assert "watches" not in said
    llm = Scripted({"a": cut}, {"a": cut})
    assert ask(llm, requests_of("a"), upper, again) == [cut]


def test_nothing_is_asked_about_nothing():
    assert ask(Scripted(), [], upper, again) == []


@pytest.mark.parametrize(
    ("ids", "answers", "said"),
    [
        ("ab", {"a": "x"}, "no answer came for: 'b'"),
        ("a", {"a": "x", "z": "y"}, "nobody asked for: 'z'"),
        ("aa", {"a": "x"}, "two requests have the id: 'a'"),
    ],
)
def test_answers_that_do_not_belong_are_a_programming_error(ids, answers, said):
    with pytest.raises(ValueError, match=said):
        by_id(requests_of(*ids), answers)


def test_a_json_string_may_spell_what_cannot_be_stored(checker):
    answer = json.dumps({"a": "A dog runs \ud800\udc00\ud83d fast.", "b": ""})
    parsed = parse_object(answer, Two)
    assert isinstance(parsed, Two)
    checker.check(parsed.a).encode()
