"""training/config.py: TOML in, checked settings out, and what a resume may change."""

import json
import math
import tomllib
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from model.config import ModelConfig
from tests.helpers import ROOT
from training.config import Config, changes, check, flatten, load, resumed, to_toml
from training.metrics import hyperparameters

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_read_back_from_their_own_toml(path):
    config = load(path)
    assert check(tomllib.loads(to_toml(config)), "again") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_key_of_a_shipped_configuration_has_a_comment(path):
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert "#" in line, line


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {"d_modle": 3}}, "unknown key model.d_modle; did you mean model.d_model?"),
        ({"max_step": 3}, "unknown key max_step; did you mean max_steps?"),
        ({"model": {"lr": 1e-3}}, "unknown key model.lr; did you mean optimizer.lr?"),
        ({"model": {"d_model": "128"}}, "model.d_model = '128': input should be a valid integer"),
        ({"model": {"d_model": 10, "n_heads": 4}}, "model.d_model = 10 is not a multiple"),
        ({"model": 3}, "model must be a table"),
        ({"optimizer": {"lr": math.inf}}, "optimizer.lr = inf: input should be a finite number"),
        ({"optimizer": {"lr": math.nan}}, "optimizer.lr = nan: input should be a finite number"),
        ({"precision": "bf8"}, "precision = 'bf8': input should be 'auto', 'fp32', 'bf16'"),
        ({"sample": {"top_p": 3.0}}, "sample.top_p = 3.0"),
        ({"train": {"keep": 0}}, "train.keep = 0 must be at least 1"),
        ({"data": {"val_fraction": 1.0}}, "data.val_fraction = 1.0 must be at least 0 and below 1"),
        ({"data": {"seq_len": 999}}, "data.seq_len = 999 is more than model.max_len = 128"),
        ({"seed": 2**63}, "must be below 2^63"),
        ({"train": {"threads": 10**9}}, "train.threads = 1000000000 must be at most 1024"),
        ({"sample": {"": 1}}, "unknown key sample."),
        ({"seed": True}, "seed = True: input should be a valid integer"),
    ],
)
def test_bad_values_are_named_with_their_key_and_fix(values, said):
    with pytest.raises(UserError) as error:
        check(values, "my.toml")
    assert str(error.value).startswith("my.toml: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["lr", "grad_clip", "weight_decay", "eps", "min_lr_ratio"])
def test_the_command_line_too_takes_no_nan_and_no_infinity(key):
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=key):
            replace(Config().optimizer, **{key: value})


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UserError) as error:
        check({"seeed": 1, "train": {"keep": 0}, "model": {"n_layers": 0}}, "f")
    for part in ("seeed", "train.keep", "n_layers"):
        assert part in str(error.value)
    with pytest.raises(UserError) as error:
        check({"train": {"keep": 0, "batch_size": 0}}, "f")
    message = str(error.value)  # each with its whole key
    assert message.count("train.keep = 0") == message.count("train.batch_size = 0") == 1


def test_data_path_is_a_path_or_a_list_of_paths():
    for path in ("a", ("a",), ("a", 'b "c"')):
        config = check({"data": {"path": path}}, "f")
        assert config.data.path == path
        assert check(tomllib.loads(to_toml(config)), "again") == config
    for path in (3, ["a", 3], {"a": "b"}):
        with pytest.raises(UserError) as error:
            check({"data": {"path": path}}, "f")
        assert str(error.value) == f"f: data.path = {path!r}: must be a path or a list of paths"
    with pytest.raises(UserError, match='must be "", a path or a list'):
        check({"data": {"path": []}}, "f")


SOURCES = [{"path": "a", "weight": 0.7}, {"path": ["b", "c"], "weight": 3, "name": "web"}]


def test_a_mixture_reads_back_from_its_own_toml():
    config = check({"data": {"sources": SOURCES}}, "f")
    assert [source.weight for source in config.data.sources] == [0.7, 3]
    assert check(tomllib.loads(to_toml(config)), "again") == config
    assert check(json.loads(json.dumps(asdict(config))), "config.json") == config
    heavier = check({"data": {"sources": [SOURCES[0], {**SOURCES[1], "weight": 4}]}}, "f")
    (change,) = changes(config, heavier, extend=False)
    assert (change.key, change.before, change.after) == ("data.sources.1.weight", 3.0, 4.0)
    assert any(change.key == "data.sources.0.path" for change in changes(Config(), config, False))
    assert hyperparameters(config)["data.sources.1.path"] == "b, c"
    assert None not in hyperparameters(config).values()  # TensorBoard takes none


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "a", "weight": 0}, "data.sources.1.weight = 0.0 must be above 0 and finite"),
        ({"path": "a", "weight": -1}, "data.sources.1.weight = -1.0 must be above 0 and finite"),
        ({"path": "a"}, "data.sources.1.weight is missing; give one"),
        ({"weight": 1}, 'data.sources.1.path = "" must be a path, or source = the name of a'),
        ({"weight": 1, "path": []}, 'data.sources.1.path = "" must be a path, or source'),
        ({"weight": 1, "path": 3}, "data.sources.1.path = 3: must be a path or a list of paths"),
        ({"weight": 1, "path": "a", "source": "names"}, "data.sources.1.source = 'names' cannot"),
        ({"weight": 1, "pth": "a"}, "key data.sources.1.pth; did you mean data.sources.1.path?"),
        ({"weight": 1, "path": "a", "name": "a/b"}, "data.sources.1.name = 'a/b' must be 1 to 40"),
        ({"weight": 1, "path": "a", "text_key": ""}, 'data.sources.1.text_key = "" must be the'),
        ({"weight": 1, "path": "a", "val_fraction": 2}, "data.sources.1.val_fraction = 2.0 must"),
    ],
)
def test_what_is_wrong_with_a_source_is_named_with_its_number(source, said):
    with pytest.raises(UserError) as error:
        check({"data": {"sources": [SOURCES[0], source]}}, "f")
    assert said in str(error.value)


@pytest.mark.parametrize("key", ["path", "val_path"])
def test_sources_and_a_path_are_refused(key):
    with pytest.raises(UserError, match=rf"data.{key} = 'x' cannot be with \[\[data.sources"):
        check({"data": {"sources": SOURCES, key: "x"}}, "f")


@pytest.mark.parametrize(
    ("key", "value"), [("encoding", "latin-9000"), ("encoding", "zlib"), ("text_key", " ,")]
)
def test_settings_of_reading_that_cannot_be(key, value):
    with pytest.raises(UserError, match=f"data.{key} = "):
        check({"data": {key: value}}, "f")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "right.toml").write_text("seed = 1")
    with pytest.raises(UserError, match=r"no such file; did you mean .*right\.toml"):
        load(tmp_path / "rihgt.toml")
    with pytest.raises(UserError, match=r"did you mean .*configs.mini\.toml"):
        load(tmp_path / "mini.toml")  # one of the shipped ones
    with pytest.raises(UserError, match=r"no such file; give a TOML file"):
        load(tmp_path / "zzzzzz.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path / "binary.toml")
    (tmp_path / "endless.toml").write_text("seed = " + "1" * 5000)
    with pytest.raises(UserError, match="not TOML"):
        load(tmp_path / "endless.toml")
    (tmp_path / "broken.toml").write_text("[model\nd_model = 3")
    with pytest.raises(UserError, match=r"not TOML.*line 1"):
        load(tmp_path / "broken.toml")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_to_toml(text):
    config = replace(Config(), data=replace(Config().data, path=text))
    assert check(tomllib.loads(to_toml(config)), "again") == config


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_at_all_is_taken_or_refused_in_one_line(value):
    for values in ({"model": value}, {"optimizer": {"lr": value}}, {str(value): value}):
        try:
            check(values, "f")
        except UserError as error:
            assert "Traceback" not in str(error)


def test_changes_on_resuming():
    stored = replace(Config(), model=ModelConfig(vocab_size=100), max_steps=100)

    def verdict(wanted, extend=False):
        return {c.key: c.refused for c in changes(stored, wanted, extend)}

    assert verdict(stored) == {}
    assert verdict(replace(stored, seed=2))["seed"]
    assert verdict(replace(stored, model=replace(stored.model, d_ff=2048)))["model.d_ff"]
    dropout = replace(stored, model=replace(stored.model, dropout=0.3))
    assert verdict(dropout) == {"model.dropout": ""}
    assert verdict(replace(stored, max_steps=50)) == {"max_steps": ""}
    assert "--extend" in verdict(replace(stored, max_steps=200))["max_steps"]
    assert verdict(replace(stored, max_steps=200), extend=True) == {"max_steps": ""}
    batch = replace(stored, train=replace(stored.train, batch_size=99))
    assert verdict(batch)["train.batch_size"]


def test_a_shorter_run_stays_on_the_learning_rate_curve():
    stored = replace(Config(), max_steps=100)
    shorter = resumed(stored, replace(stored, max_steps=60), False)
    assert (shorter.max_steps, shorter.horizon) == (60, 100)
    back = resumed(shorter, replace(shorter, max_steps=100), False)
    assert (back.max_steps, back.horizon) == (100, 100)
    longer = resumed(shorter, replace(shorter, max_steps=300), True)
    assert (longer.max_steps, longer.horizon) == (300, 300)
    assert resumed(stored, stored, False) == stored
    # a schedule that was meant to end before the run does stays as it is
    early = replace(stored, optimizer=replace(stored.optimizer, schedule_steps=20))
    assert resumed(early, replace(early, max_steps=60), False).horizon == 20
    assert not any(c.refused for c in changes(early, replace(early, max_steps=60), False))
    assert resumed(early, replace(early, max_steps=300), True).horizon == 20


def test_flatten_names_every_setting():
    flat = flatten(Config())
    assert flat["model.d_model"] == 256
    assert flat["seed"] == 1337
    assert not any(isinstance(value, dict) for value in flat.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm' must be one of layer, rms, none"),
        ({"activation": "swish"}, "activation"),
        ({"d_model": 8.0}, "d_model = 8.0 must be of type int"),
        ({"n_heads": "2"}, "n_heads"),
        ({"bias": 1}, "bias"),
        ({"dropout": "0.1"}, "dropout"),
    ],
)
def test_a_model_config_checks_its_types_and_words(options, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(**options)
