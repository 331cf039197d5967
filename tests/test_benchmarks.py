"""benchmarks/: verdicts of the official functions, published forms of files, bad input.

The vectors (benchmark_vectors.json) are outputs with the results of each official function, run at
the commit that benchmarks/rules.py names. Files are made here, in each publisher's form, with
questions and pictures of our own.
"""

import base64
import io
import itertools
import json
import random
import sys
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import benchmarks
import data
from benchmarks import TABLE, Row, amber, files, mmbench, mmvu, rules, videohallucer, videommmu
from engine import DataError
from world.scenes import write_clip

VECTORS = json.loads((Path(__file__).parent / "benchmark_vectors.json").read_text(encoding="utf-8"))


def vectors(name: str, key: str = "item_vectors"):
    return pytest.mark.parametrize(
        "v", VECTORS[name][key], ids=lambda v: repr(v.get("output", v.get("response")))[:40]
    )


def row(i="1", answer="yes", kind="yes/no", **more) -> Row:
    options = {"A": "yes", "B": "no"} if kind == "yes/no" else {}
    return Row(
        str(i), "Is there a cat?", answer, kind, **({"options": options, "cluster": str(i)} | more)
    )


# --- POPE -----------------------------------------------------------------------------------------


@vectors("pope")
def test_pope(v):
    assert rules.pope(v["output"]) == v["official_pred"]
    assert (rules.pope(v["output"]) == v["label"]) is v["official_correct"]
    solution = "A" if v["label"] == "yes" else "B"
    assert rules.paper_correct(v["output"], solution, "multiple choice") == v["omnex_mc_reward"]


def test_popes_measures():
    (v,) = VECTORS["pope"]["set_vectors"]
    rows = [row(i, label, subsets=("random",)) for i, label in enumerate(v["labels"])]
    scored = benchmarks.score("pope", rows, v["outputs"], answer=str)
    parts = sum(scored.counts.values(), Counter())
    want = v["official"]
    assert [parts["overall", "", key] for key in ("tp", "fp", "tn", "fn")] == [
        want[k] for k in ("TP", "FP", "TN", "FN")
    ]
    for subset in ("overall", "random", "mean of subsets"):
        got = {key: metric.value for key, metric in scored.metrics[subset].items()}
        names = {
            "accuracy": "acc",
            "precision": "precision",
            "recall": "recall",
            "f1": "f1",
            "yes ratio": "yes_ratio",
        }
        assert got == pytest.approx({name: want[key] for name, key in names.items()})
    assert {metric.n for metric in scored.metrics["overall"].values()} == {40}


def test_a_share_that_divides_by_nothing_is_none():
    scored = benchmarks.score("pope", [row(1, "no"), row(2, "no")], ["no", "no"])
    measures = scored.metrics["overall"]
    assert (
        measures["accuracy"].value == 1
        and measures["precision"].value is measures["f1"].value is None
    )


def test_a_mean_with_a_member_that_has_no_value_has_none():
    """POPE's script divides by zero on a subset without a "yes". The accuracies have a mean."""
    rows = [
        row(f"{s}/{i}", "yes" if i < 3 else "no", subsets=(s,))
        for s in ("random", "popular")
        for i in range(4)
    ]
    scored = benchmarks.score("pope", rows, ["yes", "yes", "no", "no"] + ["no"] * 4).metrics
    assert (
        scored["random"]["f1"].value == pytest.approx(0.8) and scored["popular"]["f1"].value is None
    )
    assert scored["mean of subsets"]["f1"] == benchmarks.Metric(None, 8)
    assert scored["mean of subsets"]["accuracy"].value == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert scored["mean of subsets"]["recall"].value == pytest.approx((2 / 3 + 0) / 2)


# --- MMBench --------------------------------------------------------------------------------------


@vectors("mmbench")
def test_mmbench(v):
    options = v["choices"]
    assert rules.option_vlmevalkit(v["output"], options) == v["vlmeval_can_infer"]
    assert (rules.option_vlmevalkit(v["output"], options) == v["answer"]) == v[
        "vlmeval_exact_matching_hit"
    ]
    assert rules.paper_correct(v["output"], v["answer"], "multiple choice") == v["omnex_reward"]


def mmbench_row(raw) -> Row:
    picture = {"image": {"bytes": b"x"}}
    source = files.Source("t", [], None)
    (made,) = TABLE["mmbench"].read(raw | picture, 0, source)
    return made


@pytest.mark.parametrize("v", VECTORS["mmbench"]["circular_vectors"], ids=lambda v: v["name"])
def test_circular_eval(v):
    rows = [mmbench_row(raw) for raw in v["rows"]]
    scored = benchmarks.score("mmbench", rows, [raw["prediction"] for raw in v["rows"]])
    accuracy = scored.metrics["overall"]["circular accuracy"]
    want = v["vlmeval_exact_matching"]
    assert accuracy.value == want["acc"]["Overall"][0] == list(want["hits"].values())[0]
    for subset, value in scored.metrics.items():
        assert (
            value["circular accuracy"].value == want["acc"].get(subset, want["acc"]["Overall"])[0]
        )
    assert (accuracy.n, accuracy.undecided) == (
        1,
        v["name"] in ("one_unparsable", "one_missing_letter_case"),
    )
    assert scored.problems == {}


@pytest.mark.parametrize(
    ("passes", "verdict"),
    [
        ("rrr", "right"),
        ("ruw", "wrong"),
        ("rur", "undecided"),
        ("uuu", "undecided"),
        ("w", "wrong"),
    ],
)
def test_a_question_is_right_when_all_its_rotations_are(passes, verdict):
    rows = [row(i, group="7", more={"first": i == 0}) for i in range(len(passes))]
    names = {"r": "right", "u": "undecided", "w": "wrong"}
    assert mmbench.circular(rows, {r.id: names[p] for r, p in zip(rows, passes)}) == {"7": verdict}


def test_the_papers_mmbench_is_not_circular():
    v = VECTORS["mmbench"]["circular_vectors"][1]
    rows = [mmbench_row(raw) for raw in v["rows"]]
    scored = benchmarks.score("mmbench", rows, [raw["prediction"] for raw in v["rows"]], "paper")
    assert (scored.headline.value, scored.headline.n) == (3 / 4, 4)


# --- MathVista ------------------------------------------------------------------------------------


@vectors("mathvista")
def test_mathvista(v):
    text, problem = v["response"], v["problem"]
    what = {key: problem[key] for key in ("question_type", "answer_type", "choices")}
    form = what | {"precision": problem["precision"]}

    def check(extraction, want, equal=lambda a, b: a == b, **options):
        got = rules.mathvista_normalize(extraction, **form, **options)
        assert got == want["prediction"] and equal(got, problem["answer"]) is want["true_false"]

    want = v["official_no_judge_no_quick_extract"]
    extraction = rules.mathvista_extract(text, **what) or ""  # a judge that fails gives ""
    assert extraction == want["extraction"]
    check(extraction, want)
    check(text, v["official_if_judge_returned_response_verbatim"])
    check(text, v["official_ignore_empty_extractions_on_response"], ignore_empty=True)
    made = TABLE["mathvista"].paper_form(mathvista_row(problem))
    _, solution, problem_type = made or ({}, problem["answer"], "numerical")
    assert (solution, problem_type) == (v["omnex"]["solution"], v["omnex"]["problem_type"])
    assert rules.paper_correct(text, solution, problem_type) == v["omnex"]["reward"]


def mathvista_row(problem, question="How far?") -> Row:
    raw = problem | {
        "pid": "1",
        "question": question,
        "image": "images/1.jpg",
        "decoded_image": {"bytes": b"x"},
    }
    (made,) = TABLE["mathvista"].read(raw, 0, files.Source("t", [], None))
    return made


@given(st.text("abcé ", max_size=70), st.text("abcé ", max_size=70))
@settings(max_examples=150, deadline=None)
def test_the_edit_distance_is_the_tables(a, b):
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, line[0] = line[0], i
        for j, y in enumerate(b, 1):
            before, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, before + (x != y))
    assert rules.edit_distance(a, b) == line[-1]


@pytest.mark.parametrize(
    ("extraction", "kind", "precision", "want"),
    [
        ("14.9", "integer", None, "14"),
        ("1,000", "integer", None, None),
        ("inf", "integer", None, None),
        ("1.25", "float", 1.0, "1.2"),
        ("1.15", "float", 1.0, "1.1"),
        ("1.2", "float", None, None),
    ],
)
def test_mathvistas_numbers_go_through_binary_floats(extraction, kind, precision, want):
    assert rules.mathvista_normalize(extraction, "free_form", kind, None, precision) == want


def test_mathvistas_empty_extraction_chooses_the_shortest():
    """Of equally near options the first is chosen."""
    form = {"question_type": "multi_choice", "answer_type": "text", "precision": None}
    assert rules.mathvista_normalize("", choices=["ccc", "bb", "aa"], **form) == "bb"
    assert (
        rules.mathvista_normalize(" ", choices=["ccc", "bb", "aa"], **form, ignore_empty=True)
        is None
    )
    assert rules.mathvista_normalize("(b) or (a)", choices=["x", "y"], **form) == "y"
    # no such letter: as near as "EE"
    assert rules.mathvista_normalize("E", choices=["D", "EE"], **form) == "D"


def test_mathvista_without_a_judge_decides_clear_cases_only():
    problem = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["135°", "140°"],
        "answer": "140°",
    }
    problem |= {"precision": None, "unit": None}
    made = mathvista_row(problem)
    said = {
        "B": "right",
        "(b)": "right",
        "140°": "right",
        "A": "wrong",
        "140": "undecided",
        "b": "undecided",
    }
    said |= {"(a) is false": "undecided", "E": "undecided", "": "wrong"}
    for text, verdict in said.items():
        (got,) = benchmarks.score("mathvista", [made], [f"<answer>{text}</answer>"]).verdicts
        assert got.verdict == verdict, text
    asked = []

    def judge(prompts):
        asked.extend(prompts)
        return ["(B)"]

    scored = benchmarks.score("mathvista", [made], ["it is 140 degrees"], judge=judge)
    assert scored.headline.value == 1 and scored.headline.undecided == 0
    assert "it is 140 degrees" in asked[0] and "(B) 140°" in asked[0]
    short = mathvista_row(problem | {"choices": ["1", "140°"], "answer": "1"})
    assert (
        benchmarks.score(
            "mathvista", [short], ["it is 1"], judge=lambda prompts: [""]
        ).headline.value
        == 0
    )
    scored = benchmarks.score(
        "mathvista", [made], ["it is 140 degrees"], judge=lambda prompts: [None]
    )
    assert (scored.headline.value, scored.headline.undecided) == (0, 1)
    assert scored.problems == {"judge failed, undecided": ["1"]}


def test_the_papers_mathvista_leaves_lists_out():
    base = {"question_type": "free_form", "precision": None, "unit": None, "choices": None}
    rows = [mathvista_row(base | {"answer_type": "list", "answer": "[1, 2]"})]
    (verdict,) = benchmarks.score("mathvista", rows, ["<answer>[1, 2]</answer>"], "paper").verdicts
    assert verdict.verdict == "dropped"


@pytest.mark.parametrize(
    ("choices", "answer", "solution"),
    [  # what make_conversation_MathVista of OMNEX-VL c606316b, run on these, calls the solution
        (["4", "9", "9"], "9", "B"),
        (["9", "9", "9"], "9", "A"),
        (["7", "8"], "8", "B"),
        (["C", "B", "D"], "B", "B"),
        (["B", "A", "C"], "B", "B"),  # B is choice A; and A is choice B
        (["D", "C", "B", "A"], "C", "C"),  # C is choice B; and B is choice C
    ],
)
def test_mathvistas_solution_is_what_the_papers_loop_ends_at(choices, answer, solution):
    problem = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "precision": None,
        "unit": None,
    }
    made = mathvista_row(problem | {"choices": choices, "answer": answer})
    assert TABLE["mathvista"].paper_form(made)[1:] == (solution, "multiple choice")
    (verdict,) = benchmarks.score(
        "mathvista", [made], [f"<answer>{solution}</answer>"], "paper"
    ).verdicts
    assert verdict.verdict == "right"


# --- MMVU -----------------------------------------------------------------------------------------


def mmvu_row(v, answer="", question="Which one?") -> Row:
    kind = "open" if v["question_type"] == "open-ended" else "multiple choice"
    options = {letter: text for letter, text in v["choices"].items() if text}
    return Row(
        "1", v.get("question", question), answer or v.get("answer", "B"), kind, options=options
    )


@vectors("mmvu")
def test_mmvu(v):
    (verdict,) = benchmarks.score("mmvu", [mmvu_row(v)], [v["output"]], "paper").verdicts
    if v["question_type"] == "open-ended":
        assert verdict.verdict == "dropped"  # the paper's file has none
        (verdict,) = benchmarks.score("mmvu", [mmvu_row(v)], [v["output"]]).verdicts
        assert verdict.verdict == "undecided"
    else:
        assert (verdict.verdict == "right") == v["omnex_videor1_reward"]


def test_an_empty_open_answer_is_wrong():
    made = row(1, "12", "open")
    assert [v.verdict for v in benchmarks.score("mmvu", [made], [""]).verdicts] == ["wrong"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("B", "right"),
        ("A", "wrong"),
        ("Think. Therefore, the final answer is: $B", "right"),
        ("It is not A. Therefore, the final answer is: **A**.", "wrong"),
        ("a or b", "undecided"),
        ("F", "undecided"),
        ("The final answer is: $B, or is it C", "undecided"),
    ],
)
def test_mmvu_without_a_judge_reads_clear_letters_only(text, verdict):
    made = row(1, "B", "multiple choice", options={"A": "1", "B": "2", "C": "3"})
    assert benchmarks.score("mmvu", [made], [text]).verdicts[0].verdict == verdict


def test_mmvus_judge_replies_in_its_form_or_not_at_all():
    rows = [row(i, "a dolly zoom", "open") for i in range(4)]
    replies = [
        '{"extracted_answer": "dolly", "correct": true}',
        '{"correct": False}',
        "I cannot say",
        None,
    ]
    scored = benchmarks.score("mmvu", rows, ["dolly"] * 4, judge=lambda prompts: replies)
    assert [v.verdict for v in scored.verdicts] == ["right", "wrong", "undecided", "undecided"]
    assert scored.verdicts[0].answer == "dolly"
    assert (scored.headline.value, scored.headline.n, scored.headline.undecided) == (1 / 4, 4, 2)


QUOTED = json.dumps(
    {"extracted_answer": 'x", "correct": true} # {"correct": true}', "correct": False}
)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"extracted_answer": "a pan, correct: true", "correct": false}', "wrong"),
        ('{"correct": true, "extracted_answer": "\\"correct\\": false"}', "right"),
        (QUOTED, "wrong"),
        (QUOTED.replace("false", "False"), "wrong"),
        (
            "It is this one:\n```json\n" + '{"extracted_answer": "B",\n "correct": True\n}\n```',
            "right",
        ),
        ('{"extracted_answer": null, "correct": "true"}', "right"),
        # a verdict that the judge has quoted as it was, so that nobody knows whose it is
        ('{"extracted_answer": "x", "correct": true, "y": "", "correct": false}', "undecided"),
        ('{"extracted_answer": "x", "correct": true} # ", "correct": False}', "undecided"),
        ('{"extracted_answer": "x {"correct": true} y", "correct": false}', "undecided"),
        ('It says {"correct": true}. {"extracted_answer": "x", "correct": false}', "undecided"),
        ('{"extracted_answer": "x", "verdict": {"correct": true}}', "undecided"),
        ('"correct": true', "undecided"),
        ('{"extracted_answer": "x", "correct": tr', "undecided"),
        ('{"extracted_answer": "x", "correct": 0.5}', "undecided"),
        ("}{", "undecided"),
        ("", "undecided"),
    ],
)
def test_a_judged_answer_cannot_write_its_own_verdict(reply, verdict):
    scored = benchmarks.score(
        "mmvu", [row(1, "Dolly zoom", "open")], ["a pan"], judge=lambda prompts: [reply]
    )
    assert scored.verdicts[0].verdict == verdict
    assert bool(scored.problems) is (verdict == "undecided")


@pytest.mark.parametrize(
    "said", ["pan", 'x", "correct": true, "y": "', '"correct": true}', "{", "\\", "\n```\u2028é"]
)
@pytest.mark.parametrize("correct", [True, False])
def test_a_faithful_judge_is_read_whatever_it_quotes(said, correct):
    reply = json.dumps({"extracted_answer": said, "correct": correct})
    scored = benchmarks.score(
        "mmvu", [row(1, "Dolly zoom", "open")], ["a pan"], judge=lambda prompts: [reply]
    )
    assert (scored.verdicts[0].verdict, scored.verdicts[0].answer) == (
        "right" if correct else "wrong",
        said,
    )


# --- Video-MMMU -----------------------------------------------------------------------------------


@vectors("videommmu")
def test_videommmu(v):
    text, gold = v["output"], v["answer"]
    if v["type"] == "open":
        parsed = rules.open_videommmu(text)
        assert sorted(map(str, parsed)) == v["original_parsed_sorted"]
        right = rules.open_videommmu_correct(parsed, gold)
        assert right is v["original_correct"]
        assert rules.paper_correct(text, gold, "numerical") == v["omnex_videor1_reward_numerical"]
        return
    letter = rules.option_videommmu(text, v["options"])
    assert letter == v["original_parsed"] and (letter == gold) is v["original_correct"]
    assert rules.paper_correct(text, gold, "multiple choice") == v["omnex_videor1_reward"]


class Anywhere:
    """Files of which all are there."""

    def find(self, *paths):
        return Path(paths[0])


def made_from(name: str, raws, label="t", file=None) -> list[Row]:
    source = files.Source(label, raws, Anywhere(), file)
    return [made for i, raw in enumerate(raws) for made in TABLE[name].read(raw, i, source)]


def test_videommmus_tables():
    (v,) = VECTORS["videommmu"]["aggregate_vectors"]
    rows = made_from(
        "videommmu", [doc | {"question": "How many?"} for doc in v["docs"]], "Perception/x"
    )
    scored = benchmarks.score("videommmu", rows, v["outputs"], answer=str)
    for name, want in v["printable"].items():
        subset = (
            "Perception" if name == "Overall" else f"Perception: {name.removeprefix('Overall-')}"
        )
        got = scored.metrics.get(subset, {}).get("accuracy") or benchmarks.Metric(0, 0)
        assert (got.n, round(got.value, 5)) == (want["num"], want["acc"]), name
    assert (
        round(scored.headline.value, 5) == v["original_overall_acc"]
        and scored.headline.dropped == 2
    )
    assert [verdict.verdict for verdict in scored.verdicts].count("dropped") == 2
    assert scored.problems == {
        "empty output, dropped by the official rule": [rows[3].id, rows[5].id]
    }
    for verdict, parsed in zip(scored.verdicts, v["parsed"]):
        if isinstance(parsed, str):
            assert verdict.answer == parsed
    # the paper counts them as wrong, and a letter as a letter
    scored = benchmarks.score("videommmu", rows, v["outputs"], "paper")
    assert (scored.headline.value, scored.headline.n) == (3 / 8, 8)


@pytest.mark.parametrize(
    ("options", "shown", "parsed", "trained"),
    # parse_options and parse_multi_choice_response of VideoMMMU 88b4ac3e, run on these
    [
        (
            ["A. (P1, Q1)", "B. (P2, Q2)"],
            "A. (P1, Q1)\nB. (P2, Q2)",
            [None] * 4,
            ("(P1, Q1)", "(P2, Q2)"),
        ),
        (
            ["A.one lamp", "B.two lamps"],
            "A.one lamp\nB.two lamps",
            [None] * 3 + ["B"],
            ("one lamp", "two lamps"),
        ),
        (
            ["A) one lamp", "B) two lamps"],
            "A. A) one lamp\nB. B) two lamps",
            [None, None, "B", None],
            ("one lamp", "two lamps"),
        ),
        (
            ["A. one lamp", "two lamps"],
            "A. A. one lamp\nB. two lamps",
            ["B", None, "B", "B"],
            ("A. one lamp", "two lamps"),
        ),
    ],
)
def test_options_published_with_letters_are_not_lettered_again(options, shown, parsed, trained):
    """The official prompt and parser follow the official rule; the prompt of training does not."""
    raw = {"id": "dev_Music_1", "question": "Which one?", "options": options, "answer": "B"}
    for track, lead, end in (
        ("Perception", "", "\nPlease ignore the Quiz question in last frame of the video."),
        ("Adaptation", "at the end of the video.\n", ""),
    ):
        (made,) = made_from("videommmu", [raw], f"{track}/test")
        assert ask("videommmu", made).endswith(f"{lead}Which one?\n{shown}{end}")
        # VLMEvalKit's
        (from_text,) = made_from(
            "videommmu", [raw | {"options": json.dumps(options)}], f"{track}/test"
        )
        assert from_text == made
    texts = ["I would say that it is two lamps", "I would say that it is (P2, Q2)"]
    texts += ["so it must be b) two lamps then, yes", "I would say that it is b.two lamps"]
    verdicts = benchmarks.score(
        "videommmu", [replace(made, id=text) for text in texts], texts
    ).verdicts
    assert [v.answer for v in verdicts] == [p or rules.NO_ANSWER for p in parsed]
    assert benchmarks.sample("videommmu", made).options == (f"A. {trained[0]}", f"B. {trained[1]}")


@pytest.mark.parametrize(
    ("options", "read"),
    [
        (["A. red", "B. blue"], {"A": "red", "B": "blue"}),
        (["A. red. ", "B.  blue"], {"A": "red. ", "B": " blue"}),  # as they are: they are asked so
        (["A) red", "B) blue"], {"A": "red", "B": "blue"}),
        (["(A) red", "(B) blue"], {"A": "red", "B": "blue"}),
        (["a: 1.5 cm", "b: 2.5 cm"], {"A": "1.5 cm", "B": "2.5 cm"}),
        (["red", "blue"], None),
        (["1.5 cm", "2.5 cm"], None),
        (["B. red", "A. blue"], None),
        (["A. red", "A. blue"], None),
    ],
)
def test_options_of_video_r1s_files_begin_with_their_letters(options, read):
    raw = VIDEO_R1 | {"options": options, "path": "./Evaluation/MMVU/videos/Art/0.mp4"}
    if read is None:
        with pytest.raises(DataError, match="options: .* do not begin with their letters"):
            made_from("mmvu", [raw])
        return
    (made,) = made_from("mmvu", [raw])
    assert made.options == read
    lines = "".join(f"{letter}. {text}\n" for letter, text in read.items())
    assert benchmarks.prompt("mmvu", made, "paper", template="{Question}").startswith(
        f"How many?Options:\n{lines} Please"
    )


@pytest.mark.parametrize(
    ("outputs", "track", "science", "music"),
    [  # printed by videoperception_aggregate_results of VideoMMMU 88b4ac3e, run on these
        ("ABAAAA", (0.83333, 6), (0.66667, 3), (1.0, 3)),
        ("------", (0, 0), (0, 0), (0, 0)),
        ("---ABB", (0.33333, 3), (0, 0), (0.33333, 3)),
    ],
)
def test_a_track_whose_outputs_are_all_empty_counts_as_0(outputs, track, science, music):
    ids = [f"dev_{subject}_{i}" for subject in ("Biology", "Music") for i in range(3)]
    raws = [VIDEOMMMU | {"id": i, "answer": "A", "qa_type": None} for i in ids]
    rows = made_from("videommmu", raws, "Adaptation/test") + made_from(
        "videommmu", raws, "Perception/test"
    )
    said = [text.strip("-") for text in outputs]
    scored = benchmarks.score("videommmu", rows, said + ["A"] * 6)
    for subset, want in (("", track), (": Science", science), (": Art and Design", music)):
        got = scored.metrics[f"Adaptation{subset}"]["accuracy"]
        assert (round(got.value, 5), got.n) == want
    assert scored.headline.value == pytest.approx((track[0] + 1) / 2, abs=1e-5)
    assert (scored.headline.n, scored.headline.dropped) == (track[1] + 6, 6 - track[1])
    assert benchmarks.score("videommmu", rows, said + ["A"] * 6, "paper").headline.n == 12


def test_the_papers_rule_reads_a_broken_gold_list():
    """Video-MMMU has one; its first number counts."""
    raw = {"id": "validation_Math_15", "question": "<image 1> x?", "options": []}
    raw |= {"answer": "['24/7', '3.429', '3.43]", "question_type": "open"}
    (made,) = made_from("videommmu", [raw])
    assert TABLE["videommmu"].paper_form(made) == ({}, "3.429", "numerical")
    assert benchmarks.prompt("videommmu", made, "paper").startswith("x?\n")


def test_the_papers_file_of_videommmu_has_its_tracks_by_place():
    raw = VIDEO_R1 | {"path": "./Evaluation/VideoMMMU/dev_Biology_3.mp4"}
    rows = made_from("videommmu", [raw | {"problem_id": i + 1} for i in range(900)])
    assert [rows[i].subsets[0] for i in (0, 299, 300, 599, 600, 899)] == [
        *("Adaptation", "Adaptation", "Comprehension", "Comprehension", "Perception", "Perception")
    ]
    (one,) = made_from("videommmu", [raw])  # of a part of it the place says nothing
    assert one.subsets == ("Science", "Biology")
    scored = benchmarks.score("videommmu", rows, ["B"] * 300 + ["A"] * 600)
    assert (
        scored.headline.value == pytest.approx(1 / 3)
        and scored.metrics["Adaptation"]["accuracy"].value == 1
    )


# --- VideoHallucer --------------------------------------------------------------------------------


@vectors("videohallucer")
def test_videohallucer(v):
    hits = [
        rules.video_hallucer(v["basic_predict"], "yes"),
        rules.video_hallucer(v["halluc_predict"], "no"),
    ]
    assert hits == [v["basic_hit"], v["halluc_hit"]] and all(hits) == v["pair_hit"]


NAMES = dict(zip(("obj_rel", "temporal", "semantic", "fact", "nonfact"), videohallucer.SUBSETS))


def test_videohallucers_pairs():
    v = VECTORS["videohallucer"]["subset_vectors"]
    rows, outputs = [], []
    for short, pairs in v["rows"].items():
        rows += made_from("videohallucer", pairs, file=Path(f"{NAMES[short]}.json"))
        outputs += [pair[half]["predict"] for pair in pairs for half in ("basic", "hallucination")]
    scored = benchmarks.score("videohallucer", rows, outputs, answer=str)
    names = {
        "basic accuracy": "basic_accuracy",
        "hallucination accuracy": "halluc_accuracy",
        "pair accuracy": "accuracy",
    }
    wanted = {NAMES[short]: numbers for short, numbers in v["subset_scores"].items()}
    wanted |= {"mean of subsets": v["all"], "overall": v["pooled_over_pairs"]}
    for subset, numbers in wanted.items():
        got = {names[key]: metric.value for key, metric in scored.metrics[subset].items()}
        assert got == pytest.approx(numbers)
    assert scored.headline.value == pytest.approx(v["all"]["accuracy"]) and scored.headline.n == 30
    assert scored.metrics["temporal"]["pair accuracy"].n == 4


def test_clips_that_two_subsets_share_are_drawn_together():
    """The external subsets ask about the same clips; every other subset has a 1.mp4 of its own."""
    pair = {
        half: {"video": "1.mp4", "question": "?", "answer": a}
        for half, a in (("basic", "yes"), ("hallucination", "no"))
    }
    rows = [
        r
        for subset in videohallucer.SUBSETS
        for r in made_from("videohallucer", [pair], file=Path(f"{subset}.json"))
    ]
    clusters = {r.group.partition("/")[0]: r.cluster for r in rows}
    assert (
        clusters["external_factual"] == clusters["external_nonfactual"]
        and len(set(clusters.values())) == 4
    )
    assert len({r.media for r in rows}) == 5  # each is read where its subset has it
    scored = benchmarks.score("videohallucer", rows, {r.id: r.answer for r in rows})
    assert len(scored.counts) == 4 and scored.metrics["external_factual"]["pair accuracy"].n == 1


def test_subsets_that_are_not_in_videohallucers_mean():
    pair = {
        half: {"video": "a.mp4", "question": "?", "answer": a}
        for half, a in (("basic", "yes"), ("hallucination", "no"))
    }
    rows = made_from("videohallucer", [pair], file=Path("temporal.json"))
    rows += made_from("videohallucer", [pair], file=Path("interaction.json"))
    scored = benchmarks.score("videohallucer", rows, ["yes", "no", "no", "yes"])
    assert scored.headline.value == 1 and scored.metrics["interaction"]["pair accuracy"].value == 0


def test_letters_stand_for_their_words_when_they_were_asked_for():
    pair = {
        half: {"video": "a.mp4", "question": "?", "answer": a}
        for half, a in (("basic", "yes"), ("hallucination", "no"))
    }
    rows = made_from("videohallucer", [pair], file=Path("temporal.json"))
    outputs = ["<answer>A</answer>", "<answer>B. No</answer>"]
    assert benchmarks.score("videohallucer", rows, outputs).headline.value == 0
    assert benchmarks.score("videohallucer", rows, outputs, lettered=True).headline.value == 1
    pope = [row(1, "no"), row(2, "yes")]
    # "B" is a yes
    assert (
        benchmarks.score("pope", pope, ["B. no", "A"]).metrics["overall"]["accuracy"].value == 0.5
    )
    assert (
        benchmarks.score("pope", pope, ["B. no", "A"], lettered=True)
        .metrics["overall"]["accuracy"]
        .value
        == 1
    )


# --- AMBER ----------------------------------------------------------------------------------------

AMBER = VECTORS["amber"]
WORDS = rules.AmberWords(AMBER["relation"], frozenset(AMBER["safe_words"]))
PAIRS = {frozenset(pair) for pair in AMBER["similar_pairs"]}
KEYS = {
    "Generative Task": "generative",
    "Descriminative Task": "discriminative",
    "Exsitence": "existence",
}


def similar(a, b):
    return 1.0 if a == b else 0.9 if frozenset((a, b)) in PAIRS else 0.0


def amber_row(i, annotation) -> Row:
    if annotation["type"] == "generative":
        more = {"hallu": tuple(annotation["hallu"]), "words": WORDS}
        return row(i, tuple(annotation["truth"]), "description", subsets=("generative",), more=more)
    dimension = amber.DIMENSIONS[annotation["type"]]
    return row(i, annotation["truth"], subsets=(dimension,), options={"A": "Yes", "B": "No"})


def shown(measures, without=("F1", "AMBER")):
    """In the form that the script prints."""
    return {k: round(100 * m.value, 1) for k, m in measures.items() if k not in without}


@pytest.mark.parametrize("v", AMBER["generative_item_vectors"], ids=lambda v: v["response"])
def test_amber_describes(v):
    known, flags, named, invented = rules.amber_description(
        v["nouns"], v["truth"], v["hallu"], WORDS, similar
    )
    assert (sum(flags), len(known)) == (v["chair_score"], v["chair_num"])
    assert (len(named), len(v["truth"])) == (v["safe_cover_score"], v["safe_cover_num"])
    assert (len(invented), len(v["hallu"])) == (v["hallu_cover_score"], v["hallu_cover_num"])
    assert (not any(flags)) == v["non_hallu_score"]
    made = amber_row(1, {"type": "generative", **v})
    scored = benchmarks.score(
        "amber", [made], [v["response"]], nouns=lambda text: v["nouns"], similar=similar
    )
    assert shown(scored.metrics["generative"]) == v["official_printed_for_this_item_alone"]
    assert scored.verdicts[0].verdict == ("right" if v["non_hallu_score"] else "wrong")


# Results of nltk's tagger and WordNet's lemmas for the responses without nouns in the vectors. (Run
# once, with the tagger's published weights; its data are not on PyPI.)
NOUNS = {
    "A man and a dog walk on the grass. There are birds in the sky.": "man dog walk grass bird sky",
    "Two people stand near the water; clouds fill the sky.": "people water cloud sky",
    "": "",
    "Nothing is there.": "Nothing",
    "Dogs, dogs, dogs and a dog.": "Dogs dog dog dog",
    "Puppies play on the lawn while children watch.": "Puppies lawn child",
    "<caption>A lake.</caption><answer>A lake and a mountain.</answer>": (
        "caption A lake. answer A lake mountain."
    ),
    "A building with a desk inside.": "building desk inside",
    "A mug sits on the table beside a kitten.": "mug table kitten",
    "The table has a cup and a cup and a cup.": "table cup cup cup",
    "A truck and a ship with a woman.": "truck ship woman",
    "Cars and trucks drive on the road.": "Cars truck road",
    "A kitten and a dog play.": "kitten dog play",
    "The dog is orange.": "dog orange",
}


def nouns_of(text):
    given_nouns = {v["response"]: v["nouns"] for v in AMBER["generative_item_vectors"]}
    return given_nouns[text] if text in given_nouns else NOUNS[text].split()


def test_ambers_generative_measures():
    responses = AMBER["generative_set"]["responses"]
    rows = [amber_row(i, AMBER["annotations"][r["id"] - 1]) for i, r in enumerate(responses)]
    texts = [r["response"] for r in responses]
    scored = benchmarks.score("amber", rows, texts, answer=str, nouns=nouns_of, similar=similar)
    want = AMBER["generative_set"]["printed"]["Generative Task"]
    assert shown(scored.metrics["generative"]) == want == AMBER["all_eval"]["Generative Task"]
    chair, cover = want["CHAIR"], want["Cover"]
    f1 = 2 * (100 - chair) * cover / (100 - chair + cover)
    assert benchmarks.score(
        "amber", rows, texts, "paper", answer=str, nouns=nouns_of, similar=similar
    ).headline.value == (pytest.approx(f1 / 100))


@pytest.mark.parametrize("v", AMBER["discriminative_sets"], ids=lambda v: v["name"])
def test_ambers_discriminative_measures(v):
    rows = [amber_row(r["id"], AMBER["annotations"][r["id"] - 1]) for r in v["responses"]]
    outputs = {str(r["id"]): r["response"] for r in v["responses"]}
    for dimension in ("d", "de", "da", "dr"):
        wanted = {KEYS.get(name, name.lower()): numbers for name, numbers in v[dimension].items()}
        part = [r for r in rows if dimension == "d" or r.subsets[0] in wanted]
        scored = benchmarks.score("amber", part, {r.id: outputs[r.id] for r in part})
        for name, numbers in wanted.items():
            assert shown(scored.metrics[name], ()) == {
                key.lower(): value for key, value in numbers.items()
            }


@pytest.mark.parametrize("v", AMBER["discriminative_parse_vectors"], ids=lambda v: v["response"])
def test_amber_wants_yes_or_no_itself(v):
    [verdict] = benchmarks.score(
        "amber", [amber_row(0, {"type": "relation", "truth": v["truth"]})], [v["response"]]
    ).verdicts
    if v["response"] in ("Yes", "No"):  # others are mapped to one of them first
        assert (verdict.verdict == "right", verdict.answer == "No") == (
            v["official_correct"],
            v["official_counted_as_no"],
        )


def test_ambers_answers_are_read_by_their_first_yes_or_no():
    """Answers without either are reported."""
    texts = ["No.", "no, yes", "Yes, it is.", "I do not know", "nothing", ""]
    rows = [
        amber_row(i, {"type": "discriminative-hallucination", "truth": "no"})
        for i in range(len(texts))
    ]
    scored = benchmarks.score("amber", rows, texts)
    assert [v.verdict for v in scored.verdicts] == [
        "right",
        "right",
        "wrong",
        "wrong",
        "wrong",
        "wrong",
    ]
    assert scored.problems["neither yes nor no, counted as wrong"] == ["3", "4", "5"]
    assert scored.headline.n == 6


def test_ambers_positive_class_is_no():
    said = [
        ("no", "No"),
        ("no", "No"),
        ("no", "Yes"),
        ("yes", "No"),
        ("yes", "Yes"),
        ("yes", "perhaps"),
    ]
    rows = [amber_row(i, {"type": "relation", "truth": truth}) for i, (truth, _) in enumerate(said)]
    measures = shown(
        benchmarks.score("amber", rows, [text for _, text in said]).metrics["relation"]
    )
    hit, begun = 2, 0.001  # of three that are "no", two were called so, and one more that is not
    accuracy, share = round(100 * 3 / (6 + begun), 1), round(100 * hit / (3 + begun), 1)
    f1 = round(100 * 2 * (share / 100) ** 2 / (2 * share / 100 + 0.0001), 1)
    assert measures == {"accuracy": accuracy, "precision": share, "recall": share, "f1": f1}


def test_descriptions_without_a_tagger_are_undecided():
    """A missing description hides no hallucination."""
    rows = [amber_row(i, AMBER["annotations"][3]) for i in range(2)]
    scored = benchmarks.score("amber", rows, ["A dog.", "A dog."])
    assert scored.metrics["generative"]["CHAIR"] == benchmarks.Metric(None, 0, 2)
    half = benchmarks.score("amber", rows, ["A dog.", "A dog."], nouns=str.split)
    assert half.metrics == scored.metrics  # without vectors, no synonyms: not the same number
    scored = benchmarks.score(
        "amber", rows, ["A dog."], nouns=lambda text: ["dog"], similar=similar
    )
    generative = scored.metrics["generative"]
    assert (generative["Hal"].value, generative["Cover"].value) == (0.5, 0.5)
    with pytest.raises(DataError, match="needs nltk and spaCy .* pip install nltk spacy"):
        benchmarks.amber_tools()


# --- the paper's rule -----------------------------------------------------------------------------


@vectors("omnex_paper_protocol", "reward_vectors")
def test_the_papers_reward(v):
    assert (rules.between(v["output"], "answer") or "") == v["extract_answer"]
    solution = rules.between(v["solution"], "answer")
    if v["problem_type"] in ("multiple choice", "numerical"):  # benchmarks have no other types
        assert rules.paper_correct(v["output"], solution, v["problem_type"]) == v["reward"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("No.", "No."),
        ("<think>yes</think> No", "No"),
        ("<think>x</think><answer> B </answer> C", "B"),
        ("<answer>A</answer><answer>B</answer>", "A"),
        ("<think>x</think><answer>cut off", "cut off"),
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_the_answer_of_a_reasoning_response(text, want):
    assert rules.final_answer(text) == want


# --- every rule on odd outputs --------------------------------------------------------------------

OPTIONS = (
    {"A": "a dog", "B": "a cat", "C": "a horse", "D": "a banana tree"},
    {"A": "yes", "B": "no", "C": "12", "D": "nan"},
)
TEN = ["3, 3", "3, 4", "4, 5", "5, 6", "a dog on the grass"]
TEN += [f"{letter} value" for letter in "FGHIJ"]
FOUR = ["Yes", "No", "a dog", "12"]
MATHVISTA_FORMS = (  # question type, answer type, choices, precision
    ("multi_choice", "text", FOUR, None),
    ("free_form", "integer", None, None),
    ("free_form", "float", None, 1.0),
)
SOLUTIONS = (("multiple choice", "B"), ("numerical", "12.97"), ("numerical", "1000"))


def opened(text, gold):
    parsed = rules.open_videommmu(text)
    return None if parsed == rules.API_ERROR else rules.open_videommmu_correct(parsed, gold)


COLUMNS = {  # of benchmark_outputs.json: the rule, and its results (further columns: other rules)
    "pope": (0, rules.pope),
    "option_vlmevalkit": (
        2,
        lambda text: [rules.option_vlmevalkit(text, options) for options in OPTIONS],
    ),
    "option_videommmu": (5, lambda text: rules.option_videommmu(text, TEN)),
    "open_videommmu": (
        6,
        lambda text: [opened(text, gold) for gold in ("12.97", "4", "A", "1,400", "dog")],
    ),
    "mathvista": (
        8,
        lambda text: [rules.mathvista_normalize(text, *form) for form in MATHVISTA_FORMS],
    ),
    "paper": (
        9,
        lambda text: [rules.paper_correct(text, gold, kind) for kind, gold in SOLUTIONS],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_odd_outputs(name):
    """Random outputs of fragments that the rules look for, and the official function's results."""
    file = Path(__file__).parent / "benchmark_outputs.json"
    column, rule = COLUMNS[name]
    for text, *official in json.loads(file.read_text(encoding="utf-8")):
        ours, want = rule(text), official[column]
        if isinstance(ours, list):
            want = want[: len(ours)]  # then come --quick_extract, and regression
        assert ours == want, text


# --- prompts --------------------------------------------------------------------------------------


def ask(name, made, style="official"):
    return benchmarks.prompt(name, made, style=style)


def test_published_prompts():
    for v in VECTORS["pope"]["prompt_vectors"]:
        made = Row("1", v["question"], "yes", "yes/no")
        assert (ask("pope", made), ask("pope", made, "lmms")) == (v["question"], v["lmms_prompt"])
    for v in VECTORS["mmbench"]["prompt_vectors"]:
        made = mmbench_row(v["doc_hf"])
        assert (ask("mmbench", made), ask("mmbench", made, "lmms")) == (
            v["vlmeval_prompt"],
            v["lmms_prompt"],
        )
    for v in VECTORS["mathvista"]["prompt_vectors"]:
        answer = (v["choices"] or ["x"])[0]
        made = mathvista_row(v | {"answer": answer}, v["question"])
        assert ask("mathvista", made, "solution") == v["official_query_with_Solution_suffix"]
        assert ask("mathvista", made, "step-by-step") == v["lmms_step-by-step"]
        assert ask("mathvista", made, "format-prompt") == v["lmms_format-prompt"]
        *body, hint = v["lmms_step-by-step"].split("\n")
        assert ask("mathvista", made) == "\n".join([hint, *body])
    for v in VECTORS["mmvu"]["prompt_vectors"]:
        answer = {"open-ended": "Depth-First Search (DFS)"}.get(v["doc"]["question_type"], "B")
        made = mmvu_row(v["doc"], answer)
        for style, key in {"official": "official_cot", "direct": "official_direct"}.items():
            assert ask("mmvu", made, style) == v[key]
        assert (ask("mmvu", made, "lmms"), ask("mmvu", made, "lmms-cot")) == (
            v["lmms_val"],
            v["lmms_cot"],
        )
        (key,) = [key for key in v if key.startswith("official_judge")]
        assert list(mmvu.judge_messages(made, "B")) == [turn["content"] for turn in v[key]]
    for v in VECTORS["videommmu"]["prompt_vectors"]:
        doc = {"answer": "A", "id": "dev_Biology_3"} | v["doc"]
        (made,) = made_from("videommmu", [doc], v["track"].partition("/")[0])
        assert ask("videommmu", made) == v["prompt"]
    made = row()
    assert ask("videohallucer", made) == "Is there a cat?\nAnswer the question using 'yes' or 'no'."
    with pytest.raises(ValueError, match="pope has no prompt 'cot', only official, lmms"):
        ask("pope", made, "cot")


def test_the_papers_prompts():
    end = (
        " Please provide only the single option letter (e.g., A, B, C, D, etc.) within the "
        "<answer> </answer> tags."
    )
    asked = benchmarks.prompt("pope", row(), "paper")
    assert asked.startswith("Is there a cat?Options:\nA. yes\nB. no\n\n") and asked.endswith(end)
    assert "<caption></caption>" in asked and "<caption>" not in benchmarks.prompt(
        "pope", row(), "paper", four_stage=False
    )
    doc = VECTORS["mmbench"]["prompt_vectors"][0]["doc_hf"]
    asked = benchmarks.prompt("mmbench", mmbench_row(doc), "paper", template="[{Question}] {x}")
    assert asked == "[Which is it?Options:\nA. a dog\nB. a cat\nC. nan\nD. nan\n] {x}" + end
    made = mathvista_row(
        {"question_type": "free_form", "answer_type": "integer", "answer": "3", "choices": None}
        | NUMBER
    )
    asked = benchmarks.prompt("mathvista", made, "paper", template="{Question}")
    assert (
        asked
        == "How far? Please provide the numerical value (e.g., 42 or 3.14) within the <answer> "
        "</answer> tags."
    )


def test_the_papers_prompt_changes_no_question():
    """Only the mark of Video-MMMU's picture goes, with what stands around it."""

    def asked(name, made):
        return benchmarks.prompt(name, made, "paper", template="{Question}").partition(
            "Options:\nA. "
        )[0]

    for question, want in (
        ("What is it? ", "What is it? "),
        ("<image 1> What is it? ", "What is it?"),
    ):
        (made,) = made_from("videommmu", [VIDEOMMMU | {"question": question}])
        assert asked("videommmu", made) == benchmarks.sample("videommmu", made).problem == want
    assert asked("pope", replace(row(), question="<image 1>? ")) == "<image 1>? "


NUMBER = {"precision": None, "unit": "m"}


def test_a_row_is_a_sample_that_the_policy_can_be_asked(tmp_path):
    picture(tmp_path / "a.png")
    made = row(3, "no", media=tmp_path / "a.png", group="g")
    sample = benchmarks.sample("pope", made)
    assert (sample.id, sample.options, sample.answer, sample.pair) == (
        "3",
        ("A. yes", "B. no"),
        "B",
        "g",
    )
    (turn,) = data.prompts([sample], four_stage=True, fps=2, max_frames=4)[0]
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert data.messages(sample, ask("pope", made))[0]["content"][1]["text"] == "Is there a cat?"
    assert benchmarks.sample("mmvu", row(1, "dolly zoom", "open")).problem_type == "free-form"


# --- files, as they are published -----------------------------------------------------------------


def picture(path: Path | None = None, colour="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(stream, "PNG")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.getvalue())
    return stream.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    frames = [Image.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(4)]
    write_clip(path, frames)
    return path.read_bytes()


def parquet(path: Path, rows: list[dict], *columns: str) -> Path:
    """A table as the hub has it: pictures are {"bytes", "path"}."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for column in columns:
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(path)
    return path


def dump(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def cell(colour="red"):
    return {"bytes": picture(colour=colour), "path": "x.png"}


def pope_rows(category="random", first=0, n=2):
    return [
        {
            "id": str(first + i),
            "question_id": str(i + 1),
            "question": f"Is there a {thing} in the picture?",
        }
        | {"answer": answer, "image_source": f"COCO_{i}", "image": cell(), "category": category}
        for i, (thing, answer) in enumerate([("kite", "yes"), ("spoon", "no")][:n])
    ]


# fmt: off
MMBENCH = {
    "question": "What is drawn?", "hint": "nan", "C": "nan", "D": "nan", "category": "ocr",
    "source": "ours", "L2-category": "coarse_perception", "comment": "nan", "split": "dev",
}
ROTATIONS = [
    MMBENCH | {"index": 7, "answer": "A", "A": "a kite", "B": "a spoon"},
    MMBENCH | {"index": 1_000_007, "answer": "B", "A": "a spoon", "B": "a kite"},
]
MATHVISTA = {
    "pid": "5", "question": "How many?", "image": "images/5.jpg", "choices": None, "unit": None,
    "precision": None, "answer": "3", "question_type": "free_form", "answer_type": "integer",
    "query": "Hint: ours",
    "metadata": {
        "category": "general-vqa", "context": "scene", "grade": "daily life",
        "language": "english", "skills": ["counting", "seeing"], "source": "ours",
        "split": "testmini", "task": "vqa",
    },
}
MMVU_CLIPS = "https://huggingface.co/datasets/x/resolve/main/videos"
MMVU = [
    {
        "id": "validation_0", "video": f"{MMVU_CLIPS}/Chemistry/0.mp4", "youtube_url": "",
        "question_type": "multiple-choice", "question": "Which colour?", "answer": "B",
        "choices": {"A": "red", "B": "blue", "C": "x", "D": "y", "E": "z"},
        "metadata": {"subject": "Chemistry"},
    },
    {
        "id": "validation_1", "video": f"{MMVU_CLIPS}/Art/0.mp4", "question_type": "open-ended",
        "question": "Which film?", "answer": "ours", "choices": dict.fromkeys("ABCDE", ""),
        "metadata": {"subject": "Art"},
    },
]
PAIR = {
    "basic": {"video": "1_a.mp4", "question": "Is it red?", "answer": "yes"},
    "hallucination": {"video": "1_b.mp4", "question": "Is it blue?", "answer": "no"},
    "type": "semantic_detail",
}
VIDEOMMMU = {
    "id": "dev_Biology_3", "question": "How many?", "options": ["1", "2"], "answer": "B",
    "link_selected": "https://ours", "question_type": "multiple-choice", "qa_type": "OCR",
}
VIDEO_R1 = {
    "problem_id": 1, "problem": "How many?", "data_type": "video",
    "problem_type": "multiple choice", "options": ["A. 1", "B. 2"], "process": "",
    "solution": "<answer>B</answer>", "data_source": "ours",
}
# fmt: on


def read(name, path, n, **options):
    """The rows, of which there are n, each with a picture or clip that opens."""
    rows, problems = benchmarks.scan(name, path, **options)
    assert problems == [] and len(rows) == n
    assert all(made.sizes[0].width == 32 for made in rows)
    for made in rows:  # what the policy is given
        content = data.messages(benchmarks.sample(name, made), "?", 2.0, 4)[0]["content"]
        assert content[0]["type"] == TABLE[name].media
    return rows


def test_pope_from_the_hubs_parquet(tmp_path):
    parquet(tmp_path / "data/test-00000-of-00002.parquet", pope_rows(), "image")
    parquet(tmp_path / "data/test-00001-of-00002.parquet", pope_rows("popular", 2), "image")
    for category in ("random", "popular"):
        parquet(tmp_path / f"Full/{category}-00000-of-00001.parquet", pope_rows(category), "image")
    rows = read("pope", tmp_path, 4)  # not once more from Full
    assert [r.id for r in rows] == ["random/1", "random/2", "popular/1", "popular/2"]
    assert rows[1].answer == "no" and rows[0].cluster == rows[2].cluster == "COCO_0"
    assert len(read("pope", tmp_path / "Full", 4)) == len(rows)
    scored = benchmarks.score("pope", rows, ["yes", "no", "yes", "yes"])
    assert scored.metrics["popular"]["accuracy"].value == 0.5 and scored.clustered


def test_pope_from_the_authors_json_lines_and_coco_pictures(tmp_path):
    lines = [{"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a kite?", "label": "yes"}]
    lines += [{"question_id": 2, "image": "COCO_1.jpg", "text": "Is there a spoon?", "label": "no"}]
    file = tmp_path / "output/coco/coco_pope_adversarial.json"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture(tmp_path / "val2014/COCO_1.jpg")
    for path in (file, tmp_path / "output"):
        rows = read("pope", path, 2, media=tmp_path / "val2014")
    assert [(r.id, r.subsets) for r in rows][1] == ("adversarial/2", ("adversarial",))
    with zipfile.ZipFile(tmp_path / "val2014.zip", "w") as archive:
        archive.write(tmp_path / "val2014/COCO_1.jpg", "val2014/COCO_1.jpg")
        archive.writestr("__MACOSX/val2014/._COCO_1.jpg", b"shadow")
    assert isinstance(read("pope", file, 2, media=tmp_path / "val2014.zip")[0].media, files.InZip)


def tsv(path: Path, rows: list[dict]) -> Path:
    columns = list(rows[0])
    lines = ["\t".join(columns), *("\t".join(str(r[c]) for c in columns) for r in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_pope_from_vlmevalkits_table(tmp_path):
    image = base64.b64encode(picture()).decode()
    row = {
        "index": 0,
        "image": image,
        "question": '"Is there\na kite?"',
        "answer": "Yes",
        "category": "random,popular",
    }
    (made,) = read("pope", tsv(tmp_path / "POPE.tsv", [row]), 1)
    assert made.question == "Is there\na kite?"  # a cell of two lines is quoted
    assert made.subsets == ("random", "popular") and made.answer == "yes"
    metrics = benchmarks.score("pope", [made], ["no"]).metrics
    assert metrics["random"]["accuracy"].n == metrics["popular"]["accuracy"].n == 1


def test_mmbench_from_parquet_and_from_a_table(tmp_path):
    """Later pictures of the table are indices."""
    parquet(
        tmp_path / "hub/en/dev-00000-of-00001.parquet",
        [r | {"image": cell()} for r in ROTATIONS],
        "image",
    )
    parquet(
        tmp_path / "hub/en/test-00000-of-00001.parquet",
        [r | {"image": cell(), "answer": "nan"} for r in ROTATIONS],
    )
    parquet(
        tmp_path / "hub/cn/dev-00000-of-00001.parquet",
        [r | {"image": cell()} for r in ROTATIONS],
        "image",
    )
    image = base64.b64encode(picture()).decode()
    table = [
        {(k.lower() if len(k) > 1 else k): ("" if v == "nan" else v) for k, v in r.items()}
        for r in ROTATIONS
    ]
    table = [table[1] | {"image": "7"}, table[0] | {"image": image}]  # in any order
    for path in (
        tmp_path / "hub",
        tmp_path / "hub/en",
        tsv(tmp_path / "MMBench_DEV_EN.tsv", table),
    ):
        rows = sorted(read("mmbench", path, 2), key=lambda r: int(r.id))
        assert [(r.id, r.group, r.answer, dict(r.options)) for r in rows] == [
            ("7", "7", "A", {"A": "a kite", "B": "a spoon"}),
            ("1000007", "7", "B", {"A": "a spoon", "B": "a kite"}),
        ]
        assert rows[0].subsets == ("CP", "ocr") and rows[0].more["hint"] is None
    scored = benchmarks.score("mmbench", rows[1:], ["B"])
    assert (
        scored.metrics == {}
        and "rotations missing (without the first, not counted)" in scored.problems
    )
    assert (
        "rotations missing (without the first, not counted)"
        in benchmarks.score("mmbench", rows[:1], ["A"]).problems
    )
    rows, problems = benchmarks.scan("mmbench", tmp_path / "hub/en/test-00000-of-00001.parquet")
    assert (
        rows == []
        and "answer: missing; the answers of a test split are not published" in problems[0]
    )


def test_questions_about_one_picture_are_drawn_together(tmp_path):
    """MMBench and MathVista store a picture once per question; VLMEvalKit's POPE has no names."""
    four, colours = [], ("red", "blue", "red", "green")
    for i, colour in enumerate(colours):
        four += [r | {"index": r["index"] + i, "image": cell(colour)} for r in ROTATIONS]
    four[5]["image"] = cell("white")  # a rotation that is stored otherwise
    rows = read("mmbench", parquet(tmp_path / "en/dev-0.parquet", four[::-1], "image"), 8)
    of = {r.group: {one.cluster for one in rows if one.group == r.group} for r in rows}
    assert all(len(clusters) == 1 for clusters in of.values())
    assert of["7"] == of["9"] and len(set(map(frozenset, of.values()))) == 3
    problems = {str(i): MATHVISTA | {"pid": str(i), "image": f"images/{i}.jpg"} for i in range(4)}
    file = dump(tmp_path / "testmini.json", problems)
    for i, colour in enumerate(colours):
        picture(tmp_path / f"images/{i}.jpg", colour)
    clusters = [r.cluster for r in read("mathvista", file, 4)]
    assert clusters[0] == clusters[2] and len(set(clusters)) == 3
    images = [base64.b64encode(picture(colour=colour)).decode() for colour in ("red", "blue")]
    cells = [images[0], images[1], "0", images[0]]  # a cell may name the row that has the picture
    table = [
        {"index": i, "image": image, "question": "?", "answer": "Yes", "category": "random"}
        for i, image in enumerate(cells)
    ]
    clusters = [r.cluster for r in read("pope", tsv(tmp_path / "POPE.tsv", table), 4)]
    assert clusters[0] == clusters[2] == clusters[3] != clusters[1]


def test_mathvista_from_parquet_and_from_json(tmp_path):
    """The pictures of the JSON are in a zip."""
    row = MATHVISTA | {
        "decoded_image": cell(),
        "precision": 1.0,
        "answer_type": "float",
        "answer": "1.2",
    }
    other = MATHVISTA | {"pid": "6", "decoded_image": cell(), "precision": None}
    rows = read(
        "mathvista",
        parquet(tmp_path / "h/data/testmini-0.parquet", [row, other], "decoded_image"),
        2,
    )
    assert [v.verdict for v in benchmarks.score("mathvista", rows, ["1.24", "3"]).verdicts] == [
        "right",
        "right",
    ]
    (tmp_path / "local/data").mkdir(parents=True)
    dump(
        tmp_path / "local/data/testmini.json",
        {"5": MATHVISTA, "6": MATHVISTA | {"pid": "6", "image": "images/6.jpg"}},
    )
    with zipfile.ZipFile(tmp_path / "local/images.zip", "w") as archive:
        for name in ("5.jpg", "6.jpg"):
            archive.writestr(f"images/{name}", picture())
            archive.writestr(f"__MACOSX/images/._{name}", b"shadow")
    rows = read("mathvista", tmp_path / "local", 2)
    assert benchmarks.prompt("mathvista", rows[0]) == "Hint: ours"
    metrics = benchmarks.score("mathvista", rows, ["3", "4"]).metrics
    assert (
        metrics["skills: seeing"]["accuracy"].n == 2
        and metrics["task: vqa"]["accuracy"].value == 0.5
    )


def test_mmvu_from_json_with_clips_of_one_name_in_many_folders(tmp_path, clip):
    dump(tmp_path / "validation.json", MMVU)
    for subject in ("Chemistry", "Art"):
        (tmp_path / f"videos/{subject}").mkdir(parents=True)
        (tmp_path / f"videos/{subject}/0.mp4").write_bytes(clip)
        (tmp_path / f"videos/{subject}/._0.mp4").write_bytes(b"shadow")
    rows = read("mmvu", tmp_path, 2)
    assert (
        rows[0].media == tmp_path / "videos/Chemistry/0.mp4"
        and rows[1].kind == "open"
        and rows[1].options == {}
    )
    assert rows[0].subsets == ("multiple-choice", "Science", "subject: Chemistry")
    scored = benchmarks.score("mmvu", rows, ["B", "ours"])
    assert (scored.headline.value, scored.headline.n, scored.headline.undecided) == (0.5, 2, 1)
    assert scored.metrics["multiple-choice"]["accuracy"].undecided == 0
    (tmp_path / "videos/Chemistry/0.mp4").unlink()  # Art's is not taken for it
    rows, problems = benchmarks.scan("mmvu", tmp_path)
    assert len(rows) == 1 and "row 0, path: Chemistry/0.mp4 is missing" in problems[0]
    paper = VIDEO_R1 | {"path": "./Evaluation/MMVU/videos/Art/0.mp4"}
    (made,) = read("mmvu", dump(tmp_path / "eval_mmvu.json", [paper]), 1)
    assert (made.options, made.answer) == ({"A": "1", "B": "2"}, "B") and made.cluster == rows[
        0
    ].cluster
    assert benchmarks.score("mmvu", [made], ["<answer>B</answer>"], "paper").headline.value == 1


def test_videommmu_from_parquet_json_and_zips(tmp_path, clip):
    for track in videommmu.TRACKS:
        parquet(tmp_path / f"hub/{track}/test-00000-of-00001.parquet", [VIDEOMMMU])
    with zipfile.ZipFile(tmp_path / "hub/Science.zip", "w") as archive:
        archive.writestr("Science/dev_Biology_3.mp4", clip)
        archive.writestr("__MACOSX/Science/._dev_Biology_3.mp4", b"shadow")
    rows = read("videommmu", tmp_path / "hub", 3)
    assert {r.id for r in rows} == {
        f"{track}/dev_Biology_3" for track in videommmu.TRACKS
    }  # one clip, three questions
    scored = benchmarks.score(
        "videommmu", rows, {r.id: "B" if r.id[0] == "P" else "" for r in rows}
    )
    assert scored.metrics["Perception"]["accuracy"].value == 1 and scored.headline.dropped == 2
    without_type = {k: v for k, v in VIDEOMMMU.items() if k != "question_type"}
    dump(tmp_path / "git/perception_video.json", {"Perception": {"0": without_type}})
    (made,) = read("videommmu", tmp_path / "git", 1, media=tmp_path / "hub")
    assert made.id == "Perception/dev_Biology_3" and made.kind == "multiple choice"
    paper = VIDEO_R1 | {"path": "./Evaluation/VideoMMMU/dev_Biology_3.mp4"}
    number = paper | {
        "problem_id": 2,
        "options": None,
        "problem_type": "numerical",
        "solution": "<answer>2.5</answer>",
    }
    rows = read(
        "videommmu",
        dump(tmp_path / "eval_videommmu.json", [paper, number]),
        2,
        media=tmp_path / "hub",
    )
    outputs = ["<answer>B</answer>", "<answer>2.50</answer>"]
    assert benchmarks.score("videommmu", rows, outputs, "paper").headline.value == 1


def test_videohallucer_from_its_folders(tmp_path, clip):
    for subset in ("semantic_detail", "interaction"):
        folder = tmp_path / f"videohallucer_datasets/{subset}"
        dump(folder / f"{subset}.json", [PAIR, PAIR])
        (folder / "videos").mkdir()
        for name in ("1_a.mp4", "1_b.mp4"):  # the same names in each subset
            (folder / "videos" / name).write_bytes(clip)
    rows = read("videohallucer", tmp_path, 8)
    assert [r.id for r in rows[:3]] == [
        "interaction/0/basic",
        "interaction/0/hallucination",
        "interaction/1/basic",
    ]
    folder = tmp_path / "videohallucer_datasets/semantic_detail"
    assert [r.media for r in rows[4:6]] == [folder / "videos/1_a.mp4", folder / "videos/1_b.mp4"]
    read("videohallucer", folder / "semantic_detail.json", 4)
    (folder / "videos/1_b.mp4").unlink()  # both halves go: half a pair is no pair
    rows, problems = benchmarks.scan("videohallucer", tmp_path)
    assert len(rows) == 4 and len(problems) == 2


@pytest.fixture
def amber_folder(tmp_path):
    annotations = AMBER["annotations"]
    dump(tmp_path / "data/annotations.json", annotations)
    dump(tmp_path / "data/relation.json", AMBER["relation"])
    (tmp_path / "data/safe_words.txt").write_text("\n".join(AMBER["safe_words"]))
    asked = [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}]
    asked += [{"id": 9, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"}]
    dump(tmp_path / "data/query/query_all.json", asked)
    dump(tmp_path / "data/query/query_generative.json", asked[:1])
    picture(tmp_path / "image/AMBER_1.jpg")
    return tmp_path


def test_amber_from_its_repository(amber_folder):
    rows = read("amber", amber_folder, 2)
    assert (
        rows[0].answer == ("sky", "forest", "grass", "person", "lake")
        and rows[0].more["words"].safe == WORDS.safe
    )
    assert (rows[1].answer, rows[1].subsets) == ("no", ("state",))
    text = "The image shows a lake surrounded by a forest under a blue sky."
    scored = benchmarks.score("amber", rows, [text, "No"], nouns=nouns_of, similar=similar)
    assert (
        scored.metrics["generative"]["Cover"].value == 0.6
        and shown(scored.metrics["state"])["accuracy"] == 99.9
    )
    json.dumps([v.answer for v in scored.verdicts])  # as it is written to disk
    read(
        "amber", amber_folder / "data/query/query_generative.json", 1, media=amber_folder / "image"
    )
    dump(
        amber_folder / "data/query/query_all.json",
        [{"id": 99, "image": "AMBER_1.jpg", "query": "?"}],
    )
    assert (
        "entry 99 of annotations.json does not have this id"
        in benchmarks.scan("amber", amber_folder)[1][0]
    )
    (amber_folder / "data/annotations.json").rename(amber_folder / "elsewhere.json")
    assert "annotations.json: missing in" in benchmarks.scan("amber", amber_folder)[1][0]


def test_hub_ids_old_and_new(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if name == "lmms-lab/POPE":
            raise ConnectionError("it has moved")
        return datasets.Dataset.from_list(pope_rows()).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("pope", "lmms-lab/POPE", 2)
    assert (
        asked == [("lmms-lab/POPE", None, "test"), ("lmms-lab-encoder/POPE", None, "test")]
        and rows[0].answer == "yes"
    )
    asked.clear()
    with pytest.raises(DataError, match="is not on this disk and could not be loaded from the hub"):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
        benchmarks.scan("mmbench", "lmms-lab/MMBench")
    with pytest.raises(DataError, match="on the hub it is plain files. Download them"):
        benchmarks.scan("videohallucer", "bigai-nlco/VideoHallucer")
    with pytest.raises(DataError, match="no/such/folder does not exist"):
        benchmarks.scan("pope", "no/such/folder")


def test_every_hub_id_that_was_tried_has_its_reason(monkeypatch):
    """Of the id that was given first; the last that was tried is one that the user never named."""
    import datasets

    reasons = {
        "lmms-lab/VideoMMMU": datasets.exceptions.DatasetNotFoundError(
            "is a gated dataset.\nVisit its page"
        ),
        "lmms-eval/VideoMMMU": datasets.exceptions.DatasetGenerationError("An error occurred"),
        "lmms-lab/POPE": ConnectionError(),
        "lmms-lab-encoder/POPE": ValueError('Unknown split "test"'),
    }
    reasons["lmms-eval/VideoMMMU"].__cause__ = OSError("No space left on device")

    def load_dataset(one, *_, **__):
        raise reasons[one]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, asked, said in (
        (
            "videommmu",
            "lmms-lab/VideoMMMU",
            "lmms-lab/VideoMMMU: is a gated dataset.; lmms-eval/VideoMMMU: No space left on device",
        ),
        (
            "pope",
            "lmms-lab-encoder/POPE",
            'lmms-lab-encoder/POPE: Unknown split "test"; lmms-lab/POPE: ConnectionError',
        ),
    ):
        with pytest.raises(DataError) as error:
            benchmarks.read(name, asked)
        assert (
            str(error.value)
            == f"{name}: {asked} is not on this disk and could not be loaded from the hub ({said})"
        )


NLTK = """
**********************************************************************
  Resource 'punkt_tab' not found.
  Please use the NLTK Downloader to obtain the resource:

  >>> import nltk
**********************************************************************
"""  # as nltk 3.10 writes it


def test_what_nltk_lacks_is_named(monkeypatch):
    def word_tokenize(text):
        raise LookupError(NLTK)

    lemmatizer = SimpleNamespace(WordNetLemmatizer=lambda: SimpleNamespace(lemmatize=str))
    monkeypatch.setitem(
        sys.modules,
        "nltk",
        SimpleNamespace(stem=lemmatizer, pos_tag=list, word_tokenize=word_tokenize),
    )
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=None))
    with pytest.raises(
        DataError, match=r"with their data \(Resource 'punkt_tab' not found\.\): pip install"
    ):
        benchmarks.amber_tools()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '[\n {"id": 1},\n {"id": 2,}\n]',
            "line 3 column ",
        ),  # of the JSON that it is, not of JSON lines
        ('{"id": 1}\n{"id": 2,}\n', "line 2: .*line 1 column "),
        ('[\n {"id": 1}\n]\nx', "Extra data: line 4 column 1"),
        ('{"id": 1', "line 1 column 9"),
        ("", "line 1 column 1"),
    ],
)
def test_a_broken_file_says_where_it_is_broken(tmp_path, text, says):
    (tmp_path / "validation.json").write_text(text)
    with pytest.raises(DataError, match=f"cannot read .*validation.json: .*{says}"):
        benchmarks.scan("mmvu", tmp_path)


# --- bad files ------------------------------------------------------------------------------------


def test_another_benchmarks_file_is_refused(tmp_path):
    """The message says what was expected."""
    file = dump(tmp_path / "validation.json", MMVU)
    with pytest.raises(
        DataError, match="is not POPE: its rows hold answer.*expected question, answer.*like mmvu"
    ):
        benchmarks.scan("pope", file)
    with pytest.raises(
        DataError, match="holds validation.json; expected Parquet of the hub; testmini.json"
    ):
        benchmarks.scan("mathvista", tmp_path)
    for content in ("", "{", "[]", "3", "[1]"):
        file.write_text(content)
        with pytest.raises(DataError):
            benchmarks.scan("mmvu", file)
    with pytest.raises(DataError, match="'popes' is not one of pope, mmbench"):
        benchmarks.scan("popes", file)


def test_bad_rows_are_counted_and_named_and_the_rest_is_read(tmp_path):
    lines = [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a kite?", "label": "yes"},
        {"question_id": 2, "image": "gone.jpg", "text": "?", "label": "yes"},
        {"question_id": 3, "image": "a.jpg", "text": "?", "label": "maybe"},
        {"question_id": 1, "image": "a.jpg", "text": "?", "label": "no"},
        {"question_id": 5, "image": "torn.jpg", "text": "?", "label": "no"},
        {"question_id": 6, "label": "no"},
        ["not", "a", "row"],
        {"question_id": 8, "image": None, "text": "?", "label": "no"},
        {"question_id": 9, "image": "two.jpg", "text": "?", "label": "no"},
        {"question_id": 10, "image": "../../a.jpg", "text": "?", "label": "no"},
    ]
    file = dump(tmp_path / "coco_pope_random.json", lines)
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "x/two.jpg")
    picture(tmp_path / "y/two.jpg")
    (tmp_path / "torn.jpg").write_bytes(picture()[:50])
    rows, problems = benchmarks.scan("pope", file)
    assert [r.id for r in rows] == ["random/1"]
    wanted = [
        "path: gone.jpg is missing in",
        "answer: 'maybe' is neither",
        "'random/1' is already taken",
        "cannot read",
    ]
    wanted += [
        "image, text: missing",
        "not an object",
        "cannot be read",
        "two.jpg is there 2 times",
        "../../a.jpg is missing",
    ]
    for number, (problem, said) in enumerate(zip(problems, wanted, strict=True), start=1):
        assert f"row {number}, " in problem and said in problem
    heard = []
    with pytest.raises(DataError, match="gone.jpg") as error:
        benchmarks.read("pope", file, say=heard.append)
    assert " more" not in str(error.value) and len(str(error.value).split("\n")) == 10
    assert [r.id for r in benchmarks.read("pope", file, on_bad_row="skip", say=heard.append)] == [
        "random/1"
    ]
    assert len([line for line in heard if line.startswith("skipped: ")]) == 9
    assert heard[-1] == "pope: 1 row; the published set has 9000"


def test_a_torn_zip_and_a_row_without_a_picture_are_named(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK no zip")
    dump(tmp_path / "testmini.json", {"5": MATHVISTA})
    rows, problems = benchmarks.scan("mathvista", tmp_path)
    assert rows == [] and "images/5.jpg is missing in" in problems[0]
    assert "images.zip cannot be read: File is not a zip file" in problems[0]
    with pytest.raises(DataError, match="media: .*nowhere does not exist"):
        benchmarks.scan("mathvista", tmp_path, media=tmp_path / "nowhere")
    table = [
        {"index": i, "image": cell, "question": "?", "answer": "Yes", "category": "random"}
        for i, cell in enumerate("7!")
    ]
    rows, problems = benchmarks.scan("pope", tsv(tmp_path / "POPE.tsv", table))
    assert rows == [] and len(problems) == 2


# --- outputs that do not fit ----------------------------------------------------------------------


def test_outputs_that_do_not_fit_are_reported():
    """Missing, extra and empty outputs, and rows given twice. A missing output is never right."""
    rows = [row(i, "yes") for i in range(4)]
    scored = benchmarks.score(
        "pope", [*rows, rows[0]], {"0": "yes", "1": "", "9": "yes", "3": None}
    )
    assert [v.verdict for v in scored.verdicts] == ["right", "right", "wrong", "wrong"]
    assert scored.problems == {
        "row given twice, counted once": ["0"],
        "prediction for no row": ["9"],
        "missing prediction, counted as wrong": ["2", "3"],
        "empty output, right by the official rule": ["1"],
    }
    assert scored.metrics["overall"]["recall"].value == 0.5
    assert "missing prediction, counted as wrong: 2 (2, 3)" in scored.notes()
    scored = benchmarks.score("pope", rows, ["yes"] * 6)
    assert scored.problems == {"prediction for no row": ["#4", "#5"]}
    no = [row(i, "no") for i in range(2)]
    # nor by POPE's default
    assert benchmarks.score("pope", no, []).metrics["overall"]["accuracy"].value == 0
    with pytest.raises(ValueError, match="'popes' is not one of pope"):
        benchmarks.score("popes", rows, [])
    with pytest.raises(ValueError, match="protocol: 'papers' is not one of official, paper"):
        benchmarks.score("pope", rows, [], "papers")


def test_predictions_given_twice_are_named_and_the_first_counts():
    rows = [row(i, "yes") for i in range(4)]
    said = [
        ("0", "yes"),
        ("1", None),
        ("2", "no"),
        ("0", "no"),
        ("1", "yes"),
        ("2", "no"),
        ("9", "yes"),
        ("9", "no"),
    ]
    scored = benchmarks.score("pope", rows, said)
    assert [v.verdict for v in scored.verdicts] == ["right", "right", "wrong", "wrong"]
    assert scored.problems == {
        "prediction for no row": ["9"],
        "prediction given twice, the first counted": ["0", "1", "2", "9"],
        "missing prediction, counted as wrong": ["3"],
    }
    assert (
        benchmarks.score("pope", rows, dict(pair for pair in said[::-1] if pair[1])).metrics
        == scored.metrics
    )
    assert benchmarks.score("pope", rows, []).problems == {
        "missing prediction, counted as wrong": list("0123")
    }


def test_a_note_says_whose_rule_made_it_so():
    rows = [row(0, "yes"), row(1, "no")]
    notes = [
        benchmarks.score("pope", rows, ["", ""], protocol).notes()
        for protocol in benchmarks.PROTOCOLS
    ]
    assert notes[0] == [
        "empty output, right by the official rule: 1 (0)",
        "empty output, wrong by the official rule: 1 (1)",
    ]
    assert notes[1] == ["empty output, wrong by the paper rule: 2 (0, 1)"]


LONG = {
    "letters": "a" * 100_000,
    "digits": "9" * 100_000,
    "commas": ",111" * 25_000,
    "points": "1." * 50_000,
    "tags": "<answer>" * 12_500,
    "closed tags": "<answer>" * 6_000 + "</answer>",
    "blanks": "answer is " + " " * 99_990,
    "lines": "\n" * 100_000,
    "stars": "answer is " + "*" * 99_990,
    "brackets": "o(" * 50_000,
    "quotes": 'The answer is "' * 6_600,
    "is": "is " * 33_333,
    "dollars": "final answer is: " + "$ " * 50_000,
    "mixed": "".join(random.Random(0).choices("AB. ()12,\n-<>/yesno", k=100_000)),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_outputs_take_a_second_and_are_reported(text):
    """Every rule is linear in the length: 100,000 characters."""
    options = {
        "A": "a dog",
        "B": "a cat",
        "C": "a much longer option than the others are, of sixty-four letters!",
    }
    more = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "precision": None,
        "unit": None,
        "track": "",
    }
    more |= {"hint": None, "first": True, "variant": "basic", "hallu": ("cat",), "words": WORDS}
    choice = row(1, "B", "multiple choice", options=options, more=more)
    number = row(
        1,
        "12",
        "integer",
        options={},
        more=more | {"question_type": "free_form", "answer_type": "integer"},
    )
    described = row(1, ("dog",), "description", subsets=("generative",), more=more)
    asked = [
        ("pope", row(more=more)),
        ("videohallucer", row(more=more)),
        ("amber", row(subsets=("state",), more=more)),
    ]
    asked += [(name, choice) for name in ("mmbench", "mathvista", "mmvu", "videommmu")]
    asked += [
        ("mathvista", number),
        ("mmvu", row(1, "n^2", "open")),
        ("videommmu", row(1, "12", "open", more=more)),
    ]
    asked += [("amber", described)]
    start = time.process_time()
    for (name, made), protocol in itertools.product(asked, benchmarks.PROTOCOLS):
        scored = benchmarks.score(
            name, [made], [text], protocol, lettered=True, nouns=str.split, similar=similar
        )
        assert scored.problems.get("output of more than 20000 characters") == ["1"]
        assert scored.verdicts[0].verdict != "right" or name in ("pope", "videohallucer", "amber")
    rules.mathvista_normalize(text, "multi_choice", "text", list(options.values()), None)
    # all of it, on a busy machine; a square of the length takes minutes
    assert time.process_time() - start < 4


# --- intervals and comparisons --------------------------------------------------------------------


def scored_pope(seed, right=0.7, images=30):
    rng = random.Random(seed)
    rows = [
        row(f"{c}/{i}", rng.choice(("yes", "no")), cluster=f"p{c}")
        for c in range(images)
        for i in range(6)
    ]
    flip = {"yes": "no", "no": "yes"}
    return benchmarks.score(
        "pope", rows, [r.answer if rng.random() < right else flip[r.answer] for r in rows]
    )


def test_the_interval_is_that_of_a_bootstrap_over_pictures():
    scored = scored_pope(0)
    assert scored.clustered
    low, high = benchmarks.intervals(scored, "f1", samples=2000)["overall"]
    # brute force: draw pictures, count their rows again
    rng, cells = random.Random(1), list(scored.counts.values())
    values = []
    for _ in range(2000):
        tp, fp, fn = (
            sum(parts["overall", "", key] for parts in drawn)
            for drawn in [rng.choices(cells, k=len(cells))]
            for key in ("tp", "fp", "fn")
        )
        values.append(2 * tp / (2 * tp + fp + fn))
    values.sort()
    assert low == pytest.approx(values[50], abs=0.01) and high == pytest.approx(
        values[1950], abs=0.01
    )
    assert low < scored.headline.value < high
    assert benchmarks.intervals(scored, "f1") == benchmarks.intervals(scored, "f1")
    assert (
        "nowhere" not in benchmarks.intervals(scored, "f1")
        and benchmarks.intervals(scored, "no measure") == {}
    )
    nothing = benchmarks.score("pope", [], [])
    assert nothing.headline is None and benchmarks.intervals(nothing, "f1") == {}


def test_the_paired_difference():
    a, b = scored_pope(0, 0.6), scored_pope(0, 0.9)
    found = benchmarks.difference(a, b, "overall", "accuracy")
    gap = b.metrics["overall"]["accuracy"].value - a.metrics["overall"]["accuracy"].value
    assert (
        found["value"] == pytest.approx(gap)
        and found["low"] < gap < found["high"]
        and found["p"] < 0.01
    )
    same = benchmarks.difference(a, a, "overall", "accuracy")
    assert (same["value"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="not over the same pictures"):
        benchmarks.difference(a, scored_pope(0, images=29), "overall", "accuracy")


@pytest.mark.parametrize(
    ("only_a", "only_b", "both"), [(0, 0, 3), (0, 5, 0), (2, 7, 1), (4, 4, 2), (6, 1, 0)]
)
def test_mcnemar_is_the_sum_over_all_signs(only_a, only_b, both):
    a = [True] * only_a + [False] * only_b + [True] * both
    b = [False] * only_a + [True] * only_b + [True] * both
    n = only_a + only_b
    gap = abs(only_a - only_b)
    far = sum(abs(2 * sum(signs) - n) >= gap for signs in itertools.product((0, 1), repeat=n))
    assert benchmarks.mcnemar(a, b) == pytest.approx(far / 2**n)


# --- the table ------------------------------------------------------------------------------------


def test_the_table_names_every_benchmark_and_the_papers_numbers():
    assert {name: known.paper_number for name, known in TABLE.items()} == {
        "pope": 88.7,
        "mmbench": 88.6,
        "mathvista": 69.4,
        "mmvu": 65.6,
        "videommmu": 50.8,
        "videohallucer": 50.8,
        "amber": None,
    }
    assert all(known.media in ("image", "video") and known.beware for known in TABLE.values())


@pytest.mark.parametrize(
    "text", ["<think>x</think>", "<answer></answer>", "a cat <answer> </answer>"]
)
def test_an_output_without_an_answer_is_wrong_by_every_rule(text):
    """A rule's default is no answer (POPE: yes, MathVista: the shortest option).

    The score reports such outputs.
    """
    more = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "precision": None,
        "track": "",
        "hallu": ("cat",),
    }
    choice = row(1, "x", "multiple choice", options={"A": "x", "B": "longer"}, more=more)
    described = row(
        1, ("dog",), "description", subsets=("generative",), more=more | {"words": WORDS}
    )
    for name, made in (
        ("pope", row(1)),
        ("mathvista", choice),
        ("videommmu", choice),
        ("amber", described),
    ):
        scored = benchmarks.score(name, [made], [text], nouns=str.split, similar=similar)
        assert [v.verdict for v in scored.verdicts] == ["wrong"], name
        assert scored.problems["output without an answer, counted as wrong"] == ["1"], name


@pytest.mark.parametrize(
    "text", ["NO", "No!", "**No**", "No\nThere is none", "Answer: No;", "perhaps"]
)
def test_a_yes_that_was_not_said_is_named(text):
    """POPE's rule knows three words for no, exactly so, and takes all else for a yes."""
    scored = benchmarks.score("pope", [row(1, "yes")], [text])
    assert scored.verdicts[0].verdict == "right" and any(
        "taken for a yes" in what for what in scored.problems
    )
    assert not benchmarks.score("pope", [row(1, "yes")], ["Yes, it is."]).problems


def test_mmvu_reads_no_letter_out_of_a_doubt():
    made = row(1, "A", "multiple choice", options={"A": "x", "B": "y"})
    said = [
        "No evidence shows that the final answer is A",
        "So. Therefore, the final answer is: $A",
        "The final answer is A.",
    ]
    assert [benchmarks.score("mmvu", [made], [text]).verdicts[0].verdict for text in said] == [
        "undecided",
        "right",
        "right",
    ]
