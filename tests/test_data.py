"""data.py: bad rows are named one by one, three formats say the same, real photographs and real
clips are read."""

import copy
import dataclasses
import json
import os
import pickle
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import av
import datasets
import numpy as np
import pytest
import skimage.data
import torch
from commands import launch
from PIL import Image

import answers
import data
import reasoning
from engine import pretrained
from engine.media import Embedded, read_image
from engine.video import read_video

torch.set_num_threads(1)
PHOTOS = ("astronaut", "coffee", "chelsea")
FRAMES, RATE = 30, 10  # a clip of three seconds

LIMITS = SimpleNamespace(min_pixels=3136, max_pixels=50_000, fps=2.0, max_frames=4)


def write_clip(path: Path, count: int, rate: int, size=(96, 64), **options) -> None:
    """An MP4 by PyAV whose i-th frame has brightness 8 i: a frame can be told by its look."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(count):
            frame = np.full((size[1], size[0], 3), 8 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name in PHOTOS:
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    Image.fromarray(skimage.data.rocket()).save(folder / "rocket.jpg", quality=90)
    write_clip(folder / "clip.mp4", FRAMES, RATE)
    # its index comes first
    write_clip(folder / "streaming.mp4", FRAMES, RATE, movflags="faststart")
    for whole in ("coffee.png", "rocket.jpg", "clip.mp4", "streaming.mp4"):
        content = (folder / whole).read_bytes()
        (folder / f"cut-{whole}").write_bytes(content[: len(content) * 3 // 4])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("this is not a picture")
    write_clip(folder / "one-frame.mp4", 1, RATE)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (20_000, 60)).save(folder / "strip.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    photos = [Image.fromarray(getattr(skimage.data, name)()).resize((60, 60)) for name in PHOTOS]
    photos[0].save(folder / "moving.gif", save_all=True, append_images=photos[1:])
    Image.fromarray(skimage.data.chelsea()).convert("CMYK").save(folder / "ink.jpg", quality=90)
    return folder


def choice(media: Path, **changes) -> dict:
    row = {
        "data_type": "image",
        "problem_type": "multiple choice",
        "problem": "What animal is this?",
        "options": ["A. a dog", "B. a cat"],
        "path": str(media / "chelsea.png"),
        "solution": "<answer>B</answer>",
        "problem_id": "cat-1",
        "process": "<prethink>centre</prethink><caption>a tabby</caption><think>a cat</think><answer>B</answer>",
    }
    return {name: value for name, value in (row | changes).items() if value is not ...}


def number(media: Path, **changes) -> dict:
    counted = {
        "problem_type": "numerical",
        "problem": "How many cups?",
        "options": [],
        "solution": "1",
        **changes,
    }
    return choice(
        media,
        **{"path": str(media / "coffee.png"), "problem_id": "cups", "process": ..., **counted},
    )


def film(media: Path, **changes) -> dict:
    shown = {"data_type": "video", "path": str(media / "clip.mp4"), "problem_id": "clip", **changes}
    return choice(media, **shown)


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- bad rows -------------------------------------------------------------------------------------

# what is wrong: (the row, the field that the message names, words of the reason or the remedy)
BAD = {
    "no such file": (dict(path="nowhere/7.png"), "path", "nowhere/7.png does not exist"),
    "a folder for a picture": (dict(path="."), "path", "does not exist"),
    "a PNG that breaks off": (dict(path="MEDIA/cut-coffee.png"), "path", "as image"),
    "an empty PNG": (dict(path="MEDIA/empty.png"), "path", "as image"),
    "text named PNG": (dict(path="MEDIA/words.png"), "path", "as image"),
    "a JPEG that breaks off": (dict(path="MEDIA/cut-rocket.jpg"), "path", "as image"),
    "an empty MP4": (dict(path="MEDIA/empty.mp4", data_type="video"), "path", "as video"),
    "an MP4 that breaks off": (
        dict(path="MEDIA/cut-clip.mp4", data_type="video"),
        "path",
        "as video",
    ),
    "a streaming MP4 that breaks off": (
        dict(path="MEDIA/cut-streaming.mp4", data_type="video"),
        "path",
        "as video",
    ),
    "a clip called image": (dict(path="MEDIA/clip.mp4"), "path", "is a clip. Give it as video"),
    "the second picture missing": (
        dict(path=["MEDIA/chelsea.png", "gone.png"]),
        "path",
        "gone.png does not exist",
    ),
    "no data_type": (dict(data_type=...), "data_type", "missing or empty. Every row needs one"),
    "no problem_type": (dict(problem_type=...), "problem_type", "missing or empty"),
    "no problem": (dict(problem=...), "problem", "missing or empty"),
    "an empty problem": (dict(problem=""), "problem", "missing or empty"),
    "no path": (dict(path=...), "path", "missing or empty"),
    "an empty list of paths": (dict(path=[]), "path", "missing or empty"),
    "no solution": (dict(solution=...), "solution", "missing or empty"),
    "a null solution": (dict(solution=None), "solution", "missing or empty"),
    "no problem_id": (dict(problem_id=...), "problem_id", "missing or empty"),
    "an empty answer": (
        dict(solution="<answer> </answer>"),
        "solution",
        "no answer inside <answer></answer>",
    ),
    "an answer not among the options": (
        dict(solution="<answer>D</answer>"),
        "solution",
        "'D' is not the letter of",
    ),
    "the option's text for its letter": (
        dict(solution="a cat"),
        "solution",
        "'a cat' is not the letter",
    ),
    "two letters": (dict(solution="AB"), "solution", "(A, B)"),
    "multiple choice without options": (dict(options=[]), "solution", "no options"),
    "options left out": (dict(options=...), "solution", "no options"),
    "words for a number": (
        dict(problem_type="numerical", solution="three"),
        "solution",
        "'three' is not a number",
    ),
    "not a number at all": (
        dict(problem_type="regression", solution="nan"),
        "solution",
        "'nan' is not a number",
    ),
    "a process that is no text": (dict(process=5), "process", "must be a string"),
    "a process without its stages": (
        dict(process="<caption>x</caption>"),
        "process",
        "lacks a stage",
    ),
    "a list for a pair": (dict(pair=["x"]), "pair", "must be a string"),
    "an unknown data_type": (
        dict(data_type="audio"),
        "data_type",
        "'audio' is neither 'image' nor 'video'",
    ),
    "an unknown problem_type": (
        dict(problem_type="essay"),
        "problem_type",
        "is not one of multiple choice, numerical",
    ),
    "options that are one string": (dict(options="A. a dog, B. a cat"), "options", ""),
    "options that are numbers": (dict(options=[1, 2]), "options", ""),
    "a path that is a number": (dict(path=7), "path", ""),
    "a null in the list of paths": (dict(path=["MEDIA/chelsea.png", None]), "path", ""),
    "objects that are one string": (dict(objects="a cat"), "objects", '["cat", "dog"]'),
    "base64 that breaks off": (
        dict(path="iVBORw0KGgo" * 90 + "abc"),
        "path",
        "iVBORw0... does not exist, and is no whole base64 (993 characters). Give a path, or all",
    ),
    "a clip of one frame": (
        dict(path="MEDIA/one-frame.mp4", data_type="video"),
        "path",
        "has 1 frame. Give a picture",
    ),
    "a picture called video": (
        dict(path="MEDIA/chelsea.png", data_type="video"),
        "path",
        "has 1 frame. Give a picture",
    ),
    "a picture of one pixel": (dict(path="MEDIA/dot.png"), "path", "1 x 1 pixels, too few"),
    "a strip of 20,000 pixels": (
        dict(path="MEDIA/strip.png"),
        "path",
        "20000 x 60 pixels; Qwen2.5-VL takes no side",
    ),
    "a picture of 20,000 x 20,000": (dict(path="MEDIA/bomb.png"), "path", "exceeds limit"),
    "a moving GIF for a picture": (
        dict(path="MEDIA/moving.gif"),
        "path",
        "is animated (3 frames). Give it as video",
    ),
    "a path that leaves the folder": (
        dict(path="../../etc/passwd"),
        "path",
        "leaves the folder of the data",
    ),
    "a way out in the middle": (
        dict(path="images/../../x.png"),
        "path",
        "leaves the folder of the data",
    ),
    "bytes that are no picture": (dict(path={"bytes": "x", "path": None}), "path", "as image"),
    "neither bytes nor path": (
        dict(path={"bytes": None, "path": None}),
        "path",
        "must be a path, or bytes",
    ),
    "a number for the problem_type": (dict(problem_type=3), "problem_type", "3 is not one of"),
    "two clips": (dict(data_type="video", path=["MEDIA/clip.mp4", "MEDIA/clip.mp4"]), "path", ""),
}


def filled(changes: dict, media: Path) -> dict:
    def fill(value):
        return value.replace("MEDIA", str(media)) if isinstance(value, str) else value

    return {
        k: [fill(v) for v in value] if isinstance(value, list) else fill(value)
        for k, value in changes.items()
    }


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_with_place_field_and_fault(media, tmp_path, kind):
    """A bad row is named with its place, its field and what is wrong."""
    changes, field, words = BAD[kind]
    bad = choice(media, **filled({"problem_id": "bad-one", **changes}, media))
    file = write(tmp_path / "train.json", [number(media), bad, film(media)])
    with pytest.raises(data.DataError) as error:
        data.load(file)
    lines = str(error.value).splitlines()
    who = " (bad-one)" if "problem_id" in bad else ""
    assert lines[0].startswith(f"train.json row 1{who}, {field}: ") and words in lines[0]
    assert len(lines) == 2 and "--on_bad_row skip" in lines[1]  # the good rows are not named


@pytest.mark.parametrize("row", [3, "text", None, ["a", "list"]])
def test_a_row_that_is_no_object_is_named(media, tmp_path, row):
    file = write(tmp_path / "train.json", [number(media), row])
    with pytest.raises(
        data.DataError, match=rf"train.json row 1, row: must be an object, got {type(row).__name__}"
    ):
        data.load(file)


def test_a_repeated_id_is_named_and_the_first_row_is_kept(media, tmp_path):
    rows = [choice(media), number(media), choice(media, problem="Again?")]
    file = write(tmp_path / "train.json", rows)
    with pytest.raises(
        data.DataError,
        match=r"row 2 \(cat-1\), problem_id: 'cat-1' is already taken. Make ids unique",
    ):
        data.load(file)
    samples = data.load(file, on_bad_row="skip")["train"]
    assert [(s.id, s.problem) for s in samples] == [
        ("cat-1", "What animal is this?"),
        ("cups", "How many cups?"),
    ]
    assert (
        len(
            data.load(
                write(tmp_path / "train.json", [choice(media, problem_id=i) for i in (0, 1)])
            )["train"]
        )
        == 2
    )


def test_every_bad_row_is_in_one_message(media, tmp_path):
    """One message names every bad row. The rows after ten are counted."""
    rows = [number(media, problem_id=f"bad {i}", solution="many") for i in range(13)]
    folder = tmp_path / "set"
    write(folder / "train.json", [choice(media), *rows])
    write(folder / "test.json", [choice(media, data_type="audio")])
    with pytest.raises(data.DataError) as error:
        data.load(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == 12 and lines[10] == "... and 4 more"
    assert lines[0].startswith("test.json row 0 (cat-1), data_type:")
    assert lines[1].startswith("train.json row 1 (bad 0), solution:")


def test_bad_rows_are_skipped_and_printed_when_asked(media, tmp_path, capsys):
    rows = [
        choice(media),
        number(media, solution="many"),
        film(media),
        choice(media, path="gone.png"),
    ]
    samples = data.load(write(tmp_path / "train.json", rows), on_bad_row="skip")["train"]
    assert [s.id for s in samples] == ["cat-1", "clip"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("skipped: train.json row 1 (cups), solution: ")
    assert lines[1].startswith("skipped: train.json row 3 (cat-1), path: ")


def test_a_split_of_bad_rows_only_is_an_error_even_when_skipping(media, tmp_path):
    folder = tmp_path / "set"
    write(folder / "train.json", [choice(media)])
    write(folder / "test.json", [choice(media, path="gone.png")])
    with pytest.raises(data.DataError, match="test has no usable row"):
        data.load(folder, on_bad_row="skip")


def test_what_is_taught_needs_all_stages_that_are_asked_for(media, tmp_path, capsys):
    """Of a reference response, where the cold start learns from it. Check says so too."""
    two = choice(media, process="<think>a cat</think><answer>B</answer>")
    rows = [film(media), two]
    file = write(tmp_path / "set" / "train.json", rows)
    with pytest.raises(
        data.DataError, match=r"^train.json row 1 \(cat-1\), process: lacks a stage"
    ):
        data.load(file, staged=["cold_start"])
    assert [len(data.load(file, "skip", staged=["cold_start"])["train"])] == [1]
    assert len(data.load(file)["train"]) == 2
    assert not data.check(str(file))
    assert "bad: train.json row 1 (cat-1), process: lacks a stage" in capsys.readouterr().out
    assert data.check(
        str(file), limits=SimpleNamespace(**vars(data.LIMITS) | {"four_stage": False})
    )
    write(tmp_path / "set" / "cold_start.json", [film(media)])
    assert len(data.load(tmp_path / "set", staged=["cold_start"])["train"]) == 2  # it has its own
    with pytest.raises(data.DataError, match="train.json row 1"):
        data.load(tmp_path / "set", staged=["cold_start", "train"])


# --- bad files and folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"problem": "Wh', "cannot read"),
        ("a.json", b"", "cannot read .*: it is empty. Write its rows"),
        ("a.json", b"\xff\xfe\x00", "cannot read"),
        ("a.jsonl", b'{"problem": "What?"}\n{"problem": ', "cannot read"),
        ("a.parquet", b"not a parquet file", "cannot read"),
        ("a.parquet", b"", "cannot read"),
        ("a.json", b'{"rows": []}', "must hold a list of rows, not a dict"),
        ("a.json", b'"rows"', "must hold a list of rows, not a str"),
        ("a.json", b"[]", "has no usable row"),
        ("a.jsonl", b"\n\n", "has no usable row"),
    ],
)
def test_a_file_that_holds_no_rows_is_one_clear_error(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=words) as error:
        data.load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "Traceback" not in str(error.value)


def test_check_finds_a_set_without_rows(media, tmp_path, capsys):
    write(tmp_path / "train.json", [choice(media)])
    write(tmp_path / "test.json", [])
    assert not data.check(str(tmp_path))
    assert "bad: test has no usable row. Give it rows" in capsys.readouterr().out


def test_a_missing_folder_or_split_says_what_is_expected(media, tmp_path):
    """A missing folder, or one without a split to use, is refused with what is expected."""
    with pytest.raises(
        data.DataError, match=r"nowhere does not exist. Give a folder with train.json, or one JSON"
    ):
        data.load(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"holds no data file; expected train.json"):
        data.load(tmp_path)
    write(tmp_path / "cold_start.json", [choice(media)])
    with pytest.raises(data.DataError, match=r"holds cold_start; expected train.json"):
        data.load(tmp_path)


def test_two_files_of_one_split_are_not_taken_for_one(media, tmp_path):
    write(tmp_path / "train.json", [choice(media)])
    (tmp_path / "train.jsonl").write_text(json.dumps(number(media)))
    with pytest.raises(data.DataError, match="train.jsonl?"):
        data.load(tmp_path)


# --- good rows ------------------------------------------------------------------------------------


def test_the_fields_of_a_row_become_those_of_a_sample(media, tmp_path):
    extra = {"category": "animals", "pair": "p1", "objects": ["cat", "sofa"], "relevant": ["cat"]}
    rows = [choice(media, **extra), number(media, solution=3, options=None)]
    full, bare = data.load(str(write(tmp_path / "any.json", rows)))[
        "train"
    ]  # one file is `train`, whatever its name
    assert (full.id, full.data_type, full.problem_type, full.answer) == (
        "cat-1",
        "image",
        "multiple choice",
        "B",
    )
    assert full.media == (media / "chelsea.png",) and full.options == ("A. a dog", "B. a cat")
    assert full.process == choice(media)["process"]
    assert (full.category, full.pair, full.objects, full.relevant) == (
        "animals",
        "p1",
        ("cat", "sofa"),
        ("cat",),
    )
    assert (bare.answer, bare.options, bare.process) == ("3", (), None)
    assert (bare.category, bare.pair, bare.objects, bare.relevant) == (
        "numerical",
        None,
        None,
        None,
    )


def test_no_objects_and_an_empty_list_are_not_the_same(media, tmp_path):
    """A row without objects and a row with an empty list of objects are not the same."""
    rows = [choice(media, objects=[], problem_id=0), choice(media, problem_id=1)]
    empty, unknown = data.load(write(tmp_path / "train.json", rows))["train"]
    assert empty.objects == () and unknown.objects is None


def test_the_question_is_the_problem_and_its_options(media, tmp_path):
    """The question is the problem and its options, line by line."""
    chosen, counted = data.load(write(tmp_path / "a.json", [choice(media), number(media)]))["train"]
    assert chosen.question == "What animal is this?\nOptions:\nA. a dog\nB. a cat"
    assert counted.question == "How many cups?"


def test_the_official_name_of_the_reference_is_taken_too(media, tmp_path):
    """The official name of the reference response is taken too."""
    text = choice(media)["process"]
    official = choice(media, process=..., process_and_answer=text)
    own = choice(media, process_and_answer="another", problem_id="own")
    official, own = data.load(write(tmp_path / "a.json", [official, own]))["train"]
    assert official.process == own.process == text


def test_splits_are_named_by_file_and_paths_are_relative_to_it(media, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("chelsea.png", "coffee.png"):
        (images / name).write_bytes((media / name).read_bytes())
    for split in ("cold_start", "train", "test_hard", "test"):
        rows = [choice(media, path="./images/chelsea.png"), number(media, path="images/coffee.png")]
        write(tmp_path / f"{split}.json", rows)
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "info.json").write_text('{"author": "me"}')
    said = []
    splits = data.load(tmp_path, say=said.append)
    assert said == ["data: ignored, because no split has this name: info.json"]
    assert set(splits) == {"cold_start", "train", "test_hard", "test"}
    assert [p.resolve() for s in splits["test"] for p in s.media] == [
        images / "chelsea.png",
        images / "coffee.png",
    ]


def test_a_folder_with_tests_only_will_do(media, tmp_path):
    write(tmp_path / "test_pairs.json", [choice(media)])
    assert list(data.load(tmp_path)) == ["test_pairs"]


def rows_of_all_kinds(media: Path) -> list[dict]:
    lists = {"objects": ["cat", "sofa"], "relevant": ["cat"]}
    return [
        choice(media, problem="Welches Tier? 猫 🐈", **lists),
        number(media, solution="<answer>1,204.5</answer>", options=[]),
        film(media, category="motion", pair="p"),
        choice(
            media, problem_type="OCR", solution="NASA", options=[], problem_id="ocr", objects=[]
        ),
    ]


def test_json_jsonl_and_parquet_give_the_same_samples(media, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = rows_of_all_kinds(media)
    names = sorted({name for row in rows for name in row})
    write(tmp_path / "a.json", rows)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8"
    )
    table = [{name: row.get(name) for name in names} for row in rows]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "a.parquet")
    from_json, from_lines, from_parquet = (
        data.load(tmp_path / f"a.{kind}") for kind in ("json", "jsonl", "parquet")
    )
    assert len(from_json["train"]) == 4 and from_json["train"][0].problem == "Welches Tier? 猫 🐈"
    assert from_json == from_lines == from_parquet


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"], ids=["line separator", "next line"])
def test_a_jsonl_line_ends_at_a_newline_only(media, tmp_path, mark):
    """JSON strings may hold these unescaped, and do in any file written with ensure_ascii=False."""
    problem = f"What{mark}animal?"
    text = json.dumps(choice(media, problem=problem), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(text + "\n", "utf-8")
    assert data.load(tmp_path / "a.jsonl")["train"][0].problem == problem


# --- media ----------------------------------------------------------------------------------------


def test_real_photographs_come_pixel_for_pixel_before_the_text(media, tmp_path):
    paths = [str(media / f"{name}.png") for name in PHOTOS]
    sample = data.load(write(tmp_path / "a.json", [choice(media, path=paths)]))["train"][0]
    assert sample.media == tuple(Path(p) for p in paths)
    (turn,) = data.messages(sample, "Which one is a cat?")
    assert turn["role"] == "user"
    assert [part["type"] for part in turn["content"]] == ["image", "image", "image", "text"]
    assert turn["content"][-1]["text"] == "Which one is a cat?"
    for part, name in zip(turn["content"], PHOTOS):
        assert np.array_equal(np.asarray(part["image"]), getattr(skimage.data, name)())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_pictures_of_every_mode_come_as_rgb(media, tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    photo = Image.fromarray(skimage.data.chelsea()).convert(mode)
    photo.save(tmp_path / f"photo.{suffix}")
    sample = data.load(write(tmp_path / "a.json", [choice(media, path=f"photo.{suffix}")]))[
        "train"
    ][0]
    image = data.messages(sample, "?")[0]["content"][0]["image"]
    assert image.mode == "RGB" and image.size == photo.size
    assert np.abs(np.asarray(image, float) - np.asarray(photo.convert("RGB"), float)).mean() < 6


def test_black_ink_on_a_transparent_ground_stays_legible(media, tmp_path):
    """Transparent pixels of a figure are usually (0, 0, 0, 0): without a ground, ink and ground are
    both black."""
    figure = np.zeros((56, 56, 4), dtype=np.uint8)
    figure[20:30, 10:40, 3] = 255
    Image.fromarray(figure, "RGBA").save(tmp_path / "figure.png")
    sample = data.load(write(tmp_path / "a.json", [choice(media, path="figure.png")]))["train"][0]
    shown = np.asarray(data.messages(sample, "?")[0]["content"][0]["image"])
    # white, as qwen-vl-utils has it
    assert (shown[20:30, 10:40] == 0).all() and (shown[:20] == 255).all()


def brightness(frames) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("count", "rate", "fps", "max_frames", "expected"),
    [
        (30, 10, 2.0, 16, 6),  # three seconds at two a second
        (30, 10, 5.0, 16, 15),
        (30, 10, 5.0, 4, 4),  # no more than allowed
        (30, 10, 100.0, 100, 30),  # nor more than there are
        (12, 24, 2.0, 16, 2),  # half a second: at least two
        (3, 1, 2.0, 16, 3),
        (1, 10, 2.0, 16, 1),
        (30, 30, 4.0, 16, 4),
    ],
)
def test_a_real_clip_is_read_evenly_with_its_true_rate(
    tmp_path, count, rate, fps, max_frames, expected
):
    """A real clip is read evenly from its first to its last frame, with its true rate."""
    write_clip(tmp_path / "clip.mp4", count, rate)
    frames, true_fps = read_video(tmp_path / "clip.mp4", fps, max_frames)
    assert len(frames) == expected and frames[0].size == (96, 64)
    between = (count - 1) / rate / max(expected - 1, 1)  # seconds from one to the next
    assert true_fps == pytest.approx(1 / between if expected > 1 else rate)
    picked = brightness(frames)
    assert picked == sorted(set(picked)) and picked[0] == 0
    assert picked[-1] == (count - 1 if expected > 1 else 0)
    steps = np.diff(picked)
    assert expected < 3 or steps.max() - steps.min() <= 1


def test_a_clip_becomes_one_video_part_with_frames_and_rate(media, tmp_path):
    sample = data.load(write(tmp_path / "a.json", [film(media)]))["train"][0]
    ((video, text),) = (
        turn["content"] for turn in data.messages(sample, "What happens?", fps=4.0, max_frames=5)
    )
    assert (video["type"], text) == ("video", {"type": "text", "text": "What happens?"})
    assert len(video["video"]) == 5 and video["fps"] == pytest.approx(4 / 2.9)
    assert all(isinstance(frame, Image.Image) and frame.mode == "RGB" for frame in video["video"])


def test_a_clip_whose_end_is_missing_is_refused(tmp_path):
    """Its index stands in front and its key frames can be decoded: only the last packet tells."""
    write_clip(tmp_path / "clip.mp4", 30, 10, movflags="faststart")
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(whole[:-20])
    row = {
        "data_type": "video",
        "problem_type": "free-form",
        "problem": "?",
        "solution": "a",
        "problem_id": "0",
    }
    with pytest.raises(
        data.DataError, match=r"cannot read .*clip.mp4 as video \(it is cut off or damaged\)"
    ):
        data.load(write(tmp_path / "a.json", [row | {"path": "clip.mp4"}]))


def test_frames_of_a_panned_photo_are_those_written(tmp_path):
    """The frames read of a panned photograph are those that were written."""
    photo = skimage.data.astronaut()
    written = [np.ascontiguousarray(photo[100:228, x : x + 128]) for x in range(0, 160, 20)]
    with av.open(str(tmp_path / "pan.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "5", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for frame in written:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames, fps = read_video(tmp_path / "pan.mp4", fps=4.0)
    assert len(frames) == 8 and fps == 4.0
    for frame, want in zip(frames, written):
        errors = [np.abs(np.asarray(frame, float) - other).mean() for other in written]
        assert (
            np.argmin(errors) == next(i for i, w in enumerate(written) if w is want)
            and min(errors) < 8
        )


@pytest.mark.parametrize("four_stage", [True, False])
def test_a_prompt_is_the_media_and_the_words_of_reasoning(media, tmp_path, four_stage):
    samples = data.load(write(tmp_path / "a.json", [choice(media), film(media)]))["train"]
    first, second = data.prompts(samples, four_stage, fps=2.0, max_frames=3)
    words = reasoning.prompt(
        "What animal is this?", ["A. a dog", "B. a cat"], "multiple choice", four_stage
    )
    assert first[0]["content"][-1]["text"] == second[0]["content"][-1]["text"] == words
    assert first[0]["content"][0]["type"] == "image" and len(second[0]["content"][0]["video"]) == 3


def test_unknown_fields_are_named_once_a_file_and_left_alone(media, tmp_path, capsys):
    rows = [
        choice(media, problem_id=str(i), optoins=["A"], **({"note": 1} if i else {}))
        for i in range(3)
    ]
    [a, *_] = data.load(write(tmp_path / "train.json", rows), say=print)["train"]
    said = capsys.readouterr().out
    assert (
        said.count(
            "fields ignored: note (2 rows), optoins (3 rows). Is one misspelt? Known: data_type"
        )
        == 1
    )
    assert a.options == ("A. a dog", "B. a cat")


def test_a_number_and_its_string_are_the_same_solution(media, tmp_path):
    """A number as a string and a bare number are the same solution."""
    rows = [
        number(media, problem_id=str(i), solution=solution)
        for i, solution in enumerate(["12", 12, " 12 "])
    ]
    assert {s.answer for s in data.load(write(tmp_path / "train.json", rows))["train"]} == {"12"}


def test_cmyk_is_read_as_colours(media, tmp_path):
    [sample] = data.load(
        write(tmp_path / "train.json", [choice(media, path=str(media / "ink.jpg"))])
    )["train"]
    image = read_image(sample.media[0])
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, dtype=float) - skimage.data.chelsea()).mean() < 12


# --- other sources --------------------------------------------------------------------------------


def embedded(media: Path, name: str) -> dict:
    return {"bytes": (media / name).read_bytes(), "path": name}


def pixels(sample) -> list[np.ndarray]:
    parts = data.messages(sample, "?")[0]["content"][:-1]
    return [
        np.asarray(x)
        for part in parts
        for x in (part["video"] if part["type"] == "video" else [part["image"]])
    ]


def picture_pictures_film(media: Path) -> list[dict]:
    return [
        choice(media, problem_id="one"),
        choice(
            media, problem_id="two", path=[str(media / "coffee.png"), str(media / "rocket.jpg")]
        ),
        film(media, problem_id="film"),
    ]


def test_media_as_bytes_or_pil_are_those_of_the_files(media, tmp_path):
    """Pictures and clips as bytes or PIL images are those of the files."""
    files = data.load(write(tmp_path / "train.json", picture_pictures_film(media)))["train"]
    inside = picture_pictures_film(media)
    for row in inside:
        paths = row["path"] if isinstance(row["path"], list) else [row["path"]]
        row["path"] = [embedded(media, Path(path).name) for path in paths]
    table = datasets.Dataset.from_list(inside)
    table.to_parquet(tmp_path / "inside" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "dict")
    sources = [data.load(tmp_path / name) for name in ("inside", "saved", "dict")]
    assert list(sources[2]) == ["train", "test"]
    for source in sources:
        for a, b in zip(files, source["train"], strict=True):
            assert (a.id, a.answer, a.sizes) == (b.id, b.answer, b.sizes)
            assert all(isinstance(medium, Embedded) for medium in b.media)
            for x, y in zip(pixels(a), pixels(b), strict=True):
                assert np.array_equal(x, y)


def test_an_image_column_stays_bytes_until_it_is_opened(media, tmp_path):
    """A column of the Image type of datasets stays bytes until it is opened."""
    rows = [
        choice(media, problem_id=str(i), path=embedded(media, f"{name}.png"))
        for i, name in enumerate(PHOTOS)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("path", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    samples = data.load(tmp_path / "train.parquet")["train"]
    for name, sample in zip(PHOTOS, samples, strict=True):
        assert np.array_equal(pixels(sample)[0], getattr(skimage.data, name)())


def test_a_sample_may_hold_a_pil_image_or_bytes_itself(media):
    photo = Image.fromarray(skimage.data.chelsea())
    for medium in (photo, (media / "chelsea.png").read_bytes()):
        sample = data.read_row(choice(media, path=medium), None)
        assert np.array_equal(pixels(sample)[0], skimage.data.chelsea())


def test_a_hub_id_goes_to_datasets_and_is_checked_like_files(media, tmp_path, monkeypatch):
    """A Hub id goes to datasets. Its splits are checked like files."""
    inside = datasets.Dataset.from_list([choice(media, path=embedded(media, "chelsea.png"))])
    outside = datasets.Dataset.from_list([choice(media)])
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({"train": inside if name == "someone/pictures" else outside})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(data.load("someone/pictures")["train"]) == 1
    with pytest.raises(data.DataError, match="is a path, but the dataset is not on this disk"):
        data.load("someone/paths")
    assert asked == ["someone/pictures", "someone/paths"]


def test_a_hub_id_that_cannot_be_had_is_one_clear_error(monkeypatch):
    def load_dataset(name):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        data.DataError,
        match="nobody/nothing is not on this disk and could not be loaded from the hub",
    ):
        data.load("nobody/nothing")


# --- the check by itself --------------------------------------------------------------------------


def test_check_prints_counts_sizes_lengths_and_bad_rows(media, tmp_path, world):
    """The check prints counts, sizes, lengths and a line for each bad row."""
    rows = [
        *picture_pictures_film(media),
        number(media),
        choice(media, problem_id="bad", path="gone.png"),
    ]
    write(tmp_path / "train.json", rows)
    command = ["check", tmp_path, "--model", world / "policy"]
    done = launch(*command, script="data.py", check=False)
    assert done.returncode == 1, done.stderr
    for line in (
        "train: 4 rows, 3 with a reference response",
        "      2 image, multiple choice",
        "      1 image, numerical",
        "      1 video, multiple choice",
        "  seconds of a clip: 3 to 3, median 3",
        "  media per row: 1 to 2, median 1",
        "bad: train.json row 4 (bad), path: ",
        "1 bad row\n",
    ):
        assert line in done.stdout, done.stdout
    write(tmp_path / "train.json", rows[:-1])
    assert launch(*command, script="data.py").stdout.endswith("no bad row\n")
    done = launch("check", "no-such-folder", script="data.py", check=False)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: data: no-such-folder does not exist"
    )


def test_the_tokens_counted_are_those_that_the_processor_makes(media, tmp_path, world):
    policy = pretrained.load(
        str(world / "policy"), trainable=False, min_pixels=3136, max_pixels=50_000
    )
    samples = data.load(
        write(tmp_path / "train.json", [*picture_pictures_film(media), number(media)])
    )["train"]
    count = data.prompt_text_tokens(policy.processor.tokenizer)
    for sample in samples:
        inputs = policy.encode(data.prompts([sample], True, 2.0, 4))
        config, ids = policy.core.config, inputs["input_ids"]
        seen = ((ids == config.image_token_id) | (ids == config.video_token_id)).sum().item()
        assert data.visual_tokens(sample, LIMITS) == seen
        assert seen + count(sample) == ids.shape[1]


# --- rows as people have them ---------------------------------------------------------------------

FORMS = {
    "A) red": "{A}) {text}",
    "(A) red": "({A}) {text}",
    "A: red": "{A}: {text}",
    "A.red": "{A}.{text}",
    "A.) red": "{A}.) {text}",
    "[A] red": "[{A}] {text}",
    "a. red": "{a}. {text}",
    "(a) red": "({a}) {text}",
    "full width": "\uff21\uff0e{text}|\uff22\uff0e{text}",
    "an enumeration comma": "{A}\u3001{text}",
}


def loaded(tmp_path: Path, *rows: dict, say=lambda text: None) -> list[data.Sample]:
    return data.load(write(tmp_path / "train.json", list(rows)), say=say)["train"]


def refused(tmp_path: Path, row: dict) -> str:
    with pytest.raises(data.DataError) as error:
        loaded(tmp_path, row)
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solution", ["B", "b", "(B)", "B.", "as written"])
def test_lettered_options_are_shown_as_letter_and_stop(media, tmp_path, form, solution):
    """Whatever marks the letters have, policy and judge see "A. red", and the gold is the bare
    letter."""
    forms = FORMS[form].split("|") * 2
    texts = ("an hour", "2.5 cm")
    options = [forms[i].format(A="AB"[i], a="ab"[i], text=text) for i, text in enumerate(texts)]
    solution = options[1] if solution == "as written" else solution
    [sample] = loaded(tmp_path, choice(media, options=options, solution=solution))
    assert sample.options == ("A. an hour", "B. 2.5 cm") and sample.answer == "B"
    assert sample.question.endswith("Options:\nA. an hour\nB. 2.5 cm")
    assert answers.is_correct("The answer is B.", sample.answer, sample.problem_type, lenient=True)
    assert not answers.is_correct("b", sample.answer, sample.problem_type)  # strict is strict


@pytest.mark.parametrize(
    ("options", "solution", "letter"),
    [
        (["red", "blue"], "blue", "B"),
        (["red", "blue"], "<answer>B</answer>", "B"),
        (["1.5 cm", "2.5 cm"], "2.5 cm", "B"),
        (["1: 2", "2: 1"], "2: 1", "B"),
        (["2", "3", "1"], "1", "C"),
        (["a.m.", "p.m."], "a.m.", "A"),
        (["U.K.", "U.S."], "U.S.", "B"),
        (["J. Smith", "Mary Jones"], "Mary Jones", "B"),
        (["1. red", "2. blue"], "2", "B"),
        (["(1) red", "(2) blue"], "(2) blue", "B"),
        (["A", "B", "C"], "C", "C"),
        (["A flat", "B flat"], "B flat", "B"),
        (["A cat", "A dog"], "A dog", "B"),
        ([unicodedata.normalize("NFD", "Z\u00fcrich"), "Bern"], "Z\u00fcrich", "A"),
    ],
)
def test_options_without_letters_get_them_in_order(media, tmp_path, options, solution, letter):
    said = []
    [sample] = loaded(
        tmp_path, choice(media, options=options, solution=solution, process=...), say=said.append
    )
    assert sample.options == tuple(f"{a}. {text}" for a, text in zip("ABC", options))
    assert sample.answer == letter
    assert said == [
        "data: train.json: assumed where rows leave it open: options get letters in their order (1 row)"
    ]


@pytest.mark.parametrize(
    ("options", "solution", "words"),
    [
        (["A. red", "A. blue"], "A", "options: begin with A, A. Give all of them letters"),
        (["B. red", "A. blue"], "A", "options: begin with B, A."),
        (["A. red", "C. blue"], "A", "options: begin with A, C."),
        (["A. red", "blue"], "A", "options: begin with A, no letter."),
        (["A. red", "B."], "A", "options: one is empty ('A. red', 'B.')"),
        (["red", " "], "A", "options: one is empty"),
        (["1.5 cm", "2.5 cm"], "1", "'1' is not the letter of an option (A, B)"),
        (["red", "blue"], "violet", "'violet' is not the letter of an option (A, B)"),
        (["red", "red"], "red", "'red' may be option A or B. Give the letter"),
        (["B", "A"], "A", "'A' may be option A or B"),
        (["B - red", "A - blue"], "A", "options: begin with B, A."),
        (
            ["C red", "A blue", "B green"],
            "A",
            "options: seem to begin with C, A, B. Give them letters in order",
        ),
        (
            ["2", "3", "1"],
            1,
            "1 is ambiguous: it may be an option's position or its text. Give the option's letter",
        ),
        (["A. red", "B. blue"], ["A", "B"], "holds the letters A, B. Give one"),
        (["A. red", "B. blue"], "B. red", "'B. red' is not the letter"),
        ([str(i) for i in range(27)], "3", "options: 27 of them"),
    ],
)
def test_options_that_could_mislead_are_refused(media, tmp_path, options, solution, words):
    assert words in refused(
        tmp_path, choice(media, options=options, solution=solution, process=...)
    )


def test_a_reference_response_says_the_letter_as_shown(media, tmp_path):
    """The cold start teaches what the strict rule accepts: not "b" or "blue" where "B" is asked
    for."""
    process = choice(media)["process"].replace("<answer>B", "<answer>{}")
    for options, said in (
        (["a) red", "b) blue"], " b "),
        (["red", "blue"], "blue"),
        (["A: red", "B: blue"], "B: blue"),
    ):
        [sample] = loaded(
            tmp_path, choice(media, options=options, solution="B", process=process.format(said))
        )
        assert sample.process == process.format("B")
    bad = choice(media, options=["red", "blue"], solution="B", process=process.format("violet"))
    assert "process: 'violet' is not the letter of an option (A, B)" in refused(tmp_path, bad)


def test_any_of_several_accepted_answers_is_right(media, tmp_path):
    row = number(
        media,
        problem_type="free-form",
        solution=["<answer>Total due</answer>", "total", "Total  due"],
    )
    [sample] = loaded(tmp_path, row)
    assert (
        isinstance(sample.answer, str)
        and f"<answer>{sample.answer}</answer>" == "<answer>Total due</answer>"
    )
    for answer in (
        sample.answer,
        copy.deepcopy(sample).answer,
        pickle.loads(pickle.dumps(sample)).answer,
    ):
        for said, strict, lenient in (
            ("TOTAL", 1, 1),
            ("total due", 1, 1),
            ("It is total!", 0, 1),
            ("sum", 0, 0),
        ):
            assert answers.is_correct(said, answer, "free-form") is bool(strict)
            assert answers.is_correct(said, answer, "free-form", lenient=True) is bool(lenient)
    counted, one = loaded(
        tmp_path, number(media, solution=["5", 6]), number(media, solution=["5"], problem_id="one")
    )
    assert [answers.is_correct(n, counted.answer, "numerical") for n in "567"] == [
        True,
        True,
        False,
    ]
    assert one.answer == "5" and type(one.answer) is str
    assert "'many' is not a number" in refused(tmp_path, number(media, solution=["5", "many"]))


@pytest.mark.parametrize("solution", ["1,2", "3,4,5", "1.204,5", "1_000", "12,34"])
def test_a_number_that_could_be_another_is_refused(media, tmp_path, solution):
    """The official rule drops commas: 12.0 would earn the gold 1,2."""
    assert f"{solution!r} may be several numbers" in refused(
        tmp_path, number(media, solution=solution)
    )
    for fine in ("1,200", "-1,234.5", ".5", "5.", "1e5", "+3"):
        assert loaded(tmp_path, number(media, solution=fine))[0].answer == fine


def test_a_list_that_was_written_as_text_is_refused(media, tmp_path):
    for text in ("['Paris', 'paris']", '["Paris"]'):
        row = number(media, problem_type="free-form", solution=text)
        assert "is a list written as text. Give the list, or one answer" in refused(tmp_path, row)
    assert loaded(tmp_path, number(media, problem_type="OCR", solution="[1]"))[0].answer == "[1]"


@pytest.mark.parametrize(
    ("solution", "kind", "gold"),
    [
        (r"\boxed{12.5}", "numerical", "12.5"),
        (r"$\boxed{-3}$", "numerical", "-3"),
        ("$4$", "numerical", "4"),
        (r"<answer>\boxed{B}</answer>", "multiple choice", "B"),
        (r"\boxed{a cat}", "free-form", "a cat"),
        (r"\frac{1}{2}", "free-form", r"\frac{1}{2}"),
        ("$5 or $6", "free-form", "$5 or $6"),
    ],
)
def test_a_solution_in_a_box_is_what_is_in_it(media, tmp_path, solution, kind, gold):
    [sample] = loaded(
        tmp_path, {"image": str(media / "coffee.png"), "problem": "What?", "solution": solution}
    )
    assert (sample.problem_type, sample.answer) == (kind, gold)


def test_what_nobody_sees_in_a_gold_can_be_left_out(media, tmp_path):
    [sample] = loaded(
        tmp_path, number(media, problem_type="free-form", solution="Par\u200bis\ufeff")
    )
    assert answers.is_correct("Paris", sample.answer, "free-form")
    # this joiner parts a word from another
    assert not answers.is_correct("می\u200cروم", "میروم", "free-form")


def test_lines_may_be_called_json_and_a_table_lie_in_parts(media, tmp_path):
    """A file of rows in lines may be called .json. A table may lie in several files."""
    rows = [number(media, problem_id=str(i)) for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.json").write_text(text)
    assert [s.id for s in data.load(tmp_path)["train"]] == list("0123")
    (tmp_path / "train.json").unlink()
    (tmp_path / "joined.jsonl").write_text(
        "\ufeff" + text[: text.index("\n") + 1] + "\ufeff" + text[text.index("\n") + 1 :]
    )
    assert len(data.load(tmp_path / "joined.jsonl")["train"]) == 4
    (tmp_path / "joined.jsonl").unlink()
    for i in (0, 1):
        table = datasets.Dataset.from_list(rows[2 * i : 2 * i + 2])
        table.to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
        (tmp_path / f"validation-0000{i}-of-00002.jsonl").write_text(json.dumps(rows[i]))
    sets = data.load(tmp_path)
    assert {name: [s.id for s in some] for name, some in sets.items()} == {
        "train": list("0123"),
        "validation": ["0", "1"],
    }
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(data.DataError, match="lacks train-00001-of-00002.parquet. Give all parts"):
        data.load(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(
        data.DataError, match="rows.csv is none of .json, .jsonl, .parquet. Convert it"
    ):
        data.load(tmp_path / "rows.csv")


def test_a_number_is_right_as_it_may_have_been_written(media, tmp_path):
    """pandas makes a column of 5, nothing, 7 one of floats: 5.0 there is no gold that refuses
    "5"."""
    column = [
        number(media, problem_id=str(i), solution=value) for i, value in enumerate((5.0, 2.5, -3.0))
    ]
    datasets.Dataset.from_list(column).to_parquet(tmp_path / "a.parquet")
    for rows in (loaded(tmp_path, *column), data.load(tmp_path / "a.parquet")["train"]):
        right = [
            [
                s
                for s in ("5", "5.0", "2.5", "2", "-3")
                if answers.is_correct(s, r.answer, "numerical")
            ]
            for r in rows
        ]
        assert right == [["5", "5.0"], ["2.5"], ["-3"]]
        assert [str(r.answer) for r in rows] == ["5", "2.5", "-3"]
    [text] = loaded(tmp_path, number(media, solution="5.0"))  # so it was written
    assert not answers.is_correct("5", text.answer, "numerical")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "solution",
            {"text": "cat"},
            "must be a text, a number or a list of accepted ones, got {'text': 'cat'}",
        ),
        ("solution", True, "got True"),
        ("solution", [["cat"]], "got ['cat']"),
        ("solution", ["cat", None], "got None"),
        ("solution", ["cat", " "], "no answer inside"),
        ("solution", "<answer>cat", "<answer> is not closed"),
        ("solution", "<answer>cat</answer> or <answer>dog</answer>", "is there twice"),
        ("solution", float("inf"), "got inf"),
        ("solution", float("nan"), "missing or empty"),
        ("problem", {"text": "Which?"}, "must be a text, or a chat"),
        ("problem", 7, "must be a text, or a chat"),
        ("problem", ["Which?"], "must be a text, or a chat"),
        ("problem", [{"role": "user", "content": None}], "must be a text, or a chat"),
        (
            "problem",
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "with one turn",
        ),
        ("problem", " \n", "missing or empty"),
        ("problem", "half a \ud83d", "holds a lone surrogate"),
        ("problem_id", ["x"], "must be a string, got ['x']"),
        ("problem_id", True, "must be a string, got True"),
        ("problem_id", 1.5, "must be a string, got 1.5"),
        ("category", False, "must be a string"),
        ("process", ["<think>"], "must be a string, got list"),
    ],
)
def test_what_is_no_text_is_not_made_one(media, tmp_path, field, value, words):
    row = number(media, problem_type="free-form", **{field: value})
    line = refused(tmp_path, row)
    assert f", {field}: " in line and words in line


def test_a_number_for_an_id_is_the_same_as_its_text(media, tmp_path):
    rows = loaded(
        tmp_path, number(media, problem_id=3.0, pair=2.0, category=0), number(media, problem_id=4)
    )
    assert [(s.id, s.pair, s.category) for s in rows] == [("3", "2", "0"), ("4", None, "numerical")]


def test_a_gold_in_nfd_is_earned_by_what_the_tokenizer_says(media, tmp_path, world):
    """Qwen's tokenizer composes what it reads, so no policy can say a decomposed text."""
    tokenizer = pretrained.context(str(world / "policy"))[1]
    gold = unicodedata.normalize("NFD", "Caf\u00e9 Z\u00fcrich")
    [sample] = loaded(tmp_path, number(media, problem_type="OCR", solution=gold))
    said = tokenizer.decode(tokenizer(gold).input_ids)
    assert said != gold and answers.is_correct(said, sample.answer, "OCR")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_rows(media, tmp_path, suffix):
    row = json.dumps(number(media, problem="Combien ? \u00e9"), ensure_ascii=False)
    (tmp_path / f"a.{suffix}").write_text(
        f"[{row}]" if suffix == "json" else row, encoding="utf-8-sig"
    )
    assert data.load(tmp_path / f"a.{suffix}")["train"][0].problem == "Combien ? \u00e9"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"):
        (tmp_path / f"a.{suffix}").write_text(
            f"[{row}]" if suffix == "json" else row, encoding=encoding
        )
        with pytest.raises(
            data.DataError, match="a.jsonl?: it is not in UTF-8.*Save it as UTF-8"
        ) as error:
            data.load(tmp_path / f"a.{suffix}")
        assert len(str(error.value).splitlines()) == 1


# --- marks ----------------------------------------------------------------------------------------


def layout(sample: data.Sample) -> list[str]:
    """The content of its prompt: "[123]" is a picture 123 pixels wide, anything else is text."""
    content = data.prompts([sample], True, 2.0, 4)[0][0]["content"]
    return [
        part["text"] if part["type"] == "text" else f"[{part['image'].width}]" for part in content
    ]


def test_pictures_stand_where_their_marks_are(media, tmp_path):
    paths = [
        str(media / name) for name in ("astronaut.png", "coffee.png", "rocket.jpg")
    ]  # 512, 600 and 640 wide
    ask = {"options": [], "problem_type": "free-form", "solution": "no", "process": ...}
    rows = [
        choice(media, **ask, path=paths[:2], problem="Is <image> older than <image>?"),
        choice(
            media, **ask, path=paths[:2], problem="Is <image 1> older than <image_2>?", problem_id=1
        ),
        choice(
            media, **ask, path=paths[:2], problem="<image>\n<image>\nIs one older?", problem_id=2
        ),
        choice(media, **ask, path=paths[0], problem="Who is this?\n<image>", problem_id=3),
        choice(
            media,
            path=paths,
            problem="What goes with <image>?",
            options=["<image>"] * 2,
            problem_id=4,
            process=...,
        ),
    ]
    among, numbered, before, behind, options = loaded(tmp_path, *rows)
    tail = reasoning.prompt("", (), "free-form")
    assert (
        layout(among) == layout(numbered) == ["Is ", "[512]", " older than ", "[600]", f"?{tail}"]
    )
    assert layout(before) == ["[512]", "[600]", f"Is one older?{tail}"]
    assert layout(behind) == ["Who is this?\n", "[512]", tail]
    assert [part for part in layout(options) if part[0] == "["] == ["[512]", "[600]", "[640]"]
    assert layout(options)[2::2] == [
        "?\nOptions:\nA. ",
        "\nB. ",
        reasoning.prompt("", (), "multiple choice"),
    ]
    assert [s.question for s in (among, before, behind)] == [
        "Is picture 1 older than picture 2?",
        "Is one older?",
        "Who is this?",
    ]
    assert options.question == "What goes with picture 1?\nOptions:\nA. picture 2\nB. picture 3"


@pytest.mark.parametrize(
    "mark",
    [
        "<Image>",
        "Picture 1: <img>coffee.png</img>",
        "<img>coffee.png</img>",
        "<|image_1|>",
        "(<image>./</image>)",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<ImageHere>",
        "<image_placeholder>",
        "<image_soft_token>",
    ],
)
def test_marks_of_other_families_are_marks(media, tmp_path, mark):
    """Qwen-VL, Phi, MiniCPM-V, Qwen2-VL's template, InternLM-XComposer, DeepSeek-VL, Gemma."""
    row = choice(media, options=[], problem_type="free-form", solution="no", process=...)
    [sample] = loaded(
        tmp_path, row | {"path": str(media / "coffee.png"), "problem": f"Here: {mark} Is it tea?"}
    )
    assert layout(sample) == [
        "Here: ",
        "[600]",
        f" Is it tea?{reasoning.prompt('', (), 'free-form')}",
    ]
    assert sample.question == "Here: Is it tea?"


def test_a_mark_before_all_words_changes_nothing(media, tmp_path):
    """LLaVA's rows begin with "<image>\\n", also those of clips."""
    rows = [
        make(media, problem=mark + "What animal is this?", problem_id=f"{make.__name__}{i}")
        # fmt: skip
        for make in (choice, film)
        for i, mark in enumerate(("", "<image>\n", "<image>"))
    ]
    samples = loaded(tmp_path, *rows, film(media, problem="<video>\nWhat animal is this?"))
    for plain, *marked in (samples[:3], samples[3:]):
        [want] = data.prompts([plain], True, 2.0, 4)
        for sample in marked:
            [got] = data.prompts([sample], True, 2.0, 4)
            assert [p["type"] for p in got[0]["content"]] == [p["type"] for p in want[0]["content"]]
            assert (
                got[0]["content"][-1] == want[0]["content"][-1]
                and sample.question == plain.question
            )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(problem="<image> or <image>?"),
            "2 marks <image> for 1 in `path`. Give one for each, or none",
        ),
        (dict(problem="<image>?", path=["MEDIA/coffee.png"] * 2), "1 mark <image> for 2"),
        (dict(problem="What?", options=["A. <image>", "B. <image>"]), "2 marks <image> for 1"),
        (dict(problem="<video>What?"), "holds the mark <video>, and the row has a picture"),
        (dict(problem="<image>\n"), "holds no words"),
        (
            dict(problem="<image 2> or <image 1>?", path=["MEDIA/coffee.png"] * 2),
            "are not 1, 2, ... in order",
        ),
    ],
)
def test_marks_that_do_not_fit_the_media_are_refused(media, tmp_path, changes, words):
    assert words in refused(tmp_path, choice(media, **filled(changes, media)))


def test_tokens_are_counted_around_the_marks(media, tmp_path, world):
    policy = pretrained.load(
        str(world / "policy"), trainable=False, min_pixels=3136, max_pixels=50_000
    )
    two = [str(media / "coffee.png"), str(media / "rocket.jpg")]
    rows = [
        choice(media, path=two, problem=f"{text}?", problem_id=text)
        for text in ("<image><image>Is", "Is <image> or <image>")
    ]
    count = data.prompt_text_tokens(policy.processor.tokenizer)
    for sample in loaded(tmp_path, *rows):
        ids = policy.encode(data.prompts([sample], True, 2.0, 4))["input_ids"]
        assert count(sample) + data.visual_tokens(sample, LIMITS) == ids.shape[1]
        assert "<image>" not in policy.processor.tokenizer.decode(ids[0])


# --- the form of TRL ------------------------------------------------------------------------------

TRL = [  # what is asked, the solution, and the type that they tell
    (
        "Which?\n\nChoices:\nA. 3\nB. 5\nC. 8",
        "<think>8</think>\n<answer>C. 8</answer>",
        "multiple choice",
        "C",
    ),
    ("Which? (A) 3 (B) 5 (C) 8", "5", "multiple choice", "B"),
    ("Which?\na) red\nb) blue\nGive the letter.", "B", "multiple choice", "b"),
    ("What is the angle at (A) here? (A) 30 (B) 60", "60", "multiple choice", "B"),
    ("Which option is it?", "D", "multiple choice", "D"),
    ("How many cups?", "<answer> 3 </answer>", "numerical", "3"),
    ("How many cups?", "1,204.5", "numerical", "1,204.5"),
    ("Who is A. B. Smith?", "a poet", "free-form", "a poet"),
    ("Is person A: tall, or person B: small?", "neither", "free-form", "neither"),
    ("What is it?", "a cup", "free-form", "a cup"),
    ("Which variable?", "x", "free-form", "x"),
]


def test_rows_of_trl_are_read_and_what_is_decided_is_said(media, tmp_path, capsys):
    """Columns of datasets' Image type, no ids and no types, a question as text or as a chat."""
    photos = [f"{name}.png" for name in PHOTOS] * 4
    rows = [
        {"image": embedded(media, p), "prompt": t, "answer": a, "source": "x"}
        for p, (t, a, *_) in zip(photos, TRL)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    listed = table.map(lambda row: {"answer": [row["answer"]]}, remove_columns="answer")
    listed.with_format("numpy").save_to_disk(tmp_path / "saved")  # whose rows are arrays
    for source in (tmp_path / "train.parquet", tmp_path / "saved"):
        samples = data.load(source)["train"]
        assert [(s.problem, s.problem_type, s.answer) for s in samples] == [
            (t, k, g) for t, _, k, g in TRL
        ]
        assert [s.id for s in samples] == [str(i) for i in range(len(TRL))] and {
            s.data_type for s in samples
        } == {"image"}
        for sample, photo in zip(samples, photos):
            assert np.array_equal(pixels(sample)[0], np.asarray(Image.open(media / photo)))
    capsys.readouterr()
    assert data.check(str(tmp_path / "train.parquet"))
    said = capsys.readouterr().out
    for words in (
        "image is read as path (11 rows)",
        "prompt is read as problem (11 rows)",
        "answer is read as solution",
        "the row's number is read as problem_id (11 rows)",
        "numerical by a number as solution (2 rows)",
        "multiple choice by lettered options in the question (4 rows)",
        "      5 image, multiple choice",
        "multiple choice by a letter as solution (1 row)",
        "fields ignored: source (11 rows)",
        "free-form without options, letter or number (4 rows)",
    ):
        assert words in said, words


def test_a_chat_gives_its_question_and_the_places_of_pictures(media, tmp_path):
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image", "text": None},
        {"type": "text", "text": " red?"},
    ]
    system = {"role": "system", "content": "Think first."}
    rows = [
        {
            "images": [str(media / "coffee.png")],
            "prompt": [{"role": "user", "content": "Is it red?"}],
            "solution": "no",
        },
        {
            "images": [str(media / "coffee.png")],
            "prompt": [system, {"role": "user", "content": parts}],
            "solution": "no",
        },
        choice(media, problem=[{"role": "user", "content": "What animal is this?"}]),
    ]
    said = []
    plain, placed, official = loaded(tmp_path, *rows, say=said.append)
    assert plain.problem == "Is it red?" and official.question.startswith(
        "What animal is this?\nOptions:"
    )
    assert layout(placed)[:2] == ["Is ", "[600]"] and layout(placed)[2].startswith(" red?\n")
    assert len(said) == 1 and "the system's turn is left out (1 row)" in said[0]


def test_bad_rows_of_trl_are_named_by_their_own_columns(media, tmp_path):
    row = {"image": "gone.png", "prompt": "What?", "answer": "x"}
    assert refused(tmp_path, row).startswith("train.json row 0, image: ") and "gone.png" in refused(
        tmp_path, row
    )
    bad = {
        "image": str(media / "coffee.png"),
        "prompt": "Which?\nA. red\nB. blue",
        "answer": "violet",
    }
    assert refused(tmp_path, bad).startswith(
        "train.json row 0, answer: 'violet' is not the letter of an option (A, B)"
    )
    assert ", prompt: " in refused(tmp_path, bad | {"prompt": "<image><image>What?"})
    assert ", path: missing or empty. Every row needs one (or image, images" in refused(
        tmp_path, bad | {"image": None}
    )
    clip = {"video": str(media / "clip.mp4"), "problem": "What?", "solution": "a fade"}
    [sample] = loaded(tmp_path, clip)
    assert (sample.data_type, sample.problem_type, sample.sizes[0].frames) == (
        "video",
        "free-form",
        FRAMES,
    )


# --- the fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_whatever_a_run_works_on(media, tmp_path):
    (tmp_path / "p.png").write_bytes((media / "coffee.png").read_bytes())
    base = [
        choice(media, path="p.png"),
        number(media, problem_type="free-form", solution=["a", "b"]),
        film(media),
    ]

    def now(rows=base, name="train") -> str:
        return data.fingerprint({name: loaded(tmp_path, *rows)})

    first = now()
    assert first.startswith("train: 3 rows, ") and first == now(copy.deepcopy(base))
    changed = [
        [base[0] | change, *base[1:]]
        for change in (
            {"problem": "Another?"},
            {"options": ["A. a dog", "B. a cow"]},
            {"solution": "A"},
            {"problem_id": "cat-2"},
            {"process": None},
            {"category": "c"},
            {"pair": "p"},
            {"objects": []},
            {"relevant": ["x"]},
            {"path": str(media / "chelsea.png")},
        )
    ]
    changed += [[base[0], base[1] | {"solution": ["a", "c"]}, base[2]], base[::-1], base[:2]]
    prints = [first, now(name="test"), *map(now, changed)]
    os.utime(tmp_path / "p.png", (1, 1))
    prints.append(now())
    with open(tmp_path / "p.png", "ab") as file:
        file.write(b" ")
    os.utime(tmp_path / "p.png", (1, 1))
    prints.append(now())
    assert len(set(prints)) == len(prints)
    assert data.fingerprint({"b": [], "a": []}) == data.fingerprint({"a": [], "b": []})


def test_the_fingerprint_sees_pictures_that_are_no_files(media, tmp_path):
    def sample(path):
        return data.read_row(choice(media, path=path), None)

    photo, other = (
        Image.open(media / f"{name}.png").resize((60, 60)) for name in ("coffee", "chelsea")
    )
    tables = []
    for i, name in enumerate(("coffee.png", "chelsea.png", "coffee.png")):
        datasets.Dataset.from_list([choice(media, path=embedded(media, name))]).to_parquet(
            tmp_path / f"{i}.parquet"
        )
        tables.append(data.fingerprint(data.load(tmp_path / f"{i}.parquet")))
    assert tables[0] == tables[2] != tables[1]
    for one, same, two in (
        (photo, photo.copy(), other),
        (
            (media / "coffee.png").read_bytes(),
            (media / "coffee.png").read_bytes(),
            (media / "chelsea.png").read_bytes(),
        ),
    ):
        a, b, c = (data.fingerprint({"train": [sample(medium)]}) for medium in (one, same, two))
        assert a == b != c
    assert {f.name for f in dataclasses.fields(data.Sample)} >= {
        "media",
        "sizes",
    }  # the two that it reads otherwise
