"""Untrusted folders run no code: no module, no pickle, nothing after a yes to a prompt."""

import ast
import io
import json
import pickle
from pathlib import Path

import pytest

import qlora_jax
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft.read import read_adapter
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer as tokenizers_

PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """Path of a file that exists only if the folder's code has run."""
    return tmp_path / "it_ran"


@pytest.fixture
def folder(tmp_path: Path, marked: Path, make_tokenizer) -> Path:
    """A tokenizer folder that also holds a Python module."""
    made = tmp_path / "model"
    make_tokenizer().fast.save_pretrained(made)
    code = f"from pathlib import Path\nPath({str(marked)!r}).touch()\nclass Evil: pass\n"
    (made / "evil.py").write_text(code)
    return made


def set_keys(path: Path, **keys: object) -> None:
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | keys))


AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}


@pytest.mark.parametrize("name", ["EvilTokenizer", None])
def test_a_tokenizer_that_needs_its_own_code_is_refused(
    folder: Path, marked: Path, monkeypatch, name: str | None
) -> None:
    set_keys(folder / "tokenizer_config.json", tokenizer_class=name, auto_map=AUTO_MAP)
    set_keys(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    with pytest.raises(UserError, match=r"code from the folder .*auto_map") as caught:
        tokenizers_.load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert not marked.exists()


def test_a_tokenizer_of_a_known_class_is_loaded_without_its_code(
    folder: Path, marked: Path
) -> None:
    plain = tokenizers_.load_tokenizer(folder).encode("hello world")
    set_keys(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    assert tokenizers_.load_tokenizer(folder).encode("hello world") == plain
    assert not marked.exists()


def test_a_config_with_code_is_read_as_data(folder: Path, marked: Path) -> None:
    set_keys(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    with pytest.raises(UserError, match="evil"):
        open_folder(folder)
    assert not marked.exists()


class Runs:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_an_adapter_that_is_a_pickle_is_refused(tmp_path: Path, marked: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    classes = {"base_model_class": "Evil", "parent_library": "evil"}
    set_keys(tmp_path / "adapter_config.json", **config, auto_mapping=classes)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Runs(marked)))
    with pytest.raises(UserError, match=r"adapter_model\.bin: a PyTorch pickle, .* never read"):
        read_adapter(tmp_path)
    assert not marked.exists()


def test_weights_that_are_a_pickle_are_refused(folder: Path, marked: Path) -> None:
    set_keys(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(marked)))
    with pytest.raises(UserError):
        open_folder(folder)
    assert not marked.exists()


def test_no_module_unpickles_or_lets_a_folder_bring_code() -> None:
    for path in sorted(Path(*qlora_jax.__path__).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not PICKLERS & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                called = ast.unparse(node.func)
                assert "allow_pickle" not in given, path
                assert not called.endswith("torch.load"), path
                if called.endswith(".from_pretrained"):
                    assert ast.unparse(given["trust_remote_code"]) == "False", path
