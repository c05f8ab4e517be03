import pytest

from qlora_jax.data.bad_records import MOST, BadRecords
from qlora_jax.runtime.errors import UserError


def fed(bad, *errors):
    """Raises each error inside `bad.guard`, at line 1, 2, and so on; returns `bad`."""
    for line, error in enumerate(errors, 1):
        with bad.guard(f"d:{line}"):
            raise UserError(error)
    return bad


def test_a_record_that_is_good_is_not_counted():
    bad = BadRecords("drop")
    made = []
    with bad.guard("d:1"):
        made.append(1)
    assert (made, bad.count) == ([1], 0)


def test_reasons_are_counted_over_the_values_in_them():
    bad = fed(
        BadRecords("drop"),
        "d:1: [1]: unknown role 'x'",
        "no text",
        "d:3: [7]: unknown role 'y'",
    )
    assert bad.line(1000) == (
        "warning: 3 of 1,000 records left out: 2 [1]: unknown role 'x' (first d:1); "
        "1 no text (first d:2); correct them, or set data.on_bad_record: error to stop at the first"
    )


@pytest.mark.parametrize("error", ["no text", "d:1: no text"])
def test_error_stops_at_the_first_and_names_its_place_once(error):
    with pytest.raises(UserError, match=r"^d:1: no text$"):
        fed(BadRecords("error"), error)


def test_other_exceptions_pass():
    with pytest.raises(KeyError), BadRecords("drop").guard("d:1"):
        raise KeyError("x")


def test_the_line_and_the_memory_are_bounded():
    letters = [chr(0x4E00 + n) for n in range(2 * MOST)]
    bad = fed(BadRecords("drop"), *letters)
    assert bad.count == 2 * MOST
    assert len(bad.line(2 * MOST)) < 500
    assert len(bad._reasons) <= MOST + 1


def test_what_a_terminal_would_act_upon_is_escaped():
    assert "\x1b" not in fed(BadRecords("drop"), "the fields are \x1b[2J").line(1)
