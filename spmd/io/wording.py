"""How values and foreign errors are worded in one-line messages."""

import reprlib
from typing import Any


def show(value: Any) -> str:
    """A value, short however large it is."""
    return reprlib.repr(value)


def first_line(error: Exception) -> str:
    """The first line of an error's message, else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
