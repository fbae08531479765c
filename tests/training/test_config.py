from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rayvaec.errors import ConfigError
from rayvaec.training.config import PRESETS, SCVI_NAMES, TrainConfig, read_config


def test_defaults_are_valid_and_survive_json() -> None:
    config = TrainConfig()
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_texts_become_the_settings_types() -> None:
    config = TrainConfig.from_options(
        settings=[
            *("lr=1e-2", "max_epochs=1e2", "use_gpu=true", "lr_schedule=constant"),
            *("gradient_clip=5", "checkpoint_steps=none", "patience = 3"),
        ]
    )
    assert (config.lr, config.max_epochs, config.use_gpu) == (0.01, 100, True)
    assert (config.lr_schedule, config.gradient_clip) == ("constant", 5.0)
    assert (config.checkpoint_steps, config.patience) == (None, 3)
    assert isinstance(config.max_epochs, int)
    assert isinstance(config.gradient_clip, float)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_options(
            settings=["lr=fast", "max_epoch=3", "seed=-1", "dropout_rate=2", "word"],
            batch_size=100,
            num_workers=20,
        )
    text = str(caught.value)
    for part in (
        "5 problems with the configuration",
        "lr='fast' is not a number",
        "unknown setting 'max_epoch': did you mean 'max_epochs'?",
        "seed=-1 is too small: at least 0",
        "dropout_rate=2.0 is too large: at most 0.95",
        "setting 'word' is not of the form key=value",
    ):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_size": 100}, "batch_size=100 is not divisible by lanes=16: the nearest that is, "),
        ({"batch_size": 8}, "the nearest that is, is 16"),
        ({"num_workers": 17}, "num_workers=17 is more than lanes=16: use 16 workers or fewer"),
        ({"buffer_rows": 100}, "buffer_rows=100 is too small: at least lanes * block_rows = 4096"),
        ({"lr": float("nan")}, "lr=nan is not a finite number"),
        ({"lr": 0}, "lr=0.0 is too small: more than 0"),
        ({"lr_schedule": "cosin"}, "unknown lr_schedule 'cosin': did you mean 'cosine'?"),
        ({"use_gpu": 1}, "use_gpu=1 is not true or false"),
        ({"max_epochs": 1.5}, "max_epochs=1.5 is not a whole number or none"),
        ({"n_latent": "5x"}, "n_latent='5x' is not a whole number"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(values)
    assert said in str(caught.value)


def test_constructing_directly_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"patience=-1 .*; \(2\) n_layers|n_layers=0"):
        TrainConfig(n_layers=0, patience=-1)


def test_settings_beat_the_file_which_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("preset: scvi\nlr: 2e-3\nmax_epochs: 7\n")
    config = TrainConfig.from_options(file, ["max_epochs=9"], batch_size=None)
    assert (config.lr, config.max_epochs, config.eps) == (2e-3, 9, PRESETS["scvi"]["eps"])
    assert config.lr_schedule == "constant"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "does not hold settings by name"),
        ("lr: [", "is neither YAML nor JSON"),
        ("lerning_rate: 1", "unknown setting 'lerning_rate'"),
        ("preset: scvo", "unknown preset 'scvo': did you mean 'scvi'?"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_options(file)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        TrainConfig.from_options(tmp_path / "none.yaml")


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_epochs is given twice, as 3 and as 4"):
        TrainConfig.from_options(settings=["max_epochs=4"], max_epochs=3)


def test_a_saved_configuration_repeats_the_run(tmp_path: Path) -> None:
    config = TrainConfig.preset("scvi", max_epochs=3, seed=7)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert TrainConfig.from_options(tmp_path / "config.json") == config
    assert TrainConfig.from_options(run=tmp_path) == config
    assert read_config(tmp_path) == config


def test_a_preset_is_checked() -> None:
    assert TrainConfig.preset("scvi").eps == 0.01
    with pytest.raises(ConfigError, match="did you mean 'scvi'"):
        TrainConfig.preset("scvii")


@pytest.mark.parametrize(
    ("cells", "epochs"), [(0, 400), (200, 400), (20_000, 50), (10**6, 10), (10**8, 10)]
)
def test_default_epochs_fall_with_the_number_of_cells(cells: int, epochs: int) -> None:
    assert TrainConfig().resolved(cells).max_epochs == epochs
    assert TrainConfig(max_epochs=3).resolved(cells).max_epochs == 3


def test_conflicts_are_those_that_change_the_result() -> None:
    config = TrainConfig(seed=1, lr=0.003)
    assert (
        TrainConfig(seed=1, lr=0.003, num_workers=4, checkpoint_seconds=1.0).conflicts(config) == []
    )
    assert TrainConfig(lr=0.1).conflicts(config) == [
        "lr=0.1 (the run has 0.003)",
        "seed=0 (the run has 1)",
    ]


def test_every_setting_says_what_it_is_for() -> None:
    settings = TrainConfig.settings()
    assert set(settings) == set(TrainConfig().to_json())
    assert all(settings.values())


@pytest.mark.parametrize("name", SCVI_NAMES)
def test_names_of_scvi_tools_are_answered_with_what_there_is_here(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown setting '{name}': ") as caught:
        TrainConfig.from_json({name: 3})
    words = set(re.findall(r"\w+", str(caught.value).partition(": ")[2]))
    elsewhere = {"val_fraction", "validation"}  # of prepare; what is done anyway
    assert words & ({*TrainConfig.settings()} | elsewhere)
    with pytest.raises(ConfigError, match=re.escape(str(caught.value))):
        TrainConfig.from_options(settings=[f"{name}=3"])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("n_epochs_kl_warmup", "kl_warmup_epochs"),
        ("n_steps_kl_warmup", "kl_warmup_steps"),
        ("learning_rate", "lr"),
        ("early_stopping_patience", "patience"),
    ],
)
def test_a_setting_that_only_has_another_name(theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"'{theirs}': {ours} is its name here$"):
        TrainConfig.from_json({theirs: 3})
