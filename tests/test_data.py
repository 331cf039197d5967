"""data.py: bad rows are named one by one, three formats say the same, real photographs and real clips are read."""

import json
import subprocess
import sys
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import data
import reasoning
import vlm

torch.set_num_threads(1)
PHOTOS = ("astronaut", "coffee", "chelsea")
FRAMES, RATE = 30, 10  # a clip of three seconds


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
    write_clip(folder / "streaming.mp4", FRAMES, RATE, movflags="faststart")  # its index comes first
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
    counted = {"problem_type": "numerical", "problem": "How many cups?", "options": [], "solution": "1", **changes}
    return choice(media, **{"path": str(media / "coffee.png"), "problem_id": "cups", "process": ..., **counted})


def film(media: Path, **changes) -> dict:
    shown = {"data_type": "video", "path": str(media / "clip.mp4"), "problem_id": "clip", **changes}
    return choice(media, **shown)


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- bad rows ---------------------------------------------------------------------------------------------------------

BAD = {  # what is wrong: (the row, the field that the message names, words of the reason or the remedy)
    "no such file": (dict(path="nowhere/7.png"), "path", "nowhere/7.png does not exist"),
    "a folder for a picture": (dict(path="."), "path", "does not exist"),
    "a PNG that breaks off": (dict(path="MEDIA/cut-coffee.png"), "path", "as image"),
    "an empty PNG": (dict(path="MEDIA/empty.png"), "path", "as image"),
    "text named PNG": (dict(path="MEDIA/words.png"), "path", "as image"),
    "a JPEG that breaks off": (dict(path="MEDIA/cut-rocket.jpg"), "path", "as image"),
    "an empty MP4": (dict(path="MEDIA/empty.mp4", data_type="video"), "path", "as video"),
    "an MP4 that breaks off": (dict(path="MEDIA/cut-clip.mp4", data_type="video"), "path", "as video"),
    "a streaming MP4 that breaks off": (dict(path="MEDIA/cut-streaming.mp4", data_type="video"), "path", "as video"),
    "a clip called image": (dict(path="MEDIA/clip.mp4"), "path", "as image"),
    "the second picture missing": (dict(path=["MEDIA/chelsea.png", "gone.png"]), "path", "gone.png does not exist"),
    "no data_type": (dict(data_type=...), "data_type", "missing or empty. Every row needs one"),
    "no problem_type": (dict(problem_type=...), "problem_type", "missing or empty"),
    "no problem": (dict(problem=...), "problem", "missing or empty"),
    "an empty problem": (dict(problem=""), "problem", "missing or empty"),
    "no path": (dict(path=...), "path", "missing or empty"),
    "an empty list of paths": (dict(path=[]), "path", "missing or empty"),
    "no solution": (dict(solution=...), "solution", "missing or empty"),
    "a null solution": (dict(solution=None), "solution", "missing or empty"),
    "no problem_id": (dict(problem_id=...), "problem_id", "missing or empty"),
    "an empty answer": (dict(solution="<answer> </answer>"), "solution", "no answer inside <answer></answer>"),
    "an answer not among the options": (dict(solution="<answer>D</answer>"), "solution", "'D' is not the letter of"),
    "the option's text for its letter": (dict(solution="a cat"), "solution", "'a cat' is not the letter"),
    "two letters": (dict(solution="AB"), "solution", "(A, B)"),
    "multiple choice without options": (dict(options=[]), "solution", "no options"),
    "options left out": (dict(options=...), "solution", "no options"),
    "words for a number": (dict(problem_type="numerical", solution="three"), "solution", "'three' is not a number"),
    "not a number at all": (dict(problem_type="regression", solution="nan"), "solution", "'nan' is not a number"),
    "a process that is no text": (dict(process=5), "process", "must be a string"),
    "a process without its stages": (dict(process="<caption>x</caption>"), "process", "lacks a stage"),
    "a list for a pair": (dict(pair=["x"]), "pair", "must be a string"),
    "an unknown data_type": (dict(data_type="audio"), "data_type", "'audio' is neither 'image' nor 'video'"),
    "an unknown problem_type": (dict(problem_type="essay"), "problem_type", "is not one of multiple choice, numerical"),
    "options that are one string": (dict(options="A. a dog, B. a cat"), "options", ""),
    "options that are numbers": (dict(options=[1, 2]), "options", ""),
    "a path that is a number": (dict(path=7), "path", ""),
    "a null in the list of paths": (dict(path=["MEDIA/chelsea.png", None]), "path", ""),
    "objects that are one string": (dict(objects="a cat"), "objects", ""),
    "a clip of one frame": (dict(path="MEDIA/one-frame.mp4", data_type="video"), "path", "has 1 frame. Give a picture"),
    "a picture called video": (
        dict(path="MEDIA/chelsea.png", data_type="video"),
        "path",
        "has 1 frame. Give a picture",
    ),
    "a picture of one pixel": (dict(path="MEDIA/dot.png"), "path", "1 x 1 pixels, too few"),
    "a strip of 20,000 pixels": (dict(path="MEDIA/strip.png"), "path", "20000 x 60 pixels; Qwen2.5-VL takes no side"),
    "a picture of 20,000 x 20,000": (dict(path="MEDIA/bomb.png"), "path", "exceeds limit"),
    "a moving GIF for a picture": (dict(path="MEDIA/moving.gif"), "path", "is animated (3 frames). Give it as video"),
    "a path that leaves the folder": (dict(path="../../etc/passwd"), "path", "leaves the folder of the data"),
    "a way out in the middle": (dict(path="images/../../x.png"), "path", "leaves the folder of the data"),
    "bytes that are no picture": (dict(path={"bytes": "x", "path": None}), "path", "as image"),
    "neither bytes nor path": (dict(path={"bytes": None, "path": None}), "path", "must be a path, or bytes"),
    "a number for the problem_type": (dict(problem_type=3), "problem_type", "3 is not one of"),
    "two clips": (dict(data_type="video", path=["MEDIA/clip.mp4", "MEDIA/clip.mp4"]), "path", ""),
}


def filled(changes: dict, media: Path) -> dict:
    def fill(value):
        return value.replace("MEDIA", str(media)) if isinstance(value, str) else value

    return {k: [fill(v) for v in value] if isinstance(value, list) else fill(value) for k, value in changes.items()}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_with_its_place_its_field_and_what_is_wrong(media, tmp_path, kind):
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
    with pytest.raises(data.DataError, match=rf"train.json row 1, row: must be an object, got {type(row).__name__}"):
        data.load(file)


def test_a_repeated_id_is_named_and_the_first_row_is_kept(media, tmp_path):
    rows = [choice(media), number(media), choice(media, problem="Again?")]
    file = write(tmp_path / "train.json", rows)
    with pytest.raises(data.DataError, match=r"row 2 \(cat-1\), problem_id: 'cat-1' is already taken. Make ids unique"):
        data.load(file)
    samples = data.load(file, on_bad_row="skip")["train"]
    assert [(s.id, s.problem) for s in samples] == [("cat-1", "What animal is this?"), ("cups", "How many cups?")]
    assert len(data.load(write(tmp_path / "train.json", [choice(media, problem_id=i) for i in (0, 1)]))["train"]) == 2


def test_every_bad_row_is_in_one_message_and_after_ten_they_are_counted(media, tmp_path):
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
    rows = [choice(media), number(media, solution="many"), film(media), choice(media, path="gone.png")]
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


# --- bad files and folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"problem": "Wh', "cannot read"),
        ("a.json", b"", "cannot read"),
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


def test_a_missing_folder_or_a_folder_without_a_split_to_use_says_what_is_expected(media, tmp_path):
    with pytest.raises(data.DataError, match=r"nowhere does not exist. Give a folder with train.json, or one JSON"):
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


# --- good rows --------------------------------------------------------------------------------------------------------


def test_the_fields_of_a_row_become_those_of_a_sample(media, tmp_path):
    extra = {"category": "animals", "pair": "p1", "objects": ["cat", "sofa"], "relevant": ["cat"]}
    rows = [choice(media, **extra), number(media, solution=3, options=None)]
    full, bare = data.load(str(write(tmp_path / "any.json", rows)))["train"]  # one file is `train`, whatever its name
    assert (full.id, full.data_type, full.problem_type, full.answer) == ("cat-1", "image", "multiple choice", "B")
    assert full.media == (media / "chelsea.png",) and full.options == ("A. a dog", "B. a cat")
    assert full.process == choice(media)["process"]
    assert (full.category, full.pair, full.objects, full.relevant) == ("animals", "p1", ("cat", "sofa"), ("cat",))
    assert (bare.answer, bare.options, bare.process) == ("3", (), None)
    assert (bare.category, bare.pair, bare.objects, bare.relevant) == ("numerical", None, None, None)


def test_no_objects_and_an_empty_list_of_objects_are_not_the_same(media, tmp_path):
    rows = [choice(media, objects=[], problem_id=0), choice(media, problem_id=1)]
    empty, unknown = data.load(write(tmp_path / "train.json", rows))["train"]
    assert empty.objects == () and unknown.objects is None


def test_the_question_is_the_problem_and_its_options_line_by_line(media, tmp_path):
    chosen, counted = data.load(write(tmp_path / "a.json", [choice(media), number(media)]))["train"]
    assert chosen.question == "What animal is this?\nOptions:\nA. a dog\nB. a cat"
    assert counted.question == "How many cups?"


def test_the_official_name_of_the_reference_response_is_taken_too(media, tmp_path):
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
    assert said == ["data: not a split, left alone: info.json"]
    assert set(splits) == {"cold_start", "train", "test_hard", "test"}
    assert [p.resolve() for s in splits["test"] for p in s.media] == [images / "chelsea.png", images / "coffee.png"]


def test_a_folder_with_tests_only_will_do(media, tmp_path):
    write(tmp_path / "test_pairs.json", [choice(media)])
    assert list(data.load(tmp_path)) == ["test_pairs"]


def rows_of_all_kinds(media: Path) -> list[dict]:
    lists = {"objects": ["cat", "sofa"], "relevant": ["cat"]}
    return [
        choice(media, problem="Welches Tier? 猫 🐈", **lists),
        number(media, solution="<answer>1,204.5</answer>", options=[]),
        film(media, category="motion", pair="p"),
        choice(media, problem_type="OCR", solution="NASA", options=[], problem_id="ocr", objects=[]),
    ]


def test_json_jsonl_and_parquet_give_the_same_samples(media, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = rows_of_all_kinds(media)
    names = sorted({name for row in rows for name in row})
    write(tmp_path / "a.json", rows)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    table = [{name: row.get(name) for name in names} for row in rows]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "a.parquet")
    from_json, from_lines, from_parquet = (data.load(tmp_path / f"a.{kind}") for kind in ("json", "jsonl", "parquet"))
    assert len(from_json["train"]) == 4 and from_json["train"][0].problem == "Welches Tier? 猫 🐈"
    assert from_json == from_lines == from_parquet


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"], ids=["line separator", "next line"])
def test_a_jsonl_line_ends_at_a_newline_only(media, tmp_path, mark):
    """JSON strings may hold these unescaped, and do in any file written with ensure_ascii=False."""
    problem = f"What{mark}animal?"
    text = json.dumps(choice(media, problem=problem), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(text + "\n", "utf-8")
    assert data.load(tmp_path / "a.jsonl")["train"][0].problem == problem


# --- media ------------------------------------------------------------------------------------------------------------


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
    sample = data.load(write(tmp_path / "a.json", [choice(media, path=f"photo.{suffix}")]))["train"][0]
    image = data.messages(sample, "?")[0]["content"][0]["image"]
    assert image.mode == "RGB" and image.size == photo.size
    assert np.abs(np.asarray(image, float) - np.asarray(photo.convert("RGB"), float)).mean() < 6


def test_black_ink_on_a_transparent_ground_stays_legible(media, tmp_path):
    """Transparent pixels of a figure are usually (0, 0, 0, 0): without a ground, ink and ground are both black."""
    figure = np.zeros((56, 56, 4), dtype=np.uint8)
    figure[20:30, 10:40, 3] = 255
    Image.fromarray(figure, "RGBA").save(tmp_path / "figure.png")
    sample = data.load(write(tmp_path / "a.json", [choice(media, path="figure.png")]))["train"][0]
    shown = np.asarray(data.messages(sample, "?")[0]["content"][0]["image"])
    assert (shown[20:30, 10:40] == 0).all() and (shown[:20] == 255).all()  # white, as qwen-vl-utils has it


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
def test_a_real_clip_is_read_evenly_from_first_to_last_frame_with_its_true_rate(
    tmp_path, count, rate, fps, max_frames, expected
):
    write_clip(tmp_path / "clip.mp4", count, rate)
    frames, true_fps = data.read_video(tmp_path / "clip.mp4", fps, max_frames)
    assert len(frames) == expected and frames[0].size == (96, 64)
    assert true_fps == pytest.approx(expected / (count / rate))  # frames a second of the clip
    picked = brightness(frames)
    assert picked == sorted(set(picked)) and picked[0] == 0
    assert picked[-1] == (count - 1 if expected > 1 else 0)
    steps = np.diff(picked)
    assert expected < 3 or steps.max() - steps.min() <= 1


def test_a_clip_becomes_one_video_part_with_frames_and_rate(media, tmp_path):
    sample = data.load(write(tmp_path / "a.json", [film(media)]))["train"][0]
    ((video, text),) = (turn["content"] for turn in data.messages(sample, "What happens?", fps=4.0, max_frames=5))
    assert (video["type"], text) == ("video", {"type": "text", "text": "What happens?"})
    assert len(video["video"]) == 5 and video["fps"] == pytest.approx(5 / 3)
    assert all(isinstance(frame, Image.Image) and frame.mode == "RGB" for frame in video["video"])


def test_frames_of_a_panned_photograph_are_those_that_were_written(tmp_path):
    photo = skimage.data.astronaut()
    written = [np.ascontiguousarray(photo[100:228, x : x + 128]) for x in range(0, 160, 20)]
    with av.open(str(tmp_path / "pan.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "5", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for frame in written:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames, fps = data.read_video(tmp_path / "pan.mp4", fps=4.0)
    assert len(frames) == 8 and fps == 4.0
    for frame, want in zip(frames, written):
        errors = [np.abs(np.asarray(frame, float) - other).mean() for other in written]
        assert np.argmin(errors) == next(i for i, w in enumerate(written) if w is want) and min(errors) < 8


@pytest.mark.parametrize("four_stage", [True, False])
def test_a_prompt_is_the_media_and_the_words_of_reasoning(media, tmp_path, four_stage):
    samples = data.load(write(tmp_path / "a.json", [choice(media), film(media)]))["train"]
    first, second = data.prompts(samples, four_stage, fps=2.0, max_frames=3)
    words = reasoning.prompt("What animal is this?", ["A. a dog", "B. a cat"], "multiple choice", four_stage)
    assert first[0]["content"][-1]["text"] == second[0]["content"][-1]["text"] == words
    assert first[0]["content"][0]["type"] == "image" and len(second[0]["content"][0]["video"]) == 3


def test_unknown_fields_are_named_once_a_file_and_left_alone(media, tmp_path, capsys):
    rows = [choice(media, problem_id=str(i), optoins=["A"], **({"note": 1} if i else {})) for i in range(3)]
    [a, *_] = data.load(write(tmp_path / "train.json", rows), say=print)["train"]
    said = capsys.readouterr().out
    assert said.count("fields left alone: note (2 rows), optoins (3 rows). Is one misspelt? Known: data_type") == 1
    assert a.options == ("A. a dog", "B. a cat")


def test_a_number_as_a_string_and_a_bare_number_are_the_same_solution(media, tmp_path):
    rows = [number(media, problem_id=str(i), solution=solution) for i, solution in enumerate(["12", 12, " 12 "])]
    assert {s.answer for s in data.load(write(tmp_path / "train.json", rows))["train"]} == {"12"}


def test_cmyk_is_read_as_colours(media, tmp_path):
    [sample] = data.load(write(tmp_path / "train.json", [choice(media, path=str(media / "ink.jpg"))]))["train"]
    image = data.read_image(sample.media[0])
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, dtype=float) - skimage.data.chelsea()).mean() < 12


# --- other sources ----------------------------------------------------------------------------------------------------


def embedded(media: Path, name: str) -> dict:
    return {"bytes": (media / name).read_bytes(), "path": name}


def pixels(sample) -> list[np.ndarray]:
    parts = data.messages(sample, "?")[0]["content"][:-1]
    return [np.asarray(x) for part in parts for x in (part["video"] if part["type"] == "video" else [part["image"]])]


def picture_pictures_film(media: Path) -> list[dict]:
    return [
        choice(media, problem_id="one"),
        choice(media, problem_id="two", path=[str(media / "coffee.png"), str(media / "rocket.jpg")]),
        film(media, problem_id="film"),
    ]


def test_pictures_and_clips_as_bytes_or_pil_are_those_of_the_files(media, tmp_path):
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
            assert all(isinstance(medium, data.Embedded) for medium in b.media)
            for x, y in zip(pixels(a), pixels(b), strict=True):
                assert np.array_equal(x, y)


def test_a_column_of_the_datasets_image_type_stays_bytes_until_it_is_opened(media, tmp_path):
    rows = [choice(media, problem_id=str(i), path=embedded(media, f"{name}.png")) for i, name in enumerate(PHOTOS)]
    table = datasets.Dataset.from_list(rows).cast_column("path", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    samples = data.load(tmp_path / "train.parquet")["train"]
    for name, sample in zip(PHOTOS, samples, strict=True):
        assert np.array_equal(pixels(sample)[0], getattr(skimage.data, name)())


def test_a_sample_may_hold_a_pil_image_or_bytes_itself(media):
    photo = Image.fromarray(skimage.data.chelsea())
    for medium in (photo, (media / "chelsea.png").read_bytes()):
        sample = data._sample(choice(media, path=medium), None)
        assert np.array_equal(pixels(sample)[0], skimage.data.chelsea())


def test_a_hub_id_goes_to_datasets_and_its_splits_are_checked_like_files(media, tmp_path, monkeypatch):
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
    with pytest.raises(data.DataError, match="nobody/nothing is no file here and cannot be had from the hub"):
        data.load("nobody/nothing")


# --- the check by itself ----------------------------------------------------------------------------------------------


def test_check_prints_counts_sizes_lengths_and_a_line_for_each_bad_row(media, tmp_path, world):
    rows = [*picture_pictures_film(media), number(media), choice(media, problem_id="bad", path="gone.png")]
    write(tmp_path / "train.json", rows)
    command = [sys.executable, "data.py", "check", str(tmp_path), "--model", str(world / "policy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parent)
    assert done.returncode == 1, done.stderr
    for line in (
        "train: 4 rows, 3 with a reference response",
        "      2 image, multiple choice",
        "      1 image, numerical",
        "      1 video, multiple choice",
        "  seconds of a clip: 3 to 3, median 3",
        "  media per row: 1 to 2, median 1",
        "bad: train.json row 4 (bad), path: ",
        "1 bad rows",
    ):
        assert line in done.stdout, done.stdout
    write(tmp_path / "train.json", rows[:-1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parent)
    assert done.returncode == 0 and done.stdout.endswith("no bad row\n")
    done = subprocess.run(
        [*command[:3], "no-such-folder"], capture_output=True, text=True, cwd=Path(data.__file__).parent
    )
    assert done.returncode == 1 and done.stderr.startswith("error: data: no-such-folder does not exist")


def test_the_tokens_counted_are_those_that_the_processor_makes(media, tmp_path, world):
    policy = vlm.load(str(world / "policy"), trainable=False, min_pixels=3136, max_pixels=50_000)
    samples = data.load(write(tmp_path / "train.json", [*picture_pictures_film(media), number(media)]))["train"]
    count = data.prompt_text_tokens(policy.processor.tokenizer)
    for sample in samples:
        inputs = policy.encode(data.prompts([sample], True, 2.0, 4))
        config, ids = policy.core.config, inputs["input_ids"]
        seen = ((ids == config.image_token_id) | (ids == config.video_token_id)).sum().item()
        assert data.visual_tokens(sample, 3136, 50_000, 2.0, 4) == seen
        assert seen + count(sample) == ids.shape[1]
