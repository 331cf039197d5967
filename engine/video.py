"""Clips by their timestamps: `read_video` seeks, so its cost does not grow with the length of the
clip.

PyAV reads them, because qwen-vl-utils' torchvision reader is gone from torchvision and its
torchcodec reader needs a system FFmpeg.
"""

import errno
import os
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence
from fractions import Fraction
from itertools import dropwhile, islice
from pathlib import Path
from threading import local
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from engine import DataError
from engine.media import UPRIGHT, Media, Size, name_of, on_white, stream_of

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
# (a, b, c, d) of a clip's display matrix, which shows (x, y) at (a x + c y, b x + d y): EXIF
# orientation
DISPLAY = {
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


# PyAV 19 reads metadata in any encoding, and has no such argument; before, it asks for UTF-8
LENIENT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


class NoSeeking(ValueError):
    """The frames of this clip cannot be told, or decoded, without all those before them."""


class Span(NamedTuple):
    """The times of a clip's first and last frame in units of `tick` seconds, and the seconds that
    it is shown, its last frame as long as the one before. stamped: they are its timestamps, and not
    its frames' numbers."""

    first: int
    last: int
    tick: Fraction
    seconds: float
    stamped: bool

    def moments(self, n: int) -> list[Fraction]:
        """n times at equal steps from the first frame's to the last's."""
        return [
            self.first + Fraction(i * (self.last - self.first), max(n - 1, 1)) for i in range(n)
        ]


class Key(NamedTuple):
    """A key frame: where to seek for it, its time, and whether it is shown itself."""

    at: int
    time: int
    is_shown: bool


def frames_taken(total: int, rate: float, fps: float, max_frames: int) -> int:
    """About `fps` a second, at least 2 and at most `max_frames`, and no more than there are."""
    # rate is total / seconds, and dividing by it gives the seconds up to rounding: a half must stay
    # a half
    return min(total, max_frames, max(2, round(round(total / rate * fps, 6))))


def size_of_video(medium: Media) -> Size:
    with _open_video(medium) as container:
        stream, stamps, shown, end = _video(container), [], None, {}
        # to decode every frame of every clip would take hours
        stream.codec_context.skip_frame = "NONKEY"
        for packet in container.demux(*_timed(container)):
            if packet.dts is not None:
                time, before = packet.dts * packet.time_base, end.get(packet.stream)
                if before is not None and time < before - 1:
                    raise ValueError(
                        f"its timestamps restart after {float(before):g} s, as in joined files: "
                        "convert it"
                    )
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
        height, width = (
            (shown.width, shown.height) if _orientation(shown) >= 5 else (shown.height, shown.width)
        )
        return Size(len(stamps), height, width, len(stamps) / _span(container, stamps).seconds)


def read_video(
    medium: Media, fps: float = 2.0, max_frames: int = 16
) -> tuple[list[Image.Image], float]:
    """n frames of a clip, upright, and how many a second there are of them, by the distance between
    them.

    n is about `fps` a second of the clip, at least 2 and at most `max_frames`. They are the frames
    whose timestamps are nearest to n times at equal steps from the first frame's to the last's, so
    that the rate is (n - 1) / (last time - first time), and a frame that is shown for long may be
    there twice. Only what leads from a key frame to one of them is decoded, or where that does not
    work, everything once.
    """
    try:
        try:
            frames, rate = _read_by_seeking(medium, fps, max_frames)
        except (NoSeeking, av.FFmpegError):
            frames, rate = _read_through(medium, fps, max_frames)
    # IndexError is PyAV's, of a stream found later
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise DataError(
            f"path: cannot decode {name_of(medium)} ({error}). Replace it, or leave its row out"
        ) from error
    # the recording of a window changes its size with it
    return [
        frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames
    ], rate


def _read_by_seeking(medium: Media, fps: float, max_frames: int) -> tuple[list[Image.Image], float]:
    with _open_video(medium) as container:
        # a frame of a GIF or APNG is drawn over the one before; in MPEG and OGG not every frame has
        # a timestamp
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
    wanted = deque(_nearest(times, moment, span.first) for moment in span.moments(n))
    pictures = []
    last = None
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
        # fewer frames than were told
        return pictures + [_picture(last) for _ in wanted], _rate(span, n)


def _rate(span: Span, n: int) -> float:
    return float((n - 1) / ((span.last - span.first) * span.tick)) if n > 1 else n / span.seconds


def _open_video(medium: Media) -> av.container.InputContainer:
    """FFmpeg looks at the name of the format before it lets the format open anything else."""
    stream = stream_of(medium)
    # else 12:30.mp4 would be of the protocol 12
    name = f"file:{stream}" if isinstance(stream, Path) else stream
    options = {"format_whitelist": ",".join(CLIPS), "protocol_whitelist": "file"}
    # not options=, which are also for each stream: older PyAV crashes where a stream is found later
    try:
        return av.open(name, container_options=options, **LENIENT)
    except av.FFmpegError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"its format is none of {', '.join(CLIPS.values())}: convert it"
        ) from error


def _video(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    stream = next(iter(container.streams.video), None)
    if stream is None or stream.codec_context is None:
        raise ValueError("no video stream that can be decoded")
    return stream


def _told_length(container: av.container.InputContainer) -> float | Fraction:
    """The length in seconds that the file's header states; 0 if it states none, or if FFmpeg
    derives it from the file's size."""
    stream, name = _video(container), container.format.name
    if name == "avi" and stream.average_rate:
        return stream.frames / stream.average_rate
    return (container.duration or 0) / av.time_base if name.startswith(("matroska", "flv")) else 0


def _timed(container: av.container.InputContainer) -> list[av.stream.Stream]:
    """The streams whose timestamps show where the file ends: video and audio, because sound may
    continue after the last new frame."""
    return [
        _video(container),
        *(stream for stream in container.streams.audio if stream.codec_context),
    ]


def _is_shown(packet: av.Packet) -> bool:
    """True if the packet is a visible frame: not the empty end packet, not cut by an edit list, not
    a hidden VP8 reference frame."""
    hidden = (
        packet.size > 0
        and packet.stream.codec_context.name == "vp8"
        and not memoryview(packet)[0] & 0x10
    )
    return packet.size > 0 and not packet.is_discard and not hidden


def _span(container, stamps: list[int | None]) -> Span:
    """The clip's span from its timestamps, or from its frame rate if it has none. The first and the
    last two timestamps are enough."""
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
    return Span(
        times[0], times[-1], tick, float((2 * times[-1] - times[-2] - times[0]) * tick), stamped
    )


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
            # a frame is decoded before it is shown: by now all have come that are shown up to
            # `after`
            if not packet.size or (
                after is not None and packet.dts is not None and packet.dts >= after
            ):
                break
            if packet.pts is None:
                raise NoSeeking
            packets.append((packet.pts, packet.is_keyframe, _is_shown(packet)))
            if _is_shown(packet) and packet.pts >= moment:
                after = packet.pts if after is None else min(after, packet.pts)
        # seeking goes by times of decoding, and in some formats to no key frame: is there one shown
        # before?
        keys = [i for i, (pts, is_key, _) in enumerate(packets) if is_key and pts <= moment]
        if keys:
            packets = packets[keys[-1] :]
            times = sorted(pts for pts, _, is_shown in packets if is_shown and pts >= packets[0][0])
            time = _nearest(times, moment, first)
            return time, next(
                Key(at, pts, is_shown)
                for pts, is_key, is_shown in reversed(packets)
                if is_key and pts <= time
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
        stream.codec_context.skip_frame = (
            "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
        )
        for frame in packet.decode():
            # earlier ones lack what they refer to
            if not begun and frame.pts is not None and frame.pts >= key.time:
                if key.is_shown and (not frame.key_frame or frame.pts > key.time):
                    raise NoSeeking  # no key frame, whatever the file says
                begun = True
            if begun and frame.pts in wanted:
                pictures[frame.pts] = _picture(frame)
        if len(pictures) == len(wanted):
            return pictures
    raise NoSeeking


def _nearest(times: Sequence[int], moment: Fraction, first: int) -> int:
    """The nearest of the sorted times. At a constant frame rate a tie goes to the frame with the
    even number (the first is 0)."""
    if not times:
        raise NoSeeking
    i = bisect_left(times, moment)
    if i in (0, len(times)):
        return times[min(i, len(times) - 1)]
    before, after = times[i - 1], times[i]
    odd = (before - first) % (2 * (after - before)) == after - before
    return (
        after if 2 * moment > before + after or (2 * moment == before + after and odd) else before
    )


def _orientation(frame: av.VideoFrame) -> int:
    """As EXIF numbers it: 1 is upright."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1
    a, b, _, c, d = (np.frombuffer(matrix, np.int32)[:5] / 2**16).round()
    return DISPLAY.get((a, b, c, d), 1)


class _Converters(local):
    """The converters of a thread, one for each pixel format. `to_image` alone makes a new one for
    each frame, which takes ten times as long as a small frame itself. One for all formats gives
    wrong colours under FFmpeg 7: after a frame of full range (yuvj420p) it takes the next for
    one. And one for each process: in a forked one it would wait for threads of its parent's."""

    def __init__(self) -> None:
        self.of = defaultdict(VideoReformatter)


CONVERTERS = _Converters()


def _picture(frame: av.VideoFrame) -> Image.Image:
    if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
        image = on_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        converter = CONVERTERS.of[os.getpid(), frame.format.name]
        image = converter.reformat(frame, format="rgb24").to_image()
    turn = UPRIGHT.get(_orientation(frame))
    return image if turn is None else image.transpose(turn)
