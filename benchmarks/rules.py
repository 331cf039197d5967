"""The publishers' scoring rules, as pure functions on the text they are given.

Each rule keeps its quirks, because the published numbers were counted with them: POPE reads "NO" as
a yes, and MathVista matches an empty answer to the shortest option. `option_vlmevalkit` is of
VLMEvalKit (commit e8e78f05), `paper_*` of Ground What You See (OMNEX-VL c606316), the others of the
benchmarks' own scripts.

The rules were made for short answers. `final_answer` takes one out of a response that reasons
first. Every rule accepts any string of any length, in linear time. None means that the rule does
not decide; the publisher would ask a judge.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import answers
from reasoning import between

# --- the answer of a reasoning response -----------------------------------------------------------


def final_answer(text: str) -> str:
    """The first <answer>, else the text after the last </think>, else the whole text.

    Official rules are applied to this text. POPE's would otherwise read the first sentence of the
    caption. An <answer> that is never closed, as in a truncated response, runs to the end.
    """
    found = between(text, "answer")
    if found is not None:
        return found
    rest = text.rpartition("</think>")[2]
    if "<answer>" in rest:
        return rest.rpartition("<answer>")[2].strip()
    return rest.strip() if rest != text else text


# --- Ground What You See --------------------------------------------------------------------------


def paper_answer(text: str) -> str:
    """The first <answer>; the whole output if there is none, or an empty one."""
    return between(text, "answer") or text


def paper_correct(text: str, solution: str, problem_type: str) -> bool:
    """The paper's reward of an output, 0 or 1: letters are equal, or numbers to two decimals."""
    return answers.is_correct(paper_answer(text), solution, problem_type)


# --- yes or no ------------------------------------------------------------------------------------


def pope(text: str) -> str:
    """POPE: "no" if the first sentence has the word No, no or not, split at blanks; else "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def video_hallucer(text: str, gold: str) -> bool:
    """VideoHallucer: is the gold word in the text? "yes and no" is right for both golds."""
    return re.search(rf"\b{gold}\b", text, re.IGNORECASE) is not None


def amber_yes_no(text: str) -> str | None:
    """The first "yes" or "no" as AMBER's script expects it, "Yes" or "No"; None without either."""
    found = re.search(r"\b(?:yes|no)\b", text, re.IGNORECASE)
    return found and found[0].capitalize()


# --- which option ---------------------------------------------------------------------------------

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"


def option_vlmevalkit(text: str, options: Mapping[str, str]) -> str | None:
    """MMBench (VLMEvalKit `can_infer`): a letter; "Z" for a refusal; None if nothing is inferred.

    options: letter -> text, without missing ones. In this order: the only letter that stands
    alone, among the last four words; the letter after "answer is"; the only option whose text is
    contained, if the output is at most twice as long as all options.
    """
    if FAILED not in text:
        if any(refusal in text for refusal in REFUSALS):
            return "Z"
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0]
        if not letters and "Z" in words:
            return "Z"
        said = re.search(r"(?i)answer\s+is\s+\**([ABCD])", text)
        if said and said[1].upper() in options:
            return said[1].upper()
    text = text.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


NO_ANSWER, API_ERROR = "No Answere Found", "API Error"  # as the official script spells them


def option_videommmu(text: str, options: Sequence[str]) -> str:
    """Video-MMMU: a letter, or `NO_ANSWER`, or `API_ERROR` for an empty output.

    The strongest form counts: "X." or "X:", then "(X)", then "X" before a blank, then an option's
    text in an answer of more than five words. The last one in that form is chosen.
    """
    if text in ("", API_ERROR):
        return API_ERROR
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = [chr(ord("A") + i) for i in range(len(options))]
    form, found = "{}.", [letter for letter in letters if f"{letter}." in text]
    colon = [letter for letter in letters if f"{letter}:" in text]
    form, found = form if found else "{}:", found + colon
    if not found:
        form, found = "({})", [letter for letter in letters if f"({letter})" in text]
    if not found:  # found before a blank, but ranked by its place between blanks
        form, found = " {} ", [letter for letter in letters if f"{letter} " in text]
    if found:
        return max(found, key=lambda letter: text.rfind(form.format(letter)))
    low, is_long = text.lower(), len(text.split()) > 5
    places = {
        letter: low.rfind(option.lower())
        for letter, option in zip(letters, options)
        if option.lower() in low and is_long
    }
    return max(places, key=places.get, default=NO_ANSWER)


# --- open answers ---------------------------------------------------------------------------------

# What stands before the conclusion of a sentence. "=" counts in the last line only.
LEADS = (
    "could be |so |is |thus |therefore |final |answer |result |are |in total |total |identify |"
    "recognize |calculated as |counted as |measured as |observed as |concluded as |found to be |"
    "equals |determined to be |number of |value is |adds up to |have |has "
).split("|")
NUMBERS = (  # with commas, with an exponent, plain
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    # (?<!\d) keeps a match from starting inside a number: linear time, same result
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def open_videommmu(text: str) -> list[str | float] | str:
    """Video-MMMU: every string and number (two decimals) that an open answer may mean.

    `API_ERROR` for an empty output. Each line gives the shortest text after one of `LEADS`. The
    whole text is used if no line has any.
    """
    if text in ("", API_ERROR):
        return API_ERROR
    whole = text.strip().strip(".").lower()
    lines, found = whole.split("\n"), []
    for i, line in enumerate(lines):
        leads = [*LEADS, "="] if i == len(lines) - 1 else LEADS
        shortest = None
        for tail in (line.rpartition(lead)[2].strip() for lead in leads if lead in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            found.append(shortest)
    found = found or [whole]
    numbers = [number for part in found for pattern in NUMBERS for number in pattern.findall(part)]
    return list(dict.fromkeys(value for part in found + numbers for value in _normalized(part)))


def _normalized(text: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; a single letter only beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_videommmu_correct(parsed: list[str | float] | str, gold: str | Sequence[str]) -> bool:
    """Is the gold text in one of the strings, or the gold number (0.286 is 0.29) a number?"""
    golds = [gold] if isinstance(gold, str) else gold
    wanted = [value for one in golds for value in _normalized(one)]
    texts = [want for want in wanted if isinstance(want, str)]
    return any(
        any(t in got for t in texts) if isinstance(got, str) else got in wanted for got in parsed
    )


# --- MathVista ------------------------------------------------------------------------------------


def mathvista_extract(
    text: str, question_type: str, answer_type: str, choices: Sequence[str] | None
) -> str | None:
    """MathVista's extraction without a judge: an exact option, or a bare number; else None."""
    if text == "" or (question_type == "multi_choice" and text in (choices or ())):
        return text
    try:
        if answer_type == "integer":
            return str(int(text))
        if answer_type == "float":
            return str(float(text))
    except ValueError:
        pass
    return None


def mathvista_normalize(
    extraction: str,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] | None,
    precision: float | None,
    ignore_empty: bool = False,
) -> str | None:
    """MathVista's form of an extracted answer, to compare with the gold text; None is wrong.

    Multiple choice gives the text of the option whose letter is in brackets, or is all there is;
    else of the option with the least edit distance, the first of equals. So "" chooses the shortest
    option, unless `ignore_empty`. Numbers go through binary floats: 14.9 -> "14", and 1.25 -> "1.2"
    at precision 1.0, which is a float in the published file.
    """
    if question_type == "multi_choice":
        extraction = extraction.strip()
        if not choices or (ignore_empty and not extraction):
            return None
        bracketed = re.search(r"\(([a-zA-Z])\)", extraction)
        letter = bracketed[1].upper() if bracketed else extraction
        if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(choices):
            return choices[ord(letter) - ord("A")]
        return min(choices, key=lambda choice: edit_distance(letter, choice))
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), int(precision)))
    except (ValueError, OverflowError, TypeError):
        return None
    return str(extraction)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance, with one integer operation per letter of `a`.

    Myers, A fast bit-vector algorithm for approximate string matching, J. ACM 46, 1999.
    """
    if not b:
        return len(a)
    where = {letter: 0 for letter in b}
    for i, letter in enumerate(b):
        where[letter] |= 1 << i
    last, every = 1 << (len(b) - 1), (1 << len(b)) - 1
    # bit i: entry i + 1 of the column is one more (rises), or one less (falls), than entry i
    rises, falls, distance = every, 0, len(b)
    for letter in a:
        match = where.get(letter, 0)
        diagonal = (((match & rises) + rises) ^ rises) | match | falls
        up, down = falls | ~(diagonal | rises) & every, rises & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, down << 1 & every
        rises, falls = down | ~(diagonal | up) & every, up & diagonal
    return distance


# --- AMBER: what a description names --------------------------------------------------------------


@dataclass(frozen=True)
class AmberWords:
    """AMBER's word lists: relation.json (word -> associated words) and safe_words.txt."""

    relation: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @cached_property
    def known(self) -> frozenset[str]:
        """The words that are counted at all."""
        return frozenset(self.relation) | {
            word for words in self.relation.values() for word in words
        }

    def around(self, objects: Sequence[str]) -> list[tuple[str, int]]:
        """(word, index of the object it stands for): all associated words, then the objects.

        The order decides: "building" stands for a wall if it is associated with one, even if the
        objects include a building.
        """
        near = [(word, i) for i, name in enumerate(objects) for word in self.relation.get(name, ())]
        return near + [(name, i) for i, name in enumerate(objects)]


def amber_description(
    nouns: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    words: AmberWords,
    similar: Callable[[str, str], float],
) -> tuple[list[str], list[bool], set[int], set[int]]:
    """(known nouns, is each hallucinated?, indices in `truth` it names, indices in `hallu`).

    nouns: of the description, lemmatised, in order and with repetition; case counts. truth, hallu:
    objects in the picture, and objects that annotators expect to be hallucinated. similar: of two
    words; above 0.8 they count as the same (`amber.amber_tools` has the official one).
    """
    nouns = [noun for noun in nouns if noun in words.known]
    there, not_there = words.around(truth), words.around(hallu)

    def first(among, agrees) -> set[int]:
        return set(next(([i] for word, i in among if agrees(word)), []))

    flags, named, invented = [], set(), set()
    for noun in nouns:
        flags.append(False)
        if noun in words.safe:
            continue
        if same := first(there, noun.__eq__):
            named |= same
            continue
        alike = partial(_alike, similar, noun)
        invented |= first(not_there, noun.__eq__) | first(not_there, alike)
        close = first(there, alike)
        named |= close
        flags[-1] = not close
    return nouns, flags, named, invented


def _alike(similar, noun: str, word: str) -> bool:
    return similar(noun, word) > 0.8
