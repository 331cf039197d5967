"""Is this answer right? One verdict, used by the accuracy reward, by the caption judge and by
evaluation.

Two rules. *Strict* is the official one (OMNEX-VL's `reward_fn`): the whole answer must be the
option letter, or a number equal to two decimals. *Lenient* takes the answer out of the words around
it, as a person reads it: "The answer is (B).", "B. a cat", "$1,200", "50 %", "12 cm". Neither takes
what hedges ("A or B", every letter listed, two numbers, "not 5"): such a rule could be hacked. Both
compare in Unicode's composed form (NFC), so that an accent is an accent however it is stored, and
without characters that nobody sees (zero-width space, byte order mark); full-width letters and
signs ("（Ｂ）") are plain ones for the lenient rule only.

Strings in, booleans out.
"""

import re
import unicodedata
from collections.abc import Sequence

LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore)\b,?\s*)?(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)*"
    r"(?:answer|option|choice|it)(?:\s+is\b|'s\b|\s+would be\b|\b)\s*[:=]?\s*",
    re.IGNORECASE,
)
LETTER = re.compile(r"\(?([A-Za-z])(?:\)?[.:]?|[.:]?)(?:(?<=[.:)])\s+(.+))?", re.DOTALL)
# in the text after a letter: another letter by itself. (So "B. vitamin C" is not taken, rather than
# "B. or C".)
ANOTHER = re.compile(r"(?<![\w'])(?:[B-HJ-Z](?![\w'])|[A-Za-z](?:[.):](?=\s|$)|\)?$))")
NUMBER = re.compile(
    r"(?<![\w.,^])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
# in the text after a letter: a choice among letters, or a remark on the letter
DOUBT = re.compile(r"\b(?:or|nor|not)\s+\(?[A-Z](?!\w)|^(?:is|isn't|are)\b")
# around a number, which is written # here: a sign that was not read with it, a range, a bound, a
# power, a fraction
HEDGE = re.compile(
    r"[-/]\s*[$€£]?\s*#|#\s*[-/]\s*#|#k\b|[<>≤≥±+*^½¼¾²³]|n't\b|"
    r"\b(?:no|not|never|or|than|least|most|between|over|under|above|below|up to|minus|negative|"
    r"hal(?:f|ves)|thirds?|quarters?|fifths?|dozens?|hundreds?|thousands?|(?:m|b|tr)illions?|"
    r"\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b",
    re.IGNORECASE,
)
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# full-width -> plain
NARROW = {0x3000: " "} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
# not the joiners of words in Persian or Hindi
UNSEEN = dict.fromkeys((0x200B, 0x2060, 0xFEFF, 0xAD))


class Answers(str):
    """The solution of a row that accepts several answers: any of `accepted` is right, and the first
    of them is its text, which is what is taught (cold start, y_i of Eq. 4) and shown."""

    accepted: tuple[str, ...]

    def __new__(cls, first: str, *others: str) -> "Answers":
        self = super().__new__(cls, first)
        self.accepted = (first, *others)
        return self


def extract(answer: str | None, text: str) -> str:
    """What is judged: the <answer> stage, or the whole response when it has no such stage (official
    rule)."""
    return (text if answer is None else answer).strip()


def solution_of(field: str) -> str:
    """The bare solution of a data row: 'A' from '<think>...</think><answer>A</answer>', or the
    field as it is."""
    found = re.findall(r"<answer>(.*?)</answer>", field, re.DOTALL)
    return (found[0] if len(found) == 1 else field).strip()


def to_number(text: str) -> float | None:
    """'1,204.5' -> 1204.5; None where the text is not one finite number."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None  # also refuses nan


def is_correct(
    prediction: str, solution: str | Sequence[str], problem_type: str, lenient: bool = False
) -> bool:
    """The verdict on one answer. Both are bare strings (no tags); of several accepted answers any
    is right.

    multiple choice   the same letter, nothing else, case kept
    numerical         equal to two decimals, both written with or without a point or comma (D-19)
    regression        within 5 % of the solution [choice: one threshold of the graded measure]
    OCR, free-form    the same words, ignoring case and spacing [choice; official: always 0, D-18]

    lenient: or the same after `read`, numbers equal to two decimals however they are written. What
    is right by the strict rule is right by the lenient one. Raises ValueError for any other problem
    type.
    """
    several = getattr(solution, "accepted", solution)
    if not isinstance(several, str):
        return any(is_correct(prediction, one, problem_type, lenient) for one in several)
    prediction, solution = (
        unicodedata.normalize("NFC", text).translate(UNSEEN) for text in (prediction, solution)
    )
    if lenient and not is_correct(prediction, solution, problem_type):
        got, want = (read(text, problem_type) for text in (prediction, solution))
        if got is None or want is None or isinstance(got, str):
            return got is not None and got == want
        return (
            abs(got - want) <= 0.05 * abs(want)
            if problem_type == "regression"
            else round(got, 2) == round(want, 2)
        )
    if problem_type == "multiple choice":
        return prediction.strip() == solution.strip()
    if problem_type in ("numerical", "regression"):
        got, want = to_number(prediction), to_number(solution)
        if got is None or want is None:
            return False
        if problem_type == "regression":
            return abs(got - want) <= 0.05 * abs(want)
        as_decimal = [any(mark in text for mark in ".,") for text in (prediction, solution)]
        return as_decimal[0] == as_decimal[1] and round(got, 2) == round(want, 2)
    if problem_type in ("OCR", "free-form"):
        return prediction.casefold().split() == solution.casefold().split()
    raise ValueError(f"unknown problem type {problem_type!r}")


def without_lead_in(text: str) -> str:
    """'**The answer is: a cat**' -> 'a cat'"""
    bare = text.replace("**", "").strip(" \t\n\"'`*")
    found = LEAD_IN.match(bare)
    return bare[found.end() :].strip() if found else bare


def read(text: str, problem_type: str) -> str | float | None:
    """The answer without the words around it: a letter, a number, or words; None where there is
    none, or more than one.

    "The answer is (b)." -> "B"; "$1,200" -> 1200.0; "Two cats" -> 2.0; "It is the Red one!" -> "red
    one".
    """
    bare = without_lead_in(text.translate(NARROW))
    if problem_type == "multiple choice":
        found = LETTER.fullmatch(bare)
        rest = (found and found[2]) or ""
        return None if not found or ANOTHER.search(rest) or DOUBT.search(rest) else found[1].upper()
    folded = bare.casefold()
    # parts of a word, as vowels are in Hindi
    marks = "".join({c for c in folded if unicodedata.category(c)[0] == "M"})
    words = re.findall(rf"[\w{marks}]+", folded)
    if problem_type not in ("numerical", "regression"):
        return " ".join(words[words[:1] in (["a"], ["an"], ["the"]) :]) or None
    bare = re.sub("[\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{HYPHEN}]", "-", bare)
    # "cm2", "m^2": of a unit
    numbers, rest = NUMBER.findall(bare), re.sub(r"[A-Za-z]\^?\d", "", NUMBER.sub("#", bare))
    spelt = [word for word in re.findall(r"\w+", rest.casefold()) if word in WORDS]
    if len(numbers) + len(spelt) != 1 or HEDGE.search(rest) or re.search(r"\d", rest):
        return None
    numbers = numbers or [str(WORDS.index(spelt[0]))]
    return to_number(numbers[0])
