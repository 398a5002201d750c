"""Encoded bytes → one image, RGB, as timm decodes it; or an ImageError that says why not.

Pillow, then `convert("RGB")`. Hence no EXIF rotation, transparency is dropped rather than blended,
and the first frame of an animation counts. Grey of more than 8 bits, which Pillow turns white above
255, is first scaled from the depth that it fills (`_to_rgb`). Kinds that start another program are
refused, whatever the file is called.

What this file does not know: where bytes come from, tensors, transforms.
"""

from __future__ import annotations

import functools
import io

import numpy as np

from pipeline.errors import ImageError, needed_for

with needed_for("reading images", extra="extract"):
    from PIL import Image, UnidentifiedImageError

NOT_PHOTOGRAPHS = {  # Pillow registers these too, but for them it …
    "BUFR": "needs a plug-in",
    "EPS": "starts Ghostscript",
    "GRIB": "needs a plug-in",
    "HDF5": "needs a plug-in",
    "IPTC": "opens what is inside, of any kind",
    "MPEG": "decodes no frame",
    "PALM": "only writes them",
    "PDF": "only writes them",
    "WMF": "needs Windows",
}
GREY_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow's, of whole numbers above 8 bits
GREY_TOPS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # what scanners make


def decode(data: bytes, where: str, advice: str) -> Image.Image:
    """Encoded bytes → RGB image, as timm decodes; ImageError names `where` and ends in `advice`.

    Pillow warns of a decompression bomb above Image.MAX_IMAGE_PIXELS and refuses at twice that;
    here the lower limit counts. It is checked by hand because warning filters are not per thread.
    """
    try:
        if not data:
            raise _Refused("the file is empty (0 bytes)")
        with Image.open(io.BytesIO(data), formats=photograph_formats()) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise _Refused(f"decompression bomb? {pixels} pixels, the limit is {limit}")
            return _to_rgb(image)
    except MemoryError:
        raise
    except _Refused as error:
        reason = str(error)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"decompression bomb? {error}"
    except UnidentifiedImageError:
        reason = _unidentified(data)
    except Exception as error:  # decoders also raise SyntaxError, ValueError, struct.error, …
        reason = f"truncated or damaged: {type(error).__name__}: {error}"
    raise ImageError(f"{where}: {reason}. {advice}")


def is_deep_grey(data: bytes) -> bool:
    """Whether an encoded image is grey above 8 bits, by its header."""
    try:
        with Image.open(io.BytesIO(data), formats=photograph_formats()) as image:
            return image.mode in GREY_MODES
    except MemoryError:
        raise
    except Exception:  # `decode` will say what is wrong with it
        return False


class _Refused(Exception):
    """We, not Pillow, decline an image; becomes an ImageError at once."""


def _unidentified(data: bytes) -> str:
    for kind, reason in NOT_PHOTOGRAPHS.items():
        _, accepts = Image.OPEN.get(kind, (None, None))
        if accepts is not None and accepts(data[:16]) is True:
            return f"a file of the kind {kind}, which is refused: for it, Pillow {reason}"
    return f"not an image of a kind that Pillow reads ({len(data)} bytes)"


def _to_rgb(image: Image.Image) -> Image.Image:
    """As timm converts; but grey above 8 bits fits its range, or is refused where it has none.

    White is the largest value of 8, 10, 12, 14 or 16 bits, the first that holds the image's largest
    value: a 12-bit scan in a 16-bit file keeps its contrast, scans of one depth keep their
    brightness beside each other, and values up to 255 stay what they are.
    """
    if image.mode in GREY_MODES:
        return _eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise _Refused(
            "grey of floating point has no white; save it with 8 or 16 bits, from black to white"
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA").convert("RGB")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > GREY_TOPS[-1]:
        raise _Refused(
            f"grey from {low} to {high}: expected 0 to {GREY_TOPS[-1]}; save it with 8 or 16 bits, "
            "from black to white"
        )
    top = next(top for top in GREY_TOPS if high <= top)
    return Image.fromarray(((pixels.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, with their dot, of the image formats that Pillow reads."""
    registered = Image.registered_extensions()
    return frozenset(end for end, kind in registered.items() if kind not in NOT_PHOTOGRAPHS)


@functools.cache
def photograph_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened, common ones first."""
    Image.preinit()
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in NOT_PHOTOGRAPHS)


def suffixes_shown() -> str:
    """The suffixes as messages show them."""
    return f".jpg, .png, .webp and {len(image_suffixes()) - 3} more suffixes"
