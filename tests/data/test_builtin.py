import ast
import inspect
from collections import Counter

import pytest

from qlora_jax.data import builtin, sources
from qlora_jax.data.builtin import package_docs, python_docs, python_source
from qlora_jax.data.records import Text
from qlora_jax.runtime.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("name", builtin.SOURCES)
def test_each_has_enough_text_for_a_small_model(name):
    records = builtin.SOURCES[name]("text", Counter())
    assert all(isinstance(r, Text) and r.where.startswith(f"{name} ") for r in records)
    assert len({r.where for r in records}) == len(records)
    assert sum(len(r.text) for r in records) > 1e6


@pytest.mark.slow
def test_several_are_read_one_after_the_other(data_config):
    config = data_config("package-docs+python-docs", format="text", eval_fraction=0)
    train = sources.read(config).train
    assert train == [
        *package_docs.records("text"),
        *(r for r in python_docs.records("text") if r.text.strip()),
    ]


@pytest.mark.parametrize("source", ["python-docs+", "python-docs+other", "+", "python_docs"])
def test_other_names_are_not_built_in(source):
    assert not builtin.is_builtin(source)


@pytest.mark.slow
def test_package_docs_are_the_packages_own_docstrings():
    import numpy as np

    docs = package_docs.documented()
    polyval = inspect.getdoc(np.polynomial.polynomial.polyval)
    assert docs["numpy.polynomial.polynomial.polyval"].rstrip() == (polyval or "").rstrip()
    assert {name.partition(".")[0] for name in docs} == set(package_docs.PACKAGES)


def test_source_has_no_questions(data_config):
    with pytest.raises(UserError, match=r"data\.format chat: python-source is plain text"):
        sources.read(data_config("python-source", format="chat"))


SOURCE = '''"""Module."""
x = """not a docstring"""  # kept\f
class C:
    """Two
    lines."""
    def f(self):
        """One."""
        return "a"
    async def g(self): "inline"; return 2
    def h(self):
        """Alone,

        its body."""
'''


def test_only_docstrings_go():
    assert python_source.undocumented(SOURCE) == (
        'x = """not a docstring"""  # kept\f\nclass C:\n    def f(self):\n        return "a"\n'
        '    async def g(self): "inline"; return 2\n    def h(self):\n        pass\n'
    )
    assert python_source.undocumented("not python (") == "not python ("


@pytest.mark.slow
def test_no_docstring_of_the_library_is_left():
    records = {r.where: r.text for r in python_source.records()}
    for module in ("shutil", "json.decoder", "argparse"):
        tree = ast.parse(records[f"python-source {module}"])
        documented = [
            node
            for node in ast.walk(tree)
            if isinstance(node, python_docs.DEFINITIONS) and ast.get_docstring(node)
        ]
        assert not documented
    assert "def copytree(src, dst" in records["python-source shutil"]
