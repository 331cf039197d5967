"""What each publisher's scoring function makes of a model's output.

One small function per published rule, on the text it is given, with its quirks: "NO" is a yes to POPE, an empty answer
is nearest to the shortest option to MathVista, an option "nan" is found in "banana" by LMMs-Eval. That is what the
published numbers were counted with. The names say whose rule it is: the benchmark's own script has the benchmark's
name alone, `_vlmevalkit` and `_lmms` are the two evaluation suites (VLMEvalKit e8e78f05, LMMs-Eval 75571cfe), `paper_`
is the code of Ground What You See (OMNEX-VL c606316). Which of them counts where is in `benchmarks.py`.

The rules were made for short answers; `final_answer` takes one out of a response that reasons first. All of them take
any string, of any length, in linear time.

Strings in, strings, numbers and booleans out. None: the rule does not decide (it would ask a judge).
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import answers

# --- the answer of a reasoning response -------------------------------------------------------------------------------


def between(text: str, tag: str) -> str | None:
    """What the first <tag> ... </tag> holds, stripped; None without one. (re's lazy form takes a time that grows with
    the square of a text of opening tags.)"""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start + 1)
    return None if start < 0 or end < 0 else text[start + len(tag) + 2 : end].strip()


def final_answer(text: str) -> str:
    """The step before any official rule: the first <answer>, or what follows the last </think>, or the whole.

    Without it POPE's rule reads the first sentence of the caption. An <answer> that is never closed (a response that
    was cut off) runs to the end.
    """
    found = between(text, "answer")
    if found is not None:
        return found
    rest = text.rpartition("</think>")[2]
    return rest.rpartition("<answer>")[2].strip() if "<answer>" in rest else rest.strip() if rest != text else text


# --- Ground What You See ----------------------------------------------------------------------------------------------


def paper_answer(text: str) -> str:
    """The first <answer>; the whole output where there is none, or an empty one."""
    return between(text, "answer") or text


def paper_reward(text: str, solution: str, problem_type: str) -> float:
    """The reward of one output, 0 or 1; `mean_relative_accuracy` for regression, 0 for types without a rule."""
    answer = paper_answer(text)
    if problem_type in ("multiple choice", "numerical"):
        return float(answers.is_correct(answer, solution, problem_type))
    got, want = answers.to_number(answer), answers.to_number(solution)
    return 0.0 if problem_type != "regression" or None in (got, want) else mean_relative_accuracy(got, want)


def mean_relative_accuracy(got: float, want: float) -> float:
    """The share of the ten thresholds 0.5, 0.55, ..., 0.95 for which |got - want| / |want| < 1 - threshold.

    In the single precision of the official code, which decides at a threshold itself.
    """
    from numpy import abs, arange, float32

    error = abs(float32(got) - float32(want)) / (abs(float32(want)) + float32(1e-8))
    return float((error < float32(1) - (0.5 + 0.05 * arange(10)).astype(float32)).mean(dtype=float32))


# --- yes or no --------------------------------------------------------------------------------------------------------


def pope(text: str) -> str:
    """POPE's own: "no" if the first sentence, split at blanks, has the word No, no or not; else "yes", always."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_lmms(text: str) -> str:
    """Lower case, no blanks around it. Only "yes" and "no" themselves are ever right."""
    return text.lower().strip()


def pope_lmms_measures(said: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """LMMs-Eval's measures of POPE: what is neither counts in accuracy alone; the yes ratio is the gold's."""
    pairs = list(zip(said, gold, strict=True))
    tp, fp, fn = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    accuracy = sum(a == b for a, b in pairs) / len(pairs)
    yes = list(gold).count("yes") / len(pairs)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1_score": f1, "yes_ratio": yes}


def yes_no_vlmevalkit(text: str) -> str:
    """Yes or No when just one of the two words is there, Unknown otherwise (which goes to a judge)."""
    text = text.lower()
    digits, cleaned = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        joined = digits or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if joined else " ")
    # 32: re.UNICODE, passed upstream where the count belongs, so that only so many full stops go
    words = re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=32).split()
    yes, no = "yes" in words, "no" in words
    return "Unknown" if yes == no else "Yes" if yes else "No"


def video_hallucer(text: str, gold: str) -> bool:
    """VideoHallucer: is the right word in it? Other words do not matter: "yes and no" is right for both questions."""
    return re.search(rf"\b{gold}\b", text, re.IGNORECASE) is not None


def amber_yes_no(text: str) -> str | None:
    """The first word of "yes" and "no" as AMBER's script wants it, exactly "Yes" or "No"; None: neither is there."""
    found = re.search(r"\b(?:yes|no)\b", text, re.IGNORECASE)
    return found and found[0].capitalize()


def amber_yes_no_lmms(text: str) -> str:
    """Yes if "yes" is anywhere ("eyes"), else No if "no" is ("nothing"), else the text as it is."""
    return "Yes" if "yes" in text.lower() else "No" if "no" in text.lower() else text


# --- which option -----------------------------------------------------------------------------------------------------

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"
AFFIXES = [("", end) for end in (".", ",", ":", ")", ").")] + [("(", ")"), ("(", ").")]
AFFIXES += [(":", end) for end in ("", ",", ".", ")", ").")]


def option_vlmevalkit(text: str, options: Mapping[str, str]) -> str | None:
    """MMBench's own rule (VLMEvalKit `can_infer`): a letter; "Z" for a refusal; None: not inferable.

    options: letter -> text, missing ones left out. A letter counts when it is the only one that stands alone, among
    the last four words; then "answer is X"; then the one option whose text is contained in a text at most twice as long
    as all options.
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
    return _contained(text, options) if len(text.lower()) <= 2 * sum(map(len, options.values())) else None


def option_lmms(text: str, options: Mapping[str, str]) -> str | None:
    """LMMs-Eval `can_infer`: a letter A to E by itself, then one with a mark (X. X, X: (X) ...), then an option's text.

    options: as in lmms-lab/MMBench, missing ones "nan". A bare letter is not read where an "A" stands among more than
    three words: it may be an article.
    """
    if FAILED not in text:
        words = text.split()
        for before, after in [("", ""), *AFFIXES]:
            letters = [letter for letter in "ABCDE" if before + letter + after in words]
            if len(letters) == 1 and not (before + after == "" and "A" in words and len(words) > 3):
                return letters[0]
    return _contained(text, options)


def _contained(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option whose text is in it, ignoring case."""
    text = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


SAID = "the answer is|answer is|the correct answer is|correct answer is|the best answer is|best answer is|"
SAID += "the correct option is|correct option is|the best option is|best option is|the choice is|choice is|"
SAID += "the correct choice is|correct choice is|i choose|i select|i pick|my answer is|my choice is|"
SAID += "옵션|정답은|답은|답:|答案是|答案为|选|答えは"


def letter_lmms(text: str, letters: Sequence[str]) -> str:
    """LMMs-Eval `extract_mcq_answer`: the letter in the strongest form, and of those the last; "" without any.

    Strongest first: at the start, at the end, anywhere after "the answer is" and its kin, then (X), X., X:, X), X
    before a blank; a letter inside a word where there is nothing else. So "I think it is (B)" chooses I of ten options.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text, bare, low = f" {text} ", text.strip(), text.lower()
    ends = [end for end in (low.find(said) + len(said) for said in SAID.split("|") if said in low)]
    found = []  # (strength, place, letter)
    for letter in letters:
        for strength, form in ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})")):
            found.append((strength, text.rfind(form), letter))
        found.append((2, text.rfind(f"{letter} "), letter))
        found += [(7, text.find(letter, end), letter) for end in ends]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
    found = [item for item in found if item[1] >= 0] or [(0, text.rfind(letter), letter) for letter in letters]
    best = max(found, key=lambda item: item[:2], default=(0, -1, ""))  # the first of equals
    return best[2] if best[1] >= 0 else ""


NO_ANSWER, API_ERROR = "No Answere Found", "API Error"  # as the official script spells them


def option_videommmu(text: str, options: Sequence[str]) -> str:
    """Video-MMMU's parser: a letter, or `NO_ANSWER`, or `API_ERROR` for an empty output.

    The letter written "X." or "X:", else "(X)", else before a blank, else the option whose text is in an answer of more
    than five words. Among several the one that stands last in the strongest of these forms.
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
    if not found:  # found before a blank, but ranked by where it stands between blanks
        form, found = " {} ", [letter for letter in letters if f"{letter} " in text]
    if found:
        return max(found, key=lambda letter: text.rfind(form.format(letter)))
    low = text.lower()
    found = [letter for letter, option in zip(letters, options) if option.lower() in low and len(text.split()) > 5]
    return max(found, key=lambda letter: low.rfind(options[ord(letter) - ord("A")].lower()), default=NO_ANSWER)


def after_answer(text: str) -> str:
    """VLMEvalKit's step before the parsers of Video-MMMU: what follows the last "Answer:"."""
    return text.rpartition("Answer:")[2].strip()


# --- open answers -----------------------------------------------------------------------------------------------------

# Before what a sentence says in the end. "=" counts in the last line only.
LEADS = (
    "could be |so |is |thus |therefore |final |answer |result |are |in total |total |identify |recognize |"
    "calculated as |counted as |measured as |observed as |concluded as |found to be |equals |determined to be |"
    "number of |value is |adds up to |have |has "
).split("|")
NUMBERS = (  # with commas, with an exponent, plain. (?<!\d): no match starts inside a number, which changes no result
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def open_videommmu(text: str) -> list[str | float] | str:
    """Video-MMMU's parser of open answers: every string and number (to two decimals) the answer may be.

    `API_ERROR` for an empty output. Per line the shortest tail after one of `LEADS`; the whole where no line has any.
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
    return list(dict.fromkeys(value for part in found + numbers for value in _normal(part)))


def _normal(text: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; a single letter only beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_videommmu_right(parsed: list[str | float] | str, gold: str | Sequence[str]) -> bool:
    """Is the gold text in one of the strings, or the gold number (0.286 is 0.29) one of the numbers?"""
    wanted = [value for one in ([gold] if isinstance(gold, str) else gold) for value in _normal(one)]
    texts = [want for want in wanted if isinstance(want, str)]
    return any(any(t in got for t in texts) if isinstance(got, str) else got in wanted for got in parsed)


# --- MathVista --------------------------------------------------------------------------------------------------------


def mathvista_extract(
    text: str, question_type: str, answer_type: str, choices: Sequence[str] | None, quick: bool = False
) -> str | None:
    """The answer as far as MathVista's script finds it without a judge; None: it would ask one.

    An option word for word, a whole number, a decimal number; with `quick` (--quick_extract) also what stands in
    'The answer is "...".'.
    """
    if text == "" or (question_type == "multi_choice" and text in (choices or ())):
        return text
    try:
        if answer_type == "integer":
            return str(int(text))
        if answer_type == "float":
            return str(float(text))
    except ValueError:
        pass
    opening = 'The answer is "'
    for line in text.split("\n") if quick else ():
        start = line.find(opening) + len(opening)
        if opening in line and line.rfind('".') >= start:
            return line[start : line.rfind('".')]
    return None


def mathvista_normalize(
    extraction: str,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] | None,
    precision: float | None,
    ignore_empty: bool = False,
) -> str | None:
    """MathVista's form of an extracted answer, to be compared with the gold text; None: it has none, which is wrong.

    Multiple choice: the text of the option whose letter stands in brackets, or is all there is; else of the option with
    the least edit distance, the first of equals (so "" chooses the shortest, unless `ignore_empty`). Numbers go through
    binary floats: 14.9 -> "14", 1.25 -> "1.2" at precision 1. `precision` is a float in the published file.
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
    """Levenshtein's distance, one step of whole-number arithmetic a letter of `a` (Myers, J. ACM 46, 1999)."""
    if not b:
        return len(a)
    where = {letter: 0 for letter in b}
    for i, letter in enumerate(b):
        where[letter] |= 1 << i
    last, every = 1 << (len(b) - 1), (1 << len(b)) - 1
    rises, falls, distance = every, 0, len(b)  # bit i: the column's entry i + 1 is one more, one less, than entry i
    for letter in a:
        match = where.get(letter, 0)
        diagonal = (((match & rises) + rises) ^ rises) | match | falls
        up, down = falls | ~(diagonal | rises) & every, rises & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, down << 1 & every
        rises, falls = down | ~(diagonal | up) & every, up & diagonal
    return distance


def mathvista_vlmevalkit(text: str, question_type: str, answer_type: str, choices: Sequence[str] | None, answer: str):
    """VLMEvalKit's step before the judge: the letter it infers, or the number if it is the right one; else False."""
    if question_type == "multi_choice":
        return option_vlmevalkit(text, {chr(ord("A") + i): c for i, c in enumerate(choices or ())}) or False
    try:
        number = {"integer": int, "float": float}[answer_type]
        return number(text) if number(text) == number(answer) else False
    except (KeyError, ValueError):
        return False


# --- MMVU -------------------------------------------------------------------------------------------------------------

POWERS = str.maketrans({digit: f"^{i}" for i, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})


def mmvu_lmms(text: str, gold: str, question_type: str, choices: Mapping[str, str]) -> bool:
    """LMMs-Eval's rule for MMVU, not the benchmark's (which is a judge), and lenient: an empty open answer is right.

    Multiple choice: the gold letter stands alone somewhere, in any case, or the option's text is contained, or the
    letter is anywhere and a word of the option too. Open: either text contains the other, or their first numbers agree
    to 0.01, or all words of a gold of two to five words are there, or both hold the same O(...).
    """
    text, gold = text.strip(), gold.strip()
    if question_type == "multiple-choice":
        if re.search(rf"\b{re.escape(gold)}\b", text, re.IGNORECASE):
            return True
        option, low = choices.get(gold, "").strip().lower(), text.lower()
        words = [word.strip(string.punctuation) for word in option.split()]
        named = gold.upper() in text.upper() and any(len(word) > 2 and word in low for word in words)
        return gold in choices and (option in low or named)
    got, want = (one.lower().translate(POWERS) for one in (text, gold))
    numbers = [re.search(r"\d+\.?\d*", one) for one in (got, want)]
    got, want = (" ".join(one.split()) for one in (got, want))
    if want in got or got in want or (all(numbers) and abs(float(numbers[0][0]) - float(numbers[1][0])) < 0.01):
        return True
    said, words = ([w.strip(string.punctuation) for w in one.split()] for one in (got, want))
    said, words = set(said), [word for word in words if word]
    if 2 <= len(words) <= 5 and all(word in said for word in words if len(word) > 2):
        return True
    orders = [_order(one) for one in (got, want)]
    return orders[0] is not None and orders[0] == orders[1]


def _order(text: str) -> str | None:
    """The first O(...) with something inside it."""
    for found in re.finditer(r"o\s*\(", text):
        end = text.find(")", found.end())
        if end < 0:
            return None
        if end > found.end():
            return text[found.start() : end + 1]
    return None


# --- AMBER: what a description names ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AmberWords:
    """AMBER's own word lists: relation.json (word -> associated words) and safe_words.txt."""

    relation: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @cached_property
    def known(self) -> frozenset[str]:
        """The words that are counted at all."""
        return frozenset(self.relation) | {word for words in self.relation.values() for word in words}

    def around(self, objects: Sequence[str]) -> list[tuple[str, int]]:
        """(word, place of the object it stands for): all associations first, then the objects themselves. So
        "building" stands for a wall where it is associated with one, though a building may be there too."""
        near = [(word, i) for i, name in enumerate(objects) for word in self.relation.get(name, ())]
        return near + [(name, i) for i, name in enumerate(objects)]


def amber_description(
    nouns: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    words: AmberWords,
    similar: Callable[[str, str], float],
) -> tuple[list[str], list[bool], set[int], set[int]]:
    """One description: (its known nouns, is each hallucinated?, places in `truth` it names, places in `hallu`).

    nouns: the description's, lemmatised, in order and with repetition (see `benchmarks.amber_tools`); case counts.
    similar: of two words, above 0.8 is the same; the official one is the cosine of spaCy's en_core_web_lg.
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


def amber_f1(chair: float, cover: float) -> float:
    """OViP's F1 of AMBER generative, in percent: the harmonic mean of 100 - CHAIR and Cover (OViP, App. A.2)."""
    precision = 100 - chair
    return 2 * precision * cover / (precision + cover) if precision + cover else 0.0
