"""The same commands on what a user brings: real photographs (scikit-image's) and a real MP4, questions of our own."""

import json

import av
import numpy as np
import pytest
from PIL import Image
from test_train import SMALL, launch

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
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(photo[100:340, x : x + 320]), format="rgb24")
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
    options = ["--max_pixels", "12544", "--max_frames", "4", "--sft_steps", "30", "--rl_steps", "2"]
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
