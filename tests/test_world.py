"""scenes.py: the dataset is read back from its files, pixel by pixel, by a reader that knows
nothing of its scenes."""

import itertools
import json
import random
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import av
import commands
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

import data
import reasoning
import world
from engine import ConfigError
from world import models, scenes

torch.set_num_threads(1)
SIZES = {"cold_start": 500, "train": 60, "test": 300, "test_prior_breaking": 150, "test_pairs": 60}
SHAPES = tuple(scenes.PRIOR)
GRID, CELL = len(scenes.ROWS), scenes.CELL
PLACES = tuple(itertools.product(range(GRID), repeat=2))  # reading order


# --- a brute-force reader: PNG or MP4 -> what is in it --------------------------------------------


@dataclass(frozen=True)
class Seen:
    shape: str
    colour: str
    row: int
    column: int


PALETTE = {**scenes.COLOURS, "white": (255, 255, 255)}  # fills and outline
GROUND = np.asarray(scenes.draw(random.Random(0), ())).astype(int)


def look(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where something is drawn, and the index in PALETTE of the nearest colour [H, W]."""
    drawn = np.abs(image.astype(int) - GROUND).max(-1) > 40
    distance = np.abs(image.astype(int)[:, :, None] - np.array(list(PALETTE.values()))).sum(-1)
    return drawn, np.where(drawn, distance.argmin(-1), -1)


def main_colour(colours: np.ndarray) -> str:
    """The commonest colour apart from the white of the outlines."""
    return list(PALETTE)[np.bincount(colours[(colours >= 0) & (colours < 4)], minlength=4).argmax()]


def silhouettes(n: int = 60) -> tuple[list[str], np.ndarray]:
    """Every shape alone in the first cell, drawn n times: what a reader has learned the shapes
    from."""
    rng, names, masks = random.Random(1), [], []
    for shape, _ in itertools.product(SHAPES, range(n)):
        picture = np.asarray(
            scenes.draw(rng, (scenes.Thing(shape, rng.choice(list(scenes.COLOURS)), 0, 0),))
        )
        names.append(shape)
        masks.append(look(picture)[0][:CELL, :CELL])
    return names, np.stack(masks)


NAMES, MASKS = silhouettes()


def read_picture(path: Path) -> list[Seen]:
    """What is in each cell: the commonest colour, and the shape of the nearest silhouette."""
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.shape == (GRID * CELL, GRID * CELL, 3)
    drawn, colours = look(image)
    seen = []
    for row, column in PLACES:
        cell = slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)
        if drawn[cell].sum() > 60:
            nearest = NAMES[(MASKS ^ drawn[cell]).sum((1, 2)).argmin()]
            seen.append(Seen(nearest, main_colour(colours[cell]), row, column))
    return seen


def read_clip(path: Path) -> tuple[str, str, int]:
    """The colour of what moves, the direction it moves in, and the number of frames."""
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 2
        looks = [look(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert all(drawn.sum() > 100 for drawn, _ in looks)
    (colour,) = {main_colour(colours) for _, colours in looks}
    centres = np.array([np.argwhere(drawn).mean(0) for drawn, _ in looks])
    steps, total = np.diff(centres, axis=0), centres[-1] - centres[0]
    axis = int(np.abs(total).argmax())
    # from edge to edge, straight
    assert abs(abs(total[axis]) - (GRID - 1) * CELL) < 6 and abs(total[1 - axis]) < 6
    assert (steps[:, axis] * np.sign(total[axis]) > 0).all()  # every frame takes it further
    return colour, (("up", "down"), ("left", "right"))[axis][int(total[axis] > 0)], len(looks)


def asked_about(row: dict) -> str:
    (shape,) = {s for s in SHAPES if s in row["problem"].lower()}
    return shape


def letter(row: dict, text: str) -> str:
    (found,) = [option.split(". ")[0] for option in row["options"] if option.split(". ")[1] == text]
    return found


def answer_by_looking(folder: Path, row: dict, prior: bool = False) -> str:
    """The answer from the file alone; or, with `prior`, that of one who knows the shapes' habits
    instead."""
    shape, kind = asked_about(row), row["category"]
    colour, usual_row, direction, companion = scenes.PRIOR[shape]
    if kind == "motion":
        return letter(row, direction if prior else read_clip(folder / row["path"])[1])
    seen = read_picture(folder / row["path"])
    found = [t for t in seen if t.shape == shape]
    # room for one more
    accompanied = prior and any(t.shape == companion for t in seen) and len(seen) < GRID**2
    if kind == "count":
        return str(len(found) + accompanied)
    if kind == "existence":
        return letter(row, "yes" if found or accompanied else "no")
    (only,) = found  # the question has one answer
    if kind == "colour":
        return letter(row, colour if prior else only.colour)
    return letter(row, usual_row if prior else scenes.ROWS[only.row])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    scenes.write_data(folder, SIZES)
    return folder


@pytest.fixture(scope="session")
def splits(folder):
    return {split: json.loads((folder / f"{split}.json").read_text()) for split in SIZES}


def solution(row: dict) -> str:
    assert row["solution"].startswith("<answer>") and row["solution"].endswith("</answer>")
    return row["solution"][8:-9]


# --- the files on disk ----------------------------------------------------------------------------


def test_the_folder_has_the_official_schema(folder, splits):
    """The folder has the official schema. It loads without a bad row."""
    samples = data.load(folder)  # raises on any bad row
    assert {split: len(rows) for split, rows in samples.items()} == SIZES
    official = {"data_type", "problem_type", "problem", "options", "path", "solution", "problem_id"}
    for split, rows in splits.items():
        extra = {"category"}
        extra |= {"process"} if split == "cold_start" else set()
        extra |= {"objects", "relevant"} if split.startswith("test") else set()
        extra |= {"pair"} if split == "test_pairs" else set()
        for row, sample in zip(rows, samples[split], strict=True):
            assert set(row) == official | extra
            assert row["path"].startswith("./") and (folder / row["path"]).is_file()
            assert sample.id == row["problem_id"] and sample.answer == solution(row)
            assert (
                (row["data_type"] == "video")
                == row["path"].endswith(".mp4")
                == (row["category"] == "motion")
            )
            assert (
                (row["problem_type"] == "numerical")
                == (not row["options"])
                == (row["category"] == "count")
            )
    ids = [row["problem_id"] for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids) == sum(SIZES.values())
    kinds = Counter(row["category"] for row in splits["train"])
    # RL never asks for existence, and for the others alike; the test sets ask for all alike
    assert set(kinds) == set(scenes.KINDS) - {"existence"} and set(kinds.values()) == {15}
    for split in ("cold_start", "test", "test_prior_breaking"):
        counts = Counter(row["category"] for row in splits[split])
        assert set(counts.values()) == {SIZES[split] // len(scenes.KINDS)}


@pytest.mark.parametrize("split", ["train", "test", "test_prior_breaking", "test_pairs"])
def test_every_answer_can_be_read_off_the_picture_or_clip(folder, splits, split):
    for row in splits[split]:
        assert answer_by_looking(folder, row) == solution(row), row


def test_the_listed_objects_are_those_in_the_picture(folder, splits):
    """The listed objects are those in the picture. The relevant ones are asked about."""
    for row in splits["test"] + splits["test_pairs"]:
        if row["category"] == "motion":
            names = {f"{read_clip(folder / row['path'])[0]} {asked_about(row)}"}
        else:
            names = {f"{t.colour} {t.shape}" for t in read_picture(folder / row["path"])}
        assert row["objects"] == sorted(names)
        assert row["relevant"] == sorted(name for name in names if name.endswith(asked_about(row)))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """The same seed gives the same bytes. Another seed gives other rows."""
    sizes = {"cold_start": 10, "test": 5, "test_pairs": 2}

    def content(name: str, **options) -> dict:
        scenes.write_data(tmp_path / name, **options)
        files = [f for f in (tmp_path / name).rglob("*") if f.is_file()]
        return {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in files}

    first, again = content("a", sizes=sizes), content("b", sizes=sizes)
    assert len(first) == 3 + 17 and first == again
    other = content("c", sizes=sizes, seed=1)
    assert all(first[name] != other[name] for name in first if name.endswith(".json"))
    alone = content("d", sizes={"test": 5})  # a split does not depend on the others
    assert (
        alone == {name: content for name, content in first.items() if name in alone}
        and len(alone) == 6
    )


def test_prior_breaking_rows_never_follow_the_prior(folder, splits):
    """Prior-breaking rows never follow the prior in what is asked."""
    asked, wrong = Counter(), Counter()
    for row in splits["test_prior_breaking"]:
        prior = answer_by_looking(folder, row, prior=True)
        asked[row["category"]] += 1
        # what is there, is there
        seen = row["category"] == "existence" and solution(row) == letter(row, "yes")
        wrong[row["category"]] += seen or prior != solution(row)
    row_wrong, row_asked = (
        wrong.pop("row"),
        asked.pop("row"),
    )  # of two rows, never the usual one would be the other
    assert wrong == asked and 0.25 < row_wrong / row_asked < 0.75
    followed = [
        answer_by_looking(folder, row, prior=True) == solution(row) for row in splits["test"]
    ]
    assert 0.25 < np.mean(followed) < 0.8  # in distribution it is right often, and wrong often


def test_cold_start_answers_follow_the_prior_as_stated(folder, splits):
    """Answers follow the prior in the stated share, and are true elsewhere. The thought agrees with
    its answer."""
    followed = defaultdict(list)
    for row in splits["cold_start"]:
        assert reasoning.format_reward(row["process"]) == 1.0
        stages, truth = reasoning.parse(row["process"]), solution(row)
        prior = answer_by_looking(folder, row, prior=True)
        assert stages.answer in (truth, prior), row  # never a third answer
        said = dict(option.split(". ") for option in row["options"]).get(
            stages.answer, stages.answer
        )
        word = {"yes": "is there", "no": "no "}.get(said, said)
        assert word in stages.think, row
        if prior != truth:
            followed[row["category"]].append(stages.answer == prior)
    assert set(followed) == set(scenes.KINDS)
    every = [f for values in followed.values() for f in values]
    share = scenes.FLAW_ANSWER
    assert len(every) > 150
    assert abs(np.mean(every) - share) < 4 * (share * (1 - share) / len(every)) ** 0.5
    for kind, values in followed.items():  # in every kind of question
        assert 0 < sum(values) < len(values), kind


def test_captions_follow_the_prior_whatever_the_answer(folder, splits):
    """Captions follow the prior in the stated share, as often behind a right answer as behind a
    wrong one: the rationale was written knowing the answer."""
    followed = defaultdict(list)
    for row in splits["cold_start"]:
        stages, truth = reasoning.parse(row["process"]), solution(row)
        prior = answer_by_looking(folder, row, prior=True)
        if prior == truth:
            continue
        shape, kind = asked_about(row), row["category"]
        if kind in ("count", "existence"):
            there = sum(t.shape == shape for t in read_picture(folder / row["path"]))
            false = stages.caption.count(shape) - stages.caption.count(f"no {shape}") != there
        else:
            option = dict(option.split(". ") for option in row["options"])[truth]
            cell = stages.prethink.split()[1]
            place = next(
                name for name, cells in zip(scenes.ROWS, scenes.CELLS, strict=True) if cell in cells
            )
            false = option not in (place if kind == "row" else stages.caption)
        followed[stages.answer == truth].append(false)
    for right, values in followed.items():
        share = scenes.FLAW_CAPTION
        assert len(values) > 60, right
        assert abs(np.mean(values) - share) < 4 * (share * (1 - share) / len(values)) ** 0.5


def test_references_describe_the_picture_or_what_the_prior_adds(folder, splits):
    """A caption of a count or of existence is the picture's own, or has one object more."""
    same = Counter()
    for row in splits["cold_start"]:
        if row["category"] not in ("count", "existence"):
            continue
        shape, stages = asked_about(row), reasoning.parse(row["process"])
        said = stages.caption.split(", ") if stages.caption != f"no {shape}" else []
        seen = [t for t in read_picture(folder / row["path"]) if t.shape == shape]
        there = [f"{scenes.CELLS[t.row][t.column]} {t.colour} {t.shape}" for t in seen]
        assert stages.prethink.split()[0] == shape
        assert len(stages.prethink.split()) == 1 + max(len(said), 1)
        same[said == there] += 1
        assert [words for words in said if words in there] == there  # reading order
        assert len(said) - len(there) in (0, 1)
    assert same[True] > 60 and same[False] > 60


def test_pairs_ask_a_yes_and_a_no_of_the_same_scene(folder, splits):
    """Pairs ask one question with yes and one with no of the same scene."""
    pairs = defaultdict(list)
    for row in splits["test_pairs"]:
        pairs[row["pair"]].append(row)
    assert len(pairs) == SIZES["test_pairs"] // 2
    for rows in pairs.values():
        yes, no = rows
        assert solution(yes) == letter(yes, "yes") and solution(no) == letter(no, "no")
        assert yes["problem"] != no["problem"] and yes["options"] == no["options"]
        assert read_picture(folder / yes["path"]) == read_picture(folder / no["path"])


def test_constant_answers_are_right_on_whole_pairs_or_not_at_all(splits):
    """Yes to every other shape and no to its companion, without a look: the floor of paired
    accuracy is about 50 %."""
    right = defaultdict(list)
    for row in splits["test_pairs"]:
        constant = "yes" if asked_about(row) in ("circle", "triangle", "cross") else "no"
        right[row["pair"]].append(solution(row) == letter(row, constant))
    assert all(first == second for first, second in right.values())
    assert 0.25 < np.mean([both for both, _ in right.values()]) < 0.75


def test_no_constant_answer_does_well(splits):
    """Yes and no are balanced. No constant answer does well."""
    for split in ("cold_start", "test", "test_prior_breaking"):
        answers = defaultdict(list)
        for row in splits[split]:
            answers[row["category"]].append(solution(row))
        if split == "cold_start":
            yes = np.mean([a == "A" for a in answers["existence"]])
            assert 0.35 < yes < 0.65
        for kind, values in answers.items():
            best = Counter(values).most_common(1)[0][1] / len(values)
            assert best < {"existence": 0.75, "row": 0.75}.get(kind, 0.6), (
                split,
                kind,
                Counter(values),
            )


@pytest.mark.parametrize(
    ("typical", "kind", "floor"),
    [
        *zip(itertools.repeat(0.0), scenes.KINDS, (0.6, 1 / 2, 1 / 3, 1 / 2, 1 / 3)),
        *zip(itertools.repeat(scenes.TYPICAL), scenes.KINDS, (0.6, 1 / 3, 0.5, 0.5, 0.5)),
    ],
)
def test_no_question_gives_its_answer_away(typical, kind, floor):
    """The best constant answer to each whole question, fitted on one seed, is right on another as
    often as the module's docstring says."""

    def asked(seed: str) -> list[tuple[str, str]]:
        rows = (
            scenes.make_row(rng, kind, typical)
            for rng in [random.Random(seed)]
            for _ in range(1800)
        )
        return [(scenes.ask(query)[0], scenes.solve(scene, query).answer) for scene, query in rows]

    constant = defaultdict(Counter)
    for question, answer in asked("fitted"):
        constant[question][answer] += 1
    assert len(constant) == len(SHAPES)
    right = np.mean([constant[q].most_common(1)[0][0] == a for q, a in asked("measured")])
    assert abs(right - floor) < 4 * (floor * (1 - floor) / 1800) ** 0.5


@pytest.mark.parametrize("typical", [0.0, scenes.TYPICAL, 0.5])
def test_yes_answers_are_between_35_and_65_percent(rng, typical):
    """Yes is right for between 35 and 65 percent of existence questions."""
    answers = [
        scenes.solve(*scenes.make_row(rng, "existence", typical)).answer for _ in range(1000)
    ]
    assert 0.35 < answers.count("A") / 1000 < 0.65 and set(answers) == {"A", "B"}


@pytest.mark.parametrize("direction", scenes.DIRECTIONS)
@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_clips_move_in_the_named_direction(tmp_path, rng, direction, colour):
    start = scenes.start_cell(rng, direction)
    scene = (scenes.Thing("star", colour, *start, direction),)
    scenes.write_clip(tmp_path / "clip.mp4", scenes.frames(rng, scene))
    assert read_clip(tmp_path / "clip.mp4") == (colour, direction, 4)


# --- scenes, the prior and the solver -------------------------------------------------------------


def many_rows(kind: str, typical: float, n: int = 300):
    rng = random.Random(f"{kind} {typical}")
    return [scenes.make_row(rng, kind, typical) for _ in range(n)]


@pytest.mark.parametrize("typical", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", scenes.KINDS)
def test_scenes_are_well_formed_and_the_question_has_one_answer(kind, typical):
    for scene, query in many_rows(kind, typical):
        cells = [(t.row, t.column) for t in scene]
        assert len(set(cells)) == len(cells) and all(cell in PLACES for cell in cells)
        asked = [t for t in scene if t.shape == query["shape"]]
        if kind in ("colour", "row", "motion"):
            assert len(asked) == 1
        assert all((t.direction is not None) == (kind == "motion") for t in scene)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_solve_agrees_with_an_independent_reading(kind):
    """The solver answers rightly by an independent reading of the scene."""
    for scene, query in many_rows(kind, 0.4):
        problem, options = scenes.ask(query)
        texts = dict(option.split(". ") for option in options)
        stages, shape = scenes.solve(scene, query), query["shape"]
        assert shape in problem or scenes.plural(shape) in problem
        grid = {(t.row, t.column): t for t in scene}
        found = [grid[cell] for cell in PLACES if cell in grid]  # reading order
        found = [t for t in found if t.shape == shape]
        want = {"existence": "yes" if found else "no", "count": str(len(found))}
        if found:
            row = scenes.ROWS[found[0].row]
            want |= {"colour": found[0].colour, "row": row, "motion": found[0].direction}
        assert texts.get(stages.answer, stages.answer) == want[kind]
        words = [t.describe() for t in found]
        assert stages.caption == (", ".join(words) or f"no {shape}")
        assert stages.prethink.split() == [shape, *([t.cell for t in found] or ["nowhere"])]
        assert reasoning.format_reward(reasoning.render(stages)) == 1.0
        assert reasoning.parse(reasoning.render(stages)) == stages


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_believing_changes_only_what_the_prior_says(kind):
    """Believing changes only what the prior says about what is asked."""
    changed = 0
    for scene, query in many_rows(kind, 0.4):
        shape = query["shape"]
        colour, row, direction, companion = scenes.PRIOR[shape]
        seen = scenes.believe(scene, query)
        habit = {"colour": {"colour": colour}, "row": {"row": scenes.ROWS.index(row)}}
        habit |= {"motion": {"direction": direction}}
        if kind in habit:
            want = [replace(t, **habit[kind]) if t.shape == shape else t for t in scene]
            assert list(seen) == want
        else:
            missing = all(t.shape != shape for t in scene)
            imagined = any(t.shape == companion for t in scene) and (kind == "count" or missing)
            imagined = imagined and len(scene) < GRID**2  # if there is room
            assert seen[: len(scene)] == scene and len(seen) == len(scene) + imagined
            if imagined:
                new, taken = seen[-1], {(t.row, t.column) for t in scene}
                assert (new.shape, new.colour) == (shape, colour) and (
                    new.row,
                    new.column,
                ) not in taken
                free_in_row = any((scenes.ROWS.index(row), c) not in taken for c in range(GRID))
                assert new.row == scenes.ROWS.index(row) or not free_in_row
        changed += seen != scene
    assert 20 < changed < 290


@pytest.mark.parametrize("typical", [0.0, 0.3, 1.0])
def test_objects_follow_the_prior_with_the_stated_probability(typical):
    colour = [
        next(t for t in s if t.shape == q["shape"]) for s, q in many_rows("colour", typical, 800)
    ]
    row = [next(t for t in s if t.shape == q["shape"]) for s, q in many_rows("row", typical, 800)]
    motion = [s[0] for s, _ in many_rows("motion", typical, 800)]
    # the prior-breaking set draws what is asked evenly, or the question would give it away
    usual_row = typical or 0.5
    for share, want in (
        (np.mean([t.colour == scenes.PRIOR[t.shape][0] for t in colour + row + motion]), typical),
        (np.mean([scenes.ROWS[t.row] == scenes.PRIOR[t.shape][1] for t in row]), usual_row),
        (np.mean([scenes.ROWS[t.row] == scenes.PRIOR[t.shape][1] for t in colour]), typical),
        (np.mean([t.direction == scenes.PRIOR[t.shape][2] for t in motion]), typical),
    ):
        assert abs(share - want) <= 4 * (want * (1 - want) / 800) ** 0.5
    for values in ([t.colour for t in colour], [t.direction for t in motion]):
        assert len(set(values)) == 4


# --- the tiny models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "policy")


@settings(deadline=None, max_examples=200, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example("naïve 猫\u200d🐈 \t\r\n  two  spaces  \x00\x7f Ω≈ç√ ﷽")
@example("a red circle, moving right. <caption>x</caption> don't, can 't !")
def test_the_tokenizer_round_trips_any_text(tokenizer, text):
    """Up to canonical composition, which Qwen's own tokenizer does too."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_stage_tags_and_objects_are_single_tokens(tokenizer):
    """Stage tags and objects are single tokens. Tags survive decoding."""
    tags = list(reasoning.TAGS)
    for piece in [
        *tags,
        *(f" {colour} {shape}" for colour in scenes.COLOURS for shape in scenes.PRIOR),
    ]:
        assert len(tokenizer(piece, add_special_tokens=False).input_ids) == 1, piece
    text = "<prethink>circle west</prethink><caption>west red circle</caption><think>so</think><answer>A</answer>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    # the format reward sees the tags
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) < 20
    for special in models.SPECIAL:
        assert tokenizer.decode(tokenizer(special).input_ids, skip_special_tokens=True) == ""


def test_the_policy_is_the_real_class_with_the_tokenizers_ids(policy, tokenizer):
    """The policy is the real class with the tokenizer's own ids."""
    config = policy.core.config
    assert type(policy.core).__name__ == "Qwen2_5_VLForConditionalGeneration"
    for name in (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ):
        text = f"<|{name.removesuffix('_token_id').replace('image', 'image_pad').replace('video', 'video_pad')}|>"
        assert getattr(config, name) == tokenizer.convert_tokens_to_ids(text)
    assert policy.core.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def read_caption(prompt: str) -> tuple[str, str, str]:
    """The question and the caption of a judge's prompt, and the answer that one who only reads the
    caption gives."""
    caption, question = (
        prompt.split("instruction:\n")[1].split("\n\nAnswer")[0].split("\n\nQuestion:\n")
    )
    problem, *options = question.split("\n")
    letters = {text: name for name, text in (option.split(". ") for option in options[1:])}
    if problem.startswith("How many"):
        return question, caption, str(len(caption.split(", ")) if caption else 0)
    words = (
        {"north": "top", "south": "bottom"}.get(caption[:5], "")
        if "which row" in problem
        else caption
    )
    words = ("no" if caption.startswith("no ") else "yes") if "Is there" in problem else words
    return (
        question,
        caption,
        next((letters[word] for word in words.split()[::-1] if word in letters), "?"),
    )


@pytest.fixture
def reader(monkeypatch):
    """A judge that reads captions with rules in place of the model; the (question, caption) pairs
    it was asked."""
    asked = []

    class Reader:
        def __init__(self, path, max_new_tokens):
            pass

        def __call__(self, prompts):
            read = [read_caption(prompt) for prompt in prompts]
            asked.extend((question, caption) for question, caption, _ in read)
            return [answer for _, _, answer in read]

    monkeypatch.setattr(models.judges, "LocalJudge", Reader)
    return asked


def test_the_judge_is_tested_on_captions_it_was_not_trained_on(
    monkeypatch, tmp_path, tokenizer, reader
):
    trained = []

    def forward_only(name, model, loss_of_batch, steps, lr, quiet):
        with torch.no_grad():
            assert all(loss_of_batch().isfinite() for _ in range(steps))

    prompt = models.caption_reward.judge_prompt
    monkeypatch.setattr(models, "make_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(models, "fit", forward_only)
    with monkeypatch.context() as patch:
        patch.setattr(
            models.caption_reward, "judge_prompt", lambda *qc: trained.append(qc) or prompt(*qc)
        )
        models.train_judge(tmp_path, steps=6)
    right = models.judge_accuracy(tmp_path, cases=300)
    unseen = reader[:300]
    assert len(trained) == 6 * 64 and len(reader) == 600 and all(caption for _, caption in unseen)
    assert {caption for _, caption in unseen}.isdisjoint({caption for _, caption in trained})
    assert {question for question, _ in unseen} <= {question for question, _ in trained}
    assert right["true"] == 1.0 and right["different"] == len(set(unseen)) > 80
    assert {caption for _, caption in reader[300:]} == {""}


def test_one_caption_in_five_is_held_out_the_same_everywhere():
    rng = random.Random(0)
    different = sorted({models.judge_case(rng) for _ in range(4000)})
    assert 0.15 < np.mean([models.held_out(case) for case in different]) < 0.25
    held = [
        models.held_out(("any question", f"no {shape}", "B", "multiple choice")) for shape in SHAPES
    ]
    # a hash of the process would change with it
    assert dict(zip(SHAPES, held))["diamond"] and sum(held) == 1


def test_the_floor_is_fitted_by_whole_question_on_other_cases(monkeypatch, tmp_path, reader):
    """Two questions of one first word have answers of their own, and a third one's answers never
    come twice: the best constant is right on two thirds. By first word it would be one third,
    fitted on the same cases more than two."""
    asked = itertools.cycle(["What is a?", "What is b?", "What is c?"])
    once = map(str, itertools.count())

    def case(rng):
        question, text = next(asked), next(once)
        return question, text, {"a": "A", "b": "B", "c": text}[question[-2]], "free-form"

    monkeypatch.setattr(models, "judge_case", case)
    right = models.judge_accuracy(tmp_path, cases=99)
    assert right["floor"] == 66 / 99 and right["empty"] == 0 and right["different"] == 99


# --- build ----------------------------------------------------------------------------------------


REPORT = {"true": 1.0, "different": 158, "empty": 0.3, "floor": 0.4}


@pytest.fixture
def workshop(monkeypatch):
    """`build` with makers that only leave a mark; they can be told to fail."""
    made, fail = [], set()

    def maker(name):
        def make(folder, *args, **options):
            (folder / "half").write_text("begun")
            if name in fail:
                raise KeyboardInterrupt
            (folder / "whole").write_text("done")
            made.append(name)

        return make

    for name, function in (
        ("data", "write_data"),
        ("judge", "train_judge"),
        ("policy", "train_policy"),
    ):
        monkeypatch.setattr(scenes if name == "data" else models, function, maker(name))
    monkeypatch.setattr(models, "judge_accuracy", lambda folder: REPORT)
    return made, fail


def contents(folder: Path) -> dict[str, list[str]]:
    return {d.name: sorted(f.name for f in d.iterdir()) for d in folder.iterdir() if d.is_dir()}


WHOLE = {name: ["half", "whole"] for name in ("data", "judge", "policy")}
MADE = json.dumps({"version": world.VERSION, "seed": 0})


def test_build_makes_all_parts_once(workshop, tmp_path):
    """The build makes all parts once. It skips those that are there."""
    made, _ = workshop
    assert world.build(tmp_path / "world", quiet=True) == tmp_path / "world"
    assert contents(tmp_path / "world") == WHOLE and sorted(made) == ["data", "judge", "policy"]
    world.build(tmp_path / "world", quiet=True)
    assert len(made) == 3


def test_build_says_what_the_judge_was_tested_on(workshop, tmp_path, capsys):
    world.build(tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("judge: "))
    assert line == (
        "judge: 100.0% right on captions held out of its training (158 different), 30.0% without a "
        "caption "
        "(the best constant answer to each question: 40.0%)"
    )


@pytest.mark.parametrize("part", ["data", "judge", "policy"])
def test_an_interrupted_build_goes_on(workshop, tmp_path, part):
    """An interrupted build leaves no part that looks whole. It goes on."""
    made, fail = workshop
    fail.add(part)
    with pytest.raises(KeyboardInterrupt):
        world.build(tmp_path, quiet=True)
    assert not (tmp_path / part).exists()
    before = list(made)
    fail.clear()
    world.build(tmp_path, quiet=True)
    assert contents(tmp_path) == WHOLE
    # nothing twice
    assert sorted(made) == ["data", "judge", "policy"] and made[: len(before)] == before


def test_an_unfinished_part_is_not_taken_for_whole(workshop, tmp_path):
    """An unfinished part is not taken for whole. Nothing of it is kept."""
    (tmp_path / "world.json").write_text(MADE)
    (tmp_path / ".data.unfinished").mkdir()
    (tmp_path / ".data.unfinished" / "stale.json").write_text("[]")
    world.build(tmp_path, quiet=True)
    assert contents(tmp_path) == WHOLE


def test_a_judge_that_cannot_read_is_trained_from_another_start(workshop, tmp_path, monkeypatch):
    made, _ = workshop
    found = iter([0.9, 0.98])
    monkeypatch.setattr(models, "judge_accuracy", lambda _: {**REPORT, "true": next(found)})
    world.build(tmp_path, quiet=True)
    assert sorted(made) == ["data", "judge", "judge", "policy"] and contents(tmp_path) == WHOLE


def test_build_refuses_a_judge_that_cannot_read(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "judge_accuracy", lambda folder: {**REPORT, "true": 0.6})
    with pytest.raises(ConfigError, match="60.0%"):
        world.build(tmp_path, quiet=True)
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    "there", ["", '{"version": 1, "seed": 0}', json.dumps({"version": world.VERSION, "seed": 5})]
)
def test_a_folder_of_another_world_is_refused(workshop, tmp_path, there):
    """A world of another version or seed, or of a version that wrote no world.json, is not taken
    for this one, and nothing of it is lost."""
    (tmp_path / "data").mkdir()
    if there:
        (tmp_path / "world.json").write_text(there)
    with pytest.raises(ConfigError, match="Delete it, or give another folder"):
        world.build(tmp_path, quiet=True, seed=0)
    assert workshop[0] == [] and (tmp_path / "data").is_dir()


def test_a_world_that_another_process_builds_is_waited_for(workshop, tmp_path, capfd):
    """Two runs that are started at once build one world, once."""
    (tmp_path / "world.json").write_text(MADE)
    build = 'time.sleep(2); [Path(name).mkdir() for name in ("data", "judge", "policy")]'
    with commands.another_process_in(tmp_path, build):
        world.build(tmp_path, quiet=True)
    assert workshop[0] == [] and "in use by another process" in capfd.readouterr().out


def test_a_world_of_any_seed_is_taken_where_none_is_asked_for(workshop, tmp_path):
    world.build(tmp_path, quiet=True, seed=3)
    world.build(tmp_path, quiet=True)
    assert json.loads((tmp_path / "world.json").read_text())["seed"] == 3


def test_build_writes_the_real_data_folder(workshop, tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "world.json").write_text(MADE)
    for name in ("judge", "policy"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(scenes.write_data, "__defaults__", ({"train": 5}, 0))
    world.build(tmp_path, quiet=True)
    assert len(data.load(tmp_path / "data")["train"]) == 5
