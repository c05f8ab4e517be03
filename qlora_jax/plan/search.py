"""Searches for the largest value that fits, in few attempts."""

from collections.abc import Callable


def largest(
    needs: Callable[[int], int], limit: int, first: tuple[int, int], unit: int, most: int
) -> int:
    """Returns the largest value up to `most`, `first` and a multiple of `unit` above it, that fits.

    Guesses along the line through what is known, since memory is nearly straight in rows and in
    tokens, and goes on until the next value is known not to fit.

    Args:
      needs: bytes of a value.
      limit: bytes that there are.
      first: a value that fits, and its bytes.
      unit: granularity.
      most: the largest value that makes sense.
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
        # where the line misleads, every other guess halves what is left
        by_line = fits <= reach < too_much and (attempts < 4 or attempts % 2)
        guess = reach if by_line else (fits + too_much) // 2
    return fits
