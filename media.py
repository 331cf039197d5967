"""Pictures and clips: only known formats are opened, all is seen upright and on white, clips go by their timestamps.

PyAV reads clips, because qwen-vl-utils' torchvision reader is gone from torchvision and its torchcodec reader needs a
system FFmpeg. What a clip costs to read does not grow with its length: `read_video` seeks.
"""

import base64
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from fractions import Fraction
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

import av
import numpy as np
import PIL
from huggingface_hub import cached_assets_path
from PIL import Image, UnidentifiedImageError

# Formats that hold what they show. A playlist (HLS, DASH, concat), a pattern of names or PostScript opens other things.
PICTURES = "JPEG PNG WEBP GIF BMP TIFF JPEG2000 PPM AVIF".split()
CLIPS = {  # as FFmpeg calls them: as people do
    "mov": "MP4, MOV, 3GP",
    "matroska": "MKV, WebM",
    "avi": "AVI",
    "gif": "GIF",
    "apng": "APNG",
    "mpegts": "TS",
    "mpeg": "MPEG",
    "flv": "FLV",
    "asf": "WMV",
    "ogg": "OGG",
}
NOTHING = (-9999, -32767, -32768)  # stand in depth and height maps where nothing was measured
UPRIGHT = {  # EXIF orientation: what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DISPLAY = {  # (a, b, c, d) of a clip's display matrix, which shows (x, y) at (a x + c y, b x + d y): EXIF orientation
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


class DataError(ValueError):
    """Something in the data, in one line: which file, which row, which field, what to do."""


@dataclass(frozen=True)
class Embedded:
    """A picture or clip inside a table, as bytes or as text (base64, or a data: URI): read when it is asked for, so
    that the media of a dataset are never in memory together."""

    table: Any = field(repr=False, hash=False)  # a datasets.Dataset, or a list of rows
    row: int
    place: int | None  # in a list of them
    column: str = "path"

    def read(self) -> bytes:
        cell = self.table[self.row][self.column]
        cell = cell if self.place is None else cell[self.place]
        held = (cell.get("bytes") or cell["path"]) if isinstance(cell, dict) else cell
        return _from_text(held) if isinstance(held, str) else held

    def __str__(self) -> str:
        return f"the picture or clip in row {self.row}"


Media = Path | bytes | Image.Image | Embedded


@dataclass(frozen=True)
class Size:
    """Of a picture (frames 1, rate 1) or clip, upright: frames, height, width, frames a second (their mean)."""

    frames: int
    height: int
    width: int
    rate: float = 1.0


def gallery_file(id: str) -> str:
    """The name of the file that keeps a picture of the row `id`: an id may be too long for one, or differ from another
    only in what a name cannot hold."""
    return f"{hashlib.sha256(id.encode(errors='surrogatepass')).hexdigest()[:32]}.png"


def medium_of(cell, root: Path | None, embedded: Embedded) -> Media:
    """What a cell of `path` stands for: a file below `root`, or what the cell itself holds."""
    if isinstance(cell, dict) and cell.get("bytes"):
        return embedded
    if isinstance(cell, dict):
        cell = cell.get("path")
    if isinstance(cell, bytes | Image.Image):
        return cell
    if not isinstance(cell, str) or not cell:
        raise DataError("path: must be a path, or bytes or a PIL image, or a list of them")
    if _is_data(cell) or (_is_base64(cell) and not os.path.isfile((root or Path()) / cell)):
        return embedded
    name = _short(cell)
    if re.match(r"(?!file:)[a-z][a-z0-9+.-]+://", cell, re.IGNORECASE):
        raise DataError(f"path: {name} is a web address. Download it, and give the path of the file")
    if root is None:
        raise DataError(f"path: {name} is a path, but the dataset is not on this disk. Give pictures with their bytes")
    if ".." in Path(cell).parts:
        raise DataError(f"path: {name} leaves the folder of the data. Move the file there, or give an absolute path")
    return root / cell.removeprefix("file://")


def _is_data(text: str) -> bool:
    return text[:5].lower() == "data:"


def _is_base64(text: str) -> bool:
    """Is it base64 throughout, and longer than most paths? The smallest picture that says something is longer."""
    try:
        return len(text) >= 64 and bool(_from_text(text))
    except ValueError:
        return False


def _from_text(text: str) -> bytes:
    """The bytes in base64 or a data: URI."""
    if _is_data(text):
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(text)
        text = unquote(text)
    plain = "".join(text.splitlines()).replace("-", "+").replace("_", "/")  # of the alphabet for URLs, too
    return base64.b64decode(plain, validate=True)


def _stream(medium: Path | bytes | Embedded) -> Path | io.BytesIO:
    """What PIL and PyAV open."""
    if isinstance(medium, Embedded):
        return io.BytesIO(medium.read())
    return io.BytesIO(medium) if isinstance(medium, bytes) else medium


def _name(medium: Media) -> str:
    return _short(str(medium)) if isinstance(medium, Path | Embedded) else "what is given in its place"


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."


def trace(medium: Media) -> tuple:
    """What changes when it does: of a file path, size and time of change, of anything else a hash of its content."""
    if isinstance(medium, Path):
        stat = medium.stat()
        return str(medium), stat.st_size, stat.st_mtime_ns
    content = medium.read() if isinstance(medium, Embedded) else medium
    look = (content.mode, content.size) if isinstance(content, Image.Image) else ()
    return *look, hashlib.sha256(content.tobytes() if look else content).hexdigest()


class Checked:
    """`_check_media`, which opens only what is new or has changed since the same data were last checked on this
    machine. What was good is kept in the assets folder of the Hugging Face cache (HF_HOME), a file for each `source`.

        with Checked("data/train.json") as checked:
            size = checked(medium, "image")
    """

    def __init__(self, *source: str | Path):
        self.file, self.before, self.now, self.saved = None, {}, {}, time.monotonic()
        self.locks: dict[str, threading.Lock] = {}
        try:
            # this code and its libraries decide what is good
            by = (Path(__file__).read_bytes(), av.__version__, PIL.__version__, *map(os.path.realpath, source))
            folder = cached_assets_path("ground-what-you-see", "media")
            self.file = folder / f"{hashlib.sha256(repr(by).encode()).hexdigest()[:32]}.json"
            kept = {key: Size(*values) for key, values in json.loads(self.file.read_bytes()).items()}
            if all(isinstance(value, int | float) for size in kept.values() for value in astuple(size)):
                self.before = kept
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            pass  # none yet, or none that can be read: then all is opened

    def __call__(self, medium: Media, data_type: str) -> Size:
        try:
            key = repr((data_type, *trace(Path(os.path.abspath(medium)) if isinstance(medium, Path) else medium)))
        except Exception:  # as in _check_media, which says what is wrong
            return _check_media(medium, data_type)
        with self.locks.setdefault(key, threading.Lock()):  # once, where two threads ask for the same
            if key not in self.now:
                self.now[key] = self.before.get(key) or _check_media(medium, data_type)
        return self.now[key]

    def each(self, rows: Sequence[tuple[Sequence[Media], str]]) -> Iterator[tuple[Size, ...] | DataError]:
        """The sizes of each row's media, or what is wrong with one of them. On all cores: PIL and FFmpeg let the
        interpreter go while they decode."""

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
        self._save(self.now if kind is None else self.before | self.now)  # what is gone goes, when all has been read

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


def _check_media(medium: Media, data_type: str) -> Size:
    """Opens it: all of a picture, the key frames of a clip. DataError where it cannot be read, or shows nothing."""
    name = _name(medium)
    if isinstance(medium, Path) and not os.path.isfile(medium):  # Path.is_file raises where a name is too long
        raise DataError(f"path: {name} does not exist")
    try:
        size = _size_of_image(medium) if data_type == "image" else _size_of_video(medium)
    except DataError as error:
        if data_type == "image" and isinstance(error.__cause__, UnidentifiedImageError) and _is_clip(medium):
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
        raise DataError(f"path: {name} has {size.width} x {size.height} pixels, too few to show anything. Replace it")
    if long >= 200 * short:
        raise DataError(
            f"path: {name} has {size.width} x {size.height} pixels; Qwen2.5-VL takes no side 200 times the "
            "other. Cut it"
        )
    return size


def _is_picture(medium: Media) -> bool:
    try:
        return bool(read_image(medium))
    except DataError:
        return False


def _is_clip(medium: Media) -> bool:
    try:
        return _size_of_video(medium).frames > 1
    except Exception:  # as above
        return False


# --- pictures ---------------------------------------------------------------------------------------------------------


def _size_of_image(medium: Media) -> Size:
    image = read_image(medium)
    return Size(1, image.height, image.width)


def read_image(medium: Media) -> Image.Image:
    """The picture upright, in RGB; transparency becomes white, as in qwen-vl-utils, not black. Of an MPO, a phone's
    picture with previews or a second lens, the first. Greys of more than 8 bits: `_grey`. DataError where it cannot be
    read."""
    try:
        return _read_image(medium)
    except DataError:
        raise
    except Exception as error:  # PIL raises many kinds; all of them mean an unreadable file
        raise DataError(f"path: cannot read {_name(medium)} as image ({error})") from error


def _read_image(medium: Media) -> Image.Image:
    image = medium if isinstance(medium, Image.Image) else _open_image(medium)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise DataError(
            f"path: {_name(medium)} is animated ({image.n_frames} frames). Give it as video, or one frame of it"
            if image.format in ("GIF", "PNG")
            else f"path: {_name(medium)} holds {image.n_frames} pictures. Give one of them"
        )
    image.load()  # verify() would pass a truncated JPEG; and a TIFF turns upright here
    # not ImageOps.exif_transpose, which writes the EXIF anew and fails where another tag is damaged
    turn = UPRIGHT.get(image.getexif().get(0x0112))
    image = _on_white(_grey(image) if image.mode[0] in "IF" else image)
    return image if turn is None else image.transpose(turn)


def _open_image(medium: Media) -> Image.Image:
    Image.init()
    try:
        return Image.open(_stream(medium), formats=[name for name in PICTURES if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"its format is none of {', '.join(PICTURES)}: convert it") from error


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Greys of modes I;16, I and F in 8 bits, linearly, with nothing cut off.

    Integers within 16 bits: black is 0 and white is 2^depth - 1, by the least usual depth (8, 10, 12, 14 or 16 bits)
    that holds them all. So 16 bits are divided by 257, and 12 bits in a file of 16 are not dark. Floats within [0, 1]:
    white is 1. Others have no white of their own: black is the least value, and white the greatest. What is no number
    is black, and so is what marks that nothing was measured. Where a TIFF says that 0 is white, all is the other way.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and image.format == "TIFF" and tags.get(339, (1,)) == (1,):
        values = values.view(np.uint32)  # by its SampleFormat; PIL has signed integers only
    empty = np.isnan(values) | np.isin(values, NOTHING)
    with contextlib.suppress(ValueError):
        empty |= values == float(tags.get(42113, "nan").strip(" \0"))  # GDAL's own
    known = values[~empty & (np.abs(values.astype(np.float64)) < 1e38)]  # and none of the type's ends
    black, white = (known.min().item(), known.max().item()) if known.size else (0, 0)
    if black >= 0 and values.dtype.kind in "ui" and white < 2**16:
        black, white = 0, next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if white < 2**bits)
    elif black >= 0 and white <= 1:
        black, white = 0, 1
    share = ((values.astype(np.float64) - black) / (white - black or 1)).clip(0, 1)
    share = 1 - share if tags.get(262) == 0 else share
    grey = Image.fromarray((255 * np.where(empty, 0, share)).round().astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


# --- clips ------------------------------------------------------------------------------------------------------------


class NoSeeking(ValueError):
    """The frames of this clip cannot be told, or decoded, without all those before them."""


class Span(NamedTuple):
    """The times of a clip's first and last frame in units of `tick` seconds, and the seconds that it is shown, its last
    frame as long as the one before. stamped: they are its timestamps, and not its frames' numbers."""

    first: int
    last: int
    tick: Fraction
    seconds: float
    stamped: bool

    def moments(self, n: int) -> list[Fraction]:
        """n times at equal steps from the first frame's to the last's."""
        return [self.first + Fraction(i * (self.last - self.first), max(n - 1, 1)) for i in range(n)]


class Key(NamedTuple):
    """A key frame: where to seek for it, its time, and whether it is shown itself."""

    at: int
    time: int
    is_shown: bool


def frames_taken(total: int, rate: float, fps: float, max_frames: int) -> int:
    """About `fps` a second, at least 2 and at most `max_frames`, and no more than there are."""
    # rate is total / seconds, and dividing by it gives the seconds up to rounding: a half must stay a half
    return min(total, max_frames, max(2, round(round(total / rate * fps, 6))))


def _size_of_video(medium: Media) -> Size:
    with _open_video(medium) as container:
        stream, stamps, shown, end = _video(container), [], None, {}
        stream.codec_context.skip_frame = "NONKEY"  # to decode every frame of every clip would take hours
        for packet in container.demux(*_timed(container)):
            if packet.dts is not None:
                time, before = packet.dts * packet.time_base, end.get(packet.stream)
                if before is not None and time < before - 1:
                    raise ValueError(f"its time begins anew after {float(before):g} s, as in joined files: convert it")
                end[packet.stream] = time
            if packet.is_corrupt:
                raise ValueError("it is cut off or damaged")
            if packet.stream is not stream:
                continue
            if _is_shown(packet):
                stamps.append(packet.pts)
            for frame in packet.decode():
                shown = shown or frame
        length = _told_length(container)
        if length - max(end.values(), default=0) > 1 + length / 10:
            raise ValueError(f"it is cut off: it should last {float(length):.1f} s")
        if shown is None:
            raise ValueError("no frame of it can be decoded")
        height, width = (shown.width, shown.height) if _orientation(shown) >= 5 else (shown.height, shown.width)
        return Size(len(stamps), height, width, len(stamps) / _span(container, stamps).seconds)


def read_video(medium: Media, fps: float = 2.0, max_frames: int = 16) -> tuple[list[Image.Image], float]:
    """n frames of a clip, upright, and how many a second there are of them, by the distance between them.

    n is about `fps` a second of the clip, at least 2 and at most `max_frames`. They are the frames whose timestamps are
    nearest to n times at equal steps from the first frame's to the last's, so that the rate is (n - 1) / (last time -
    first time), and a frame that is shown for long may be there twice. Only what leads from a key frame to one of them
    is decoded, or where that does not work, everything once.
    """
    try:
        try:
            frames, rate = _read_by_seeking(medium, fps, max_frames)
        except (NoSeeking, av.FFmpegError):
            frames, rate = _read_through(medium, fps, max_frames)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:  # the last: PyAV's, of a stream found later
        raise DataError(f"path: cannot decode {_name(medium)} ({error}). Replace it, or leave its row out") from error
    # the recording of a window changes its size with it
    return [frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames], rate


def _read_by_seeking(medium: Media, fps: float, max_frames: int) -> tuple[list[Image.Image], float]:
    with _open_video(medium) as container:
        # a frame of a GIF or APNG is drawn over the one before; in MPEG and OGG not every frame has a timestamp
        if container.format.name in ("gif", "apng", "mpeg", "ogg"):
            raise NoSeeking
        packets = filter(_is_shown, container.demux(_video(container)))
        head = [packet.pts for packet in islice(packets, max(max_frames, 32))]
        if None in head:
            raise NoSeeking
        span = _span(container, head + _tail(container, min(head, default=0)))
        if not span.stamped:
            raise NoSeeking
        n = frames_taken(len(head), len(head) / span.seconds, fps, max_frames)
        found = [_find(container, moment, span.first) for moment in span.moments(n)]
        wanted, pictures = {}, {}
        for time, key in found:
            wanted.setdefault(key.time, (key, set()))[1].add(time)
        for key, times in wanted.values():
            pictures |= _decode(container, key, times)
    return [pictures[time] for time, _ in found], _rate(span, n)


def _read_through(medium: Media, fps: float, max_frames: int) -> tuple[list[Image.Image], float]:
    with _open_video(medium) as container:
        stamps = [packet.pts for packet in container.demux(_video(container)) if _is_shown(packet)]
        span = _span(container, stamps)
    times = sorted(stamps) if span.stamped else range(len(stamps))
    n = frames_taken(len(times), len(times) / span.seconds, fps, max_frames)
    wanted, pictures, last = deque(_nearest(times, moment, span.first) for moment in span.moments(n)), [], None
    with _open_video(medium) as container:
        for i, frame in enumerate(container.decode(_video(container))):
            time = frame.pts if span.stamped else i
            while wanted and time is not None and time >= wanted[0]:
                pictures.append(_picture(frame))
                wanted.popleft()
            if not wanted:
                break
            last = frame
        if last is None and not pictures:
            raise ValueError("no frame of it can be decoded")
        return pictures + [_picture(last) for _ in wanted], _rate(span, n)  # fewer frames than were told


def _rate(span: Span, n: int) -> float:
    return float((n - 1) / ((span.last - span.first) * span.tick)) if n > 1 else n / span.seconds


def _open_video(medium: Media) -> av.container.InputContainer:
    """FFmpeg looks at the name of the format before it lets the format open anything else."""
    stream = _stream(medium)
    name = f"file:{stream}" if isinstance(stream, Path) else stream  # else 12:30.mp4 would be of the protocol 12
    options = {"format_whitelist": ",".join(CLIPS), "protocol_whitelist": "file"}
    try:  # not options=, which are also for each stream: older PyAV crashes where a stream is found later
        return av.open(name, container_options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"its format is none of {', '.join(CLIPS.values())}: convert it") from error


def _video(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    stream = next(iter(container.streams.video), None)
    if stream is None or stream.codec_context is None:
        raise ValueError("no video stream that can be decoded")
    return stream


def _told_length(container: av.container.InputContainer) -> float | Fraction:
    """The seconds that the head of the file tells, 0 where it tells none, or FFmpeg makes them from the file's size."""
    stream, name = _video(container), container.format.name
    if name == "avi" and stream.average_rate:
        return stream.frames / stream.average_rate
    return (container.duration or 0) / av.time_base if name.startswith(("matroska", "flv")) else 0


def _timed(container: av.container.InputContainer) -> list[av.stream.Stream]:
    """Those that say how far a file goes: sound may go on where nothing new is to be seen."""
    return [_video(container), *(stream for stream in container.streams.audio if stream.codec_context)]


def _is_shown(packet: av.Packet) -> bool:
    """Not the mark at the end, nor what an edit list cuts away, nor a frame of VP8 that others only refer to."""
    hidden = packet.size > 0 and packet.stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
    return packet.size > 0 and not packet.is_discard and not hidden


def _span(container, stamps: list[int | None]) -> Span:
    """By timestamps, of which the first and the last two suffice; where there are none, by the frame rate."""
    stream = _video(container)
    # AVI has none: where frames are not stored in the order of showing, FFmpeg's are wrong
    stamped = container.format.name != "avi" or not stream.codec_context.has_b_frames
    stamped = stamped and None not in stamps and (len(set(stamps)) > 1 or len(stamps) == 1)
    if not stamps:
        raise ValueError("it holds no frame")
    if not stream.average_rate and not stamped:
        raise ValueError("it has neither timestamps nor a frame rate")
    times = sorted(set(stamps)) if stamped else range(len(stamps))
    tick = stream.time_base if stamped else 1 / stream.average_rate
    if len(times) == 1:
        return Span(times[0], times[0], tick, float(1 / (stream.average_rate or 1)), stamped)
    return Span(times[0], times[-1], tick, float((2 * times[-1] - times[-2] - times[0]) * tick), stamped)


def _tail(container, first: int) -> list[int | None]:
    """Timestamps of the last frames, two or more."""
    stream = _video(container)
    length = Fraction(container.duration, av.time_base) if container.duration else 10**6
    at, step = first + int(length / stream.time_base), max(1, int(1 / stream.time_base))
    while True:
        container.seek(at, stream=stream)
        stamps = [packet.pts for packet in container.demux(stream) if _is_shown(packet)]
        if len(stamps) > 1 or at <= first:
            return stamps
        at, step = max(first, at - step), 2 * step


def _find(container, moment: Fraction, first: int) -> tuple[int, Key]:
    """The time of the frame nearest to `moment`, and the key frame that leads to it."""
    stream = _video(container)
    at, step = int(moment), max(1, int(1 / stream.time_base))
    start = first - 2 * step  # the first frame is decoded before it is shown
    while True:
        container.seek(at, stream=stream)
        packets, after = [], None  # not whole: they may be all of a clip
        for packet in container.demux(stream):
            # a frame is decoded before it is shown: by now all have come that are shown up to `after`
            if not packet.size or (after is not None and packet.dts is not None and packet.dts >= after):
                break
            if packet.pts is None:
                raise NoSeeking
            packets.append((packet.pts, packet.is_keyframe, _is_shown(packet)))
            if _is_shown(packet) and packet.pts >= moment:
                after = packet.pts if after is None else min(after, packet.pts)
        # seeking goes by times of decoding, and in some formats to no key frame: is there one shown before?
        keys = [i for i, (pts, is_key, _) in enumerate(packets) if is_key and pts <= moment]
        if keys:
            packets = packets[keys[-1] :]
            times = sorted(pts for pts, _, is_shown in packets if is_shown and pts >= packets[0][0])
            time = _nearest(times, moment, first)
            return time, next(
                Key(at, pts, is_shown) for pts, is_key, is_shown in reversed(packets) if is_key and pts <= time
            )
        if at <= start:
            raise NoSeeking
        at, step = max(start, at - step), 2 * step


def _decode(container, key: Key, wanted: set[int]) -> dict[int, Image.Image]:
    """The frames of these times, decoded from the key frame."""
    stream, pictures, begun = _video(container), {}, False
    container.seek(key.at, stream=stream)
    for packet in dropwhile(lambda packet: packet.pts != key.time, container.demux(stream)):
        # what no other frame refers to need not be decoded
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
        for frame in packet.decode():
            if not begun and frame.pts is not None and frame.pts >= key.time:  # earlier ones lack what they refer to
                if key.is_shown and (not frame.key_frame or frame.pts > key.time):
                    raise NoSeeking  # no key frame, whatever the file says
                begun = True
            if begun and frame.pts in wanted:
                pictures[frame.pts] = _picture(frame)
        if len(pictures) == len(wanted):
            return pictures
    raise NoSeeking


def _nearest(times: Sequence[int], moment: Fraction, first: int) -> int:
    """Of sorted times the nearest; of two as near, at a constant rate, that of an even number after the first."""
    if not times:
        raise NoSeeking
    i = bisect_left(times, moment)
    if i in (0, len(times)):
        return times[min(i, len(times) - 1)]
    before, after = times[i - 1], times[i]
    odd = (before - first) % (2 * (after - before)) == after - before
    return after if 2 * moment > before + after or (2 * moment == before + after and odd) else before


def _orientation(frame: av.VideoFrame) -> int:
    """As EXIF numbers it: 1 is upright."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1
    a, b, _, c, d = (np.frombuffer(matrix, np.int32)[:5] / 2**16).round()
    return DISPLAY.get((a, b, c, d), 1)


def _picture(frame: av.VideoFrame) -> Image.Image:
    if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
        image = _on_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = frame.to_image()
    turn = UPRIGHT.get(_orientation(frame))
    return image if turn is None else image.transpose(turn)
