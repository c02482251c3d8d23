"""Test setup: jaxtyping's import hook and beartype check shapes and dtypes of signatures, in tests only."""

from __future__ import annotations

import os
from pathlib import Path

# the tests' networks are too small for two threads: on a busy machine, waiting for each other takes minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from jaxtyping import install_import_hook

from tests import typechecked

install_import_hook(["medad", "zsad"], f"{typechecked.__name__}.check_signature")
hypothesis.settings.register_profile("adflows", deadline=None, max_examples=50)
hypothesis.settings.load_profile("adflows")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of `flows` last.

    Prefect's threads outlive these tests and use the global random generator. Hypothesis, in another test, would blame
    a strategy for that.
    """
    items.sort(key=lambda item: "flows" in item.path.parts)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real CT and real industrial images. See CONTRIBUTING.md."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ADFLOWS_DATA", default))
    if not (folder / "liver").is_dir():
        pytest.skip(f"real data not found at {folder}; set ADFLOWS_DATA")
    return folder
