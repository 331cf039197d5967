"""The same commands on what a user brings: real photographs (scikit-image's) and a real MP4,
questions of our own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from commands import launch
from PIL import Image
from test_train import SMALL

import reasoning

skimage_data = pytest.importorskip("skimage.data")

PHOTOGRAPHS = {  # file in skimage/data: what it shows
    "astronaut.png": "a woman in a space suit",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera",
    "cell.png": "a cell under a microscope",
    "chelsea.png": "a cat",
    "clock_motion.png": "a clock",
    "coffee.png": "a cup of coffee",
    "coins.png": "coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "hubble_deep_field.jpg": "galaxies",
    "ihc.png": "stained tissue",
    "microaneurysms.png": "blood vessels",
    "moon.png": "the moon",
    "motorcycle_left.png": "a motorcycle in a workshop",
    "motorcycle_right.png": "a motorcycle in a workshop",
    "page.png": "a printed page",
    "retina.jpg": "a retina",
    "rocket.jpg": "a rocket",
    "text.png": "handwriting",
}


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    from pathlib import Path

    folder = tmp_path_factory.mktemp("photos")
    source = Path(skimage_data.__file__).parent
    names = sorted(set(PHOTOGRAPHS.values()))
    rows = []
    for i, (file, shown) in enumerate(PHOTOGRAPHS.items()):
        (folder / file).write_bytes((source / file).read_bytes())
        wrong = names[(names.index(shown) + 1 + i) % len(names)]
        wrong = wrong if wrong != shown else names[names.index(shown) - 1]
        letter, options = ("A", [shown, wrong]) if i % 2 else ("B", [wrong, shown])
        rows.append(
            {
                "data_type": "image",
                "problem_type": "multiple choice",
                "problem": "What does it show?",
                "options": [f"{mark}. {text}" for mark, text in zip("AB", options)],
                "path": f"./{file}",
                "solution": f"<answer>{letter}</answer>",
                "problem_id": file,
                "process": f"<prethink>centre</prethink><caption>{shown}</caption><think>{shown}</think>"
                f"<answer>{letter}</answer>",
            }
        )
    photo = np.asarray(Image.open(source / "motorcycle_left.png").convert("RGB"))
    with av.open(str(folder / "pan.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for x in range(0, 360, 10):  # a pan over a real photograph: 36 frames, three seconds
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(photo[100:340, x : x + 320]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = {
        **rows[0],
        "data_type": "video",
        "path": "./pan.mp4",
        "problem_id": "clip",
        "problem": "Where does it look?",
    }
    clip |= {"options": ["A. to the left", "B. to the right"], "solution": "B"}
    (folder / "train.json").write_text(json.dumps([*rows, clip]))
    (folder / "test.json").write_text(json.dumps([*rows[:5], clip]))
    return folder


def test_every_stage_runs_on_real_photographs_and_a_real_clip(world, photo_folder, tmp_path):
    run = tmp_path / "run"
    # pictures of 84 x 84 to 112 x 112 pixels keep this quick; the default is 401,408 pixels
    options = (
        "--max_pixels 12544 --max_frames 4 --sft_steps 30 --rl_steps 2 --eval_responses 0".split()
    )
    done = launch("--world", world, "--data", photo_folder, "--output_dir", run, *SMALL, *options)
    assert "21 train" in done.stdout and (run / "report.html").exists()
    rows = json.loads((run / "eval/after.json").read_text())["test"]["rows"]
    assert len(rows) == 6 and all(row["text"] for row in rows)
    assert len((run / "select/scores.jsonl").read_text().splitlines()) == 21


def test_a_bad_row_stops_the_run_before_any_model_is_built(world, photo_folder, tmp_path):
    rows = json.loads((photo_folder / "train.json").read_text())
    del rows[3]["solution"]
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in photo_folder.iterdir():
        (bad / file.name).symlink_to(file)
    (bad / "train.json").unlink()
    (bad / "train.json").write_text(json.dumps(rows))
    done = launch("--data", bad, "--output_dir", tmp_path / "run", check=False, cwd=tmp_path)
    assert done.returncode != 0 and not (tmp_path / "shapes-world").exists()
    assert "train.json row 3 (cell.png), solution: missing or empty" in done.stderr


@pytest.fixture(scope="module")
def mixed_folder(photo_folder, tmp_path_factory):
    """All five problem types on a picture, two pictures and a clip each."""
    process = "<prethink>the middle</prethink><caption>{0}</caption><think>{0}</think><answer>{1}</answer>"
    kinds = {
        "multiple choice": ("Which is it?", ["A. a cat", "B. a rocket"], "A", "a tabby cat"),
        "numerical": ("How many cats?", [], "1", "one tabby cat"),
        "OCR": ("What does the sign say?", [], "NO ENTRY", "a sign that says no entry"),
        "free-form": ("What animal is it?", [], "a cat", "a tabby cat"),
        "regression": (
            "How heavy is it, in kilograms?",
            [],
            "4.5",
            "a tabby cat of four kilograms",
        ),
    }
    media = {
        "picture": ("image", str(photo_folder / "chelsea.png")),
        "pictures": (
            "image",
            [str(photo_folder / "chelsea.png"), str(photo_folder / "rocket.jpg")],
        ),
        "clip": ("video", str(photo_folder / "pan.mp4")),
    }
    rows = [
        {
            "data_type": data_type,
            "problem_type": kind,
            "problem": problem,
            "options": options,
            "path": path,
            "solution": f"<answer>{answer}</answer>",
            "problem_id": f"{kind}, {medium}",
            "process": process.format(caption, answer),
        }
        for medium, (data_type, path) in media.items()
        for kind, (problem, options, answer, caption) in kinds.items()
    ]
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


MIXED = (
    "--max_pixels 6272 --max_frames 4 --sft_steps 30 --rl_steps 2 --prompts_per_step 5 "
    "--prompts_per_pass 3 "
    "--responses 8 --max_new_tokens 64 --eval_responses 0"
).split()


class FlakyServer:
    """Speaks the OpenAI API on loopback: answers, is slow, fails, talks nonsense, and is dead where
    the file `death` is."""

    def __init__(self, death):
        outer, self.asked = self, 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked += 1
                n = outer.asked
                text = {3: "", 4: "no idea at all"}.get(n % 7, "A")
                body = {
                    "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]
                }
                dead = death.exists() or n % 7 == 5
                if n % 7 == 6:
                    threading.Event().wait(0.3)
                self.send_response(503 if dead else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(b"<html>" if n % 7 == 1 and n > 7 else json.dumps(body).encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def metrics(run):
    return [json.loads(line) for line in (run / "rl/metrics.jsonl").read_text().splitlines()]


LORA = "--lora_rank 4 --gradient_checkpointing true --selection false".split()


def test_a_run_takes_all_problem_types_on_pictures_and_clips(world, mixed_folder, tmp_path):
    """A run with a local judge takes all problem types on a picture, on several and on clips."""
    run = tmp_path / "run"
    launch("--world", world, "--data", mixed_folder, "--output_dir", run, *SMALL, *MIXED, *LORA)
    lines = metrics(run)
    assert len(lines) == 2 and lines[0]["kl"] == pytest.approx(0, abs=1e-6)  # with media in both
    assert all(line["unknown"] == 0 and 0 <= line["caption_leak"] <= 1 for line in lines)
    rows = json.loads((run / "eval/after.json").read_text())["test"]["rows"]
    assert len(rows) == 15 and len({row["category"] for row in rows}) == 5


def test_a_run_with_a_flaky_endpoint_invents_no_reward(world, mixed_folder, tmp_path, monkeypatch):
    """A run with a slow, failing and nonsensical endpoint, which dies half-way, finishes. It
    invents no reward."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-loopback-secret")
    run = tmp_path / "run"
    server = FlakyServer(run / "rl/metrics.jsonl")  # dies after the first update
    # how many prompts would be selected follows from which call meets which of the server's moods
    judge = [
        "--judge",
        server.url,
        "--judge_model",
        "flaky",
        "--judge_deadline",
        "20",
        "--selection",
        "false",
    ]
    done = launch(
        "--world", world, "--data", mixed_folder, "--output_dir", run, *SMALL, *MIXED, *judge
    )
    server.http.shutdown()
    replies = [json.loads(line) for line in (run / "judge/0.jsonl").read_text().splitlines()]
    assert replies and len({(line["question"], line["caption"]) for line in replies}) == len(
        replies
    )
    known, unknown = 0, 0
    for line in map(json.loads, (run / "rl/rollouts.jsonl").read_text().splitlines()):
        for text, verdict, reply in zip(line["text"], line["caption"], line["judge"], strict=True):
            captioned = bool(reasoning.parse(text).caption)
            # asked, and no reply: unknown, not 0
            assert (verdict is None) == (captioned and reply is None)
            assert captioned or verdict == 0.0 and reply is None
            unknown, known = unknown + (verdict is None), known + (verdict is not None)
    assert known > 0
    assert unknown > 0 and metrics(run)[-1]["unknown"] > 0
    everything = done.stdout + done.stderr
    everything += "".join(
        f.read_text(errors="ignore")
        for f in run.rglob("*")
        if f.suffix in (".yaml", ".jsonl", ".html")
    )
    assert "sk-loopback-secret" not in everything
