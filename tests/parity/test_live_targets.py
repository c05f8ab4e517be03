"""Compares the modules that our code and PEFT select for the same config."""

import itertools

import pytest

from qlora_jax.formats.peft.config import targets_of
from qlora_jax.models.weight_shapes import adaptable, layer_linears
from tests.models.test_decoder_config import read

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

TARGETS = (
    ["q_proj", "v_proj"],
    ["q_proj", "nothing", "c_attn"],
    ["self_attn.q_proj", "dense", "fc1"],
    ["model.layers.1.mlp.up_proj", "proj"],
    ["lm_head", "embed_tokens", "o_proj"],
    r".*\.[12]\..*proj",
    r"model\.layers\..*_proj|lm_head",
    "q_proj",
)
EXCLUDED = (None, [], ["up_proj", "q_proj"], ["model.layers.1.self_attn.q_proj"], r".*\.0\..*")
LAYERS = (None, [], 1, [0, 2])
PATTERNS = (None, "layers", ["h", "layers"], "h")
SAVED = (None, ["lm_head"], ["self_attn"], ["mlp.up_proj", "score"])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "phi3"])
def test_the_same_modules_are_covered(family) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = read(family, **({"ffn_dim": 128} if family == "opt" else {}))
    modules = list(adaptable(config))
    linears = layer_linears(config)
    others = [path for path in modules if path not in linears]
    counts = set()
    for targets, excluded, layers, pattern, saved in itertools.product(
        TARGETS, EXCLUDED, LAYERS, PATTERNS, SAVED
    ):
        if isinstance(targets, str) and (layers is not None or pattern is not None):
            continue  # PEFT refuses such a config
        if pattern is not None and layers in (None, []):
            continue
        settings = {
            "target_modules": targets,
            "exclude_modules": excluded,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
            "modules_to_save": saved,
        }
        theirs = peft.LoraConfig(**settings)
        found = ((path, check_target_module_exists(theirs, path)) for path in modules)
        # For an excluded module PEFT returns a truthy object of a class named Excluded...
        expected = {p for p, match in found if match and "Excluded" not in type(match).__name__}
        assert set(targets_of(settings).covered(list(linears), others, "x")) == expected, settings
        counts.add(len(expected))
    assert len(counts) > 3
