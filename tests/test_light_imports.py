"""Imports of processes. Torch takes one to two seconds and MONAI as long again, so only processes that use them load
them. Each case runs in a process of its own and looks at `sys.modules` afterwards.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.store.step import load_steps
from medad.base.devices import DRIVER_FILES

ROOT = Path(__file__).parents[1]
SLOW_HALF_OF_MONAI = {"matplotlib", "sklearn", "torchvision", "transformers"}
"""Packages that `import monai` alone would load where they are installed."""
STEPS = load_steps("flows.liver", "flows.zsad")
FUNCTIONS = sorted({step.function for step in STEPS.values()})
WITHOUT_DEVICE = sorted({step.function for step in STEPS.values() if step.kind is None})
USE_TENSORS = ("medad.organ", "medad.steps.liver_mask", "medad.reports.ablation", "zsad")
"""Modules of steps without a device that may load torch: the liver finder's networks, and tensors of features."""


def loaded_by(script: str, *arguments: str) -> set[str]:
    """Run Python code in a new process and return the top-level packages it has loaded at its end."""
    code = f"{script}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
    return set(ran.stdout.splitlines()[-1].split())


def load_functions(functions: list[str]) -> set[str]:
    script = "import importlib, sys\nfor each in sys.argv[1:]: importlib.import_module(each.partition(':')[0])"
    return loaded_by(script, *functions)


HELP = """
import contextlib, sys
from flows.cli.app import app
for command in ([], ["liver"], ["liver", "step"], ["zsad"]):
    with contextlib.suppress(SystemExit):
        app([*command, "--help"])
"""


@pytest.mark.parametrize(
    "script",
    [HELP, "import flows.liver.flow", "import flows.liver.liver_masks, flows.inbox.flow", "import flows.zsad.flow"],
    ids=["help", "liver", "inbox", "zsad"],
)
def test_the_process_of_a_flow_loads_neither_torch_nor_monai(script: str) -> None:
    assert not loaded_by(script) & {"monai", "torch", "torchvision"}


BY_HAND = """
import sys
from pathlib import Path
from flows.__main__ import main
from medad.cohort.phantom import write_btcv_phantoms
folder = Path(sys.argv[1])
write_btcv_phantoms(folder, 1, seed=1, shape=(32, 32, 8), spacing_mm=(10.0, 10.0, 15.0))
(scan,), (label,) = (list((folder / name).iterdir()) for name in ("img", "label"))
options = ["--liver", str(label), "--liver-label", "6", "--set", "slice_px=64", "-o", str(folder / "out.safetensors")]
sys.argv = ["adflows", "liver", "step", "window", str(scan), "--through", "equalise", *options]
main()
"""


def test_a_step_by_hand_needs_no_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    loaded = loaded_by(BY_HAND, str(tmp_path))
    assert (tmp_path / "out.safetensors").is_file()
    assert not loaded & {"monai", "prefect", "skimage", "torch"}


IMAGES = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from flows.zsad.flow import zsad
from zsad.config.settings import ZsadSettings
folder = Path(sys.argv[1])
for name in ("good/000", "stain/000"):
    (folder / "cloth" / "test" / name).parent.mkdir(parents=True)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "cloth" / "test" / f"{name}.png")
data = {"root": str(folder), "layout": "mvtec"}
settings = ZsadSettings(name="x", gpus="cpu", data=data, encoder={"model": "embedded"}, method={"system": "dual"})
assert zsad.plan(settings, folder / "out").details["plan"]
"""


def test_an_image_flow_knows_its_keys_without_loading_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    assert not loaded_by(IMAGES, str(tmp_path)) & {"monai", "open_clip", "timm", "torchvision"}


PRELOADS = """
import importlib
from flows.devices.child import PRELOADED
for each in PRELOADED:
    importlib.import_module(each)
"""


def test_the_fork_server_loads_torch_but_no_networks() -> None:
    loaded = loaded_by(PRELOADS)
    assert "torch" in loaded
    assert not loaded & {"monai", "torchvision"}


@pytest.mark.skipif(any(Path(name).exists() for name in DRIVER_FILES), reason="torch counts the GPUs of this machine")
def test_a_machine_without_a_driver_has_no_gpu_and_needs_no_torch_to_know() -> None:
    counted = "from flows.devices.slots import CPU, allowed_devices; assert allowed_devices('auto') == (CPU,)"
    assert "torch" not in loaded_by(counted)


def test_steps_without_a_device_load_no_monai() -> None:
    """Check that MONAI is the library of networks and losses: nothing else loads it."""
    assert "medad.steps.cases:prepare_case" in WITHOUT_DEVICE
    assert "monai" not in load_functions(WITHOUT_DEVICE)


def test_most_steps_without_a_device_load_no_torch() -> None:
    light = [function for function in WITHOUT_DEVICE if not function.startswith(USE_TENSORS)]
    assert {"medad.steps.by_hand:step_slice", "medad.steps.cases:evaluate_case"} <= set(light)
    assert "torch" not in load_functions(light)


def test_networks_load_monai_without_its_optional_libraries() -> None:
    networks = [function for function in FUNCTIONS if function.startswith(("medad.networks", "medad.steps.segment"))]
    loaded = load_functions(networks)
    assert {"monai", "torch"} <= loaded
    assert not loaded & SLOW_HALF_OF_MONAI


def test_hidden_packages_can_be_imported_afterwards() -> None:
    assert "matplotlib" in loaded_by("import medad.base.monai_parts, matplotlib")


PREPARE = """
import sys
from pathlib import Path
from medad.cohort.phantom import write_btcv_phantoms
from medad.cohort.datasets import LabelledScan
from medad.config.liver import PreprocessSettings
from medad.steps.cases import prepare_case
folder = Path(sys.argv[1])
write_btcv_phantoms(folder, 1, seed=1, shape=(48, 40, 10), spacing_mm=(7.0, 7.0, 12.0))
(scan,), (label,) = (list((folder / name).iterdir()) for name in ("img", "label"))
case = LabelledScan(scan, label, (6,), None, "agree", "error")
prepare_case(case, PreprocessSettings(slice_px=64), folder, training=True)
"""


def test_a_case_is_prepared_without_torch(tmp_path: Path) -> None:
    loaded = loaded_by(PREPARE, str(tmp_path))
    assert (tmp_path / "prepared.safetensors").is_file()
    assert not loaded & {"monai", "torch"}
