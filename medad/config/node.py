"""Settings of an inbox's DICOM node: who may send scans to it, and where results go."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from medad.base.private import DataRoot
from medad.base.settings import Settings

AeTitle = Annotated[str, Field(pattern=r"^[\x21-\x5b\x5d-\x7e]{1,16}$")]
"""Application Entity title: 1 to 16 characters without spaces and backslash."""
Port = Annotated[int, Field(ge=1, le=65535)]


def _network(text: str) -> str:
    ipaddress.ip_network(text)
    return text


Network = Annotated[str, AfterValidator(_network)]
"""IP address, or network such as 10.1.2.0/24."""


class TlsSettings(Settings):
    """Certificates of the node and of its peers, as PEM files. Both sides must have one."""

    certificate: DataRoot
    """Certificate of this node."""
    key: DataRoot
    """Private key of this node. Only its owner should have access."""
    peers: DataRoot
    """Certificates of the peers, or of their authority. Others are refused."""


class ListenSettings(Settings):
    """The storage node that fills an inbox (`adflows liver listen`)."""

    callers: Annotated[tuple[AeTitle, ...], Field(min_length=1)]
    """AE titles that may send. Others are refused."""
    addresses: Annotated[tuple[Network, ...], Field(min_length=1)] = ("127.0.0.1",)
    """IP addresses or networks that may send, such as 10.1.2.0/24. Others are disconnected."""
    address: str = "127.0.0.1"
    """Address of this machine at which the node listens. 0.0.0.0: all of them."""
    port: Port = 11112
    """Port at which the node listens."""
    ae_title: AeTitle = "ADFLOWS"
    """AE title of the node, which callers must use."""
    complete_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """Number of seconds after its last slice for which a series is complete, if no caller is still sending it."""
    max_associations: Annotated[int, Field(ge=1, le=64)] = 4
    """Largest number of callers at a time."""
    max_file_mb: Annotated[float, Field(gt=0)] = 1024.0
    """Largest size of a file in 10^6 bytes. A caller that sends more is disconnected."""
    max_waiting_gb: Annotated[float, Field(gt=0)] = 50.0
    """Largest size of all series that are still arriving, in 10^9 bytes. Then slices are refused until there is
    space."""
    idle_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """Number of seconds of silence after which a caller is disconnected."""
    tls: TlsSettings | None = None
    """Encryption. None: connections are not encrypted, which is usual inside a hospital's network."""


class SendSettings(Settings):
    """The DICOM node, such as an archive, that gets an inbox's DICOM results."""

    address: Annotated[str, Field(min_length=1)]
    """Host name or IP address of the node."""
    port: Port
    """Port of the node."""
    ae_title: AeTitle
    """AE title of the node."""
    own_ae_title: AeTitle = "ADFLOWS"
    """AE title that the node knows this program by."""
    tls: TlsSettings | None = None
    """Encryption. None: the connection is not encrypted."""

    @model_validator(mode="after")
    def _host(self) -> SendSettings:
        if any(character.isspace() or character == "/" for character in self.address):
            raise ValueError("`address` must be a host name or an IP address")
        return self
