"""A griffe extension: the headings of this package's docstrings, as mkdocstrings knows them."""

import re
from typing import Any

from griffe import Extension, Object

HEADINGS = {
    r"^Example:$": "Examples:",
    r"^Raises,? (.+):$": r"Errors are raised \1.\n\nRaises:",
}


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            for heading, known in HEADINGS.items():
                obj.docstring.value = re.sub(heading, known, obj.docstring.value, flags=re.M)
