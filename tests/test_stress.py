"""stress.py and corrupted rows: drops by hand, and what model and judge are shown."""

import math
import random
import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import skimage.data
from PIL import Image

import answers
import corruption
import data
import stress
from engine import DataError
from engine.media import Size
from stress import Line, Question

pytestmark = pytest.mark.quick


PHOTO = Image.fromarray(skimage.data.astronaut()).crop((150, 0, 350, 200))


def rows(n=12, **changes) -> list[data.Sample]:
    """Cuts of a photograph, each of its own size, with two words of options."""
    return [
        data.Sample(
            id=f"r{i}",
            data_type="image",
            media=(PHOTO.crop((0, 0, 40 + i, 40)),),
            problem="There are two. <image> Which is it? Answer with one word.",
            options=("A. red", "B. blue"),
            problem_type="multiple choice",
            answer="AB"[i % 2],
            sizes=(Size(1, 40, 40 + i),),
            **changes,
        )
        for i in range(n)
    ]


def shown(sample: data.Sample) -> list[dict]:
    return data.prompts([sample], True, 2.0, 16)[0][0]["content"]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*corruption.KINDS, corruption.NO_MEDIA])
def test_rows_are_corrupted_when_they_are_read(kind):
    """The model sees another picture or another text, never both, and the row keeps its answer."""
    before = rows()
    after, notes = corruption.corrupt(before, kind, 0)
    assert [s.id for s in after] == [s.id for s in before] and not notes
    for old, new in zip(before, after, strict=True):
        assert (new.answer, new.options, new.category) == (old.answer, old.options, old.category)
        images = [[p["image"].tobytes() for p in shown(s) if "image" in p] for s in (old, new)]
        words = [[p["text"] for p in shown(s) if "text" in p] for s in (old, new)]
        if kind == corruption.NO_MEDIA:
            assert images[1] == [] and "".join(words[1]).split() == "".join(words[0]).split()
        elif kind in ("remove_text", "mislead"):
            assert images[0] == images[1] and words[0] != words[1]
        else:
            assert words[0] == words[1] and images[0] != images[1]
    assert before == rows() and corruption.corrupt(before, kind, 0)[0] == after


def test_a_judge_reads_what_is_asked_and_no_false_hint():
    [row] = corruption.corrupt(rows(1), "remove_text", 0)[0]
    assert row.question == "Answer with one word.\nOptions:\nA. red\nB. blue"
    [row] = corruption.corrupt(rows(1), "mislead", 0)[0]
    assert row.question == rows(1)[0].question and "Hint: the answer is B. blue." in row.hint


def test_a_caption_is_held_against_what_is_shown():
    """Another row's picture comes with its objects; where nothing is shown, all that is named is
    made up."""
    some = [
        replace(s, objects=(f"thing {i}",), relevant=(f"thing {i}",)) for i, s in enumerate(rows())
    ]
    objects = {data.picture_of(s): s.objects for s in some}
    for row in corruption.corrupt(some, "random_media", 0, picture=data.picture_of)[0]:
        assert row.objects == objects[data.picture_of(row)] and row.relevant is None
    for kind in ("blank", corruption.NO_MEDIA):
        assert {s.objects for s in corruption.corrupt(some, kind, 0)[0]} == {()}
        assert {s.objects for s in corruption.corrupt(rows(), kind, 0)[0]} == {None}
    assert corruption.corrupt(some, "occlude", 0)[0][3].objects == some[3].objects


def test_another_row_s_media_come_with_their_sizes():
    before = rows()
    after, _ = corruption.corrupt(before, "random_media", 5)
    assert all(new.media != old.media for old, new in zip(before, after, strict=True))
    assert all(s.sizes[0].width == s.media[0].width for s in after)
    mixed = random.Random(1).sample(before, len(before))
    assert {s.id: s.media for s in corruption.corrupt(mixed, "random_media", 5)[0]} == {
        s.id: s.media for s in after
    }


def test_clips_get_clips_and_two_pictures_get_two():
    before = rows(4)
    before += [
        replace(s, id=f"v{s.id}", data_type="video", media=(f"{s.id}.mp4",)) for s in rows(4)
    ]
    before += [replace(s, id=f"t{s.id}", media=(*s.media, "b.png")) for s in rows(4)]
    for old, new in zip(before, corruption.corrupt(before, "random_media", 0)[0], strict=True):
        assert new.data_type == old.data_type and len(new.media) == len(old.media)
        assert [s for s in before if s.media == new.media][0].data_type == old.data_type


def test_rows_about_one_picture_do_not_lend_it_to_each_other():
    shared = rows(1)[0]
    # the same content, as every row of a Parquet file holds its own copy
    alike = [replace(shared, id=str(i), media=(shared.media[0].copy(),)) for i in range(4)]
    lend = partial(corruption.corrupt, kind="random_media", seed=0, picture=data.picture_of)
    found, notes = lend(alike)
    assert not found
    assert notes == ["4 rows left out: there are no other media of its kind (0, 1, 2)"]
    assert len(lend([*alike, rows(2)[1]])[0]) == 5


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("mislead", dict(options=(), answer="a cat"), "no false answer is known to its question"),
        (
            "remove_text",
            dict(problem="Answer with one word."),
            "the rule finds nothing to remove in its text",
        ),
    ],
)
def test_rows_that_cannot_be_corrupted_are_left_out_and_said(kind, changes, says):
    some = rows(6)
    some[:4] = [replace(s, **changes) for s in some[:4]]
    found, [note] = corruption.corrupt(some, kind, 0)
    assert [s.id for s in found] == ["r4", "r5"] and note.startswith(f"4 rows left out: {says}")


def test_a_text_that_is_all_condition_is_counted():
    some = [replace(s, problem="AB is 5. Find x.") for s in rows(3)]
    found, notes = corruption.corrupt(some, "remove_text", 0)
    assert [s.problem for s in found] == [""] * 3
    assert notes == ["3 rows have no words of their own left"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'fog' is none of blank, random_media"):
        corruption.corrupt(rows(2), "fog", 0)


def test_the_share_is_a_draw_by_seed_and_id():
    """A row's fate does not depend on the rows around it; a greater share holds the smaller one."""
    some = rows(400)
    hit = {
        (seed, share): {s.id for s in corruption.corrupt(some, "blank", seed, share)[0] if s.corruption}
        for seed in (0, 1)
        for share in (0.0, 0.25, 0.5, 1.0)
    }  # fmt: skip
    assert [len(hit[0, share]) for share in (0.0, 1.0)] == [0, 400]
    assert 70 < len(hit[0, 0.25]) < 130 and 165 < len(hit[0, 0.5]) < 235
    assert hit[0, 0.25] < hit[0, 0.5] and hit[0, 0.5] != hit[1, 0.5]
    part = {s.id for s in corruption.corrupt(some[50:90], "blank", 0, 0.5)[0] if s.corruption}
    assert part == hit[0, 0.5] & {s.id for s in some[50:90]}


def test_a_corruption_of_media_leaves_the_fingerprint():
    some = rows(3)
    corrupted, _ = corruption.corrupt(some, "blank", 0)
    assert data.fingerprint({"train": some}) == data.fingerprint({"train": corrupted})


# --- drops ----------------------------------------------------------------------------------------


def asked(n: int, kinds=("one",), clusters=0) -> list[Question]:
    return [
        Question(str(i), kinds[i % len(kinds)], str(i % clusters if clusters else i), 0.25)
        for i in range(n)
    ]


def test_drops_by_hand():
    questions = asked(4, ("one", "two"))
    intact, blank = [True, True, True, False], [True, False, False, True]
    right = {
        "intact": {str(i): x for i, x in enumerate(intact)},
        "blank": {str(i): x for i, x in enumerate(blank) if i != 3},
    }
    found = {(line.kind, line.input): line for line in stress.lines(questions, right)}
    assert found["all", "intact"] == Line("all", "intact", 4, 0.75)
    # row 3 has no blank answer: of the other three, all were right and one is
    line = found["all", "blank"]
    assert (line.n, line.right, line.drop) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["one", "blank"].drop == pytest.approx(0.5) and found["two", "blank"].n == 1
    # of few rows, Newcombe's interval
    assert found["two", "blank"].low < 1.0 == found["two", "blank"].high
    assert found["all", "chance"] == Line("all", "chance", 4, 0.25)


def test_alone_the_interval_is_that_of_paired_differences():
    rng = np.random.default_rng(0)
    one, two = (dict(zip(map(str, range(80)), (rng.random(80) < p).tolist())) for p in (0.8, 0.4))
    found = stress.difference(asked(80), one, two)
    changes = [int(one[str(i)]) - int(two[str(i)]) for i in range(80)]
    half = 1.96 * statistics.stdev(changes) / math.sqrt(80)
    assert found["drop"] == pytest.approx(statistics.mean(changes))
    assert found["high"] - found["drop"] == pytest.approx(half, rel=1e-9)
    assert found["drop"] - found["low"] == pytest.approx(half, rel=1e-9)


def test_clusters_widen_it_as_a_bootstrap_over_them_does():
    """60 pictures with five questions each, right or wrong together."""
    rng, questions = np.random.default_rng(1), asked(300, clusters=60)
    good = rng.random((2, 60)) < np.array([[0.8], [0.4]])
    one, two = ({q.id: bool(side[int(q.cluster)]) for q in questions} for side in good)
    found = stress.difference(questions, one, two)
    change = good[0].astype(float) - good[1]
    drawn = change[rng.integers(0, 60, (4000, 60))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=0.02)
    assert found["high"] == pytest.approx(high, abs=0.02)
    alone = stress.difference(asked(300), one, two)
    assert alone["high"] - alone["low"] < 0.6 * (found["high"] - found["low"])


def test_an_interval_does_not_leave_what_is_possible():
    one, two = {"0": True, "1": True, "2": True}, {"0": False, "1": False, "2": True}
    found = stress.difference(asked(3), one, two)
    assert -1 <= found["low"] < found["drop"] < found["high"] <= 1


@pytest.mark.parametrize("lost", [True, False])
def test_where_all_rows_change_alike_the_interval_is_no_point(lost):
    one = {str(i): True for i in range(40)}
    found = stress.difference(asked(40), one, {i: not lost for i in one})
    assert found["drop"] == lost and found["high"] - found["low"] > 0.05


def test_rows_of_one_picture_or_pair_are_one_cluster():
    some = rows(6)
    some[1] = replace(some[1], media=(some[0].media[0].copy(),))
    some[2:4] = [replace(s, pair="p") for s in some[2:4]]
    some[4] = replace(some[4], media=some[3].media)
    clusters = [q.cluster for q in stress.questions_of(some)]
    assert clusters[0] == clusters[1] and len(set(clusters[2:5])) == 1 and len(set(clusters)) == 3


def test_chance_is_of_the_options_that_are_shown():
    several = replace(rows(1)[0], answer=answers.Answers("A", "red"))
    bare = replace(rows(1)[0], options=(), answer="5")
    chances = [q.chance for q in stress.questions_of([*rows(1), several, bare])]
    assert chances == [0.5, 0.5, 0.0]


def test_a_set_of_the_same_name_is_not_overwritten():
    with pytest.raises(DataError, match="test_blank is the name of test with blank"):
        stress.corrupted_tests({"test": rows(2), "test_blank": rows(2)}, ["blank"], print)


def test_a_kind_that_fits_no_row_is_said_and_left_out(capsys):
    bare = [replace(s, options=(), answer="a cat") for s in rows(2)]
    made = stress.corrupted_tests({"test": bare}, ["mislead", "blank"], print)
    assert list(made) == ["test_blank"]
    assert "test_mislead: 2 rows left out: no false answer is known" in capsys.readouterr().out


def test_the_table_reads():
    right = {
        "intact": {"0": True, "1": True, "2": True, "3": False},
        corruption.NO_MEDIA: {"0": False, "1": True, "2": False, "3": False},
    }
    text = stress.table("test", list(stress.lines(asked(4), right)))
    assert text.splitlines()[0] == "test: the stress test"
    assert text.splitlines()[1].split("  ")[1].strip() == "kind of question"
    assert "needs eyes: +50.0 [" in text and "] of 75.0 points" in text and "chance" in text
    assert "question alone" in text and "one" not in text.replace("alone", "").split()
