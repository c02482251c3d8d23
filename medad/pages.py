"""LEAF: what makes a page self-contained: content as data URIs. Also used by `zsad`."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_uri(kind: str, content: bytes) -> str:
    """Content of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def jpeg_uri(picture: Image.Image, quality: int) -> str:
    """The picture as a data URI. Chroma is kept at full resolution: outlines are two pixels wide."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True, progressive=True)
    return data_uri("image/jpeg", buffer.getvalue())


def png_uri(picture: Image.Image) -> str:
    """The picture as a data URI, without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())
