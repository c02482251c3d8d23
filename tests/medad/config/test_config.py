"""Settings: the configurations load, the defaults are the thesis's, and a wrong value gives a one-line error."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from medad.base.errors import ConfigError
from medad.config.inbox import load_inbox
from medad.config.liver import DatasetSettings, LiverSettings, NetSettings, load
from medad.config.packaged import DEFAULT_MODEL, model_folder

_FOLDER = Path(__file__).parents[3] / "configs" / "liver"
CONFIGS = sorted(path for path in _FOLDER.glob("*.yaml") if not path.stem.startswith("ablation"))
INBOXES = sorted((Path(__file__).parents[3] / "configs" / "inbox").glob("*.yaml"))
INBOX = "name: a\ninbox: in\nout: out\nmodel: m\nscans: '*/scan'\nlivers: '*/liver.nii.gz'\n"
AUTOMATIC = "name: a\ninbox: in\nout: out\nmodel: m\nscans: '*/scan'\n"
GOOD = "name: a\ntrain_data: {root: x, layout: btcv}\ntest_data: {root: y, layout: lits}\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_file_loads(path: Path) -> None:
    assert load(path).name == path.stem


def test_thesis_file_states_the_defaults() -> None:
    """Compare with the numbers of section 3.4.1, and check that the file only repeats the defaults."""
    thesis = load(next(path for path in CONFIGS if path.stem == "thesis"))
    assert thesis.preprocess.slice_px == 256
    assert thesis.synthesis.threshold_grey == 200
    assert thesis.synthesis.shift_grey[1] == 100
    assert (thesis.train.focal.alpha, thesis.train.focal.gamma) == (1, 2)
    for phase, epochs in ((thesis.train.restoration, 200), (thesis.train.segmentation, 1)):
        assert (phase.epochs, phase.batch_size, phase.learning_rate) == (epochs, 8, 1e-4)
    bare = LiverSettings(name="thesis", train_data=thesis.train_data, test_data=thesis.test_data)
    assert thesis == bare


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("- 1\n", "expected a mapping"),
        ("name: [\n", "not valid YAML"),
        (GOOD + "speed: 3\n", "speed: Extra inputs are not permitted"),
        (GOOD + "seed: -1\n", "seed: Input should be greater than or equal to 0"),
        (GOOD + "preprocess: {window_hu: [5, 5]}\n", "window_hu must be (low, high)"),
        (GOOD + "preprocess: {slice_px: 100}\n", "preprocess.slice_px: Input should be a multiple of 16"),
        (GOOD + "restoration: {widths: [12, 24, 48]}\n", "groups = 8 must divide every width"),
        (
            GOOD + "segmentation: {architecture: autoencoder}\n",
            "the segmentation network is always a U-Net",
        ),
        (GOOD + "train: {schedule: joint, snapshot_epochs: 5}\n", "snapshot_epochs belongs to schedule two_phase"),
        (GOOD + "synthesis: {texture: {opacity: [1, 0]}}\n", "opacity must be (low, high)"),
        (GOOD + "train_data: {root: x, layout: btcv, insert: {}}\n", "inserted into test scans only"),
        (GOOD.replace("layout: btcv", "layout: folder"), "layout folder needs `images`"),
        (GOOD.replace("name: a", "name: ../a"), "name: String should match pattern"),
        (GOOD.replace("layout: lits", "layout: lits, liver_labels: [1]"), "must include the tumour's value (2)"),
        ("name: a\n", "train_data: Field required (and 1 more)"),
        (GOOD + "folds: {count: 5, index: 5}\n", "folds: folds.index = 5, but it must be below folds.count = 5"),
        (GOOD + "folds: {count: 1, index: 0}\n", "folds.count: Input should be greater than or equal to 2"),
        (GOOD + "folds: {count: 5}\n", "folds.index: Field required"),
        (GOOD.replace("layout: lits", "layout: lits, patients: 'a('"), "`patients` is not a regular expression"),
        (GOOD.replace("layout: lits", "layout: lits, patients: 'a'"), "`patients` needs exactly one group"),
    ],
)
def test_wrong_files_are_named_in_one_line(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert rule in message
    assert "\n" not in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load(tmp_path / "none.yaml")


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    settings = load(path, {"train.restoration.epochs": 3, "seed": 7, "train_data.root": "z"})
    assert settings.train.restoration.epochs == 3
    assert settings.seed == 7
    assert settings.train_data == DatasetSettings(root="z", layout="btcv")
    with pytest.raises(ConfigError, match="name is not a group of settings"):
        load(path, {"name.first": 1})


def test_settings_survive_yaml_and_are_frozen() -> None:
    settings = load(next(path for path in CONFIGS if path.stem == "demo"))  # its data folders are public
    assert LiverSettings.model_validate(yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))) == settings
    with pytest.raises(ValidationError):
        settings.seed = 3  # type: ignore[misc]
    assert NetSettings().widths == (64, 128, 256, 512)


@pytest.mark.parametrize("path", INBOXES, ids=lambda path: path.stem)
def test_every_committed_inbox_loads(path: Path) -> None:
    assert load_inbox(path).name == path.stem


def test_there_is_an_example_of_an_inbox() -> None:
    assert [path.stem for path in INBOXES] == ["example"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (INBOX + "speed: 3\n", "speed: Extra inputs are not permitted"),
        (INBOX + "unchanged_s: -1\n", "unchanged_s: Input should be greater than or equal to 0"),
        (INBOX.replace("out: out", "out: in/out"), "neither inside the other"),
        (INBOX.replace("out: out", "out: m"), "`out` must not be the model's folder"),
        (INBOX.replace("*/scan", "scan"), "`scans` must be a pattern with exactly one *"),
        (INBOX.replace("*/scan", "../*/scan"), "`scans` must be a pattern below the inbox"),
        (INBOX.replace("*/liver.nii.gz", "*/scan"), "the same pattern"),
        (INBOX + "liver_model: net.ts\n", "`liver_model` finds livers only without `livers`"),
        (f"{AUTOMATIC}liver_labels: [1, 2]\n", "`liver_labels` are values of the masks of `livers`"),
    ],
)
def test_a_wrong_inbox_is_named_in_one_line(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_inbox(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert rule in str(caught.value)


def test_an_inbox_is_a_data_set_whose_file_names_name_no_case(tmp_path: Path) -> None:
    path = tmp_path / "inbox.yaml"
    path.write_text(INBOX + "settings: {device: cpu, postprocess: {threshold: 0.4}}\n", encoding="utf-8")
    inbox = load_inbox(path)
    data = inbox.data("/x")
    assert (data.root, data.layout, data.images, data.labels) == ("/x", "folder", "*/scan", "*/liver.nii.gz")
    assert (data.liver_labels, data.pseudonyms) == ((), True)
    assert inbox.settings_by_key == {"device": "cpu", "postprocess.threshold": 0.4}


def test_an_inbox_needs_neither_masks_nor_a_model(tmp_path: Path) -> None:
    path = tmp_path / "inbox.yaml"
    path.write_text(AUTOMATIC.replace("model: m\n", ""), encoding="utf-8")
    inbox = load_inbox(path)
    assert (inbox.livers, inbox.data("/x").labels, inbox.liver_model_path) == (None, None, None)
    assert inbox.model_folder == model_folder(DEFAULT_MODEL)
