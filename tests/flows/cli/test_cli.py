"""The command line: errors are one line with exit code 2, and help imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Cli = Callable[..., Any]
HEAVY = (
    "torch",
    "torchvision",
    "open_clip",
    "prefect",
    "numpy",
    "monai",
    "scipy",
    "nibabel",
    "SimpleITK",
    "skimage",
    "matplotlib",
)
COMMANDS = [
    (),
    ("demo",),
    ("samples",),
    ("doctor",),
    ("liver",),
    *(("liver", name) for name in ("run", "prepare", "export-slices", "train", "segment", "evaluate", "step", "inbox")),
    ("zsad",),
    *(("zsad", name) for name in ("run", "score", "prompts", "evaluate")),
    ("ids",),
    *(("ids", name) for name in ("add", "ls", "which", "rm")),
]


@pytest.mark.parametrize("flow", ["liver", "zsad"])
def test_help_imports_nothing_heavy(flow: str) -> None:
    """Check that help imports no heavy library. It must take less than half a second."""
    probe = (
        "import sys\n"
        f"sys.argv = ['adflows', '{flow}', 'run', '--help']\n"
        "from flows.__main__ import main\n"
        "try:\n    main()\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, encoding="utf-8")
    assert "--refresh" in done.stdout
    assert done.stderr.strip() == "[]"


def test_python_m_flows_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows", "--help"], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert all(name in done.stdout for name in ("demo", "samples", "doctor", "liver", "zsad"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help(cli: Cli, command: tuple[str, ...]) -> None:
    ran = cli(*command, "--help")
    assert ran.code == 0
    lines = ran.out.splitlines()
    described = [line for line in lines if line.strip().startswith("--")]
    assert all(len(line.split()) > 2 for line in described), described


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("liver", "run", "nowhere.yaml"), ("nowhere.yaml", "cannot be read")),
        (("liver", "run", "nosuchname"), ("nosuchname", "demo", "small", "thesis")),
        (("liver", "run", "demo", "--set", "seed"), ("--set seed", "KEY=VALUE")),
        (("liver", "run", "demo", "--set", "seed=[1"), ("--set seed", "YAML")),
        (("liver", "run", "demo", "--set", "no.such.key=1"), ("no", "demo.yaml")),
        (("liver", "run", "demo", "--set", "preprocess.slice_px=100"), ("preprocess.slice_px", "multiple")),
        (("liver", "run", "demo", "--name", "../up"), ("name",)),
        (("liver", "segment", "scan.nii.gz", "--model", "nomodel", "-o", "o"), ("nomodel", "manifest")),
        (
            ("liver", "segment", "a.nii", "b.nii", "--liver", "l.nii", "--model", "m", "-o", "o"),
            ("2 scans", "1 liver masks"),
        ),
        (("liver", "segment", "a.nii", "--liver", "l.nii", "--model", "nomodel", "-o", "o"), ("nomodel", "manifest")),
        (("liver", "step", "roi", "grey.nii.gz", "-o", "o.nii.gz"), ("--liver MASK", "--liver-label")),
        (("liver", "step", "window", "x.nii", "-o", "o", "--set", "window_hu=[3,1]"), ("window_hu",)),
        (("liver", "evaluate", "demo", "--model", "nomodel"), ("nomodel", "manifest")),
        (("zsad", "run", "nosuchname"), ("nosuchname", "demo", "dual_clip")),
        (("zsad", "run", "demo_embedded", "--set", "method.lambda_9=1"), ("lambda_9", "demo_embedded.yaml")),
        (("zsad", "run", "demo_embedded", "--seed", "1", "--seed", "1"), ("seeds", "twice")),
        (("zsad", "run", "dual_clip", "--set", "encoder.seed=1"), ("encoder", "exactly one")),
        (("zsad", "score", "x.png", "-o", "o", "--config", "nosuchname"), ("nosuchname", "demo")),
        (("zsad", "score", "x.png", "-o", "o", "-m", "padim"), ("padim", "no such method", "winclip")),
        (("zsad", "run", "musc"), ("--data is needed",)),
        (
            ("zsad", "score", "x.png", "-o", "o", "-c", "demo_embedded", "-m", "clip", "--normal", "n"),
            ("CLIP", "normal", "musc"),
        ),
        (("zsad", "evaluate", "nomaps", "nomasks"), ("nomaps", "no such folder")),
        (("zsad", "evaluate", "a", "b", "--set", "max_fpr=7"), ("max_fpr",)),
    ],
)
@pytest.mark.usefixtures("cache")
def test_a_users_error_is_one_line_and_code_2(
    cli: Cli, arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli(*arguments)
    assert ran.code == 2
    [line] = ran.err.strip().splitlines()
    assert line.startswith("adflows: ")
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("runs*"))


def test_a_bug_keeps_its_traceback_and_code_1(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.argv = ['adflows', 'doctor']\n"
        "import flows.cli.doctor\n"
        "def broken(runs):\n    raise ZeroDivisionError('a bug')\n"
        "flows.cli.doctor.run_checks = broken\n"
        "from flows.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: a bug" in done.stderr


def test_every_configuration_loads() -> None:
    from medad.config.liver import load

    folder = Path(__file__).parents[3] / "configs" / "liver"
    files = sorted(path for path in folder.glob("*.yaml") if not path.stem.startswith("ablation"))
    assert {path.stem for path in files} >= {"thesis", "demo", "small"}
    for path in files:
        assert load(path).name == path.stem


def test_the_thesis_configuration_is_the_defaults() -> None:
    from medad.config.liver import LiverSettings, load

    folder = Path(__file__).parents[3] / "configs" / "liver"
    thesis = load(folder / "thesis.yaml")
    data = {"train_data": thesis.train_data, "test_data": thesis.test_data}
    assert thesis == LiverSettings(name="thesis", **data)


def test_options_go_over_the_file() -> None:
    from flows.cli.liver_options import load_settings
    from flows.cli.options import parse_overrides

    pairs = ["train.restoration.epochs=3", "preprocess.window_hu=[-100, 200]", "gpus=cpu"]
    values = parse_overrides(pairs, name="mine", seed=None, train_data__root="/data")
    assert values == {
        "train.restoration.epochs": 3,
        "preprocess.window_hu": [-100, 200],
        "gpus": "cpu",
        "name": "mine",
        "train_data.root": "/data",
    }
    settings = load_settings(Path("demo"), values)
    assert settings.train.restoration.epochs == 3
    assert settings.train_data.root == "/data"


def test_prompts_are_printed_by_side(cli: Cli) -> None:
    plain = cli("zsad", "prompts", "metal_nut").out.splitlines()
    assert plain[0] == "normal (308)"
    assert plain[309] == "anomalous (308)"
    answer = cli("zsad", "prompts", "metal_nut", "--json").answer
    assert [f"  {text}" for text in answer["normal"]] == plain[1:309]
    assert len(answer["anomalous"]) == 22 * 7 * 2
    assert all("metal nut" in text for text in answer["anomalous"])


def test_maps_of_any_tool_are_judged(cli: Cli, tmp_path: Path) -> None:
    """Check that a perfect map gives figures of 1: all scores of the defect are above all others."""
    import numpy as np
    from PIL import Image

    maps, masks = tmp_path / "maps", tmp_path / "masks"
    maps.mkdir()
    masks.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        mask = np.zeros((20, 30), np.uint8)
        if name != "a":
            mask[4:9, 10:20] = 255
        np.save(maps / f"{name}.npy", (rng.random(mask.shape) + (mask > 0)).astype(np.float32))
        Image.fromarray(mask).save(masks / f"{name}.png")
    ran = cli("zsad", "evaluate", maps, masks, "--json")
    assert ran.code == 0
    for kind, keys in (("image", ("auroc", "ap", "f1max")), ("pixel", ("auroc", "ap", "f1max", "aupro"))):
        assert {key: ran.answer[kind][key] for key in keys} == dict.fromkeys(keys, 1.0)
    plain = cli("zsad", "evaluate", maps, masks).out.splitlines()
    assert any(line.startswith("pixel aupro") for line in plain)
    for kind in ("image", "pixel"):
        [figure] = [line for line in plain if line.startswith(f"{kind} f1max at oracle threshold ")]
        [threshold] = [line for line in plain if line.startswith(f"{kind} oracle threshold ")]
        assert float(figure.split()[-1]) == 1
        assert threshold.split()[-1] == f"{ran.answer[kind]['f1max_threshold']:.4f}"
    assert all("oracle" in line for line in plain if "f1max" in line or "threshold" in line)
    np.save(maps / "d.npy", np.zeros((20, 30), np.float32))
    ran = cli("zsad", "evaluate", maps, masks, "--json")
    assert ran.code == 2
    assert [problem["id"] for problem in ran.answer["problems"]] == ["d"]
    assert len(ran.err.splitlines()) == 1


@pytest.mark.usefixtures("cache")
def test_steps_by_hand_chain_to_what_prepare_gives(cli: Cli, new_world: Callable[..., Any], tmp_path: Path) -> None:
    import numpy as np

    from medad.cohort.datasets import LabelledScan, find_cases
    from medad.config.liver import PreprocessSettings, load
    from medad.slices.prepared_file import load_prepared
    from medad.steps.cases import prepare_case

    world = new_world(tmp_path, train=1, test=0)
    scan, label = world.btcv / "img" / "img0001.nii.gz", world.btcv / "label" / "label0001.nii.gz"
    out = tmp_path / "out"
    out.mkdir()
    liver = ("--liver", label, "--liver-label", 6)
    steps: list[tuple[Any, ...]] = [
        ("window", scan, "-o", out / "window.nii.gz"),
        ("roi", out / "window.nii.gz", "-o", out / "roi.nii.gz", *liver),
        ("slice", out / "roi.nii.gz", "-o", out / "slices.safetensors", "--set", "slice_px=64", *liver),
        ("equalise", out / "slices.safetensors", "-o", out / "equalised.safetensors"),
    ]
    for step in steps:
        ran = cli("liver", "step", *step)
        assert ran.code == 0, ran.err
        assert "1 task: 1 computed, 0 cached" in ran.out
    again = cli("liver", "step", *steps[0], "--json")
    assert (again.answer["computed"], again.answer["cached"]) == (0, 1)
    refreshed = cli("liver", "step", *steps[0], "--refresh", "--json")
    assert refreshed.answer["computed"] == 1

    settings = load(world.config)
    [case], _ = find_cases(settings.train_data)
    whole = tmp_path / "whole"
    whole.mkdir()
    prepare_case(LabelledScan.of(case, settings.train_data), PreprocessSettings(slice_px=64), whole, training=True)
    ours, theirs = (load_prepared(p).slices for p in (out / "equalised.safetensors", whole / "prepared.safetensors"))
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    np.testing.assert_array_equal(ours.organ, theirs.organ)
    np.testing.assert_array_equal(ours.z, theirs.z)


@pytest.mark.usefixtures("cache")
def test_one_folder_has_the_results_of_all_steps(cli: Cli, new_world: Callable[..., Any], tmp_path: Path) -> None:
    world = new_world(tmp_path, train=1, test=0)
    source, label = world.btcv / "img" / "img0001.nii.gz", world.btcv / "label" / "label0001.nii.gz"
    names = {
        "window": "window.nii.gz",
        "roi": "roi.nii.gz",
        "slice": "slices.safetensors",
        "equalise": "equalised.safetensors",
    }
    out = tmp_path / "steps"
    contents: dict[str, bytes] = {}
    for step, name in names.items():
        liver = ("--liver", label, "--liver-label", 6)
        ran = cli("liver", "step", step, source, "-o", f"{out}/", "--set", "slice_px=64", *liver)
        assert ran.code == 0, ran.err
        source = out / name
        contents[name] = source.read_bytes()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents


@pytest.mark.usefixtures("cache")
def test_a_step_on_a_bad_file_is_one_line_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no gzip")
    ran = cli("liver", "step", "window", bad, "-o", tmp_path / "out.nii.gz")
    assert ran.code == 2
    assert [line for line in ran.err.splitlines() if line.startswith(f"{bad}: ")]
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.fixture
def empty_config(tmp_path: Path) -> Path:
    """Write a liver configuration without cases."""
    data = {"root": str(tmp_path), "layout": "btcv"}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"name": "c", "train_data": data, "test_data": data}), encoding="utf-8")
    return config


@pytest.mark.usefixtures("cache")
def test_a_dead_server_is_one_line(prefect_cli: Cli, empty_config: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        ran = prefect_cli("liver", "prepare", empty_config)
    assert ran.code == 2
    [line] = ran.err.strip().splitlines()
    assert "PREFECT_API_URL" in line


def test_doctor_as_json_names_every_check(
    cli: Cli, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the test of the wheel really imports the libraries
    monkeypatch.setattr("flows.cli.doctor._TORCH_PROBE", "print('2.9.0'); print('')")
    monkeypatch.setattr("flows.cli.doctor._OPEN_CLIP_PROBE", "print('3.3.0', '0.24.0')")
    ran = cli("doctor", "--json", "-o", tmp_path / "runs")
    checks = {check["name"]: check for check in json.loads(ran.out)}
    assert {"Python", "torch", "prefect", "fastapi", "sqlalchemy", "Prefect", "cache", "memory"} <= set(checks)
    assert checks["cache"]["status"] == "ok"
    assert str(cache) in checks["cache"]["found"]
    assert ran.code == (2 if any(check["status"] == "fail" for check in checks.values()) else 0)
