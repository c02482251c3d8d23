"""Parts of report pages: templates, and content as data URIs. Also used by `zsad`."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import io
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from medad.reporting.failures import group_rows


@functools.cache
def page_environment(package: str) -> jinja2.Environment:
    """Return an environment with the templates of a package and the shared ones: base.html and its parts.

    Text is escaped. A template that uses an undefined name raises an error. The page's script sorts and filters tables.
    Its digest is in the page's Content-Security-Policy, so no other script runs.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([_template_loader(each) for each in (package, "medad.reporting")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["group_rows"] = group_rows
    script, digest = script_of("medad.reporting", "tables.js")
    environment.globals.update(script=script, script_hash=digest, more_scripts="")
    return environment


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as YAML, as reports show them."""
    return yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None, allow_unicode=True)


def script_of(package: str, name: str) -> tuple[Markup, str]:
    """Return a package's script for a page, and its source expression for the page's Content-Security-Policy."""
    text = importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return Markup(text), f"'sha256-{digest}'"  # noqa: S704 - the package's own


def _template_loader(package: str) -> jinja2.FunctionLoader:
    files = importlib.resources.files(package)

    def source(name: str) -> str | None:
        file = files.joinpath(name)
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return jinja2.FunctionLoader(source)


def data_uri(kind: str, content: bytes) -> str:
    """Return content as a data URI of media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def jpeg_uri(picture: Image.Image, quality: int) -> str:
    """Return the picture as a JPEG data URI. Chroma has full resolution, because outlines are two pixels wide."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True, progressive=True)
    return data_uri("image/jpeg", buffer.getvalue())


def png_uri(picture: Image.Image) -> str:
    """Return the picture as a PNG data URI, without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())
