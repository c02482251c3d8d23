"""Steps by hand: a chain gives what the steps give one by one, and a pseudonym stands for its scan and mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from medad.cohort.phantom import write_btcv_phantoms

Cli = Callable[..., Any]
LABELS = ("--liver-label", 6)
SMALL = ("--set", "slice_px=64")


@dataclass(frozen=True)
class Scan:
    file: Path
    label: Path


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """Return a phantom and its labels."""
    folder = tmp_path_factory.mktemp("phantom")
    write_btcv_phantoms(folder, 1, seed=1, shape=(32, 32, 8), spacing_mm=(10.0, 10.0, 15.0))
    (file,), (label,) = (list((folder / name).iterdir()) for name in ("img", "label"))
    return Scan(file, label)


@pytest.fixture(autouse=True)
def alone(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own cache and register, and no server."""
    monkeypatch.setenv("ADFLOWS_PRIVATE", str(tmp_path / "private"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def test_a_chain_gives_what_its_steps_give_one_by_one(cli: Cli, scan: Scan, tmp_path: Path) -> None:
    mask, source = ("--liver", scan.label, *LABELS), scan.file
    for name in ("window", "roi", "slice", "equalise"):
        assert cli("liver", "step", name, source, *mask, *SMALL, "-o", tmp_path / name).code == 0
        [source] = (tmp_path / name).iterdir()
    done = cli("liver", "step", "window", scan.file, "--through", "equalise", *mask, *SMALL, "-o", tmp_path, "--json")
    assert (done.answer["computed"], done.answer["cached"]) == (0, 4)
    assert Path(done.answer["written"]).read_bytes() == source.read_bytes()
    middle = cli("liver", "step", "roi", tmp_path / "window" / "window.nii.gz", "--through", "slice", *mask, *SMALL,
                 "-o", tmp_path / "middle.safetensors", "--json")  # fmt: skip
    assert (middle.answer["computed"], middle.answer["cached"]) == (0, 2)
    [expected] = (tmp_path / "slice").iterdir()
    assert (tmp_path / "middle.safetensors").read_bytes() == expected.read_bytes()


def test_a_pseudonym_is_its_scan_with_its_mask(cli: Cli, scan: Scan, tmp_path: Path) -> None:
    by_file, by_name = tmp_path / "file.safetensors", tmp_path / "name.safetensors"
    mask = ("--liver", scan.label, *LABELS)
    assert cli("liver", "step", "window", scan.file, "--through", "slice", *mask, *SMALL, "-o", by_file).code == 0
    [case_id] = cli("ids", "add", scan.file, *mask, "--json").answer["ids"]
    done = cli("liver", "step", "slice", case_id, *SMALL, "-o", by_name, "--json")
    assert (done.answer["computed"], done.answer["cached"]) == (0, 3)
    assert by_name.read_bytes() == by_file.read_bytes()
    assert cli("liver", "step", "window", case_id, "--through", "slice", *SMALL, "-o", by_name, "--json").code == 0
    assert str(scan.file) not in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("slice", "grey.nii.gz", "--through", "window"), "--through window: comes before slice"),
        (("window", "scan.nii.gz", "--through", "roi"), "--liver MASK"),
        (("window", "ct-000000000000"), "ct-000000000000: this machine's register has no such case"),
    ],
)
def test_a_bad_request_is_one_line(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    refused = cli("liver", "step", *arguments, "-o", tmp_path / "out.nii.gz")
    assert refused.code == 2
    assert says in refused.err
    assert len(refused.err.splitlines()) == 1


def test_a_dry_run_of_a_chain_writes_nothing(cli: Cli, scan: Scan, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    options = ("--liver", scan.label, *LABELS, *SMALL, "-o", out, "--json", "--dry-run")
    planned = cli("liver", "step", "window", scan.file, "--through", "equalise", *options)
    assert planned.code == 0, planned.err
    statuses = [row["status"] for row in planned.answer["plan"]]
    assert statuses == ["make", "follows", "follows", "follows"]
    assert not out.exists()
    assert cli("liver", "step", "window", scan.file, "-o", tmp_path / "grey.nii.gz").code == 0
    (tmp_path / "grey.nii.gz").unlink()
    planned = cli("liver", "step", "window", scan.file, "-o", tmp_path / "grey.nii.gz", "--json", "--dry-run")
    assert [row["status"] for row in planned.answer["plan"]] == ["cached"]
    assert not (tmp_path / "grey.nii.gz").exists()


def test_a_server_runs_the_step_only_if_it_is_asked_for(
    cli: Cli, scan: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def run(flow: Any, *, local: bool, dry_run: bool, **parameters: Any) -> Any:
        assert not dry_run
        asked.append(not local)
        return flow.local(**parameters)

    monkeypatch.setattr("flows.cli.liver_step.run_flow", run)
    assert cli("liver", "step", "window", scan.file, "-o", tmp_path / "one.nii.gz").code == 0
    assert asked == [False]
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4999/api")
    assert cli("liver", "step", "window", scan.file, "-o", tmp_path / "two.nii.gz").code == 0
    assert asked == [False, True]
