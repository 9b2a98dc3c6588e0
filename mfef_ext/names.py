"""How messages show values, and what they say of a name that is none of those that are known."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from difflib import get_close_matches

LONGEST = 200  # characters of a value
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100  # characters
_REPR.maxlist = _REPR.maxtuple = 16


def shown(value: object) -> str:
    """``repr(value)``, with ``...`` for most of what is long."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def a(noun: str) -> str:
    """The noun, such as the name of a class, with its article: a Linear, an Identity, an LSTM."""
    sounds = "AEFHILMNORSX" if noun[:2].isupper() else "AEIOUaeiou"
    return f"an {noun}" if noun[:1] in sounds else f"a {noun}"


def unknown(what: str, name: str, known: Sequence[str], prefix: str = "", choice: str = "") -> str:
    """The sentence about ``what``, in which ``name`` is none of those that are known.

    ``prefix`` stands before the known names in ``what``; ``choice`` says which to use, where there
    are too many to list.
    """
    near = get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    what = what if len(what) <= 400 else what[:400] + "..."
    return f"{what} is unknown; {hint}use one of {choice or ', '.join(known)}"
