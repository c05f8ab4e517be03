"""Searches for the largest value that fits in memory, with few attempts."""

from collections.abc import Callable


def largest(
    needs: Callable[[int], int], limit: int, first: tuple[int, int], unit: int, most: int
) -> int:
    """Returns the largest value first + i * unit, up to `most`, whose bytes are within `limit`.

    The search guesses on a line through known values, because memory is nearly linear in rows and
    in tokens. The search ends when the next larger value is known not to fit.

    Args:
      needs: function of a value that returns its bytes.
      limit: bytes that may be used.
      first: a value that fits, and its bytes.
      unit: difference between two tried values.
      most: largest value to try.
    """
    (fits, device), start = first, first[0]
    too_much = start + ((most - start) // unit + 1) * unit
    guess, attempts = start + unit, 0
    while fits + unit < too_much:
        guess = min(max(start + (guess - start) // unit * unit, fits + unit), too_much - unit)
        needed = needs(guess)
        slope = (needed - device) / (guess - fits)
        if needed <= limit:
            fits, device = guess, needed
        else:
            too_much = guess
        reach = fits + int((limit - device) / slope) if slope > 0 else too_much
        attempts += 1
        # If the line misleads (after three attempts), every second guess halves the interval.
        by_line = fits <= reach < too_much and (attempts < 4 or attempts % 2)
        guess = reach if by_line else (fits + too_much) // 2
    return fits
