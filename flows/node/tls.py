"""Encryption of the DICOM node's connections. Both sides must show a certificate."""

from __future__ import annotations

import ssl
from pathlib import Path

from medad.base.errors import ConfigError
from medad.config.node import TlsSettings


def tls_context(settings: TlsSettings, *, server: bool) -> ssl.SSLContext:
    """Return the context of a server or a client. Raises ConfigError if a file is not as it should be."""
    purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
    files = {name: Path(getattr(settings, name)).expanduser() for name in ("certificate", "key", "peers")}
    for name, file in files.items():
        if not file.is_file():
            raise ConfigError(f"tls.{name}: {file}: no such file")
    try:
        context = ssl.create_default_context(purpose, cafile=files["peers"])
        context.load_cert_chain(files["certificate"], files["key"])
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"tls: the certificates cannot be used ({error.args[-1]})") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = False  # the peer is known by its certificate, and archives are often known by an address
    return context
