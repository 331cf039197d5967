"""eval.py and measures.py: measures of rows made by hand, and the command as a user runs it."""

import contextlib
import io
import json
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import test_benchmarks as forms
import torch
import yaml
from PIL import Image, ImageColor

import benchmarks
import data
import eval as evaluation
import measures
import report
import train
from benchmarks import results
from caption_reward import CaptionReward
from engine import ConfigError, DataError, judges, pretrained
from engine.run import Run
from world.scenes import write_clip

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


def sample(i: int, answer: str = "A", **changes) -> data.Sample:
    fields = {
        "id": f"row-{i}",
        "data_type": "image",
        "media": (),
        "problem": f"Question {i}?",
        "options": ("A. red", "B. green", "C. blue"),
        "problem_type": "multiple choice",
        "answer": answer,
        "category": "colour",
    }
    return data.Sample(**(fields | changes))


def response(answer: str, caption: str = "a picture") -> str:
    before = f"<prethink>left</prethink><caption>{caption}</caption><think>so</think>"
    return f"{before}<answer>{answer}</answer>"


def scored(samples, texts, **options):
    names = measures.vocabulary({"test": samples})
    rows = measures.verdicts(samples, texts, names, **options)
    return {"metrics": measures.metrics(samples, rows), "rows": rows}


def value(result: dict, name: str) -> tuple[float, int]:
    return result["metrics"][name]["value"], result["metrics"][name]["n"]


# --- right answers --------------------------------------------------------------------------------


def test_accuracy_is_counted_in_all_and_by_category():
    rows = [  # answer, said, category: 3 of 5 colours and 1 of 2 counts are right
        ("A", "A", "colour"),
        ("A", "B", "colour"),
        ("B", "B", "colour"),
        ("C", "C", "colour"),
        ("C", "A or C", "colour"),
        ("2", "2", "count"),
        ("3", "2", "count"),
    ]
    types = {"colour": "multiple choice", "count": "numerical"}
    samples = [sample(i, a, category=c, problem_type=types[c]) for i, (a, _, c) in enumerate(rows)]
    result = scored(samples, [response(said) for _, said, _ in rows])
    assert value(result, "accuracy") == (4 / 7, 7)
    by_category = {
        name: (some["accuracy"]["value"], some["accuracy"]["n"])
        for name, some in result["metrics"]["by category"].items()
    }
    assert by_category == {"colour": (3 / 5, 5), "count": (1 / 2, 2)}
    assert [row["right"] for row in result["rows"]] == [True, False, True, True, False, True, False]
    assert [row["answer"] for row in result["rows"]] == ["A", "B", "B", "C", "A or C", "2", "2"]


def test_rows_keep_what_was_asked_and_said():
    text = response("B", "a green circle")
    (row,) = scored([sample(4, "C")], [text])["rows"]
    expected = {
        "id": "row-4",
        "category": "colour",
        "problem": "Question 4?",
        "solution": "C",
        "text": text,
    }
    assert expected.items() <= row.items() and row["answer"] == "B" and row["right"] is False


def test_a_response_without_an_answer_stage():
    """It is judged as a whole, and its format is wrong."""
    result = scored([sample(0), sample(1), sample(2)], ["A", response("A"), "the answer is A"])
    assert [row["right"] for row in result["rows"]] == [True, True, False]
    assert [row["format"] for row in result["rows"]] == [False, True, False]
    assert value(result, "format") == (1 / 3, 3)


def test_the_format_of_two_stage_responses():
    """It is right only if two stages are asked for."""
    text = "<think>so</think><answer>A</answer>"
    assert value(scored([sample(0)], [text], four_stage=False), "format") == (1, 1)
    assert value(scored([sample(0)], [text]), "format") == (0, 1)
    described = sample(0, objects=("a",))
    # there is no caption to count
    assert "captioned" not in scored([described], [text], four_stage=False)["rows"][0]


def test_a_pair_is_right_only_when_both_of_its_rows_are():
    said = [
        ("p1", "A"),
        ("p1", "A"),
        ("p2", "A"),
        ("p2", "B"),
        ("p3", "B"),
        ("p3", "B"),
        (None, "A"),
        (None, "B"),
    ]
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # rows of a pair need not be neighbours
    samples = [sample(i, "A", pair=said[i][0]) for i in order]
    result = scored(samples, [response(said[i][1]) for i in order])
    assert value(result, "paired") == (1 / 3, 3)
    assert value(result, "accuracy") == (4 / 8, 8)


def test_measures_that_the_rows_cannot_give_are_left_out():
    metrics = scored([sample(0)], [response("A")])["metrics"]
    assert set(metrics) == {"accuracy", "format", "by category"}
    line = measures.one_line({"metrics": metrics})
    assert line == "accuracy 100.0%  format 100.0%"


# --- existence: POPE ------------------------------------------------------------------------------

YES_NO, NO_YES = ("A. yes", "B. no"), ("A. No", "B. Yes")


def existence(rows, **changes):
    """(options, the letter of truth, what is said) of each row."""
    samples = [
        sample(i, truth, options=options, **changes) for i, (options, truth, _) in enumerate(rows)
    ]
    return scored(samples, [response(said) for *_, said in rows])["metrics"].get("existence")


def test_popes_measures_by_hand():
    # 3 hits, 1 miss, 2 false alarms, 3 correct rejections and 1 answer that is neither: a no
    rows = [(YES_NO, "A", "A"), (YES_NO, "A", "A"), (NO_YES, "B", "B"), (NO_YES, "B", "A")]
    rows += [(YES_NO, "B", "A"), (NO_YES, "A", "B")]
    rows += [(YES_NO, "B", "B"), (NO_YES, "A", "A"), (YES_NO, "B", "B"), (YES_NO, "B", "maybe")]
    measured = existence(rows)
    assert measured == pytest.approx(
        {
            "accuracy": 0.7,
            "precision": 3 / 5,
            "recall": 3 / 4,
            "f1": 2 / 3,
            "yes ratio": 5 / 10,
            "n": 10,
        }
    )


def test_popes_measures_are_of_yes_no_questions():
    """Other questions are left out. Without yes/no questions there are no such measures."""
    rows = [
        (YES_NO, "A", "A"),
        (YES_NO, "B", "A"),
        (("A. red", "B. green"), "A", "B"),
        ((), "A", "A"),
    ]
    measured = existence(rows)
    assert (measured["n"], measured["accuracy"], measured["precision"], measured["recall"]) == (
        2,
        0.5,
        0.5,
        1.0,
    )
    assert existence(rows[2:]) is None


@pytest.mark.parametrize(("said", "yes_ratio"), [("B", 0.0), ("A", 1.0)])
def test_popes_measures_of_a_constant_answer_are_finite(said, yes_ratio):
    measured = existence([(YES_NO, "A", said), (YES_NO, "B", said)])
    assert measured["yes ratio"] == yes_ratio and measured["accuracy"] == 0.5
    assert measured["f1"] == pytest.approx(2 / 3 if said == "A" else 0)
    assert existence([(YES_NO, "B", "B")])["recall"] == 0


@pytest.mark.parametrize("options", [("3", "4"), ("yes", "no"), ("(A) yes", "(B) no")])
def test_options_without_letters_do_not_end_the_evaluation(options):
    """data.py takes such options with a numerical or free-form row."""
    result = scored([sample(0, "3", options=options, problem_type="free-form")], [response("3")])
    assert value(result, "accuracy") == (1, 1)


# --- captions: hallucinated objects ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "names", "found"),
    [
        (
            "a red circle, a blue star",
            ["red circle", "blue star", "green cross"],
            ["red circle", "blue star"],
        ),
        ("a cat on a catamaran", ["cat", "cata", "maran"], ["cat"]),  # whole words
        ("a catamaran", ["cat"], []),
        (
            "two fire trucks and a fire truck",
            ["truck", "fire truck"],
            ["fire truck"],
        ),  # the longer one hides it
        (
            "a truck beside a fire truck",
            ["truck", "fire truck"],
            ["fire truck", "truck"],
        ),  # but not another one
        ("A Red CIRCLE.", ["red circle"], ["red circle"]),
        ("a dog", ["Dog"], ["Dog"]),
        ("a cup, a cup and a cup", ["cup"], ["cup"]),  # once
        (
            "red fire truck circle",
            ["fire truck", "red circle"],
            ["fire truck"],
        ),  # hiding joins nothing
        ("a+b", ["a+b"], ["a+b"]),  # a name is text, not a pattern
        ("aab", ["a+b"], []),
        ("", ["cat"], []),
        ("a cat", [], []),
    ],
)
def test_mentioned_finds_whole_names_longer_ones_first(caption, names, found):
    assert sorted(measures.mentioned(caption, names)) == sorted(found)
    assert sorted(measures.mentioned(caption, names[::-1])) == sorted(found)


def test_hallucinated_objects_captions_and_coverage_by_hand():
    rows = [  # objects, relevant, caption
        (("cat", "sofa"), ("cat",), "a cat and a dog"),  # dog is not there; covers 1 of 1
        (("dog",), None, "a dog, a dog"),  # all right; without `relevant`, objects count: 1 of 1
        (
            ("cup", "table", "cat"),
            ("cup", "table"),
            "a cup, a sofa and a dog",
        ),  # sofa, dog are not there; 1 of 2
        (("sofa",), ("sofa",), "nothing much"),  # names nothing; 0 of 1
        (None, None, "a cat, a dog and a sofa"),  # what is there is not known: not counted
        ((), (), "a table"),  # nothing is there
    ]
    samples = [sample(i, objects=o, relevant=r) for i, (o, r, _) in enumerate(rows)]
    result = scored(samples, [response("A", caption) for *_, caption in rows])
    assert [row.get("hallucinated") for row in result["rows"]] == [
        ["dog"],
        [],
        ["dog", "sofa"],
        [],
        None,
        ["table"],
    ]
    assert value(result, "hallucinated objects") == (
        4 / 7,
        7,
    )  # of the 7 objects that captions name
    assert value(result, "hallucinated captions") == (3 / 5, 5)
    assert value(result, "coverage") == (3 / 5, 5)


def test_a_missing_caption_names_nothing_and_covers_nothing():
    samples = [sample(0, objects=("cat",)), sample(1, objects=("cat",))]
    result = scored(samples, ["<answer>A</answer> a cat", response("A", "a cat")])
    assert [row["captioned"] for row in result["rows"]] == [0, 1]
    assert value(result, "coverage") == (1 / 2, 2)


def test_objects_of_every_set_can_be_hallucinated_in_each():
    sets = {
        "test": [sample(0, objects=("cat",))],
        "test_b": [sample(1, objects=("dog", "cat")), sample(2)],
    }
    names = measures.vocabulary(sets)
    assert sorted(names) == ["cat", "dog"]
    (row,) = measures.verdicts(sets["test"], [response("A", "a dog and a cat")], names)
    assert row["hallucinated"] == ["dog"]


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # published tables of Wilson's 95 % interval
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(right, n, low, high):
    rate = measures.rate_of(right, n)
    assert (rate["value"], rate["n"]) == (right / n, n)
    assert rate["low"] == pytest.approx(low, abs=6e-5) and rate["high"] == pytest.approx(
        high, abs=6e-5
    )
    for bound in (
        rate["low"],
        rate["high"],
    ):  # its definition: where the observed share is 1.96 errors away
        assert abs(right / n - bound) == pytest.approx(
            1.96 * (max(bound * (1 - bound), 0) / n) ** 0.5, abs=1e-7
        )


def test_a_rate_counts_true_values():
    assert measures.rate([True, False, True, True]) == measures.rate_of(3, 4)


# --- the judge ------------------------------------------------------------------------------------


def test_answerable_captions():
    """They are judged, and unknown verdicts are left out."""
    replies = {
        "a red circle": "A",
        "a green circle": " B\n",
        "a circle": None,
        "a shape": "<answer>A</answer>",
    }
    asked = []

    def judge(prompts):
        asked.extend(prompts)
        return [
            next(r for caption, r in replies.items() if f"\n{caption}\n" in prompt)
            for prompt in prompts
        ]

    captions = ["a red circle", "a green circle", "a circle", "a shape", ""]
    samples = [sample(i, "A") for i in range(5)]
    result = scored(
        samples, [response("C", caption) for caption in captions], judge=CaptionReward(judge)
    )
    assert [row["answerable"] for row in result["rows"]] == [True, False, None, True, False]
    assert [row["judge"] for row in result["rows"]] == ["A", "B", None, "A", None]
    assert value(result, "answerable captions") == (2 / 4, 4)  # of the four known verdicts
    assert value(result, "no verdict") == (1 / 5, 5)
    assert "answerable captions 50.0%  no verdict 20.0%" in measures.one_line(result)
    assert len(asked) == 4  # an empty caption is wrong without a call
    # the judge sees the options
    assert all("A. red" in prompt and "B. green" in prompt for prompt in asked)
    assert not any("<answer>C" in prompt for prompt in asked)  # and not what the policy answered


def test_two_stages_ask_no_judge():
    """And without a known verdict there is no measure."""

    def silent(prompts):
        return [None] * len(prompts)

    assert (
        "answerable captions"
        not in scored([sample(0)], [response("A")], judge=CaptionReward(silent))["metrics"]
    )

    def never(prompts):
        raise AssertionError("asked")

    text = "<think>so</think><answer>A</answer>"
    result = scored([sample(0)], [text], four_stage=False, judge=CaptionReward(never))
    assert "answerable" not in result["rows"][0]


# --- pictures for the report ----------------------------------------------------------------------


def photo(path: Path, colour: str) -> Path:
    Image.new("RGB", (60, 40), colour).save(path)
    return path


def test_the_gallery_shows_pictures_and_strips_of_clips(world, tmp_path):
    two = sample(
        0, media=(photo(tmp_path / "r.png", "red"), photo(tmp_path / "b.png", "blue")), id="a/b: 1"
    )
    clip = next(s for s in data.load(world / "data")["test"] if s.data_type == "video")
    rest = [sample(i, media=two.media[:1]) for i in range(5)]
    measures.save_gallery(
        tmp_path / "gallery", {"test": [two, clip, *rest]}, fps=2.0, max_frames=16, n=3
    )
    files = list((tmp_path / "gallery").rglob("*.png"))
    # ids need not be file names
    assert all(re.fullmatch(r"[\w.-]+", file.name, re.ASCII) for file in files)
    pictures = {image.size: np.asarray(image) for image in map(Image.open, files)}
    assert len(files) == 3 and set(pictures) == {
        (2 * 168, 168),
        (4 * 168, 168),
        (168, 168),
    }  # n rows of the set
    strip = pictures[2 * 168, 168]
    assert strip[80, 80].tolist() == [255, 0, 0] and strip[80, 250].tolist() == [0, 0, 255]


def test_a_wide_picture_is_wide_in_the_gallery(tmp_path):
    Image.new("RGB", (120, 60), "red").save(tmp_path / "wide.png")
    measures.save_gallery(
        tmp_path, {"test": [sample(0, media=(tmp_path / "wide.png",))]}, fps=2.0, max_frames=16
    )
    shown = np.asarray(Image.open(next((tmp_path / "test").glob("*.png"))))
    assert (
        (shown[42:126] == [255, 0, 0]).all()
        and (shown[:42] == 255).all()
        and (shown[126:] == 255).all()
    )


def test_rows_of_two_sets_with_one_id_keep_their_own_pictures(tmp_path):
    """Ids are unique within a file only."""
    sets = {
        name: [sample(1, media=(photo(tmp_path / f"{name}.png", name),))]
        for name in ("red", "blue")
    }
    measures.save_gallery(tmp_path / "gallery", sets, fps=2.0, max_frames=16)
    kept = {
        tuple(np.asarray(Image.open(f))[80, 80].tolist())
        for f in (tmp_path / "gallery").rglob("*.png")
    }
    assert kept == {(255, 0, 0), (0, 0, 255)}


def test_ids_that_a_file_name_cannot_tell_apart_keep_their_own(tmp_path):
    """And one that is too long for a name does not end the run."""
    colours = {
        "\u7ea2": "red",
        "\u84dd": "blue",
        "a/1": "lime",
        "a:1": "black",
        "A/1": "white",
        "x" * 300: "yellow",
    }
    samples = [
        sample(1, id=id, media=(photo(tmp_path / f"{c}.png", c),)) for id, c in colours.items()
    ]
    measures.save_gallery(tmp_path / "eval" / "gallery", {"test": samples}, fps=2.0, max_frames=16)
    run = SimpleNamespace(folder=tmp_path)
    for id, colour in colours.items():
        shown = Image.open(report.picture(run, "test", {"id": id}))
        assert shown.getpixel((80, 80)) == ImageColor.getrgb(colour)


# --- models and runs ------------------------------------------------------------------------------


def test_responses_are_greedy_and_in_order(world, policy):
    """They do not depend on the batch."""
    samples = data.load(world / "data")["test"][:5]
    assert {s.data_type for s in samples} == {"image", "video"}
    together = measures.respond(policy, samples, max_new_tokens=6)
    assert together == [measures.respond(policy, [s], max_new_tokens=6)[0] for s in samples]
    assert together == measures.respond(policy, samples[::-1], max_new_tokens=6)[::-1]
    assert len(set(together)) > 1 and measures.respond(policy, []) == []


def test_a_run_folder_stands_for_its_last_finished_stage(tmp_path):
    """A checkpoint stands for itself."""
    assert evaluation.checkpoint_of(tmp_path) == (tmp_path, {})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"fps": 1.0, "four_stage": False}))
    with pytest.raises(ConfigError, match="without a finished stage"):
        evaluation.checkpoint_of(tmp_path)
    for stage in ("sft", "rl"):
        (tmp_path / stage / "policy").mkdir(parents=True)
        assert evaluation.checkpoint_of(tmp_path) == (
            tmp_path / stage / "policy",
            {"fps": 1.0, "four_stage": False},
        )


def test_the_command_evaluates_a_checkpoint_and_writes_every_row(world, policy, tmp_path):
    out, judge = tmp_path / "x.json", world / "judge"
    done = commands.launch(
        *(
            "--model",
            world / "policy",
            "--data",
            world / "data",
            "--max_new_tokens",
            8,
            "--out",
            out,
        ),
        *("--judge", judge, "--batch", 4),
        script="eval.py",
    )
    assert "test: accuracy" in done.stdout and "test_pairs: accuracy" in done.stdout
    result = json.loads(out.read_text())
    sets = {
        split: rows for split, rows in data.load(world / "data").items() if split.startswith("test")
    }
    assert set(result) == set(sets)
    for split, samples in sets.items():
        assert [row["id"] for row in result[split]["rows"]] == [s.id for s in samples]
        assert value(result[split], "accuracy")[1] == len(samples)
    assert value(result["test_pairs"], "paired")[1] == 2
    texts = [row["text"] for row in result["test"]["rows"]]
    # the same in this process
    assert texts == measures.respond(policy, sets["test"], max_new_tokens=8)
    categories = {s.category for s in sets["test"]}
    assert all(
        any(line.split()[:1] == [name] for line in done.stdout.splitlines()) for name in categories
    )


COUNTED = """
import json, os, sys
sys.path.insert(0, sys.argv.pop(1))
import eval as evaluation
import measures
import torch

torch.set_num_threads(1)
asked, respond, replace = [], measures.respond, os.replace

def counted(policy, samples, *options):
    asked.extend(f"{s.category}/{s.id}" for s in samples)
    return respond(policy, samples, *options)

def renamed(source, target):
    asked.append(f"writes {os.path.basename(target)}")
    return replace(source, target)

measures.respond, os.replace = counted, renamed
folder = sys.argv.pop(1)
evaluation.main()
with open(f"{folder}/{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(asked, file)
"""  # eval.py, with a record of what each process is asked and writes


def test_two_processes_share_own_rows_and_one_writes(world, tmp_path):
    """Neither answers a row of the other; the file is that of one process."""
    (tmp_path / "counted.py").write_text(COUNTED)
    options = [
        "--model",
        world / "policy",
        "--data",
        world / "data",
        "--max_new_tokens",
        6,
        "--batch",
        2,
    ]
    options += ["--judge", world / "judge"]
    printed = evaluate(*options, "--out", tmp_path / "one.json")
    counted = ROOT, tmp_path, *options, "--out", tmp_path / "two.json"
    done = commands.launch(*counted, script=tmp_path / "counted.py", processes=2)
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    result = json.loads((tmp_path / "two.json").read_text())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop() == "writes two.json" and not any("writes" in line for line in first + second)
    rows = [f"{row['category']}/{row['id']}" for of in result.values() for row in of["rows"]]
    # once with its own media, and once with another row's where there is one
    assert {*first, *second} == {*rows} and {*first}.isdisjoint(second)
    assert all((first + second).count(row) <= 2 for row in rows)
    assert abs(len({*first}) - len({*second})) <= len(result)
    assert (
        "test: accuracy" in printed
        and printed.partition("test: ")[2] == done.stdout.partition("test: ")[2]
    )


@pytest.mark.parametrize("four_stage", [True, False])
def test_captions_are_judged_where_none_was_rewarded(world, tmp_path, monkeypatch, four_stage):
    """So that arms can be compared; where there is no caption stage no judge is asked."""
    asked = []

    def judge(prompts):
        asked.extend(prompts)
        return ["A"] * len(prompts)

    options = [
        "--method",
        "sft",
        "--world",
        world,
        "--output_dir",
        tmp_path / "run",
        "--quiet",
        "true",
    ]
    cfg = train.parse_config([*map(str, options), "--four_stage", str(four_stage).lower()])
    assert not cfg.caption_reward
    monkeypatch.setattr(
        measures,
        "respond",
        lambda policy, samples, *_: [response("A", f"see {s.id}") for s in samples],
    )
    sets = data.load(world / "data")
    train.evaluate("before", str(world / "policy"), sets, CaptionReward(judge), cfg, Run(cfg))
    result = json.loads((tmp_path / "run/eval/before.json").read_text())
    assert set(result) == {"test", "test_pairs"}
    for split, of in result.items():
        right = [s.answer == "A" for s in sets[split]]
        assert of["metrics"].get("answerable captions") == (
            measures.rate(right) if four_stage else None
        )
        assert [row.get("answerable") for row in of["rows"]] == (
            right if four_stage else [None] * len(right)
        )
    assert bool(asked) is four_stage


def test_a_judge_that_dies_is_said_at_an_evaluation(world, tmp_path, monkeypatch, capsys):
    class Dying:
        last_error = "503 gone"

        def __call__(self, prompts):
            return ["A"] * (len(prompts) - 3) + [None] * 3

    def respond(policy, samples, *_):
        return [response("A", f"see {s.id}") for s in samples]

    monkeypatch.setattr(measures, "respond", respond)
    cfg = train.Config(world=str(world), output_dir=str(tmp_path / "run"), eval_responses=0)
    sets, policy = {"test": data.load(world / "data")["test"]}, str(world / "policy")
    train.evaluate("before", policy, sets, CaptionReward(Dying()), cfg, Run(cfg))
    said = capsys.readouterr().out
    assert "warning: test: the judge gave no verdict on 3 of 10 captions" in said
    assert "Its last error: 503 gone" in said and "no verdict 30.0%" in said


def test_rows_that_the_model_cannot_be_asked_are_refused_first(world, tmp_path, monkeypatch):
    rows = json.loads((world / "data" / "train.json").read_text())[:2]
    rows = [row | {"path": str(world / "data" / row["path"])} for row in rows]
    rows[1]["problem"] += "<|im_end|>"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    options = [
        "--model",
        world / "policy",
        "--data",
        tmp_path / "train.json",
        "--max_new_tokens",
        3,
    ]
    out = tmp_path / "out.json"
    evaluate(*options, "--out", out, "--on_bad_row", "skip")
    assert [row["id"] for row in json.loads(out.read_text())["train"]["rows"]] == [
        rows[0]["problem_id"]
    ]
    monkeypatch.setattr(pretrained, "load", None)
    with pytest.raises(SystemExit, match=f"error: .*{rows[1]['problem_id']}.*contains <.im_end.>"):
        evaluate(*options)


@pytest.mark.parametrize("out", [".", "none/x.json", "file/x.json"])
def test_a_file_that_cannot_be_written_is_refused_first(world, tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "load", None)
    options = ["--model", world / "policy", "--data", world / "data", "--out", tmp_path / out]
    with pytest.raises(SystemExit, match="error: out: cannot write .*. Give a"):
        evaluate(*options)


def test_a_missing_data_folder_is_one_line_without_a_traceback(world, tmp_path):
    options = ["--model", world / "policy", "--data", tmp_path / "nowhere"]
    done = commands.launch(*options, script="eval.py", check=False)
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode != 0 and done.stdout == "evaluation on 1 process(es), cpu\n"
    assert (
        len(errors) == 1
        and errors[0].startswith("error: data: ")
        and "nowhere does not exist" in errors[0]
    )


def test_vision_limits_of_a_run_are_those_of_its_evaluation(world, tmp_path, monkeypatch, capsys):
    """A run folder's settings reach the model; the set is train.json where there is no test."""
    (tmp_path / "run" / "rl").mkdir(parents=True)
    (tmp_path / "run" / "rl" / "policy").symlink_to(world / "policy")
    settings = {
        "max_pixels": 12_544,
        "max_new_tokens": 3,
        "four_stage": False,
        "dtype": "float32",
        "seed": 1,
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = json.loads((world / "data" / "train.json").read_text())[:2]
    for row in rows:
        row["path"] = str(world / "data" / row["path"])
    (tmp_path / "train.json").write_text(json.dumps(rows))
    loaded, load = [], pretrained.load

    def record(path, **options):
        loaded.append(load(path, **options))
        return loaded[-1]

    monkeypatch.setattr(pretrained, "load", record)
    monkeypatch.setattr(
        sys,
        "argv",
        ["eval.py", "--model", f"{tmp_path / 'run'}", "--data", f"{tmp_path}/train.json"],
    )
    evaluation.main()
    assert loaded[0].max_pixels == 12_544 and not loaded[0].training
    assert "train: accuracy" in capsys.readouterr().out


# --- benchmarks, end to end -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A few rows of all seven, in their publishers' forms, in one folder each."""
    folder, clip = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("clip") / "a.mp4"
    write_clip(clip, [Image.new("RGB", (56, 56), (20 * i, 0, 0)) for i in range(4)])
    for category in ("random", "popular", "adversarial"):
        rows = forms.pope_rows(category)
        forms.parquet(folder / f"pope/Full/{category}-00000-of-00001.parquet", rows, "image")
    rows = [row | {"image": forms.cell()} for row in forms.ROTATIONS]
    forms.parquet(folder / "mmbench/en/dev-00000-of-00001.parquet", rows, "image")
    problems = {
        str(i): forms.MATHVISTA | {"pid": str(i), "image": "images/5.jpg"} for i in range(3)
    }
    forms.dump(folder / "mathvista/data/testmini.json", problems)
    forms.picture(folder / "mathvista/images/5.jpg")
    forms.dump(folder / "mmvu/validation.json", forms.MMVU)
    for place in (
        "mmvu/videos/Chemistry/0.mp4",
        "mmvu/videos/Art/0.mp4",
        "videommmu/Science/dev_Biology_3.mp4",
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / place)
    for track in ("Perception", "Comprehension", "Adaptation"):
        forms.parquet(folder / f"videommmu/{track}/test-00000-of-00001.parquet", [forms.VIDEOMMMU])
    for subset in ("temporal", "semantic_detail"):
        forms.dump(folder / f"videohallucer/{subset}/{subset}.json", [forms.PAIR])
        for name in ("1_a.mp4", "1_b.mp4"):
            (folder / f"videohallucer/{subset}/videos").mkdir(exist_ok=True)
            shutil.copy(clip, folder / f"videohallucer/{subset}/videos/{name}")
    forms.dump(folder / "amber/data/annotations.json", forms.AMBER["annotations"])
    forms.dump(folder / "amber/data/relation.json", forms.AMBER["relation"])
    (folder / "amber/data/safe_words.txt").write_text("\n".join(forms.AMBER["safe_words"]))
    asked = [
        {"id": i, "image": "AMBER_1.jpg", "query": text}
        for i, text in ((1, "Describe this image."), (9, "Is it?"))
    ]
    forms.dump(folder / "amber/data/query/query_all.json", asked)
    forms.picture(folder / "amber/image/AMBER_1.jpg")
    return folder


def launch(*options, processes=1):
    return commands.launch(*options, script="eval.py", processes=processes).stdout


def evaluate(*options):
    """The same in this process: what it prints."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = ["eval.py", *map(str, options)]
    try:
        with contextlib.redirect_stdout(out):
            evaluation.main()
    finally:
        sys.argv = argv
    return out.getvalue()


NAMES = ("pope", "mmbench", "mathvista", "mmvu", "videommmu", "videohallucer", "amber")
FILES = (
    "scores.json",
    "counts.json",
    *(f"{name}.jsonl" for name in NAMES),
    *(f"outputs/{name}.jsonl" for name in NAMES),
)


def content(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def benchmarked(world, published, tmp_path_factory):
    """All seven, by one process: (its folder, what it printed, its options)."""
    folder = tmp_path_factory.mktemp("benchmarked") / "run"
    options = [
        "--model",
        world / "policy",
        "--max_new_tokens",
        6,
        "--batch",
        2,
        "--dtype",
        "float32",
    ]
    options += ["--benchmarks", *(f"{name}={published / name}" for name in NAMES)]
    return folder, launch(*options, "--output_dir", folder), options


def test_every_benchmark_is_scored_by_both_protocols(benchmarked):
    folder, printed, _ = benchmarked
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores) == set(NAMES) and all(
        {"official", "paper"} <= set(of) for of in scores.values()
    )
    assert all(of["asked"] == "four_stage" and of["judge"] == "" for of in scores.values())
    for name in NAMES:
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert lines and all(line["prompt"] and isinstance(line["output"], str) for line in lines)
        kinds = {line[protocol]["verdict"] for line in lines for protocol in ("official", "paper")}
        assert kinds <= {"right", "wrong", "undecided", "dropped"}
        assert benchmarks.TABLE[name].title in printed
    assert scores["mmvu"]["paper"]["metrics"]["overall"]["accuracy"]["dropped"] == 1  # open-ended
    assert scores["amber"]["official"]["metrics"]["generative"]["CHAIR"]["undecided"] == 1
    assert "amber: descriptions stay undecided" in printed and "pip install" in printed
    pope = scores["pope"]["official"]["metrics"]["overall"]["accuracy"]
    assert pope["n"] == 6
    assert "88.7" in printed


def test_every_benchmark_can_be_asked_on_corrupted_inputs(benchmarked, tmp_path, monkeypatch):
    """The stress test of all seven. Each kind shows and asks what it should; the intact rows count
    as in the score, and another run over the same folder asks nothing anew."""
    _, _, options = benchmarked
    folder, kinds = tmp_path / "run", ["blank", "random_media", "remove_text", "mislead"]
    chats, messages = defaultdict(list), data.messages

    def watched(sample, text, *rest):
        made = messages(sample, text, *rest)
        chats[sample.corruption and sample.corruption[0]].append((sample.id, text, made))
        return made

    monkeypatch.setattr(data, "messages", watched)
    printed = evaluate(*options, "--output_dir", folder, "--stress", *kinds)
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores) == set(NAMES) and content(folder) == content(benchmarked[0])
    for name in NAMES:
        assert f"{name}: the stress test" in printed
        lines = json.loads((folder / f"stress/{name}.json").read_text())
        found = {line["input"]: line for line in lines if line["kind"] == "all"}
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        verdicts = [
            row["official"]["verdict"] for row in rows if row["prompt"] != "Describe this image."
        ]
        counted = [v for v in verdicts if v != "dropped"]
        # an answer that no rule decides is there, and not right
        assert found["intact"]["n"] >= len(counted) - 1 and found["intact"]["n"] > 0
        assert found["intact"]["right"] * found["intact"]["n"] == counted.count("right")
        assert name != "pope" or set(found) == {"intact", "no_media", *kinds, "chance"}
    intact = {(i, text) for i, text, _ in chats[None]}
    pictures = {
        kind: [
            m
            for _, _, [turn] in of
            for part in turn["content"]
            for m in part.get("video", [part.get("image")])
            if m
        ]
        for kind, of in chats.items()
    }
    assert not pictures["no_media"] and chats["no_media"]
    assert all(
        image.getcolors() == [(image.width * image.height, (128,) * 3)]
        for image in pictures["blank"]
    )
    assert {(i, text) for i, text, _ in chats["blank"]} == intact
    assert all("Hint: the answer is" in text for _, text, _ in chats["mislead"])
    assert not {(i, text) for i, text, _ in chats["remove_text"]} & intact
    before = {file: file.stat().st_mtime_ns for file in (folder / "stress").glob("*/*.jsonl")}
    evaluate(*options, "--output_dir", folder, "--stress", *kinds)
    assert before == {
        file: file.stat().st_mtime_ns for file in (folder / "stress").glob("*/*.jsonl")
    }


def test_own_rows_can_be_asked_on_corrupted_inputs(world, tmp_path):
    """The stress test of own rows: a table for each set, and the drops in --out."""
    out = tmp_path / "x.json"
    options = ["--model", world / "policy", "--data", world / "data", "--max_new_tokens", 8]
    printed = evaluate(*options, "--out", out, "--stress", "blank", "mislead")
    result = json.loads(out.read_text())
    for split in ("test", "test_pairs"):
        assert f"{split}: the stress test" in printed
        inputs = {line["input"] for line in result[split]["stress"] if line["kind"] == "all"}
        assert inputs == {"intact", "no_media", "blank", "mislead", "chance"}
        assert result[f"{split}_blank"]["corruption"] == "blank"
        assert "blind accuracy" not in result[f"{split}_blank"]["metrics"]
    assert printed.count("needs eyes: ") == 2


def test_two_processes_and_a_killed_run_give_the_same_files(benchmarked, tmp_path):
    folder, _, options = benchmarked
    launch(*options, "--output_dir", tmp_path / "two", processes=2)
    assert content(tmp_path / "two") == content(folder)
    shutil.copytree(folder, tmp_path / "killed")
    for name in ("scores.json", "counts.json", "mmvu.jsonl", "amber.jsonl", "outputs/amber.jsonl"):
        (tmp_path / "killed" / name).unlink()
    cut = (folder / "outputs/pope.jsonl").read_bytes()
    # in the middle of a line
    (tmp_path / "killed/outputs/pope.jsonl").write_bytes(cut[: len(cut) // 2])
    evaluate(*options, "--output_dir", tmp_path / "killed")
    assert content(tmp_path / "killed") == content(folder)


KNOWN = {  # what a policy might have said, row by row
    "pope": {"yes": "A", "no": "A"},
    "mmbench": {"A": "A", "B": "B"},
    "videohallucer": {"yes": "A", "no": "B"},
}


@pytest.fixture(scope="module")
def known(benchmarked, published, tmp_path_factory):
    """The rows with known answers.

    POPE always yes, MMBench and VideoHallucer right, MathVista 3, 4 and nothing.
    """
    folder = tmp_path_factory.mktemp("known") / "run"
    shutil.copytree(benchmarked[0], folder)
    for name in NAMES:
        golds = {
            row.id: row.answer for row in benchmarks.scan(name, published / name, check=False)[0]
        }
        lines = [
            json.loads(line) for line in (folder / f"outputs/{name}.jsonl").read_text().splitlines()
        ]
        for i, line in enumerate(lines):
            said = KNOWN.get(name, {}).get(golds[line["id"]]) or {
                "mathvista": ["3", "4", ""][i % 3]
            }.get(name, "B")
            line["output"] = response(said) if said else ""
        (folder / f"outputs/{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    printed = evaluate(*benchmarked[2], "--output_dir", folder)
    return folder, printed, json.loads((folder / "scores.json").read_text())


def test_known_answers_get_the_scores_that_a_hand_gives_them(known):
    _, printed, scores = known
    pope = scores["pope"]["official"]["metrics"]["overall"]
    assert [pope[m]["value"] for m in ("accuracy", "precision", "recall", "yes ratio")] == [
        0.5,
        0.5,
        1.0,
        1.0,
    ]
    assert pope["f1"]["value"] == pytest.approx(2 / 3) and pope["f1"]["interval"].startswith(
        "bootstrap"
    )
    assert scores["pope"]["paper"]["metrics"]["overall"]["accuracy"]["value"] == 0.5
    assert scores["mmbench"]["official"]["metrics"]["overall"]["circular accuracy"]["value"] == 1
    pairs = scores["videohallucer"]["official"]["metrics"]["mean of subsets"]["pair accuracy"]
    assert pairs["value"] == 1 and pairs["n"] == 2
    mathvista = scores["mathvista"]["paper"]["metrics"]["overall"]["accuracy"]
    assert mathvista["value"] == pytest.approx(1 / 3) and mathvista["n"] == 3
    mmvu = scores["mmvu"]["paper"]["metrics"]["overall"]["accuracy"]
    assert (mmvu["value"], mmvu["n"], mmvu["dropped"], mmvu["interval"]) == (1.0, 1, 1, "Wilson")
    assert mmvu["low"] == pytest.approx(measures.rate_of(1, 1)["low"])
    assert scores["mmvu"]["official"]["metrics"]["overall"]["accuracy"]["undecided"] == 1
    assert (
        "empty output" in printed
        and "official, overall: accuracy 50.0, precision 50.0, recall 100.0" in printed
    )


def test_doubled_and_foreign_lines_are_named(known, benchmarked, tmp_path):
    """Two runs into one folder, or shards put together: the first line with an output counts."""
    shutil.copytree(known[0], tmp_path / "run")
    file = tmp_path / "run/outputs/pope.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    again = [line | {"output": response("B")} for line in lines[:2]]
    again += [lines[0] | {"id": "random/99"}]
    unread = lines[2] | {
        "output": None,
        "error": "cut off",
    }  # by the first run, and not by the second
    lines = [*lines[:2], unread, *lines[2:]]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *again]))
    printed = evaluate(*benchmarked[2], "--output_dir", tmp_path / "run")
    assert f"prediction given twice, the first counted: 3 ({lines[0]['id']}, " in printed
    assert "prediction for no row: 1 (random/99)" in printed and "cannot be decoded" not in printed
    assert (tmp_path / "run/pope.jsonl").read_bytes() == (known[0] / "pope.jsonl").read_bytes()
    found = json.loads((tmp_path / "run/scores.json").read_text())["pope"]["official"]
    assert found["metrics"] == known[2]["pope"]["official"]["metrics"]


def test_a_note_of_one_protocol_says_whose_it_is(known):
    kinds = ("yes/no", "open")  # the paper leaves open questions out
    rows = [
        benchmarks.Row(kind, "?", "no", kind, options={"A": "yes", "B": "no"}) for kind in kinds
    ]
    found = {
        protocol: benchmarks.score("mmvu", rows, {"7": "x"}, protocol)
        for protocol in benchmarks.PROTOCOLS
    }
    assert results.notes(found) == [
        "prediction for no row: 1 (7)",
        "official: missing prediction, counted as wrong: 2 (yes/no, open)",
        "paper: missing prediction, counted as wrong: 1 (yes/no)",
    ]
    assert "empty output, wrong by the official rule: 1 (2)" in known[1]
    assert "official: empty" not in known[1] and "paper: empty" not in known[1]


def test_the_table_says_of_how_many_members_a_mean_is(known):
    """Two of the five subsets of VideoHallucer are there, and all three of POPE."""
    assert "mean of subsets (2 of 5)" in known[1] and "mean of subsets (3 of 3)" not in known[1]


def test_each_row_keeps_its_prompt_answer_and_both_verdicts(known):
    lines = [json.loads(line) for line in (known[0] / "pope.jsonl").read_text().splitlines()]
    for line in lines:
        right = line["id"].endswith("/1")  # the row whose answer is yes
        assert line["official"] == {"answer": "yes", "verdict": "right" if right else "wrong"}
        assert line["paper"] == {"answer": "A", "verdict": "right" if right else "wrong"}
        assert line["output"] == response("A") and line["prompt"].startswith("Is there a")


def test_runs_that_differ_are_compared(known, benchmarked, tmp_path, capsys):
    results.compare(benchmarked[0], known[0])
    [line] = [
        x for x in capsys.readouterr().out.splitlines() if "videohallucer" in x and "official" in x
    ]
    assert "+100.0 [+100.0, +100.0]" in line
    shutil.copytree(known[0], tmp_path / "short")
    lines = (known[0] / "pope.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "short/pope.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="pope: rows are in one of them only: 1 .*the same --limit"):
        results.compare(known[0], tmp_path / "short")


def test_a_judge_decides_what_no_rule_does_and_is_remembered(
    known, benchmarked, world, tmp_path, monkeypatch
):
    folder, asked = tmp_path / "run", []
    shutil.copytree(known[0], folder)

    class Judge:
        def __init__(self, *args, **options):
            pass

        def __call__(self, prompts):
            asked.extend(prompts)
            return ['{"extracted_answer": "ours", "correct": true}' for _ in prompts]

    monkeypatch.setattr(judges, "LocalJudge", Judge)
    for _ in range(2):
        evaluate(*benchmarked[2], "--output_dir", folder, "--judge", world / "judge")
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["mmvu"]["official"]["metrics"]["overall"]["accuracy"]["undecided"] == 0
    assert scores["mmvu"]["judge"] == str(world / "judge")
    trials = [prompt for prompt in asked if prompt.startswith("Which letter comes first")]
    asked = [prompt for prompt in asked if prompt not in trials]
    assert len(trials) == 2, "each run tries it first"
    assert len(asked) == len(set(asked)) > 0, "asked once"
    with pytest.raises(SystemExit, match="used the judge .*Give it again"):
        evaluate(*benchmarked[2], "--output_dir", folder)


def test_prompts_of_a_run_and_pairs_at_the_limit(world, published, tmp_path):
    """A run's own prompt, a template, and a pair that --limit would cut."""
    (tmp_path / "run/rl").mkdir(parents=True)
    (tmp_path / "run/rl/policy").symlink_to(world / "policy")
    (tmp_path / "run/config.yaml").write_text(
        yaml.safe_dump({"four_stage": False, "max_new_tokens": 3})
    )
    options = [
        "--model",
        tmp_path / "run",
        "--benchmarks",
        f"videohallucer={published / 'videohallucer'}",
        "--limit",
        3,
    ]
    evaluate(*options)
    folder = tmp_path / "run/benchmarks"
    scores = json.loads((folder / "scores.json").read_text())["videohallucer"]
    assert (
        scores["asked"] == "two_stage"
        and scores["official"]["metrics"]["overall"]["pair accuracy"]["n"] == 1
    )
    line = json.loads((folder / "videohallucer.jsonl").read_text().splitlines()[0])
    assert (
        "<think>" in line["prompt"]
        and "<caption>" not in line["prompt"]
        and "A. Yes" in line["prompt"]
    )
    (tmp_path / "wording.txt").write_text("Look. {Question} Say it in <answer></answer>.")
    evaluate(
        *options,
        "--template",
        tmp_path / "wording.txt",
        "--output_dir",
        tmp_path / "other",
        "--sample",
    )
    line = json.loads((tmp_path / "other/videohallucer.jsonl").read_text().splitlines()[0])
    assert line["prompt"].startswith("Look. Is it red?") and "within the <answer>" in line["prompt"]


def test_the_docs_say_what_to_compare_with_what():
    table = (
        (ROOT / "docs" / "evaluation.md")
        .read_text()
        .partition("## Evaluation on benchmarks")[2]
        .partition("\n## ")[0]
    )
    for known in benchmarks.TABLE.values():
        [line] = [line for line in table.splitlines() if line.startswith(f"| {known.title} |")]
        assert f"{known.paper_number or 'not in GWYS'}" in line


def test_another_prompt_needs_another_folder(benchmarked):
    folder, _, options = benchmarked
    with pytest.raises(SystemExit, match="asked: 'four_stage' there, 'direct' now"):
        evaluate(*options, "--output_dir", folder, "--direct")


def test_two_runs_are_compared_row_by_row(benchmarked, tmp_path, capsys):
    folder, _, options = benchmarked
    some = [*options[:2], "--max_new_tokens", 6, *options[options.index("--benchmarks") :]]
    evaluate(*some, "--limit", 4, "--direct", "--output_dir", tmp_path / "direct")
    asked = [
        json.loads(line)["prompt"]
        for line in (tmp_path / "direct/pope.jsonl").read_text().splitlines()
    ]
    assert len(asked) == 4 and asked[0] == "Is there a kite in the picture?"
    results.compare(folder, folder)
    printed = capsys.readouterr().out
    assert "videohallucer" in printed and "+0.0 [+0.0, +0.0]" in printed and "McNemar" in printed
    with pytest.raises(
        DataError, match="pope: .*not over the same pictures.*evaluate both on the same rows"
    ):
        shutil.copytree(folder, tmp_path / "other")
        counts = json.loads((folder / "counts.json").read_text())
        counts["pope"]["official"].pop("COCO_0")
        (tmp_path / "other/counts.json").write_text(json.dumps(counts))
        results.compare(folder, tmp_path / "other")


def test_a_folder_without_scores_is_not_compared(tmp_path):
    with pytest.raises(SystemExit, match=f"error: compare: {tmp_path} has no scores.json. Give"):
        evaluate("--compare", tmp_path, tmp_path)


@pytest.mark.parametrize("model", ["runs/typo", "./typo", "/no/typo", "runs/a/typo"])
def test_a_mistyped_run_folder_is_said_to_be_missing(world, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit) as stopped:
        evaluate("--model", model, "--data", world / "data")
    told = f"error: model: cannot load {model}: there is no folder {model}"
    assert str(stopped.value).startswith(told) and len(str(stopped.value)) < 200


def test_a_run_folder_is_no_model_and_says_what_is(tmp_path):
    (tmp_path / "sft/policy").mkdir(parents=True)
    with pytest.raises(ValueError, match="it is a run folder. Give .*sft/policy"):
        pretrained.context(str(tmp_path))
    (tmp_path / "rl/policy").mkdir(parents=True)
    with pytest.raises(ValueError, match="it is a run folder. Give .*rl/policy"):
        pretrained.context(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--benchmarks", "vqa=/x"], "'vqa' is not one of pope, mmbench"),
        (["--benchmarks", "pope=/nowhere"], "/nowhere"),
        (["--benchmarks", "amber"], "amber is not on the hub; give amber=FOLDER"),
        (["--benchmarks", "pope=HERE/mmvu"], "pope:"),
        (["--benchmarks", "pope=HERE/pope", "--template", "/nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_one_line_before_a_model_is_loaded(published, tmp_path, options, says):
    options = [word.replace("HERE", str(published)) for word in options]
    done = commands.launch(
        "--model", "/no/model", *options, script="eval.py", check=False, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and says in done.stderr, (
        done.stderr
    )
    assert "Traceback" not in done.stderr


# --- what stands behind an answer -----------------------------------------------------------------


def test_right_answers_behind_wrong_captions_by_hand():
    """The caption is wrong where the judge fails on it or where it names what is not there."""
    rows = [  # right, answerable, hallucinated -> right behind a wrong caption, both right
        (True, True, []),  # both
        (True, True, ["cat"]),  # wrong: names what is not there
        (True, False, []),  # wrong: cannot be answered from
        (False, True, []),
        (False, False, ["cat"]),
        (True, None, ["cat"]),  # no verdict: left out
    ]
    rows = [
        {"right": r, "right_lenient": r, "format": True, "answerable": a, "hallucinated": h}
        | {"captioned": 1, "covered": 0, "relevant": 0}
        for r, a, h in rows
    ]
    found = measures.metrics([sample(i) for i in range(6)], rows)
    counted = {name: (found[name]["value"], found[name]["n"]) for name in found if "right" in name}
    assert counted == {"right, caption wrong": (2 / 5, 5), "both right": (1 / 5, 5)}
    assert found["by category"]["colour"] == {
        name: part for name, part in found.items() if name != "by category"
    }


def test_the_slope_is_that_of_a_regression_within_rows():
    """numpy's least squares with a dummy for each row, over the responses with a known verdict."""
    rng = np.random.default_rng(0)
    rows, design, target = [], [], []
    for i in range(30):
        answerable = [None if rng.random() < 0.1 else bool(rng.random() < 0.5) for _ in range(8)]
        right = [bool(rng.random() < (0.8 if a else 0.3)) for a in answerable]
        rows.append({"sampled": {"right": right, "answerable": answerable}})
        for r, a in zip(right, answerable):
            if a is not None:
                design.append([float(a), *(float(i == k) for k in range(30))])
                target.append(float(r))
    want = np.linalg.lstsq(np.array(design), np.array(target), rcond=None)[0][0]
    found = measures.slope([measures.covariance(row) for row in rows])
    assert found["value"] == pytest.approx(want, abs=1e-9) and found["low"] < want < found["high"]
    same = {"sampled": {"right": [True, False], "answerable": [True, True]}}
    assert measures.slope([measures.covariance(same)] * 5) is None  # its captions do not differ


def test_the_blind_control_shows_another_row_of_the_category():
    """Never the row's own media or its pair's; the category and the type are the row's."""
    samples = [
        sample(
            i, category="colour" if i % 2 else "count", media=(f"{i // 4}.png",), pair=f"p{i // 4}"
        )
        for i in range(24)
    ] + [sample(99, category="alone", media=("x.png",))]
    found = measures.other_media(samples)
    assert set(found) == {s.id for s in samples[:24]}  # the lonely one has no other
    by_media = {s.media: s for s in samples}
    for s in samples[:24]:
        other = by_media[found[s.id].media]
        assert found[s.id].media != s.media and other.pair != s.pair
        assert (found[s.id].problem, found[s.id].answer) == (s.problem, s.answer)
    assert found == measures.other_media(samples)
