"""What a row's `path` holds, and pictures: only known formats are opened, and all is seen upright
and on white."""

import base64
import contextlib
import hashlib
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine import DataError

# Formats that hold what they show. A playlist (HLS, DASH, concat), a pattern of names or PostScript
# opens other things.
PICTURES = "JPEG PNG WEBP GIF BMP TIFF JPEG2000 PPM AVIF".split()
NOTHING = (-9999, -32767, -32768)  # stand in depth and height maps where nothing was measured
# what may be base64 that was cut off, or a path without a dot
BASE64 = re.compile(r"[A-Za-z0-9+/_=\r\n-]{64,}")
UPRIGHT = {  # EXIF orientation: what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Embedded:
    """A picture or clip inside a table, as bytes or as text (base64, or a data: URI): read when it
    is asked for, so that the media of a dataset are never in memory together."""

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
    """Of a picture (frames 1, rate 1) or clip, upright: frames, height, width, frames a second
    (their mean)."""

    frames: int
    height: int
    width: int
    rate: float = 1.0


def gallery_file(id: str) -> str:
    """The name of the file that keeps a picture of the row `id`: an id may be too long for one, or
    differ from another only in what a name cannot hold."""
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
    if BASE64.fullmatch(cell) and not os.path.exists((root or Path()) / cell):
        start = name if len(cell) <= 200 else f"{cell[:40]}..."
        raise DataError(
            f"path: {start} does not exist, and is no whole base64 ({len(cell)} characters). Give "
            "a path, or all of the picture"
        )
    if re.match(r"(?!file:)[a-z][a-z0-9+.-]+://", cell, re.IGNORECASE):
        raise DataError(
            f"path: {name} is a web address. Download it, and give the path of the file"
        )
    if root is None:
        raise DataError(
            f"path: {name} is a path, but the dataset is not on this disk. Give pictures with "
            "their bytes"
        )
    if ".." in Path(cell).parts:
        raise DataError(
            f"path: {name} leaves the folder of the data. Move the file there, or give an "
            "absolute path"
        )
    return root / cell.removeprefix("file://")


def _is_data(text: str) -> bool:
    return text[:5].lower() == "data:"


def _is_base64(text: str) -> bool:
    """Is it base64 throughout, and longer than most paths? The smallest picture that says something
    is longer."""
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
    # of the alphabet for URLs, too
    plain = "".join(text.splitlines()).replace("-", "+").replace("_", "/")
    return base64.b64decode(plain, validate=True)


def stream_of(medium: Path | bytes | Embedded) -> Path | io.BytesIO:
    """What PIL and PyAV open."""
    if isinstance(medium, Embedded):
        return io.BytesIO(medium.read())
    return io.BytesIO(medium) if isinstance(medium, bytes) else medium


def name_of(medium: Media) -> str:
    return (
        _short(str(medium))
        if isinstance(medium, Path | Embedded)
        else "the bytes or the PIL image of this row"
    )


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."


def trace(medium: Media) -> tuple:
    """A fingerprint that changes when the medium does: a file's path, size and modification time,
    or a hash of the content."""
    if isinstance(medium, Path):
        stat = medium.stat()
        return str(medium), stat.st_size, stat.st_mtime_ns
    content = medium.read() if isinstance(medium, Embedded) else medium
    look = (content.mode, content.size) if isinstance(content, Image.Image) else ()
    return *look, hashlib.sha256(content.tobytes() if look else content).hexdigest()


def read_image(medium: Media) -> Image.Image:
    """The picture upright, in RGB; transparency becomes white, as in qwen-vl-utils, not black. Of
    an MPO, a phone's picture with previews or a second lens, the first. Greys of more than 8 bits:
    `_grey`. DataError where it cannot be read."""
    try:
        return _read_image(medium)
    except DataError:
        raise
    except Exception as error:  # PIL raises many kinds; all of them mean an unreadable file
        raise DataError(f"path: cannot read {name_of(medium)} as image ({error})") from error


def _read_image(medium: Media) -> Image.Image:
    image = medium if isinstance(medium, Image.Image) else _open_image(medium)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise DataError(
            f"path: {name_of(medium)} is animated ({image.n_frames} frames). Give it as video, or "
            "one frame of it"
            if image.format in ("GIF", "PNG")
            else f"path: {name_of(medium)} holds {image.n_frames} pictures. Give one of them"
        )
    image.load()  # verify() would pass a truncated JPEG; and a TIFF turns upright here
    # not ImageOps.exif_transpose, which writes the EXIF anew and fails where another tag is damaged
    turn = UPRIGHT.get(image.getexif().get(0x0112))
    image = on_white(_grey(image) if image.mode[0] in "IF" else image)
    return image if turn is None else image.transpose(turn)


def _open_image(medium: Media) -> Image.Image:
    Image.init()
    try:
        return Image.open(
            stream_of(medium), formats=[name for name in PICTURES if name in Image.OPEN]
        )
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(
            f"its format is none of {', '.join(PICTURES)}: convert it"
        ) from error


def on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Greys of modes I;16, I and F in 8 bits, linearly, with nothing cut off.

    Integers within 16 bits: black is 0 and white is 2^depth - 1, by the least usual depth (8, 10,
    12, 14 or 16 bits) that holds them all. So 16 bits are divided by 257, and 12 bits in a file of
    16 are not dark. Floats within [0, 1]: white is 1. Others have no white of their own: black is
    the least value, and white the greatest. What is no number is black, and so is what marks that
    nothing was measured. Where a TIFF says that 0 is white, all is the other way.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and image.format == "TIFF" and tags.get(339, (1,)) == (1,):
        values = values.view(np.uint32)  # by its SampleFormat; PIL has signed integers only
    empty = np.isnan(values) | np.isin(values, NOTHING)
    with contextlib.suppress(ValueError):
        empty |= values == float(tags.get(42113, "nan").strip(" \0"))  # GDAL's own
    # without the ends of the type
    known = values[~empty & (np.abs(values.astype(np.float64)) < 1e38)]
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
