"""The storage node: a DICOM service class provider for C-ECHO and C-STORE of CT images.

Slices are written as they come, without decoding. Messages show addresses and pseudonyms, but no AE title or UID of a
caller: whoever can connect could write a patient's name there.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import build_context
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from flows.node.series_folders import NoSpaceError, SeriesFolders
from flows.node.tls import tls_context
from medad.base.errors import ConfigError, DiskFullError
from medad.config.node import ListenSettings

VERIFICATION = "1.2.840.10008.1.1"
SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000
"""Status codes of C-STORE (PS3.4, table B.2-1)."""
TRANSFER_SYNTAXES = [
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.5",  # RLE lossless
]
"""Transfer syntaxes that the readers of CT know."""
MOST_PDU_BYTES = 1 << 20
"""Largest PDU that is read. Callers are told to send at most 16 KB, and a request for an association has a few KB."""
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


@contextlib.contextmanager
def receiving(settings: ListenSettings, folders: SeriesFolders, say: Callable[[str], None]) -> Iterator[int]:
    """Listen while the `with` block runs. Yield the port. `say` receives a line about each refused caller or slice.

    Raises
    ------
    ConfigError
        The address or the port cannot be used, or a certificate.
    """
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)  # it logs AE titles and UIDs
    receiver = _Receiver(settings, folders, say)
    entity = AE(ae_title=settings.ae_title)
    entity.require_called_aet = True
    entity.require_calling_aet = list(settings.callers)
    entity.maximum_associations = settings.max_associations
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = settings.idle_s
    contexts = [build_context(VERIFICATION)]
    contexts += [build_context(each, TRANSFER_SYNTAXES) for each in (CTImageStorage, EnhancedCTImageStorage)]
    try:
        server = _Server(entity, settings, contexts, receiver)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{settings.address}:{settings.port}: cannot listen there ({reason})") from error
    entity._servers.append(server)  # its `shutdown` removes it from this list
    threading.Thread(target=server.serve_forever, name="dicom-node", daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        for association in entity.active_associations:
            association.abort()


class _Handler(RequestHandler):
    """The beginning of a connection, in its own thread, so that a slow caller keeps no other waiting."""

    server: _Server

    def handle(self) -> None:
        self.request.settimeout(self.server.idle_s)
        if self.server.tls is not None:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().handle()

    def _create_association(self) -> Association:
        association = super()._create_association()
        connection = association.dul.socket
        assert connection is not None
        read = connection.recv

        def recv(nr_bytes: int) -> bytearray:
            if nr_bytes > MOST_PDU_BYTES:  # as announced, before anything is read
                raise OSError("PDU too long")
            return read(nr_bytes)

        connection.recv = recv  # type: ignore[method-assign]
        association.dul.daemon = True  # a caller that stalls does not delay the end of the program
        return association


class _Server(ThreadedAssociationServer):
    """A server that closes connections from other addresses before it reads from them."""

    daemon_threads = True

    def __init__(self, entity: AE, settings: ListenSettings, contexts: list[Any], receiver: _Receiver) -> None:
        self.may_connect, self.idle_s = receiver.may_connect, settings.idle_s
        self.tls = None if settings.tls is None else tls_context(settings.tls, server=True)
        place = (settings.address, settings.port)
        super().__init__(entity, place, settings.ae_title, contexts, None, receiver.handlers, _Handler)

    def verify_request(self, request: object, client_address: Any) -> bool:
        del request
        return self.may_connect(client_address[0])

    def handle_error(self, request: object, client_address: Any) -> None:
        """Close a connection that failed to begin, for example without a certificate. pynetdicom would print it."""


class _Receiver:
    """Handlers of the events of all associations."""

    def __init__(self, settings: ListenSettings, folders: SeriesFolders, say: Callable[[str], None]) -> None:
        self.settings, self.folders, self.say = settings, folders, say
        self.networks = [ipaddress.ip_network(each) for each in settings.addresses]
        self._received: dict[Any, int] = {}
        """Bytes that an association has sent since its last complete message."""
        self._lock = threading.Lock()

    @property
    def handlers(self) -> list[Any]:
        return [
            (evt.EVT_C_STORE, self.store),
            (evt.EVT_C_ECHO, lambda event: SUCCESS),
            (evt.EVT_DATA_RECV, self.count),
            (evt.EVT_REJECTED, lambda event: self.say(f"{_address(event)}: refused by its AE title, or too many")),
            (evt.EVT_CONN_CLOSE, self.end),
        ]

    def may_connect(self, text: str) -> bool:
        """Return whether an address may send."""
        address = ipaddress.ip_address(text.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or address
        if any(mapped in network for network in self.networks):
            return True
        self.say(f"{text}: refused, because this address is not in `addresses`")
        return False

    def count(self, event: Any) -> None:
        """Disconnect a caller whose message is larger than allowed."""
        with self._lock:
            self._received[event.assoc] = self._received.get(event.assoc, 0) + len(event.data)
            too_large = self._received[event.assoc] > 1e6 * self.settings.max_file_mb
        if too_large:
            self.say(f"{_address(event)}: disconnected, because a file has more than {self.settings.max_file_mb:g} MB")
            event.assoc.abort()

    def end(self, event: Any) -> None:
        with self._lock:
            self._received.pop(event.assoc, None)
        self.folders.end(event.assoc)

    def store(self, event: Any) -> int:
        """Write a slice. Return the status of its C-STORE."""
        with self._lock:
            self._received[event.assoc] = 0
        content = event.encoded_dataset()
        try:
            header = dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=list(_UIDS))
            study, series, instance = (str(header[name].value) for name in _UIDS)
        except (InvalidDicomError, KeyError, ValueError, TypeError, AttributeError, OSError, NotImplementedError):
            self.say(f"{_address(event)}: a slice without the UIDs of study, series and instance was refused")
            return CANNOT_UNDERSTAND
        if instance != str(event.request.AffectedSOPInstanceUID) or not (study and series):
            self.say(f"{_address(event)}: a slice whose UID is not the one announced was refused")
            return MISMATCH
        try:
            self.folders.store(study, series, instance, content, event.assoc)
        except NoSpaceError:
            self.say(f"{_address(event)}: a slice was refused for lack of space")
            return OUT_OF_RESOURCES
        except (OSError, DiskFullError) as error:
            self.say(f"{_address(event)}: a slice was refused, because it cannot be written ({type(error).__name__})")
            return OUT_OF_RESOURCES
        return SUCCESS


def _address(event: Any) -> str:
    return str(event.assoc.requestor.address or "a caller")
