"""Pictures and clips of rows, as chat messages show them; read ahead by worker processes.

A picture takes milliseconds and a clip about a second, on the CPU. With --media_workers that time
passes while the update before trains. Rows, their order and every byte stay the same.
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from qwen_vl_utils.vision_process import fetch_image
from torch.utils.data import DataLoader

import corruption
from engine import DataError
from engine.media import read_image
from engine.rows import Sample
from engine.video import read_video

TIMEOUT = 600  # seconds without a row from any worker: an error, where a run would wait for ever


def media_parts(sample: Sample, fps: float, max_frames: int) -> list[dict[str, Any]]:
    """The media of a row as parts of a chat message, corrupted where the row is."""

    def seen(media: corruption.Media) -> corruption.Media:
        return (
            corruption.change(media, *sample.corruption, sample.id) if sample.corruption else media
        )

    if sample.data_type == "video" and sample.media:
        frames, true_fps = read_video(sample.media[0], fps, max_frames)
        return [{"type": "video", "video": seen(frames), "fps": true_fps}]
    return [{"type": "image", "image": seen(read_image(path))} for path in sample.media]


def resized(part: dict[str, Any], min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """A part of a chat message with its picture or frames at the size that the model sees."""
    if part["type"] == "text" or "resized" in part:  # a second time could change the size again
        return part
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    if part["type"] == "image":
        return part | {"image": fetch_image({"image": part["image"], **limits}), "resized": True}
    # frame by frame: qwen-vl-utils' own list reader rounds to 56, not 28 pixels
    frames = [fetch_image({"image": frame, **limits}) for frame in part["video"]]
    return part | {"video": frames, "resized": True}


def read_ahead(batches: list[list[Sample]], cfg) -> Iterator[list[Sample]]:
    """The same batches, whose media `cfg.media_workers` processes have read before they are asked
    for, up to a batch ahead. With 0 they are as they were, and read when they are encoded.

    Raises DataError at the batch whose media cannot be read, as reading in this process does.
    """
    rows = [row for batch in batches for row in batch]
    if not (cfg.media_workers and rows):
        yield from batches
        return
    parts = iter(
        DataLoader(
            rows,
            batch_size=None,  # row by row: a batch's clips are shared out among the workers
            collate_fn=partial(_read, cfg=cfg),
            num_workers=cfg.media_workers,
            prefetch_factor=math.ceil(max(map(len, batches)) / cfg.media_workers),
            # rows are inherited, not pickled: a row may refer to a whole table
            multiprocessing_context="fork",
            # freeing a decoder waits for its threads, which are not inherited
            worker_init_fn=lambda _: gc.freeze(),
            generator=torch.Generator(),  # the default one is training's
            timeout=TIMEOUT,
        )
    )
    for batch in batches:
        yield [replace(row, decoded=_unless_error(next(parts))) for row in batch]


def _read(row: Sample, cfg) -> list[dict[str, Any]] | DataError:
    """In a worker. An error is a value there: as an exception it would come with a traceback."""
    try:
        parts = media_parts(row, cfg.fps, cfg.max_frames)
    except DataError as error:
        return error
    if cfg.reward:  # a function of the user's, which gets pictures as they are on disk
        return parts
    return [resized(part, cfg.min_pixels, cfg.max_pixels) for part in parts]


def _unless_error(found: list | DataError) -> list:
    if isinstance(found, DataError):
        raise found
    return found
