"""Every picture and clip is opened before a model is loaded; what was good is remembered until its
file changes."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import av
import PIL
from huggingface_hub import cached_assets_path
from PIL import UnidentifiedImageError

from engine import DataError, media, video
from engine.media import Media, Size, name_of, read_image, trace
from engine.video import size_of_video


class Checked:
    """`check_media`, which opens only what is new or has changed since the same data were last
    checked on this machine. What was good is kept in the assets folder of the Hugging Face cache
    (HF_HOME), a file for each `source`.

        with Checked("data/train.json") as checked:
            size = checked(medium, "image")
    """

    def __init__(self, *source: str | Path):
        self.file, self.before, self.now, self.saved = None, {}, {}, time.monotonic()
        self.locks: dict[str, threading.Lock] = {}
        try:
            # this code, and the libraries that it uses, decide what is good
            code = [Path(file).read_bytes() for file in (__file__, media.__file__, video.__file__)]
            by = (*code, av.__version__, PIL.__version__, *map(os.path.realpath, source))
            folder = cached_assets_path("ground-what-you-see", "media")
            self.file = folder / f"{hashlib.sha256(repr(by).encode()).hexdigest()[:32]}.json"
            kept = {
                key: Size(*values) for key, values in json.loads(self.file.read_bytes()).items()
            }
            if all(
                isinstance(value, int | float) for size in kept.values() for value in astuple(size)
            ):
                self.before = kept
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            pass  # none yet, or none that can be read: then all is opened

    def __call__(self, medium: Media, data_type: str) -> Size:
        try:
            is_file = isinstance(medium, Path)
            key = repr((data_type, *trace(Path(os.path.abspath(medium)) if is_file else medium)))
        except Exception:  # as in check_media, which says what is wrong
            return check_media(medium, data_type)
        # once, where two threads ask for the same
        with self.locks.setdefault(key, threading.Lock()):
            if key not in self.now:
                self.now[key] = self.before.get(key) or check_media(medium, data_type)
        return self.now[key]

    def each(
        self, rows: Sequence[tuple[Sequence[Media], str]]
    ) -> Iterator[tuple[Size, ...] | DataError]:
        """The sizes of each row's media, or what is wrong with one of them. On all cores: PIL and
        FFmpeg let the interpreter go while they decode."""

        def sizes(row: tuple[Sequence[Media], str]) -> tuple[Size, ...] | DataError:
            try:
                return tuple(self(medium, row[1]) for medium in row[0])
            except DataError as error:
                return error

        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            for i in range(0, len(rows), 256):
                yield from pool.map(sizes, rows[i : i + 256])
                if time.monotonic() - self.saved > 60:
                    self._save(self.before | self.now)
        finally:
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Checked":
        return self

    def __exit__(self, kind, *_) -> None:
        # what is gone goes, when all has been read
        self._save(self.now if kind is None else self.before | self.now)

    def _save(self, keep: dict[str, Size]) -> None:
        self.saved = time.monotonic()
        if self.file is None or keep == self.before:
            return
        try:  # whole or not at all, whoever else writes it
            beside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
            beside.write_text(json.dumps({key: astuple(size) for key, size in keep.items()}))
            os.replace(beside, self.file)
        except OSError:
            pass  # a folder that cannot be written, or a full disk: all is opened next time


def check_media(medium: Media, data_type: str) -> Size:
    """Opens it: all of a picture, the key frames of a clip. DataError where it cannot be read, or
    shows nothing."""
    name = name_of(medium)
    # Path.is_file raises where a name is too long
    if isinstance(medium, Path) and not os.path.isfile(medium):
        raise DataError(f"path: {name} does not exist")
    try:
        size = _size_of_picture(medium) if data_type == "image" else size_of_video(medium)
    except DataError as error:
        if (
            data_type == "image"
            and isinstance(error.__cause__, UnidentifiedImageError)
            and _is_clip(medium)
        ):
            raise DataError(f"path: {name} is a clip. Give it as video") from error
        raise
    except Exception as error:  # PyAV raises many kinds; all of them mean an unreadable file
        if not _is_picture(medium):
            raise DataError(f"path: cannot read {name} as video ({error})") from error
        size = Size(1, 0, 0)
    if data_type == "video" and size.frames < 2:
        raise DataError(f"path: {name} has {size.frames} frame. Give a picture as image")
    short, long = sorted((size.height, size.width))
    if short < 4:
        raise DataError(
            f"path: {name} has {size.width} x {size.height} pixels, too few to show anything. "
            "Replace it"
        )
    if long >= 200 * short:
        raise DataError(
            f"path: {name} has {size.width} x {size.height} pixels; Qwen2.5-VL takes no side 200 "
            "times the other. Cut it"
        )
    return size


def _size_of_picture(medium: Media) -> Size:
    image = read_image(medium)
    return Size(1, image.height, image.width)


def _is_picture(medium: Media) -> bool:
    try:
        return bool(read_image(medium))
    except DataError:
        return False


def _is_clip(medium: Media) -> bool:
    try:
        return size_of_video(medium).frames > 1
    except Exception:  # as above
        return False
