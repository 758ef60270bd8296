"""What to say of a name that nothing has."""

from collections.abc import Iterable
from difflib import get_close_matches


def alternatives(name: object, known: Iterable[str], introduction: str = "there are") -> str:
    """The nearest known name, if one is near, and then all of them."""
    names = list(known)
    begun = [one for one in names if one.startswith(str(name))]
    near = get_close_matches(str(name), names, n=1) or begun
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}{introduction}: {', '.join(names)}"
