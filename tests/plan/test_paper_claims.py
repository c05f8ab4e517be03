"""Checks our formulas against the numbers in the LoRA and QLoRA papers."""

import pytest

from qlora_jax.plan.paper_claims import (
    full_fine_tuning,
    gpt3_adapters,
    gpt3_parameters,
    paper_claims,
)


def test_a_65b_model_needs_more_than_780_gb() -> None:
    assert full_fine_tuning(65_285_660_672) == 783_427_928_064
    assert full_fine_tuning(65_285_660_672) / 2**30 == pytest.approx(729.6, abs=0.05)
    assert full_fine_tuning(1) == 12


def test_gpt3_has_175_billion_parameters() -> None:
    """Layers of 12 d² parameters make up nearly all of the total."""
    assert gpt3_parameters() == pytest.approx(175e9, rel=3e-3)
    rest = gpt3_parameters() - 96 * 12 * 12288**2
    assert 50257 * 12288 < rest < 0.004 * 175e9


def test_adapters_of_gpt3() -> None:
    """LoRA, table 4: 4.7M and 37.7M trainable parameters with ranks 1 and 8 on q and v."""
    assert gpt3_adapters(1) == 96 * 2 * (12288 + 12288)
    assert gpt3_adapters(1) / 1e6 == pytest.approx(4.7, abs=0.05)
    assert gpt3_adapters(8) / 1e6 == pytest.approx(37.7, abs=0.05)


def test_lines() -> None:
    found = {line.what: line for line in paper_claims()}
    values = [line.value for line in found.values()]
    full, adam, with_gradients, weights, rank_1, file = values
    assert full > 780e9
    assert weights == pytest.approx(350e9, rel=0.01)
    assert adam < 1.2e12 < with_gradients
    assert rank_1 == 4_718_592
    assert file == pytest.approx(35 * 2**20, rel=0.03)
    assert weights / file == pytest.approx(10_000, rel=0.1)  # LoRA paper: "roughly 10,000 times"
    assert str(found["LLaMA 65B, full fine-tuning"]) == (
        "LLaMA 65B, full fine-tuning: 783.428 GB (729.624 GiB); the paper: more than 780 GB"
    )
    assert str(found["GPT-3, LoRA of rank 1 on q and v"]).endswith(
        ": 4,718,592 parameters; the paper: 4.7M"
    )
