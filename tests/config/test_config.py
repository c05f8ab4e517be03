import dataclasses
import re
import string

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_jax import config as config_lib
from qlora_jax.runtime.errors import UserError

BASE = "model: a.gguf\ndata: d.jsonl\noutput: runs/a\n"


@pytest.fixture
def load(tmp_path):
    def load(text, overrides=None):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config_lib.load_config(path, overrides)

    return load


@pytest.fixture
def refusal(load, tmp_path):
    """Returns the error line that refuses a config, without the folder."""

    def refusal(text, overrides=None):
        with pytest.raises(UserError) as caught:
            load(text, overrides)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{tmp_path}/run.yaml:")
        return message.removeprefix(f"{tmp_path}/")

    return refusal


def test_a_section_in_one_word_fills_its_first_field(load):
    config = load(BASE)
    assert config.model.path == "a.gguf"
    assert config.data.source == "d.jsonl"
    assert config == load("model: {path: a.gguf}\ndata: {source: d.jsonl}\noutput: runs/a\n")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e3", 1500.0), (".5", 0.5), ("2", 2.0)]
)
def test_a_number_is_a_float_however_it_is_written(load, text, value):
    for config in (
        load(BASE + f"optimizer: {{learning_rate: {text}}}\n"),
        load(BASE, {"optimizer.learning_rate": text}),
    ):
        assert config.optimizer.learning_rate == value
        assert type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora: {rnak: 3}\n", "unknown key lora.rnak; the nearest known one is lora.rank"),
        ("learning_rate: 1\n", "unknown key learning_rate; the nearest known one is optimizer.lea"),
        ("rnak: 3\n", "unknown key rnak; the nearest known one is lora.rank"),
        ("optimizer: {learning_rate: .inf}\n", "optimizer.learning_rate: .*finite.* not inf "),
        ("lorra: {rank: 3}\n", "unknown key lorra; the nearest known one is lora"),
        ("trian: {steps: 3}\n", "unknown key trian; the nearest known one is train"),
        ("lora: {rank: x}\n", "lora.rank: .*integer.* not 'x' "),
        ("lora: {rank: 0}\n", "lora.rank: .*greater than or equal to 1, not 0 "),
        ("lora: {rank: 1.5}\n", "lora.rank: .*integer.* not 1.5 "),
        ("lora: {rank_pattern: {q_proj: 0}}\n", "lora.rank_pattern: .* not 0 "),
        ("lora: {target_modules: 3}\n", "lora.target_modules: .* not 3 .*list"),
        ("lora: {dropout: 1.0}\n", "lora.dropout: .*less than 1, not 1.0 "),
        ("lora: [1]\n", r"lora: .* not \[1\]"),
        ("lora: 3\n", "lora: .* not 3"),
        ("optimizer: {learning_rate: abc}\n", "optimizer.learning_rate: .*number.* not 'abc' "),
        ("optimizer: {learning_rate: 0}\n", "optimizer.learning_rate: .*greater than 0, not 0 "),
        ("optimizer: {learning_rate: .nan}\n", "optimizer.learning_rate: .*nan"),
        ("quant: {double_quant: maybe}\n", "quant.double_quant: .*boolean.* not 'maybe' "),
        ("method: qlorra\n", "method: .*qlora.* not 'qlorra' "),
        ("train: {steps: -1}\n", "train.steps: .* not -1 "),
        ("train: {steps: true}\n", r"train.steps: .*number, not True \(expected: int \| null\)"),
        ("train: {steps: 3, epochs: 2}\n", "train.steps 3 and train.epochs 2 are both given; kee"),
        ("train: {epochs: 0}\n", "train.epochs: .*greater than 0"),
        ("train: {seed: false}\n", "train.seed: .*number, not False "),
        ("lora: {alpha: true}\n", "lora.alpha: .*number, not True "),
        ("lora: {dropout: false}\n", "lora.dropout: .*number, not False "),
        ("optimizer: {clip_norm: true}\n", "optimizer.clip_norm: .*number, not True "),
        ("lora: {rank_pattern: {q_proj: true}}\n", "lora.rank_pattern: .*number, not True "),
        ("3: x\n", "3: keys should be strings"),
    ],
)
def test_a_wrong_key_or_value_is_named(refusal, text, expected):
    assert re.match(f"run.yaml: {expected}", refusal(BASE + text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: d\noutput: o\n", "run.yaml: model is missing"),
        (
            "model: m\noutput: o\ndata: {source: d, eval_source: {a/b: x}}\n",
            "run.yaml: data.eval_source: name of a set should consist of letters, digits",
        ),
        (
            "model: m\noutput: o\ndata: {source: d, eval_source: {}}\n",
            "run.yaml: data.eval_source: input should name at least one set",
        ),
        ("model: {}\ndata: d\noutput: o\n", "run.yaml: model.path is missing"),
        ("model: a\ndata: d\noutput: 2026-01-01\n", "run.yaml: output: "),
        ("", "run.yaml: a config is a mapping; give it keys of these: model, data, output"),
        ("- 1\n", "run.yaml: a config is a mapping; give it keys of these: model, data, output"),
        ("model: a\nlora: [1\n", "run.yaml:3: not valid YAML: "),
        ("model: a\n\tdata: b\n", "run.yaml:2: not valid YAML: "),
        ("model: *x\n", "run.yaml:1: not valid YAML: found undefined alias"),
        ("a: !!python/object:os.system x\n", "run.yaml:1: not valid YAML: "),
        (BASE + "model: b\n", 'run.yaml:4: not valid YAML: found duplicate key "model"'),
        (BASE + "lora:\n  rank: 1\n  rank: 2\n", "run.yaml:6: not valid YAML: found duplicate key"),
        (b"\xff\xfe\x00", "run.yaml: not a text file"),
        ("\0", "run.yaml: not valid YAML: unacceptable character"),
        ("output: 2026-05-45\n", "run.yaml: not valid YAML: day is out of range"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(refusal, text, expected):
    assert refusal(text).startswith(expected)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "file/run.yaml"])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError,
        match=f"^{tmp_path / name}: no such config file; give a YAML file or a run directory$",
    ):
        config_lib.load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ({"lora.rank": "8"}, "lora.rank", 8),
        ({"method": "lora"}, "method", "lora"),
        ({"model": "b.gguf"}, "model.path", "b.gguf"),
        ({"model.path": "c"}, "model.path", "c"),
        ({"lora.target_modules": "[q_proj, v_proj]"}, "lora.target_modules", ["q_proj", "v_proj"]),
        ({"model": "12"}, "model.path", "12"),
        ({"output": "2026-01-01"}, "output", "2026-01-01"),
        ({"lora.target_modules": "[a-z"}, "lora.target_modules", "[a-z"),
        ({"lora.target_modules": "# q"}, "lora.target_modules", "# q"),
        ({"lora.rank_pattern.q_proj": "4"}, "lora.rank_pattern", {"q_proj": 4}),
        (
            {"lora.rank_pattern.layers.0.q_proj": "4", "lora.rank_pattern.v_proj": "5"},
            "lora.rank_pattern",
            {"layers.0.q_proj": 4, "v_proj": 5},
        ),
        ({"lora.alpha_pattern.layers.0.q": "4"}, "lora.alpha_pattern", {"layers.0.q": 4.0}),
        ({"lora": "{rank: 4}"}, "lora.rank", 4),
        ({"data.eval_source": "null"}, "data.eval_source", None),
        ({"data.eval_source": "{a: x, b: y}"}, "data.eval_source", {"a": "x", "b": "y"}),
        ({"data.eval_source.a": "x.jsonl"}, "data.eval_source", {"a": "x.jsonl"}),
        ({"train.epochs": "2.5"}, "train.epochs", 2.5),
        ({"data.eval_source": ""}, "data.eval_source", None),
        ({"data.source": "null"}, "data.source", "null"),
        ({"data.source": ""}, "data.source", ""),
        ({"output": "2026-05-45"}, "output", "2026-05-45"),
        ({"output": "{a}"}, "output", "{a}"),
        ({"data": "[a, b]"}, "data.source", ["a", "b"]),
        ({"data": "[a"}, "data.source", "[a"),
        ({"data.source": "[a.jsonl, b.jsonl]"}, "data.source", ["a.jsonl", "b.jsonl"]),
        ({"data.source": "a+b"}, "data.source", "a+b"),
        ({"quant.double_quant": "false"}, "quant.double_quant", False),
    ],
)
def test_an_override_is_laid_over_the_file(load, overrides, key, value):
    node = load(BASE + "lora: {rank: 2}\nquant: {double_quant: true}\n", overrides)
    for name in key.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    "text", ["Briefly: yes or no", "[INST]", "# hi", "12", "1e-4", "true", "~", "'a'", "- a", "*b"]
)
@pytest.mark.parametrize("key", ["data.system_prompt", "model.path", "output", "quant.codebook"])
def test_an_override_of_text_is_that_text(load, key, text):
    node = load(BASE, {key: text})
    for name in key.split("."):
        node = getattr(node, name)
    assert node == text


FULL = """\
model: {path: a.gguf, compute_dtype: float32, remat: dots}
data: {source: d.jsonl, sequence_length: 64}
output: runs/a
lora: {rank: 2, alpha: 3}
"""


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ({"model": "b.gguf"}, {}),
        ({"model": "12"}, {}),
        ({"model": "{path: b.gguf}"}, {}),
        ({"data": "e.jsonl"}, {}),
        ({"lora": "{rank: 4}"}, {}),
        ({"model.storage_dtype": "float16", "model": "b.gguf"}, {"model.storage_dtype": "float16"}),
        ({"model": "b.gguf", "model.storage_dtype": "float16"}, {"model.storage_dtype": "float16"}),
        ({"data.packing": "false", "data": "e.jsonl"}, {"data.packing": "false"}),
    ],
)
def test_a_section_in_one_word_keeps_the_rest_of_it(load, overrides, kept):
    config = load(FULL, overrides)
    assert config != load(FULL, kept)
    first = {"model": "model.path", "data": "data.source", "lora": "lora.rank"}
    back = {"model": "a.gguf", "data": "d.jsonl", "lora": "2"}
    undone = {first[key]: back[key] for key in overrides if key in first}
    assert load(FULL, overrides | undone) == load(FULL, kept)


def test_a_list_of_sources_is_the_data_section_in_one_word(load, tmp_path):
    config = load("model: m\ndata: [a.jsonl, b.jsonl]\noutput: o\n")
    assert config.data.source == ["a.jsonl", "b.jsonl"]
    config_lib.dump(config, tmp_path / "again.yaml")
    assert config_lib.load_config(tmp_path / "again.yaml") == config


def test_a_section_the_file_lacks_can_be_given_in_one_word(load):
    config = load("output: o\n", {"data": "d", "model": "m", "model.remat": "full"})
    assert (config.data.source, config.model.path, config.model.remat) == ("d", "m", "full")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"lora.rnak": "8"}, "unknown key lora.rnak; the nearest known one is lora.rank"),
        ({"lora.rank": "x"}, "lora.rank: "),
        ({"lora.rank": ""}, "lora.rank: "),
        ({"data.source": "[]"}, "data.source: input should be a valid string, not [] "),
        ({"data.source": "[a, 3]"}, "data.source: "),
        ({"lora.rank.x": "3"}, "lora.rank: "),
        ({"": "3"}, "unknown key"),
        ({"lora.": "3"}, "unknown key lora."),
    ],
)
def test_a_wrong_override_is_named(refusal, overrides, expected):
    assert refusal(BASE, overrides).startswith(f"run.yaml: {expected}")


def test_an_override_below_a_single_value_is_named(load):
    with pytest.raises(UserError, match=r"--lora.rank.x: rank is a single value, 2"):
        load(BASE + "lora: {rank: 2}\n", {"lora.rank.x": "3"})


def test_overrides_are_parsed_from_arguments():
    arguments = ["--lora.rank=8", "--train.steps", "50", "--a.b=c=d", "--e="]
    assert config_lib.parse_overrides(arguments) == {
        "lora.rank": "8",
        "train.steps": "50",
        "a.b": "c=d",
        "e": "",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lora.rank=8"], "unexpected argument 'lora.rank=8'"),
        (["-x"], "unexpected argument '-x'"),
        (["--lora.rank"], "--lora.rank has no value"),
    ],
)
def test_a_wrong_argument_is_named(arguments, expected):
    with pytest.raises(UserError, match=expected):
        config_lib.parse_overrides(arguments)


def test_every_setting_is_documented():
    settings = list(config_lib.all_settings())
    assert len({s.key for s in settings}) == len(settings)
    for setting in settings:
        assert setting.doc, setting.key
        assert setting.type, setting.key
        assert "\n" not in setting.doc
    by_key = {s.key: s for s in settings}
    assert by_key["model.path"].default == "required"
    assert by_key["lora.rank"].default == "16"
    assert by_key["lora.rank"].type == "int"
    assert by_key["model.remat"].type == "auto | none | dots | full | host"


def test_a_difference_names_the_settings(load):
    a, b = load(BASE), load(BASE, {"lora.rank": "8", "lora.rank_pattern.q_proj": "4"})
    assert config_lib.difference(a, a) == []
    assert config_lib.difference(a, b) == [
        "lora.rank: 16 → 8",
        "lora.rank_pattern: {} → {'q_proj': 4}",
    ]


def test_the_digest_is_of_the_values_alone(load):
    a = load(BASE)
    spelled_out = load(
        "# a comment\noutput: runs/a\ndata: {source: d.jsonl}\nmodel: {path: a.gguf}\n"
    )
    assert config_lib.digest(a) == config_lib.digest(spelled_out)
    assert config_lib.digest(a) != config_lib.digest(load(BASE, {"train.seed": "1"}))
    assert len(config_lib.digest(a)) == 64


def test_a_config_cannot_be_changed(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(BASE).lora.rank = 3


words = st.text(
    st.characters(codec="utf-8", exclude_characters="\x85"), max_size=12
) | st.sampled_from(
    [
        "null",
        "true",
        "no",
        "1e-4",
        "123",
        "2026-01-01",
        "~",
        "a: b",
        "# c",
        "- d",
        "0x1f",
        "\n",
        " ",
    ]
)
names = st.text(string.ascii_lowercase + "_.[]*:", min_size=1, max_size=8)
integers = st.integers(1, 2**40)
floats = st.floats(min_value=0, max_value=1e30, exclude_min=True)


@st.composite
def trees(draw):
    section = lambda **fields: draw(st.fixed_dictionaries({}, optional=fields))  # noqa: E731
    return {
        "model": {"path": draw(words)}
        | section(revision=words | st.none(), remat=st.sampled_from(["none", "dots", "full"])),
        "data": {"source": draw(words)}
        | section(system_prompt=words | st.none(), packing=st.booleans()),
        "output": draw(words),
        "method": draw(st.sampled_from(["qlora", "lora", "full"])),
        "quant": section(codebook=words, double_quant=st.booleans()),
        "lora": section(
            rank=integers,
            alpha=floats,
            target_modules=words | st.lists(words, max_size=3),
            rank_pattern=st.dictionaries(names, integers, max_size=3),
            alpha_pattern=st.dictionaries(names, floats, max_size=3),
            dropout=st.floats(0, 1, exclude_max=True),
        ),
        "optimizer": section(learning_rate=floats, epsilon=floats, weight_decay=floats),
        "train": section(seed=st.integers(0, 2**63)),
    }


@given(trees())
@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_dumped_loads_as_it_was(tmp_path, tree):
    config = config_lib.from_tree(tree, "test")
    path = tmp_path / "config.yaml"
    config_lib.dump(config, path)
    loaded = config_lib.load_config(path)
    assert loaded == config
    assert config_lib.digest(loaded) == config_lib.digest(config)
    assert config_lib.difference(loaded, config) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"output": "a\udcff"}, "output 'a\\udcff'"),
        ({"lora": {"target_modules": ["q", "a\udcff"]}}, "lora.target_modules ['q', 'a\\udcff']"),
        ({"lora": {"rank_pattern": {"a\udcff": 2}}}, "lora.rank_pattern {'a\\udcff': 2}"),
    ],
)
def test_a_name_that_is_no_utf8_is_refused(changes, named):
    tree = {"model": {"path": "m"}, "data": {"source": "d"}, "output": "o"} | changes
    with pytest.raises(UserError, match=re.escape(f"{named} is not UTF-8 text")):
        config_lib.from_tree(tree, "c.yaml")
