"""Hallucination-as-Cue: inputs that lack something the answer needs, in training and in tests.

What stays right was guessed from the rest: from the question, from its options, or from what is
usual. The paper (arXiv 2604.03179) takes away one modality at a time:

    BI  `blank`         the picture shows nothing
    RI  `random_media`  the picture is another sample's
    TR  `remove_text`   the text has lost its conditions and its question

`blur`, `occlude` and `mislead` are not the paper's. A second note on it names such corruptions, and
they are common elsewhere. `corrupt` does any of them to rows of a dataset: train.py --corrupt_train
trains on them, and eval.py --stress tests on them.

Media are PIL images, a clip is a list of them. Draws are a function of (seed, id) and the pool that
is drawn from, so a sample is corrupted alike in every epoch and on every process. Inputs are never
changed in place.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

from PIL import Image, ImageFilter

import answers

Media = Image.Image | list[Image.Image]
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


def random_media(pool: Sequence[tuple[Hashable, Row]], own: Hashable, seed: int, id: str) -> Row:
    """RI: another row, whose media take the place of this one's.

    pool: (what a row shows, row) of those with as many media of this kind, in a fixed order. From a
    drawn place on, the first that shows another thing than `own` is taken. Raises ValueError where
    there is none.
    """
    start = _rng(seed, id, "another").randrange(len(pool)) if pool else 0
    for k in range(len(pool)):
        shown, row = pool[(start + k) % len(pool)]
        if shown != own:
            return row
    raise ValueError(f"{id}: there are no other media of its kind")


def remove_text(problem: str) -> str:
    """TR: the problem without its conditions and its question, by a rule over sentences (D-91).

        'AB is 5. Find x. Round to the nearest tenth.'  ->  'Round to the nearest tenth.'

    What stays: options, in lines of their own ("A. red", "(B) 12 cm") or at the end of a line ("(A)
    3 (B) 4"); sentences on the form of the answer ("Answer with one word."), if they ask nothing;
    the marks of media (<image>). '' where the text holds none of them.
    """
    lines, kept = problem.splitlines(), []
    listed = _listed(lines)
    for i, line in enumerate(lines):
        if i in listed:
            kept.append(line)
            continue
        inline = INLINE.search(line)
        if inline and ("?" in inline[0] or len(SENTENCE.split(inline[0].strip())) > 1):
            inline = None
        parts = []
        for sentence in SENTENCE.split(line[: inline.start()] if inline else line):
            stays = FORM.search(sentence) and not ASKS.search(sentence)
            parts += [sentence.strip()] if stays else MARK.findall(sentence)
        kept.append(" ".join([*parts, *([inline[0].strip()] if inline else [])]))
    return "\n".join(line for line in kept if line.strip())


def _listed(lines: list[str]) -> set[int]:
    """The lines that are options: from A, a or 1 on, at least two, and a heading right above."""
    found: set[int] = set()
    for i, line in enumerate(lines):
        block, first = [i], LISTED.match(line)
        if i in found or not first or first[1] not in ("A", "a", "1"):
            continue
        for j in range(i + 1, len(lines)):
            following = LISTED.match(lines[j])
            if following and following[1] == chr(ord(first[1]) + len(block)):
                block.append(j)
            elif lines[j].strip():
                break
        if len(block) > 1:
            found.update(block)
            heading = [j for j in range(i) if lines[j].strip()][-1:]
            found.update(j for j in heading if HEADING.fullmatch(lines[j]))
    return found


MARK = re.compile(r"<(?:image|video)>")
# at white space behind a sentence: not in a decimal, and harmless behind an abbreviation
SENTENCE = re.compile(r"(?<=[.?!])\s+|(?<=[。？！])")
LISTED = re.compile(r"\s*(?:[-*•]\s+)?(?:\*\*)?[(\[]?([A-Za-z]|\d)(?:\*\*)?(?:[.)\]:]|\s[-–]\s)")
HEADING = re.compile(r"\s*(?:the\s+)?(?:answer\s+)?(?:options|choices)(?:\s+are)?\s*:\s*", re.I)
# two options or more to the end of a line, perhaps behind "Choices:"
INLINE = re.compile(
    r"(?:\b(?i:options|choices)\s*:\s*)?"
    r"(?:\(A\).+\(B\).*|\(a\).+\(b\).*|(?<!\w)A[.)].+(?<!\w)B[.)].*)$"
)
# a sentence that says how to answer
FORM = re.compile(
    r"^\W*(?:(?:hint|note)\s*:\s*)?(?:please\s+|just\s+|only\s+|directly\s+|then\s+)*(?:"
    r"(?:answer|respond|reply)\s+(?:the\s+question\s+)?(?:directly\s+)?"
    r"(?:with|in|using|by|yes\b|true\b|and\s+(?:provide|give)|as\s+an?)\b"
    r"|answer\s+the\s+(?:multiple[- ]choice\s+)?question\s+(?:requiring|and\s+(?:provide|give))\b"
    r"|round\s+(?:(?:your|the)\s+(?:final\s+)?(?:answer|result)\s+|it\s+)?(?:to|up|down|off)\b"
    r"|(?:express|write|give|state|provide|report|put|output|leave|enter|return|submit)\s+"
    r"(?:just\s+|only\s+)?(?:your|the)\s+(?:(?:single|final|correct|numerical|option'?s?)\s+)*"
    r"(?:answer|result|option|letter|number|choice|value)s?"
    r"(?=\W*$|\s+\(|\s+(?:as|in|to|with|within|using|directly|only|at|inside|on|rounded|from)\b)"
    r"|(?:choose|select|pick)\s+(?:one|(?:the|a)\s+(?:(?:single|correct|right|best)\s+)*"
    r"(?:answer|option|choice|letter)s?)(?=\W*$|\s+(?:from|among|below|of\s+the\s+following)\b)"
    r"|use\s+(?:a\s+single|one|only)\s+(?:word|number|letter|phrase|sentence)\b"
    r"|(?:the|your)\s+(?:final\s+)?answer\s+(?:must|should|has\s+to)\s+be\b"
    r"|\(units?\s*:[^)]*\)|请[^？]{0,12}(?:回答|作答|选择))",
    re.IGNORECASE,
)
ASKS = re.compile(
    r"[?？]|\b(?:answer|respond|reply)\s+(?:yes|true)\s+or\s+(?:no|false)\s*:\s*\S|following\s+question",
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


def crop(media: Media, seed: int, id: str, least: float = 0.8) -> Media:
    """A part of the picture in its proportions, of `least` of its area or more, enlarged to its
    size: the negative image of mDPO, and a baseline of OViP. Frames of a clip are cut alike."""
    if not 0 < least <= 1:
        raise ValueError(f"least must lie in (0, 1], got {least}")
    rng = _rng(seed, id, "crop")
    x, y, side = rng.random(), rng.random(), math.sqrt(rng.uniform(least, 1))

    def change(image: Image.Image) -> Image.Image:
        width, height = image.width * side, image.height * side
        left, top = x * (image.width - width), y * (image.height - height)
        box = (left, top, left + width, top + height)
        return image.convert("RGB").resize(image.size, Image.Resampling.BICUBIC, box)

    return _each(media, change)


def mislead(problem: str, options: Sequence[str], answer: str, seed: int, id: str) -> str:
    """The problem with a false hint behind it: a wrong option or number, or yes for no.

    Never the right answer, and none of several accepted ones. Raises ValueError where no false
    answer is known: to words without options, or where no option or every one is right.
    """
    accepted = getattr(answer, "accepted", (answer,))
    if options:
        shown = [(option, LABEL.match(option)) for option in options]
        named = [(m[1].upper() if m else chr(ord("A") + i)) for i, (_, m) in enumerate(shown)]
        words = [option[m.end() :] if m else option for option, m in shown]
        by_letter = [w for letter, w in zip(named, words) if letter in map(str.strip, accepted)]
        right = [*accepted, *by_letter]
        false = [
            f"{letter}. {w}"
            for letter, w in zip(named, words)
            if letter not in map(str.strip, accepted) and not any(_same(w, r) for r in right)
        ]
        false = false if len(false) < len(options) else []
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
        said = {a.strip().lower() for a in accepted}
        false = [{"yes": "no", "no": "yes"}[a] for a in said if said in ({"yes"}, {"no"})]
    if not false:
        raise ValueError(f"{id}: no false answer is known to its question")
    return f"{problem}\nHint: the answer is {_rng(seed, id, 'mislead').choice(false)}."


LABEL = re.compile(r"\s*\(?([A-Za-z])[.):]\s*")


def _same(one: str, two: str) -> bool:
    """Do two answers say the same, as words or as a number?"""
    return any(
        answers.is_correct(one.strip(), two.strip(), kind, lenient=True)
        for kind in ("free-form", "numerical")
    )


# --- rows of a dataset ----------------------------------------------------------------------------

BLUR = 0.05  # sigma, of the shorter side of a picture


def corrupt(
    rows: Sequence[Row],
    kind: str,
    seed: int,
    share: float = 1.0,
    picture: Callable[[Row], Hashable] = lambda row: row.id,
) -> tuple[list[Row], list[str]]:
    """Rows with `share` of them corrupted, and notes on those that could not be.   n -> at most n

    share: 0 leaves all intact, 1 corrupts all; in between, (seed, id) decides on each row.
    picture: equal for rows about the same picture, which lend each other nothing. A row that should
    be corrupted and cannot be is left out: without another row whose media it could show, without a
    false answer to hint at, or, under remove_text, where the rule finds nothing to remove. Media
    are changed when they are read (`change`). Raises ValueError for an unknown kind.
    """
    if kind not in (*KINDS, NO_MEDIA):
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")

    def media_of(row: Row) -> tuple[str, int]:
        return row.data_type, len(row.media)

    pools = defaultdict(list)  # rows that could lend each other their media
    shown = {row.id: picture(row) for row in rows} if kind == "random_media" else {}
    for row in sorted(rows, key=lambda row: row.id) if shown else ():
        pools[media_of(row)].append((shown[row.id], row))
    found, left_out = [], defaultdict(list)
    for row in rows:
        if share < 1 and _rng(seed, row.id, "share").random() >= share:
            found.append(row)
            continue
        try:
            found.append(_corrupted(row, kind, seed, pools[media_of(row)], shown.get(row.id)))
        except ValueError as error:
            left_out[str(error).removeprefix(f"{row.id}: ")].append(row.id)
    notes = [
        f"{len(i)} row{'s' * (len(i) > 1)} left out: {why} ({', '.join(i[:3])})"
        for why, i in left_out.items()
    ]
    if kind == "remove_text" and (bare := sum(bool(r.corruption) and not r.problem for r in found)):
        notes.append(f"{bare} rows have no words of their own left")
    return found, notes


def _corrupted(row: Row, kind: str, seed: int, pool: list, own: Hashable) -> Row:
    row = replace(row, corruption=(kind, seed))
    if kind == "mislead":
        # apart from the problem: the judge of captions is not to read it
        return replace(row, hint=mislead("", row.options, row.answer, seed, row.id))
    if kind == "remove_text":
        problem = remove_text(row.problem)
        if problem.split() == row.problem.split():
            raise ValueError(f"{row.id}: the rule finds nothing to remove in its text")
        return replace(row, problem=problem)
    if kind == "random_media":
        other = random_media(pool, own, seed, row.id)
        # what a caption can name is what is shown
        shown = {"media": other.media, "sizes": other.sizes, "objects": other.objects}
        return replace(row, **shown, relevant=None)
    if kind == NO_MEDIA:
        problem = MARK.sub(" ", row.problem).strip()
        row = replace(row, media=(), sizes=(), problem=problem)
    if kind in ("blank", NO_MEDIA) and row.objects is not None:
        row = replace(row, objects=(), relevant=None)
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
