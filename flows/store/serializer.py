"""Prefect's view of a result: a reference, checked against the artefact whenever it is read."""

from __future__ import annotations

import json
from typing import Any

from prefect.serializers import Serializer
from pydantic import Field

from flows.store.artifacts import ArtefactStore, DamagedArtefactError, Ref


class VerifiedSerializer(Serializer):  # Prefect cannot register a parametrised base
    """References as JSON. `loads` checks the artefact's files and raises when one is not what it was.

    Prefect takes any error here for a miss, so a deleted, damaged or truncated artefact is made again.
    """

    type: str = Field(default="adflows-reference", frozen=True)

    def dumps(self, obj: Any) -> bytes:
        """Encode a `Ref`. An exception (Prefect records a crashed task's) becomes a record that never loads."""
        if isinstance(obj, Ref):
            return obj.model_dump_json(exclude={"reused"}).encode()
        if isinstance(obj, BaseException):
            return json.dumps({"error": type(obj).__name__}).encode()
        raise TypeError(f"expected a Ref, got {type(obj).__name__}")

    def loads(self, blob: bytes) -> Ref:
        """Decode and verify a `Ref`. Raises DamagedArtefactError or pydantic's ValidationError."""
        record = json.loads(blob)
        if "error" in record:
            raise DamagedArtefactError(f"the task had failed with {record['error']}")
        ref = Ref.model_validate(record)
        ArtefactStore().verify(ref)
        return ref
