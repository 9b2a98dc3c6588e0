"""What is said of a name that is none of those that are known."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def unknown(what: str, name: str, known: Sequence[str], prefix: str = "", choice: str = "") -> str:
    """The sentence about ``what``, in which ``name`` is none of those that are known.

    ``prefix`` stands before the known names in ``what``; ``choice`` says which to use, where there
    are too many to list.
    """
    near = get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    what = what if len(what) <= 400 else what[:400] + "..."
    return f"{what} is unknown; {hint}use one of {choice or ', '.join(known)}"
