"""Hallucination-as-Cue: inputs from which the answer cannot be known, in training and in tests.

What is right on such inputs was guessed: from the question, from its options, or from what is
usual. The paper (arXiv 2604.03179) takes away one modality at a time:

    BI  `blank`         the picture shows nothing
    RI  `random_media`  the picture is another sample's
    TR  `remove_text`   the text has lost its conditions and its question

`blur`, `occlude`, `mislead` and `mismatch` are not the paper's. A second note on it names such
corruptions, and they are common elsewhere. `corrupt` does any of them to rows of a dataset:
train.py --corrupt_train trains on them, and eval.py --stress tests on them.

Media are PIL images, a clip is a list of them. Draws are a function of (seed, id) alone, so a
sample is corrupted alike in every epoch and on every process. Inputs are never changed in place.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from PIL import Image, ImageFilter

import answers

Media = Image.Image | list[Image.Image]
Other = TypeVar("Other")
Row = TypeVar("Row")  # engine.rows.Sample

KINDS = ("blank", "random_media", "remove_text", "blur", "occlude", "mislead")
NO_MEDIA = "no_media"  # the question alone, the floor of a test

# Qwen2.5-VL's processor subtracts a mean of 123, 117 and 104 and divides by about 70. So mid-grey
# becomes about 0, where black and white become about -1.7 and 2: colours that a model could read.
GREY = (128, 128, 128)


def _rng(seed: int, id: str, kind: str) -> random.Random:
    return random.Random(f"{seed}/{id}/{kind}")


def _each(media: Media, change: Callable[[Image.Image], Image.Image]) -> Media:
    return [change(frame) for frame in media] if isinstance(media, list) else change(media)


# --- the paper's ----------------------------------------------------------------------------------


def blank(media: Media) -> Media:
    """BI: each picture in mid-grey (`GREY`), at its size (D-90)."""
    return _each(media, lambda image: Image.new("RGB", image.size, GREY))


def random_media(media: Media, pool: Sequence[tuple[str, Media]], seed: int, id: str) -> Media:
    """RI: the media of another sample, at their own size; for a clip those of a clip.

    pool: (id, media) of the samples to draw from, this one among them or not. The draw does not
    depend on the order of the pool. Raises ValueError where it holds no other sample of this kind.
    """
    clip = isinstance(media, list)
    others = [(name, other) for name, other in pool if isinstance(other, list) == clip]
    return _another(others, seed, id, "clip" if clip else "picture")


def remove_text(problem: str) -> str:
    """TR: the problem without its conditions and its question.

    Options ("A. red", "(B) 12 cm"), the form of the answer ("Round to the nearest tenth.", "Answer
    with one word.") and the marks of media (<image>) stay. '' where the text holds none of them.
    A rule over sentences (D-91):

        'AB is 5. Find x. Round to the nearest tenth.'  ->  'Round to the nearest tenth.'
    """
    lines = []
    for line in problem.splitlines():
        marks = MARK.findall(line)
        line = MARK.sub(" ", line)
        options = OPTIONS.search(line)
        before = line[: options.start()] if options else line
        kept = [part.strip() for part in SENTENCE.split(before) if FORM.search(part)]
        lines.append(" ".join([*marks, *kept, *([options[0].strip()] if options else [])]))
    return "\n".join(line for line in lines if line)


MARK = re.compile(r"<(?:image|video)>")
# the end of a sentence, and not of a decimal or an abbreviation in small letters
SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z\"'(\[$\\])|(?<=[。？！])")
# a line's options to its end: the first letter at its start, or two or more in a row anywhere
OPTIONS = re.compile(
    r"^\s*(?:\([A-Z]\)|[A-Z][.):])\s.*|^\s*(?:options|choices)\s*:.*|\(A\)\s.*\(B\)\s.*"
    r"|(?<!\w)A[.):]\s.*(?<!\w)B[.):]\s.*",
    re.IGNORECASE,
)
FORM = re.compile(
    r"^\W*(?:(?:hint|note)\s*:\s*)?(?:please\s+)?(?:(?:answer|respond|reply)\b|round\b.*\bto\b"
    r"|(?:express|write|give|state|provide|report|leave)\s+(?:\w+\s+){0,2}(?:answer|result)s?\b"
    r"|(?:choose|select|pick)\s+(?:\w+\s+){0,3}(?:answer|option|choice|letter)s?\b)",
    re.IGNORECASE,
)


# --- not the paper's ------------------------------------------------------------------------------


def blur(media: Media, sigma: float) -> Media:
    """Gaussian blur; sigma in pixels."""
    if not sigma >= 0:
        raise ValueError(f"sigma must be 0 or more, got {sigma}")
    return _each(media, lambda image: image.convert("RGB").filter(ImageFilter.GaussianBlur(sigma)))


def occlude(media: Media, seed: int, id: str, share: float = 0.5) -> Media:
    """A grey rectangle of the picture's proportions over `share` of its area. All frames of a clip
    have it in the same place."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    rng = _rng(seed, id, "occlude")
    x, y, side = rng.random(), rng.random(), math.sqrt(share)

    def change(image: Image.Image) -> Image.Image:
        width, height = round(image.width * side), round(image.height * side)
        corner = round(x * (image.width - width)), round(y * (image.height - height))
        covered = image.convert("RGB")  # a copy
        covered.paste(GREY, (*corner, corner[0] + width, corner[1] + height))
        return covered

    return _each(media, change)


def mislead(problem: str, options: Sequence[str], answer: str, seed: int, id: str) -> str:
    """The problem with a false hint behind it: a wrong option, number, or yes for no.

    Never the right answer, and none of several accepted ones. Raises ValueError where no false
    answer is known: words without options.
    """
    accepted = getattr(answer, "accepted", (answer,))
    rng = _rng(seed, id, "mislead")
    if options:
        named = [OPTION.match(option) for option in options]
        letters = [m[1] if m else chr(ord("A") + i) for i, m in enumerate(named)]
        words = [option[m.end() :] if m else option for m, option in zip(named, options)]
        right = {
            w for letter, w in zip(letters, words) if {letter, w} & {a.strip() for a in accepted}
        }
        false = [f"{letter}. {w}" for letter, w in zip(letters, words) if w not in right]
    elif numbers := [n for n in map(answers.to_number, accepted) if n is not None]:
        # far enough off for every rule of answers.is_correct, and written as the answer is
        steps = [n for n in range(-9, 10) if n]
        whole = all(n == int(n) for n in numbers)
        moved = [numbers[0] + step * max(1.0, abs(numbers[0]) / 5) for step in steps]
        moved = [round(n) if whole else round(n, 2) for n in moved]
        far = [n for n in moved if all(abs(n - m) > max(0.01, 0.05 * abs(m)) for m in numbers)]
        # a count below 0 misleads nobody
        false = [f"{n}" for n in far if n >= 0 or min(numbers) < 0]
    else:
        other = {"yes": "no", "no": "yes"}
        false = [other[a] for a in (a.strip().lower() for a in accepted) if a in other]
        false = [] if len(false) > 1 else false
    if not false:
        raise ValueError(f"{id}: no false answer is known to its question")
    return f"{problem}\nHint: the answer is {rng.choice(false)}."


def mismatch(pool: Sequence[tuple[str, Other]], seed: int, id: str) -> Other:
    """The question of another sample (whatever the pool of (id, question) holds for one), to be
    asked about this sample's media. Raises ValueError where there is no other sample.

    Over a whole dataset it pairs the same questions with the same foreign media as `random_media`,
    so `corrupt` has no kind of this name.
    """
    return _another(pool, seed, id, "question")


OPTION = re.compile(r"\s*\(?([A-Za-z])[.):]\s*")


# --- rows of a dataset ----------------------------------------------------------------------------

BLUR = 0.05  # sigma, of the shorter side of a picture


def corrupt(
    rows: Sequence[Row], kind: str, seed: int, share: float = 1.0
) -> tuple[list[Row], list[str]]:
    """Rows with `share` of them corrupted, and notes on those that could not be.   n -> at most n

    share: 0 leaves all intact, 1 corrupts all; in between, (seed, id) decides on each row. A row
    that should be corrupted and cannot be is left out: without another row whose media it could
    show, without a false answer to hint at, or, under remove_text, with nothing to remove. Media
    are changed when they are read (`change`). Raises ValueError for an unknown kind.
    """
    if kind not in (*KINDS, NO_MEDIA):
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    alike = defaultdict(list)  # rows that could lend each other their media
    for row in sorted(rows, key=lambda row: row.id):
        alike[row.data_type, len(row.media)].append(row)
    found, left_out = [], defaultdict(list)
    for row in rows:
        if share < 1 and _rng(seed, row.id, "share").random() >= share:
            found.append(row)
            continue
        try:
            found.append(_corrupted(row, kind, seed, alike[row.data_type, len(row.media)]))
        except ValueError as error:
            left_out[str(error).removeprefix(f"{row.id}: ")].append(row.id)
    notes = [f"{len(i)} rows left out: {why} ({', '.join(i[:3])})" for why, i in left_out.items()]
    if kind == "remove_text" and (bare := sum(bool(r.corruption) and not r.problem for r in found)):
        notes.append(f"{bare} rows have no words of their own left")
    return found, notes


def _corrupted(row: Row, kind: str, seed: int, alike: list[Row]) -> Row:
    row = replace(row, corruption=(kind, seed))
    if kind == NO_MEDIA:
        return replace(row, media=(), sizes=(), problem=MARK.sub(" ", row.problem).strip())
    if kind == "mislead":
        hinted = mislead(row.problem, row.options, row.answer, seed, row.id)
        return replace(row, problem=hinted)
    if kind == "remove_text":
        problem = remove_text(row.problem)
        if problem == row.problem:
            raise ValueError(f"{row.id}: its text has no condition and no question to remove")
        return replace(row, problem=problem)
    if kind == "random_media":
        start = _rng(seed, row.id, kind).randrange(len(alike))
        for other in alike[start:] + alike[:start]:
            # rows about the same picture are no other sample here
            if other.id != row.id and other.media != row.media:
                return replace(row, media=other.media, sizes=other.sizes)
        raise ValueError(f"{row.id}: no other row has other media of its kind")
    return row


def change(media: Media, kind: str, seed: int, id: str) -> Media:
    """The media of a row as its corruption shows them; unchanged where the text is corrupted, or
    the media were another row's to begin with."""
    if kind == "blank":
        return blank(media)
    if kind == "blur":
        first = media[0] if isinstance(media, list) else media
        return blur(media, BLUR * min(first.size))
    return occlude(media, seed, id) if kind == "occlude" else media


def _another(pool: Sequence[tuple[str, Other]], seed: int, id: str, what: str) -> Other:
    others = sorted((name, i) for i, (name, _) in enumerate(pool) if name != id)
    if not others:
        raise ValueError(f"{id}: the pool holds no other sample with a {what}")
    return pool[_rng(seed, id, what).choice(others)[1]][1]
