"""Shapes and dtypes in signatures are enforced here, and only here: jaxtyping's import hook with beartype."""

from __future__ import annotations

import os
from pathlib import Path

# the tests' networks are too small to share: two threads that wait for each other on a busy machine take minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from jaxtyping import install_import_hook

from tests import typechecked

install_import_hook(["medad", "zsad"], f"{typechecked.__name__}.check_signature")
hypothesis.settings.register_profile("adflows", deadline=None, max_examples=50)
hypothesis.settings.load_profile("adflows")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of `flows` last: Prefect's threads outlive them and draw from the global generator, which
    hypothesis, in another test, takes for a strategy's doing."""
    items.sort(key=lambda item: "flows" in item.path.parts)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT and real industrial images; see CONTRIBUTING.md."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ADFLOWS_DATA", default))
    if not (folder / "liver").is_dir():
        pytest.skip(f"real data not found at {folder}; set ADFLOWS_DATA")
    return folder
