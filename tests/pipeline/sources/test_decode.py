"""Bytes become an image, or a message with reason and advice."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, noise, put, says, tree
from PIL import Image

from pipeline.errors import ImageError, PipelineError
from pipeline.sources.decode import decode, image_suffixes, is_deep_grey
from pipeline.sources.open import open_source
from pipeline.sources.source import REPAIR, REPAIR_OR_SKIP, FileSource, Row


def huge_png(side: int) -> bytes:
    """The header of an image of side², a few bytes long."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def photograph(path: Path) -> FileSource:
    """As `predict` has them."""
    rows = [Row(key=str(path), split="photos")]
    return FileSource(rows=rows, description="photographs", paths=[str(path)], advice=REPAIR)


FAULTS = {
    "empty": (b"", "the file is empty (0 bytes)"),
    "text": (b"<html>404</html>", "not an image of a kind that Pillow reads (16 bytes)"),
    "cut jpeg": (noise("JPEG")[:1500], "truncated or damaged: OSError"),
    "cut png": (noise("PNG")[:5000], "truncated or damaged: "),
    "cut webp": (noise("WEBP")[:700], "truncated or damaged: "),
    "cut gif": (noise("GIF")[:2000], "truncated or damaged: "),
    "header alone": (noise("PNG")[:20], "truncated or damaged: OSError"),
    "bad checksum": (noise("PNG")[:60] + b"\0\0\0" + noise("PNG")[63:], "truncated or damaged: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_image_is_named_with_reason_and_advice(tmp_path: Path, fault: str) -> None:
    data, reason = FAULTS[fault]
    tree(tmp_path, "a/0.png")
    path = put(tmp_path / "a/bad.jpg", data)
    source = open_source(tmp_path)
    with pytest.raises(ImageError) as caught:
        source.open(1)
    says(caught.value, str(path), reason, "--on-error skip")
    assert len(source.sha256(1)) == 32
    with pytest.raises(ImageError) as caught:
        photograph(path).open(0)
    says(caught.value, str(path), reason, "Repair or remove")
    assert "--on-error" not in str(caught.value)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_counts_at_the_lower_limit() -> None:
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ImageError, match=r"x\.png: decompression bomb\? 100000000 pixels") as caught,
    ):
        decode(huge_png(10_000), "x.png", REPAIR_OR_SKIP)
    says(caught.value, f"the limit is {Image.MAX_IMAGE_PIXELS}", "--on-error skip")
    with pytest.raises(ImageError, match=r"decompression bomb\? .*400000000 pixels.* limit of \d+"):
        decode(huge_png(20_000), "x.png", REPAIR_OR_SKIP)


def test_a_decompression_bomb_where_warnings_are_errors() -> None:
    with pytest.raises(ImageError, match=r"decompression bomb\? .*100000000 pixels"):
        decode(huge_png(10_000), "x.png", REPAIR_OR_SKIP)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: no such file\. Repair"):
        photograph(tmp_path / "gone.png").open(0)
    with pytest.raises(ImageError, match="cannot be read: Is a directory"):
        photograph(tmp_path).open(0)


def test_image_errors_survive_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(ImageError("x.png: broken")))
    assert isinstance(error, OSError)
    assert isinstance(error, PipelineError)
    assert str(error) == "x.png: broken"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_as_pillow_converts(mode: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16))
    else:
        image = Image.fromarray(pixels).convert("RGBA" if mode == "LA" else mode)
        image = image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    got = decode(stream.getvalue(), "x", REPAIR_OR_SKIP)
    assert (got.mode, got.size) == ("RGB", (16, 16))
    with Image.open(io.BytesIO(stream.getvalue())) as reference:
        assert reference.mode in (mode, mode.removesuffix(";16"))  # older releases widen it to I
        assert got.tobytes() == reference.convert("RGB").tobytes()


def grey(values: list[int], kind: str, mode: str) -> bytes:
    """One row of pixels."""
    image = Image.new(mode, (len(values), 1))
    for place, value in enumerate(values):
        image.putpixel((place, 0), value)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


DEEP = [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("TIFF", "I"), ("PPM", "I")]


@pytest.mark.parametrize(("kind", "mode"), DEEP)
def test_grey_of_16_bits_keeps_its_contrast(kind: str, mode: str) -> None:
    """Both byte orders; white is the top of the smallest usual depth that holds the values."""
    data = grey([0, 1, 128, 257, 32768, 65534, 65535], kind, mode)
    if kind == "TIFF":
        assert data[:2] == (b"MM" if mode == "I;16B" else b"II")
    assert levels(data) == [0, 0, 0, 1, 128, 255, 255]
    assert levels(grey([0, 300, 2048, 4095], kind, mode)) == [0, 19, 128, 255]  # 12 bits
    assert levels(grey([0, 256, 1023], kind, mode)) == [0, 64, 255]  # 10
    assert levels(grey([16383, 4096], kind, mode)) == [255, 64]  # 14
    assert levels(grey([7, 100, 255], kind, mode)) == [7, 100, 255]  # as ever


def levels(data: bytes) -> list[int]:
    got = np.asarray(decode(data, "x", REPAIR_OR_SKIP))
    assert (got == got[..., :1]).all()
    return got[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "values", "reason"),
    [
        ("F", [0.0, 0.5, 1.0], "grey of floating point has no white; save it with 8 or 16 bits"),
        ("I", [0, 65536], "grey from 0 to 65536: expected 0 to 65535; save it"),
        ("I", [-1000, 3000], "grey from -1000 to 3000: expected 0 to 65535; save it"),
    ],
)
def test_grey_without_a_white_is_refused(mode: str, values: list[int], reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(grey(values, "TIFF", mode), "scan.tif", REPAIR_OR_SKIP)
    says(caught.value, "scan.tif: ", reason, "--on-error skip")


def test_deep_grey_is_known_by_its_header() -> None:
    for kind, mode in DEEP:
        data = grey([0, 65535], kind, mode)
        assert is_deep_grey(data)
    assert not any(is_deep_grey(encoded(kind=kind)) for kind in ("PNG", "JPEG", "TIFF"))
    assert not any(is_deep_grey(encoded(kind="PNG", mode=mode)) for mode in ("L", "RGBA"))
    assert not any(is_deep_grey(data) for data, _ in FAULTS.values())


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(inside: bytes) -> bytes:
    """An IPTC file of 10 x 10 grey pixels that holds another file."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(data)) + data

    size = [(3, 20, struct.pack(">H", 10)), (3, 30, struct.pack(">H", 10))]
    head = [(3, 60, b"\x01\x00"), *size, (3, 120, b"\x00\x05")]
    return b"".join(field(*part) for part in head) + field(8, 10, inside)


@pytest.mark.parametrize("name", ["cat.jpg", "cat.png", "cat.eps"])
@pytest.mark.parametrize("inside", [False, True])
def test_no_image_starts_another_program(
    name: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    monkeypatch.setattr("subprocess.check_call", lambda command, **_: started.append(command))
    data = iptc(EPS) if inside else EPS
    with pytest.raises(ImageError) as caught:
        decode(data, name, REPAIR_OR_SKIP)
    refused = "the kind EPS, which is refused: for it, Pillow starts Ghostscript"
    says(caught.value, f"{name}: ", "not an image of a kind" if inside else refused, "Repair")
    assert not started


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_palette_with_transparency_keeps_its_colours_and_does_not_warn() -> None:
    stream = io.BytesIO()
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    image.save(stream, "PNG", transparency=bytes(range(256)))
    got = decode(stream.getvalue(), "x", REPAIR_OR_SKIP)
    with Image.open(io.BytesIO(stream.getvalue())) as reference:
        assert isinstance(reference.info["transparency"], bytes)
        assert got.tobytes() == reference.convert("RGB").tobytes()


def test_first_frame_of_an_animation_and_no_exif_rotation() -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (4, 6), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert decode(stream.getvalue(), "x", REPAIR_OR_SKIP).getpixel((0, 0)) == (255, 0, 0)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    frames[0].save(stream, "JPEG", exif=exif)
    assert decode(stream.getvalue(), "x", REPAIR_OR_SKIP).size == (4, 6)


def test_suffixes_are_those_that_pillow_reads() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif"} <= image_suffixes()
    assert not {".h5", ".pdf", ".eps", ".mpg", ".txt", ""} & image_suffixes()
