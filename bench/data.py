"""Media from disk to tensors: ours beside plain qwen-vl-utils, and with workers that read ahead.

    pip install scikit-image decord                # decord: qwen-vl-utils' reader of clips
    python -m bench.data --folder bench-data       # two CPU cores, ten minutes

Pictures are JPEGs of 1000 x 750 pixels. Clips are H.264 of 1280 x 720 pixels, two minutes at 25
frames a second with a key frame every ten seconds; 16 frames are taken. Both forms end in the same
processor, with the limits of configs/ and without the vision tower. qwen-vl-utils reads clips with
each of its readers that works here.

With workers a sleep stands for the update, twice as long as reading a batch in this process takes.
What counts is the time between two sleeps: how long training waits. The first batch, before which
nothing trains, is left out. The CPU time is that of the training process alone: it says the same
on a busy machine. Forms take turns; figures are medians with the smallest and largest.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info, vision_process
from skimage import data as photos

import data
from engine import loader, vlm
from world import models

LIMITS = {"min_pixels": 3136, "max_pixels": 401_408}
TAKEN = {"fps": 2.0, "max_frames": 16}
SECONDS, RATE, WIDTH, HEIGHT = 120, 25, 1280, 720
BATCHES = 3


def write(folder: Path, sizes: dict[str, int]) -> None:
    """Rows of different photos, and one clip, a view that wanders over a photo."""
    folder.mkdir(parents=True, exist_ok=True)
    large = Image.fromarray(photos.astronaut()).resize((2400, 2400))
    chance = random.Random(0)
    if not (folder / "clip.mp4").exists():
        pixels = np.asarray(large)
        with av.open(str(folder / "unfinished.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
            stream.width, stream.height = WIDTH, HEIGHT
            stream.pix_fmt, stream.gop_size = "yuv420p", 10 * RATE
            for i in range(SECONDS * RATE):
                x, y = (int(500 * (1 + math.sin(i / n))) for n in (100, 130))
                view = np.ascontiguousarray(pixels[y : y + HEIGHT, x : x + WIDTH])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
            container.mux(stream.encode())
        (folder / "unfinished.mp4").rename(folder / "clip.mp4")
    for i in range(sizes.get("picture", 0)):
        x, y = chance.randrange(1400), chance.randrange(1650)
        large.crop((x, y, x + 1000, y + 750)).save(folder / f"{i}.jpg", quality=90)
    row = {"problem": "What is this?", "problem_type": "free-form", "options": [], "solution": "it"}
    for kind, n in sizes.items():
        rows = [
            row
            | {
                "problem_id": f"{kind} {i}",
                "data_type": "image" if kind == "picture" else "video",
                "path": f"{i}.jpg" if kind == "picture" else "clip.mp4",
            }
            for i in range(n)
        ]
        (folder / f"{kind}.json").write_text(json.dumps(rows))


def plain(processor, rows: list[data.Sample], reader: str) -> dict:
    """qwen-vl-utils as its page shows it."""
    vision_process.get_video_reader_backend = lambda: reader
    chats = []
    for row in rows:
        part = {"type": row.data_type, row.data_type: str(row.media[0]), **LIMITS}
        part |= TAKEN if row.data_type == "video" else {}
        text = {"type": "text", "text": data.prompt_of(row, True)}
        chats.append([{"role": "user", "content": [part, text]}])
    images, videos, options = process_vision_info(chats, return_video_kwargs=True)
    options.pop("fps")  # of the rate only positions are made
    text = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    media = {"images": images} if images else {"videos": videos, **options}
    return processor(text=text, **media, do_resize=False, padding=True, return_tensors="pt")


def readers(clip: Path) -> list[str]:
    """The readers of qwen-vl-utils that read a clip here."""
    found = []
    for name, read in vision_process.VIDEO_READER_BACKENDS.items():
        try:
            read({"video": str(clip), **TAKEN})
            found.append(name)
        except Exception as error:  # of many kinds
            print(f"qwen-vl-utils' {name} does not work here: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="of the media")
    parser.add_argument("--pictures", type=int, default=8, help="in a batch, 0: none [default 8]")
    parser.add_argument("--clips", type=int, default=2, help="in a batch, 0: none [default 2]")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # of the calling process, in all forms
    sizes = {"picture": args.pictures * BATCHES, "clip": args.clips * BATCHES}
    sizes = {kind: n for kind, n in sizes.items() if n}
    write(args.folder, sizes)
    model, processor = models.make_policy(models.make_tokenizer())
    policy = vlm.VLM(model, processor, *LIMITS.values())  # its tower is not frozen: not run
    names = readers(args.folder / "clip.mp4")
    for kind, count in sizes.items():
        rows = data.load(args.folder / f"{kind}.json")["train"]
        size = count // BATCHES
        batches = [rows[i : i + size] for i in range(0, count, size)]
        found = defaultdict(list)

        def ours(batches) -> None:
            policy.encode(data.prompts(next(batches), True, **TAKEN))

        def timed(name: str, form, *args, found=found, size=size) -> float:
            start, cpu = time.perf_counter(), time.process_time()
            form(*args)
            seconds = time.perf_counter() - start
            found[name].append((size / seconds, 1000 * (time.process_time() - cpu) / size))
            return seconds

        for _ in range(args.repeats):
            alone = [timed("ours, in this process", ours, iter([batch])) for batch in batches]
            for reader in names if kind == "clip" else names[:1]:
                name = "qwen-vl-utils" + (f", {reader}" if kind == "clip" else "")
                for batch in batches:
                    timed(name, plain, processor, batch, reader)
            for workers in args.workers:
                cfg = SimpleNamespace(media_workers=workers, reward="", **LIMITS, **TAKEN)
                ahead = loader.read_ahead(batches, cfg)
                ours(ahead)
                for _ in batches[1:]:
                    time.sleep(2 * statistics.median(alone))
                    timed(f"ours, read ahead by {workers}", ours, ahead)
        print(f"\n| {kind}s, {size} in a batch | rows a second | CPU ms a row |\n|---|---|---|")
        for name, pairs in found.items():
            shown = [
                f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
                for values, form in zip(zip(*pairs), (".2f", ".0f"))
            ]
            print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
