"""Chat templates that exceed the limits of time or memory of the trial."""

import re

import pytest

from qlora_jax.runtime.errors import UserError
from qlora_jax.text import template_trial

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(template_trial, "SECONDS", 0.5)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (LOOP, "takes over 0.5 s of computing"),
        (DOUBLING + "{{ m(60) }}", "takes over 0.5 s of computing"),
        ("{% if messages | length > 3 %}" + LOOP + "{% endif %}", "takes over 0.5 s of computing"),
        ("{{ 'a' * 10**10 }}", "needs over 512 MiB"),
        ("{{ '%100000000000d' % 1 }}", "needs over 512 MiB"),
        ("{% generation %}{{ 'a' * 10**10 }}{% endgeneration %}", "needs over 512 MiB"),
    ],
)
def test_what_needs_too_much_is_refused(template, fault):
    with pytest.raises(UserError) as caught:
        template_trial.check(template, "folder")
    assert str(caught.value) == (
        f"folder: its chat template {fault} for short conversations; "
        "replace the template there, or use another tokenizer"
    )


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
        "{{ raise_exception('no system turns') }}",
        "{{ strftime_now('%d') }}{{ messages | tojson }}",
        "{{ 1 // 0 }}",
        "{% no such tag %}",
        "\ud800",
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    ],
)
def test_what_is_quick_passes_and_its_errors_are_told_later(template):
    template_trial.check(template, "folder")


def test_a_tokenizer_with_such_a_template_is_refused(make_tokenizer):
    with pytest.raises(UserError, match=re.escape("512 MiB for short conversations")):
        make_tokenizer("{{ 'a' * 10**11 }}")


def test_whatever_a_template_raises_is_one_line(make_tokenizer):
    tokenizer = make_tokenizer("{{ 1 // 0 }}")
    with pytest.raises(UserError, match="refuses the turns: integer division or modulo by zero"):
        tokenizer.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
