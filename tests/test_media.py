"""media.py: only known formats are opened, pictures and clips are seen as people see them, clips go
by timestamps."""

import base64
import functools
import io
import itertools
import json
import os
import struct
import threading
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageOps

import data
from engine import media, media_check, video

PHOTO = skimage.data.camera()[100:228, 160:320]  # 128 x 160, greys from 2 to 252


def photo(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()[:96, :128]).convert(mode)


def packed(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def row(path, **changes) -> dict:
    options = {"problem_type": "multiple choice", "options": ["A. a", "B. b"], "solution": "A"}
    return {
        "data_type": "image",
        "problem": "Which?",
        "path": path,
        "problem_id": "0",
        **options,
        **changes,
    }


def loaded(folder: Path, *rows: dict) -> list[data.Sample]:
    (folder / "train.json").write_text(json.dumps(rows))
    return data.load(folder)["train"]


def both(folder: Path, content: bytes, name: str) -> list:
    """The same as a file and as bytes."""
    (folder / name).write_bytes(content)
    return [folder / name, content]


# --- pictures: upright ----------------------------------------------------------------------------


def turned(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def by_exif(image: Image.Image, value: int) -> Image.Image:
    """By PIL."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(packed(image, "PNG", exif=turned(value)))))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, form, value):
    content = packed(photo(), form, exif=turned(value))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert upright.size == ((96, 128) if value >= 5 else (128, 96))
    for medium in (*both(tmp_path, content, "photo"), Image.open(io.BytesIO(content))):
        assert np.array_equal(np.asarray(media.read_image(medium)), np.asarray(upright))
        size = media_check.check_media(medium, "image")
        assert (size.width, size.height) == upright.size


def test_a_damaged_tag_beside_the_orientation_does_no_harm():
    exif = turned(6)
    exif[0x011A] = 72.0
    content = packed(
        photo(), "JPEG", exif=exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x00\x00\x05")
    )
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert media.read_image(content).size == (96, 128)


@pytest.mark.parametrize("mode", ["P", "LA", "I;16", "1"])
def test_pictures_of_other_modes_are_turned_too(mode):
    image = Image.new(mode, (60, 40))
    assert media.read_image(packed(image, "PNG", exif=turned(8))).size == (40, 60)


# --- pictures: greys ------------------------------------------------------------------------------


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def deep(bits: int) -> np.ndarray:
    return np.rint(PHOTO / 255 * (2**bits - 1)).astype(np.uint16)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_greys_in_16_bits_are_those_of_the_photograph(form, bits):
    content = packed(Image.fromarray(deep(bits)), form)
    shown = np.asarray(media.read_image(content)).astype(int)
    assert shown.shape == (*PHOTO.shape, 3) and np.abs(shown - PHOTO[..., None]).max() <= (
        bits < 16
    )


WIDE = {  # what has no white of its own is shown from its least to its greatest value
    "int32": PHOTO.astype(np.int32) * 2**22,
    "uint32": PHOTO.astype(np.uint32) * 2**24,  # half of it is negative to PIL
    "int16 below zero": (PHOTO.astype(np.int16) - 1000) * 8,
    "float32 of some metres": PHOTO.astype(np.float32) / 100,
    "float32 beyond 16 bits": PHOTO.astype(np.float32) * 1e6,
    "float32 below zero": PHOTO.astype(np.float32) / 100 - 1.5,
}


@pytest.mark.parametrize("kind", WIDE)
def test_a_wide_grey_is_shown_from_least_to_greatest(kind):
    values = WIDE[kind].astype(float)
    expected = (values - values.min()) / (values.max() - values.min()) * 255
    shown = np.asarray(media.read_image(tiff(WIDE[kind])))[..., 0]
    assert np.abs(shown - expected).max() <= 0.51 and shown.min() == 0 and shown.max() == 255


def test_floats_from_0_to_1_are_those_of_the_photograph():
    shown = np.asarray(media.read_image(tiff((PHOTO / 255).astype(np.float32))))
    assert np.array_equal(shown[..., 1], PHOTO)


def test_what_is_no_number_is_black_and_the_rest_stays():
    values = (PHOTO / 255).astype(np.float32)
    values[0, :4] = np.nan, np.inf, -np.inf, 0.5
    shown = np.asarray(media.read_image(tiff(values)))[..., 0]
    assert shown[0, :4].tolist() == [0, 255, 0, 128] and np.array_equal(shown[1:], PHOTO[1:])


@pytest.mark.parametrize("kind", ["16 bits", "floats", "8 bits"])
def test_a_tiff_whose_0_is_white_is_no_negative(kind):
    """As scanners and X-ray machines write them; those of 8 bits PIL turns itself."""
    values = {"16 bits": deep(16), "floats": (PHOTO / 255).astype(np.float32), "8 bits": PHOTO}[
        kind
    ]
    shown = np.asarray(media.read_image(tiff(values, photometric="miniswhite")))[..., 0]
    assert np.array_equal(shown, 255 - PHOTO)


@pytest.mark.parametrize(
    ("values", "nothing", "options"),
    [
        (PHOTO.astype(np.float32) / 255, -9999, {}),
        (PHOTO.astype(np.float32) / 255, np.finfo(np.float32).min, {}),
        (PHOTO.astype(np.float32) / 255, -1, {"extratags": [(42113, "s", 0, "-1", True)]}),
        (deep(16).astype(np.int32), -32768, {}),
    ],
)
def test_places_where_nothing_was_measured_are_black(values, nothing, options):
    """As in depth maps and GeoTIFFs: one such pixel would make all others white. The rest of the
    picture stays as it is."""
    values = values.copy()
    values[0, :3] = nothing
    shown = np.asarray(media.read_image(tiff(values, **options)))[..., 0]
    assert shown[0, :3].tolist() == [0, 0, 0] and np.array_equal(shown[1:], PHOTO[1:])


@pytest.mark.parametrize("value", [0, 7, 65535])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_a_grey_of_one_value_is_read(kind, value):
    assert media.read_image(tiff(np.full((32, 32), value, kind))).mode == "RGB"


# --- pictures: on white ---------------------------------------------------------------------------


def inked(mode: str) -> bytes:
    """Black ink in the middle of a ground that is transparent, and black or another colour behind
    that."""
    x = np.zeros((64, 64), np.uint8)
    x[20:44, 20:44] = 255
    ink = Image.fromarray(x)
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, ink.size)
        image.putalpha(ink)
        return packed(image, "PNG")
    if mode == "I;16":  # of 16 bits, whose transparent grey is 300
        return packed(
            Image.fromarray(np.where(x, 0, 300).astype(np.uint16)), "PNG", transparency=300
        )
    if mode == "RGB":
        return packed(
            Image.merge("RGB", [ImageOps.invert(ink)] * 3), "PNG", transparency=(255, 255, 255)
        )
    return packed(
        ImageOps.invert(ink).convert(mode), "GIF" if mode == "P" else "PNG", transparency=255
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "P", "I;16"])
def test_what_is_transparent_is_white_in_every_mode(mode):
    x = np.asarray(media.read_image(inked(mode)))
    assert x[0, 0].tolist() == [255] * 3 and x[32, 32].tolist() == [0] * 3


# --- pictures: several in a file ------------------------------------------------------------------


def test_a_phones_jpg_with_a_preview_is_its_first_picture(tmp_path):
    small = photo().resize((64, 48))
    content = packed(photo(), "MPO", save_all=True, append_images=[small], quality=95)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    (tmp_path / "IMG_1.jpg").write_bytes(content)
    [sample] = loaded(tmp_path, row("IMG_1.jpg"))
    assert sample.sizes == (media.Size(1, 96, 128),)
    error = np.asarray(media.read_image(sample.media[0]), float) - np.asarray(photo())
    assert np.abs(error).mean() < 4


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("GIF", r"animated \(2 frames\). Give it as video"),
        ("PNG", r"animated \(2 frames\). Give it as video"),
        ("TIFF", "holds 2 pictures. Give one of them"),
        ("WEBP", "holds 2 pictures. Give one of them"),  # FFmpeg reads no moving WebP
    ],
)
def test_other_files_of_several_pictures_are_refused(form, words):
    content = packed(photo(), form, save_all=True, append_images=[photo().rotate(90)])
    with pytest.raises(data.DataError, match=words):
        media_check.check_media(content, "image")


# --- known formats only ---------------------------------------------------------------------------


PAN = skimage.data.astronaut()[200:264]


def pattern(i: int, size=(96, 64)) -> np.ndarray:
    """A frame of a pan over a photograph that tells its number, in 12 bits, as black and white
    squares."""
    x = PAN[: size[1], i % 380 : i % 380 + size[0]].copy()
    for k in range(12):
        x[:8, 8 * k : 8 * k + 8] = 255 * (i >> k & 1)
    return x


def write(
    path: Path,
    frames=300,
    codec="libx264",
    rate=25,
    pix="yuv420p",
    times=None,
    form=None,
    mux=None,
    **options,
):
    with av.open(str(path), "w", format=form, options=mux or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(pattern(i), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copied(source: Path, path: Path, change, mux=None) -> Path:
    """The same stream with other packets: change(i, packet) -> bytes, having set what else it
    wants."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=mux or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(p for p in old.demux(video=0) if p.size):
            other = av.Packet(change(i, packet))
            other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
            other.is_keyframe, other.duration, other.stream = (
                packet.is_keyframe,
                packet.duration,
                stream,
            )
            new.mux(other)
    return path


NAMED = "its format is none of"
PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile CLIP\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\nCLIP\n#EXT-X-ENDLIST\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "text": "CLIP\n" * 40,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """12 s of 25 frames, a key frame every 2 s, frames that refer forwards and backwards."""
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", g="50")


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "list.ffconcat"])
def test_a_playlist_is_no_clip_whatever_its_name(clip, tmp_path, kind, name):
    (tmp_path / "real.mp4").write_bytes(clip.read_bytes())
    for medium in both(tmp_path, PLAYLISTS[kind].replace("CLIP", "real.mp4").encode(), name):
        for read in (
            video.read_video,
            lambda m: media_check.check_media(m, "video"),
            lambda m: media_check.check_media(m, "image"),
        ):
            with pytest.raises(
                data.DataError, match=f"cannot (read|decode).*({NAMED}.*convert it|Invalid data)"
            ) as error:
                read(medium)
            assert "\n" not in str(error.value)


def test_what_a_playlist_names_is_not_opened(clip, tmp_path):
    """Without the list of formats the clip that it names is read as if it were the row's."""
    listed = tmp_path / "clip.mp4"
    listed.write_text("ffconcat version 1.0\nfile real.mp4\n")
    (tmp_path / "real.mp4").write_bytes(clip.read_bytes())
    with av.open(str(listed)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 300
    with pytest.raises(data.DataError, match=NAMED):
        media_check.check_media(listed, "video")


def test_postscript_named_png_is_not_interpreted(tmp_path):
    (tmp_path / "figure.png").write_bytes(packed(photo("RGB"), "EPS"))
    with pytest.raises(
        data.DataError,
        match=f"cannot read .*figure.png as image .{NAMED} JPEG, PNG, .*: convert it",
    ):
        media_check.check_media(tmp_path / "figure.png", "image")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_given_as_clip_is_told_to_be_one(tmp_path, form):
    for medium in both(tmp_path, packed(photo(), form), "photo"):
        with pytest.raises(data.DataError, match="has 1 frame. Give a picture as image"):
            media_check.check_media(medium, "video")


def test_a_clip_given_as_picture_is_refused_in_a_line(clip):
    for medium in (clip, clip.read_bytes()):
        with pytest.raises(data.DataError, match="path: .* is a clip. Give it as video"):
            media_check.check_media(medium, "image")


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_files_that_were_joined_are_no_clip_of_half_the_length(tmp_path, name):
    """Their times begin anew, so that the second half would be taken for the first."""
    whole = write(tmp_path / name, 100, "mpeg2video")
    assert media_check.check_media(whole, "video").frames == 100
    content = whole.read_bytes()
    for medium in both(tmp_path, content + content, f"two-{name}"):
        with pytest.raises(
            data.DataError,
            match=r"its timestamps restart after 4\S* s, as in joined files|is cut off or da",
        ):
            media_check.check_media(medium, "video")


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.flv", "a.avi", "a.mp4"])
def test_a_clip_that_was_cut_off_is_no_short_clip(tmp_path, name):
    codec = {"a.webm": "libvpx", "a.flv": "flv", "a.avi": "mpeg4"}.get(name, "libx264")
    whole = write(tmp_path / name, 300, codec)
    assert media_check.check_media(whole, "video").frames == 300
    content = whole.read_bytes()
    for medium in both(tmp_path, content[: len(content) // 2], f"half-{name}"):
        with pytest.raises(data.DataError, match="path: cannot read .* as video"):
            media_check.check_media(medium, "video")


def test_sound_that_goes_on_after_the_last_frame_is_no_cut(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream, sound = (
            container.add_stream("libx264", rate=25),
            container.add_stream("aac", rate=16_000),
        )
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pattern(i), format="rgb24")))
        for i in range(150):  # ten seconds in all
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            noise.sample_rate, noise.pts, noise.time_base = 16_000, 1024 * i, Fraction(1, 16_000)
            container.mux(sound.encode(noise))
        container.mux([*stream.encode(), *sound.encode()])
    assert media_check.check_media(tmp_path / "a.mkv", "video") == media.Size(50, 64, 96, 25.0)


@pytest.mark.parametrize("content", [b"", b"<html>", packed(photo(), "PNG")[:500]])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for path in (tmp_path / "a.png", tmp_path / "gone.png"):
        with pytest.raises(data.DataError, match=f"path: cannot read .*{path.name} as image"):
            media.read_image(path)


def test_a_name_with_a_colon_is_a_file_and_no_protocol(clip, tmp_path, monkeypatch):
    (tmp_path / "12:30.mp4").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert media_check.check_media(Path("12:30.mp4"), "video").frames == 300
    assert len(video.read_video(Path("12:30.mp4"))[0]) == 16


def test_a_title_in_another_encoding_does_not_lose_the_clip(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["title"] = "caf\u00e9 XX"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pattern(i), format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    latin = content.replace("caf\u00e9 XX".encode(), "caf\u00e9 XXX".encode("latin-1"))
    if video.LENIENT:
        with pytest.raises(UnicodeDecodeError):
            av.open(io.BytesIO(latin))
    assert (
        media_check.check_media(latin, "video").frames
        == len(video.read_video(latin, 10.0, 20)[0])
        == 20
    )


# --- clips: seen upright, on white, in one size ---------------------------------------------------


@pytest.mark.parametrize("value", range(2, 9))
def test_a_clip_is_turned_as_a_player_turns_it(clip, value):
    """The matrix of an orientation is where its turn puts the corners (0, 0), (1, 0) and (0, 1) of
    a picture."""
    corners = Image.fromarray(np.arange(1, 5, dtype=np.uint8).reshape(2, 2))  # 1 2 over 3 4
    shown = np.asarray(by_exif(corners, value))
    place = {int(shown[y, x]): (x, y) for x in (0, 1) for y in (0, 1)}
    (a, b), (c, d) = (np.subtract(place[k], place[1]) for k in (2, 3))
    content = bytearray(clip.read_bytes())
    at = content.find(b"tkhd") + 44
    one = 2**16
    content[at : at + 36] = struct.pack(
        ">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 2**30
    )
    plain, frames = video.read_video(clip)[0], video.read_video(bytes(content))[0]
    assert len(frames) == 16
    for before, after in zip(plain, frames, strict=True):
        assert np.array_equal(np.asarray(after), np.asarray(by_exif(before, value)))
    size = media_check.check_media(bytes(content), "video")
    assert (size.width, size.height) == frames[0].size == ((64, 96) if value >= 5 else (96, 64))


def test_what_is_transparent_in_a_moving_gif_is_white():
    steps = []
    for i in range(4):
        x = np.full((64, 64), 1, np.uint8)
        x[20:44, 10 + i : 30 + i] = 0
        step = Image.fromarray(x, "P")
        step.putpalette([0, 0, 0, 0, 0, 0])  # ink, and a ground that is black behind
        steps.append(step)
    content = packed(
        steps[0],
        "GIF",
        save_all=True,
        append_images=steps[1:],
        transparency=1,
        disposal=2,
        duration=100,
    )
    frames = [np.asarray(frame) for frame in video.read_video(content, 10.0)[0]]
    assert len(frames) == 4
    for i, frame in enumerate(frames):
        assert (frame[0] == 255).all() and (frame[20:44, 10 + i : 30 + i] == 0).all()


def test_a_clip_whose_size_changes_is_read_in_one_size(tmp_path):
    parts = []
    for size in ((96, 64), (128, 64)):
        with av.open(io.BytesIO(), "w", format="webm") as container:
            stream = container.add_stream("libvpx", rate=10)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for i in range(10):
                parts += stream.encode(av.VideoFrame.from_ndarray(pattern(i, size), format="rgb24"))
            parts += stream.encode()
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i, part in enumerate(parts):
            packet = av.Packet(bytes(part))
            packet.pts = packet.dts = i
            packet.time_base, packet.is_keyframe, packet.stream = (
                Fraction(1, 10),
                part.is_keyframe,
                stream,
            )
            container.mux(packet)
    with av.open(str(tmp_path / "a.webm")) as container:
        assert {frame.width for frame in container.decode(video=0)} == {96, 128}
    assert {frame.size for frame in video.read_video(tmp_path / "a.webm", 10.0)[0]} == {(96, 64)}


@pytest.mark.parametrize("order", [1, -1], ids=["full range first", "limited range first"])
def test_the_colours_of_a_clip_are_not_those_of_the_last(tmp_path, order):
    """A thread that reads a clip of full range and then one of limited range, or the other way
    round, shows both as FFmpeg alone does."""
    clips = [
        write(tmp_path / "full.avi", 10, codec="mjpeg", pix="yuvj420p"),
        write(tmp_path / "tagged.mp4", 10, **{"x264-params": "fullrange=on"}),
        write(tmp_path / "limited.avi", 10, codec="mpeg4"),
    ]
    for path in clips[::order]:
        got, _ = video.read_video(path, 25.0, 99)
        for image, (_, want) in zip(got, every_frame(path), strict=True):
            assert np.array_equal(np.asarray(image), want)


# --- clips: by timestamps -------------------------------------------------------------------------


def every_frame(path: Path) -> list[tuple[int, np.ndarray]]:
    with av.open(str(path)) as container:
        return [
            (frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]


def nearest(frames: list[tuple[int, np.ndarray]], n: int) -> list[np.ndarray]:
    """By brute force: of all frames the one nearest to each of n times, equally far apart."""
    times = [time for time, _ in frames]
    wanted = [times[0] + Fraction(i * (times[-1] - times[0]), n - 1) for i in range(n)]
    return [
        frames[min(range(len(times)), key=lambda k: abs(times[k] - moment))][1] for moment in wanted
    ]


UNEVEN = [
    0,
    *sorted(np.random.default_rng(0).choice(np.arange(1, 12_000), 299, replace=False).tolist()),
]
SCREEN = [
    *range(0, 1000, 10),
    *range(1000, 12_000, 500),
]  # much happens in the first second, and then little
X264 = {
    "open GOP": "open-gop=1:keyint=40:min-keyint=40:scenecut=0",
    "intra refresh": "intra-refresh=1:keyint=50",
}


def trimmed(path: Path) -> Path:
    """A second and a half cut away by an edit list, as a phone does it: the key frame before is
    there and not shown."""
    long = write(path.with_suffix(".mov"), g="50")
    with (
        av.open(str(long)) as old,
        av.open(
            str(path), "w", options={"avoid_negative_ts": "disabled", "use_editlist": "1"}
        ) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        cut = int(1.5 / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
                new.mux(packet)
    return path


def all_called_key(path: Path) -> Path:
    def change(i, packet):
        packet.is_keyframe = True
        return bytes(packet)

    return copied(write(path.with_suffix(".mov"), codec="mpeg4", g="50"), path, change)


CLIPS = {  # kind: (file name, how it is made)
    "B-frames": ("a.mp4", dict(g="50")),
    "one key frame": ("a.mp4", dict(g="9999", sc_threshold="0")),
    "open GOP": ("a.mp4", {"x264-params": X264["open GOP"]}),
    "open GOP in MKV": ("a.mkv", {"x264-params": X264["open GOP"]}),
    "open GOP in TS": ("a.ts", {"x264-params": X264["open GOP"]}),
    "one key frame in TS": ("a.ts", dict(g="9999", sc_threshold="0")),
    "no key frames": ("a.mp4", {"x264-params": X264["intra refresh"]}),
    "fragments": ("a.mp4", dict(g="50", mux={"movflags": "frag_keyframe+empty_moov+skip_trailer"})),
    "MPEG-4": ("a.mp4", dict(codec="mpeg4", g="50", bf="2")),
    "VP8": ("a.webm", dict(codec="libvpx", g="50", deadline="realtime", **{"cpu-used": "8"})),
    "VP8, live": (
        "a.webm",
        dict(codec="libvpx", g="50", deadline="realtime", mux={"live": "1"}, **{"cpu-used": "8"}),
    ),
    "VP9": ("a.webm", dict(codec="libvpx-vp9", g="50", deadline="realtime", **{"cpu-used": "8"})),
    "MJPEG": ("a.avi", dict(codec="mjpeg", pix="yuvj420p")),
    "MPEG-4 in AVI": ("a.avi", dict(codec="mpeg4", g="50")),
    "FLV": ("a.flv", dict(g="50")),
    "WMV": ("a.wmv", dict(codec="wmv2", g="50")),
    "MPEG-2": ("a.mpg", dict(codec="mpeg2video", g="12", bf="2")),
    "GIF": ("a.gif", dict(codec="gif", pix="rgb8")),
    "APNG": ("a.apng", dict(codec="apng", pix="rgb24", form="apng")),
    "uneven": ("a.mp4", dict(times=UNEVEN, g="50")),
    "uneven in MKV": ("a.mkv", dict(times=UNEVEN, g="50")),
    "a screen": ("a.mkv", dict(times=SCREEN, frames=len(SCREEN), g="50")),
    "begins late": ("a.mkv", dict(times=[7000 + 40 * i for i in range(300)], g="50")),
    "an edit list": ("a.mp4", trimmed),
    "every frame called key": ("a.mp4", all_called_key),
}


@pytest.fixture(scope="module", params=CLIPS)
def any_clip(request, tmp_path_factory) -> Path:
    name, how = CLIPS[request.param]
    path = tmp_path_factory.mktemp("any") / name
    return how(path) if callable(how) else write(path, **how)


def tick(path: Path) -> Fraction:
    with av.open(str(path)) as container:
        return container.streams.video[0].time_base


def test_the_clips_refer_backwards_and_begin_anew(clip):
    """So that what follows says something: frames are stored in another order, and key frames are
    few."""
    with av.open(str(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = [packet.pts for packet in packets]
    assert times != sorted(times) and sum(packet.is_keyframe for packet in packets) in range(6, 10)


def test_frames_are_those_nearest_in_time_of_all(any_clip):
    frames, size = every_frame(any_clip), media_check.check_media(any_clip, "video")
    assert (size.frames, size.height, size.width) == (len(frames), 64, 96)
    seconds = float((frames[-1][0] - frames[0][0]) * tick(any_clip))
    for medium, fps, most in (
        (any_clip, 2.0, 16),
        (any_clip.read_bytes(), 20.0, 38),
        (any_clip, 0.1, 16),
    ):
        shown, rate = video.read_video(medium, fps, most)
        # what visual_tokens counts with
        assert len(shown) == video.frames_taken(size.frames, size.rate, fps, most)
        assert rate == pytest.approx((len(shown) - 1) / seconds)
        for got, want in zip(shown, nearest(frames, len(shown)), strict=True):
            assert np.array_equal(np.asarray(got), want)


def test_an_avi_goes_by_its_frame_rate(tmp_path):
    """It has no timestamps, and those that FFmpeg makes up for frames stored in another order are
    wrong."""
    frames = every_frame(write(tmp_path / "a.avi", g="50"))
    times = [time for time, _ in frames]
    assert times != sorted(times)
    size = media_check.check_media(tmp_path / "a.avi", "video")
    assert (size.frames, size.rate) == (300, 25)
    shown, rate = video.read_video(tmp_path / "a.avi")
    assert rate == pytest.approx(15 / (299 / 25))
    for got, want in zip(
        shown, nearest([(i, frame) for i, (_, frame) in enumerate(frames)], 16), strict=True
    ):
        assert np.array_equal(np.asarray(got), want)


@pytest.mark.parametrize(
    ("frames", "fps", "most"),
    [(300, 2.0, 16), (300, 9.0, 7), (299, 9.0, 5), (50, 9.0, 3), (31, 2.5, 99)],
)
def test_at_a_constant_rate_frames_are_told_by_number(tmp_path, frames, fps, most):
    """As before there were timestamps: of n frames the i-th is number round(i (all - 1) / (n - 1)),
    halves to even."""
    every = every_frame(write(tmp_path / "a.mp4", frames, g="40"))
    shown, _ = video.read_video(tmp_path / "a.mp4", fps, most)
    n = min(most, round(frames / 25 * fps))
    assert len(shown) == n
    for i, got in enumerate(shown):
        assert np.array_equal(np.asarray(got), every[round(i * (frames - 1) / (n - 1))][1])


def test_hidden_frames_of_vp8_are_none_of_the_clips(tmp_path):
    def hide(i, packet):
        content = bytearray(bytes(packet))
        content[0] &= 0xEF if i % 10 == 7 else 0xFF  # the bit of the frame's header that shows it
        return bytes(content)

    whole = write(
        tmp_path / "whole.webm", codec="libvpx", g="50", deadline="realtime", **{"cpu-used": "8"}
    )
    path = copied(whole, tmp_path / "a.webm", hide)
    frames = every_frame(path)
    assert len(frames) == media_check.check_media(path, "video").frames == 270
    shown, _ = video.read_video(path)
    for got, want in zip(shown, nearest(frames, 16), strict=True):
        assert np.array_equal(np.asarray(got), want)


def test_a_webm_without_a_frame_rate_lasts_as_long_as_it_does(tmp_path):
    """What a browser records: no rate in the header, where FFmpeg makes one up, and no two frames
    equally far apart."""
    times = [i * 33 + (i * 7919) % 21 - 10 + 10 * (i == 0) for i in range(300)]
    path = write(
        tmp_path / "a.webm",
        codec="libvpx",
        times=times,
        form="webm",
        mux={"live": "1"},
        deadline="realtime",
    )
    content = bytearray(path.read_bytes())
    at = content.find(bytes.fromhex("23E383"))  # DefaultDuration becomes as many bytes of nothing
    length = content[at + 3] & 127
    content[at : at + 4 + length] = bytes([0xEC, 0x82 + length]) + bytes(2 + length)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert not container.streams.video[0].average_rate
    size, (frames, rate) = media_check.check_media(path, "video"), video.read_video(path)
    assert size.frames / size.rate == pytest.approx(9.9, abs=0.05)
    assert len(frames) == 16 and 1 / rate == pytest.approx(9.9 / 15, abs=0.005)


def test_no_step_is_longer_than_the_file_makes_it(tmp_path):
    """Told by number, 15 of 16 frames would be of the first second of 12."""
    path = write(tmp_path / "a.mkv", len(SCREEN), times=SCREEN, g="50")
    every = {frame.tobytes(): time for time, frame in every_frame(path)}
    frames, rate = video.read_video(path)
    steps = np.diff([every[np.asarray(frame).tobytes()] for frame in frames])
    assert (
        len(frames) == 16 and steps.max() <= 1000 / rate + 500 and steps.min() >= 1000 / rate - 500
    )


def test_a_frame_that_stands_for_long_is_there_as_often(tmp_path):
    path = write(tmp_path / "a.mkv", 5, times=[0, 100, 200, 9000, 10_000])
    every = [frame for _, frame in every_frame(path)]
    frames, rate = video.read_video(path, 2.0, 5)
    assert [
        next(i for i, f in enumerate(every) if np.array_equal(f, frame)) for frame in frames
    ] == [0, 2, 3, 3, 4]
    assert rate == pytest.approx(4 / 10)


def test_the_spacing_of_the_frames_reaches_the_positions(tmp_path, policy):
    write(tmp_path / "a.mkv", len(SCREEN), times=SCREEN, g="50")
    [sample] = loaded(tmp_path, row("a.mkv", data_type="video"))
    inputs = policy.encode(data.prompts([sample], True, 2.0, 8))
    assert inputs["video_grid_thw"][0, 0] == 4  # of two frames each
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 * SCREEN[-1] / 1000 / 7)


# --- clips: seeking -------------------------------------------------------------------------------


@pytest.fixture
def fed(monkeypatch) -> list[int]:
    """Counts the packets that are decoded after seeking, and the clips that are read through."""
    count, through = [0, 0], video._read_through

    def counted(skip, packets):
        for packet in itertools.dropwhile(skip, packets):
            count[0] += 1
            yield packet

    def read_through(*args):
        count[1] += 1
        return through(*args)

    monkeypatch.setattr(video, "dropwhile", counted)
    monkeypatch.setattr(video, "_read_through", read_through)
    return count


def repeated(source: Path, path: Path, times: int) -> Path:
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        length = round(Fraction(len(packets), 25) / packets[0].time_base)
        for i in range(times):
            for packet in packets:
                other = av.Packet(bytes(packet))
                other.pts, other.dts = packet.pts + i * length, packet.dts + i * length
                other.time_base, other.is_keyframe, other.stream = (
                    packet.time_base,
                    packet.is_keyframe,
                    stream,
                )
                new.mux(other)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_ten_minutes_are_read_as_quickly_as_one(tmp_path, fed, name):
    """x264 sets a key frame every 250, so 16 frames take 2,000 on average and 4,000 at most, of
    1,500 or 15,000."""
    minute = write(tmp_path / "minute.mp4", 1500, preset="ultrafast", bf="3", sc_threshold="0")
    video.read_video(repeated(minute, tmp_path / f"minute-{name}", 1))
    short, fed[0] = fed[0], 0
    video.read_video(repeated(minute, tmp_path / name, 10))
    assert fed[1] == 0 and short <= 1500 and fed[0] <= 16 * 250


@pytest.mark.parametrize(
    "kind", ["every frame called key", "no key frames", "GIF", "APNG", "MPEG-2"]
)
def test_what_cannot_be_sought_is_read_through_once(tmp_path, fed, kind):
    name, how = CLIPS[kind]
    video.read_video(how(tmp_path / name) if callable(how) else write(tmp_path / name, **how))
    assert fed[1] == 1


def test_a_stream_that_refuses_to_seek_is_read_through(clip, fed, monkeypatch):
    class Unseekable:
        def __init__(self, container):
            self.container = container

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def __getattr__(self, name):
            return getattr(self.container, name)

        def seek(self, *_, **__):
            raise av.error.PermissionError(1, "Operation not permitted")

    expected, opened = video.read_video(clip), video._open_video
    monkeypatch.setattr(video, "_open_video", lambda medium: Unseekable(opened(medium)))
    frames, rate = video.read_video(clip)
    assert fed[1] == 1 and rate == expected[1]
    assert all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(frames, expected[0], strict=True)
    )


# --- what a cell of `path` may hold ---------------------------------------------------------------


def test_base64_and_data_uris_are_pictures(tmp_path):
    content = packed(photo(), "PNG")
    text = base64.b64encode(content).decode()
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    uri = f"data:image/png;base64,{text}"
    forms = [text, lines, uri, f"DATA:;BASE64,{quote(text)}", f"data:image/png,{quote(content)}"]
    forms += [{"bytes": text, "path": None}, {"bytes": None, "path": uri}, [text, uri]]
    samples = loaded(tmp_path, *(row(form, problem_id=str(i)) for i, form in enumerate(forms)))
    assert [len(s.media) for s in samples] == [1] * 7 + [2]
    for medium in (medium for s in samples for medium in s.media):
        assert np.array_equal(np.asarray(media.read_image(medium)), np.asarray(photo()))
        assert len(repr(medium)) < 200 and hash(medium)  # without the table that it is in


def test_a_clip_in_base64_is_read(clip, tmp_path):
    text = base64.b64encode(clip.read_bytes()).decode()
    [sample] = loaded(tmp_path, row(text, data_type="video"))
    assert (
        sample.sizes[0].frames == 300
        and len(data.messages(sample, "?")[0]["content"][0]["video"]) == 16
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "https://example.org/a/photo.jpg?size=2",
            "is a web address. Download it, and give the path of the file",
        ),
        ("HTTP://example.org/" + "a" * 5000, r"\.\.\. is a web address"),
        ("s3://bucket/photo.jpg", "is a web address"),
        ("data:image/png;base64,iVBORw0KGgo", "cannot read the picture or clip in row 0 as image"),
        ("data:image/png;base64", "cannot read the picture or clip in row 0 as image"),
        (
            base64.b64encode(b"no picture, but a text of some length that was encoded").decode(),
            "its format is none of",
        ),
        ("x" * 5001, r"xxx\.\.\. does not exist"),
        ("a b/" * 1500, r"a b/[ab /]*\.\.\. does not exist"),
        ("null\0.png", "does not exist"),
    ],
)
def test_what_is_no_path_and_no_picture_is_told_in_a_line(tmp_path, path, words):
    (tmp_path / "train.json").write_text(json.dumps([row(path)]))
    with pytest.raises(data.DataError, match=words) as error:
        data.load(tmp_path)
    # the second: mend or skip
    assert len(str(error.value).splitlines()) == 2 and len(str(error.value)) < 600


def test_a_path_that_could_be_base64_is_a_path_if_it_is_there(tmp_path):
    name = "frames/UCF101/ApplyEyeMakeup/ApplyEyeMakeupg01c01/" + "0" * 18
    assert len(base64.b64decode(name, validate=True)) == 51
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(packed(photo(), "PNG"))
    assert loaded(tmp_path, row(name))[0].media == (tmp_path / name,)


def test_a_file_uri_is_the_path_in_it(tmp_path):
    (tmp_path / "a.png").write_bytes(packed(photo(), "PNG"))
    samples = loaded(tmp_path, row(f"file://{tmp_path}/a.png"), row("file://a.png", problem_id="1"))
    assert [s.media for s in samples] == [(tmp_path / "a.png",)] * 2


# --- what was good is kept ------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path, monkeypatch) -> list:
    """The media that are opened from now on; what is kept is in a folder of its own."""
    found, check_media = [], media_check.check_media

    def watched(medium, data_type):
        found.append(medium)
        return check_media(medium, data_type)

    monkeypatch.setattr(media_check, "check_media", watched)
    place = functools.partial(media_check.cached_assets_path, assets_dir=tmp_path / "kept")
    monkeypatch.setattr(media_check, "cached_assets_path", place)
    return found


@pytest.fixture
def folder(tmp_path, clip) -> Path:
    """Two pictures, one of them asked about twice and once more as text, and a clip."""
    (tmp_path / "a.png").write_bytes(packed(photo(), "PNG"))
    (tmp_path / "b.jpg").write_bytes(packed(photo("L"), "JPEG"))
    text = "data:image/png;base64," + base64.b64encode(packed(photo(), "PNG")).decode()
    paths = ["a.png", ["a.png", "b.jpg"], text]
    rows = [row(path, problem_id=str(i)) for i, path in enumerate(paths)]
    rows.append(row(str(clip), problem_id="clip", data_type="video"))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return tmp_path


def test_what_was_good_is_not_opened_again_until_it_changes(folder, opened):
    first = data.load(folder)["train"]
    assert len(opened) == 4 and opened.count(folder / "a.png") == 1
    assert [s.sizes for s in data.load(folder)["train"]] == [s.sizes for s in first] and len(
        opened
    ) == 4
    then = (folder / "a.png").stat()
    (folder / "a.png").touch()
    assert (folder / "a.png").stat().st_mtime_ns != then.st_mtime_ns
    assert data.load(folder)["train"][0] == first[0] and opened[4:] == [folder / "a.png"]
    then = (folder / "b.jpg").stat()
    (folder / "b.jpg").write_bytes(packed(photo("L").resize((40, 30)), "JPEG"))
    # of another size, as old as before
    os.utime(folder / "b.jpg", ns=(then.st_atime_ns, then.st_mtime_ns))
    assert data.load(folder)["train"][1].sizes[1] == media.Size(1, 30, 40) and opened[5:] == [
        folder / "b.jpg"
    ]


def test_what_is_kept_is_known_by_any_name_of_the_folder(
    folder, opened, monkeypatch, tmp_path_factory
):
    data.load(folder)
    monkeypatch.chdir(folder)
    for source in (".", Path.cwd(), f"../{folder.name}/", folder / "train.json"):
        data.load(source)
        assert len(opened) == (8 if source == folder / "train.json" else 4), source
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    data.load(folder)
    assert len(opened) == 8


def test_a_folder_that_is_gone_under_a_process_does_no_harm(folder, opened, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert len(data.load(folder)["train"]) == len(data.load(folder)["train"]) == 4


def test_other_code_checks_all_media_again(folder, monkeypatch, tmp_path):
    """What one version of the readers takes for good, a corrected one looks at again."""
    before = media_check.Checked(folder).file
    assert media_check.Checked(folder).file == before
    for module in (media, video):
        other = tmp_path / "other.py"
        other.write_bytes(Path(module.__file__).read_bytes() + b"# corrected\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(other))
            assert media_check.Checked(folder).file != before


def test_a_long_check_keeps_what_it_has_seen(folder, opened, monkeypatch):
    """A long check keeps what it has seen even if it is killed."""
    now = iter(range(0, 10**6, 61))
    monkeypatch.setattr(media_check.time, "monotonic", lambda: next(now))
    sizes = media_check.Checked(folder).each([([folder / "a.png"], "image")] * 300)
    assert [next(sizes) for _ in range(257)] == [
        (media.Size(1, 96, 128),)
    ] * 257  # and never comes to its end
    assert (
        len(json.loads(next((folder / "kept").rglob("*.json")).read_text())) == 1
        and len(opened) == 1
    )


def test_media_are_opened_side_by_side_each_once(tmp_path, monkeypatch):
    """Four rows that are there only together; a picture that many ask for is opened by one."""
    together, opened = threading.Barrier(2, timeout=60), []

    def check(medium, data_type):
        opened.append(medium)
        together.wait()
        return media.Size(1, 9, 9)

    monkeypatch.setattr(media_check, "check_media", check)
    monkeypatch.setattr(media_check.os, "cpu_count", lambda: 4)
    rows = [([name], "image") for name in (b"a", b"b", b"a", b"b")]
    assert list(media_check.Checked(tmp_path).each(rows)) == [
        (media.Size(1, 9, 9),)
    ] * 4 and sorted(opened) == [b"a", b"b"]


def test_what_is_bad_is_opened_and_told_every_time(folder, opened):
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:300])
    for _ in range(2):
        with pytest.raises(
            data.DataError, match=r"train.json row 1 \(1\), path: cannot read .*b.jpg"
        ):
            data.load(folder)
    assert opened.count(folder / "b.jpg") == 2 and len(opened) == 5
    (folder / "a.png").unlink()
    with pytest.raises(data.DataError, match="a.png does not exist"):
        data.load(folder)


def test_a_picture_is_no_clip_because_it_was_a_good_picture(folder, opened):
    data.load(folder)
    (folder / "train.json").write_text(json.dumps([row("a.png", data_type="video")]))
    with pytest.raises(data.DataError, match="has 1 frame. Give a picture as image"):
        data.load(folder)


def test_a_check_that_is_interrupted_keeps_what_it_has_seen(folder, opened, monkeypatch):
    with monkeypatch.context() as interrupted:
        check = media_check.check_media
        interrupted.setattr(
            media_check, "check_media", lambda m, kind: check(m, kind) if kind == "image" else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            data.load(folder)
    assert len(data.load(folder)["train"]) == 4 and len(opened) == 4
    (folder / "train.json").write_text(json.dumps([row("a.png")]))
    data.load(folder)
    # what is gone is not kept
    assert len(json.loads(next((folder / "kept").rglob("*.json")).read_text())) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": [1]}', "\0", "[" * 10**5])
def test_what_is_kept_and_cannot_be_read_is_not_believed(folder, opened, content):
    data.load(folder)
    (file,) = (folder / "kept").rglob("*.json")
    file.write_text(content)
    assert len(data.load(folder)["train"]) == 4 and len(opened) == 8
    assert len(data.load(folder)["train"]) == 4 and len(opened) == 8


def test_where_nothing_can_be_kept_all_is_opened(folder, opened):
    (folder / "kept").write_text("a file where a folder is needed")
    assert (
        len(data.load(folder)["train"]) == len(data.load(folder)["train"]) == 4 and len(opened) == 8
    )
