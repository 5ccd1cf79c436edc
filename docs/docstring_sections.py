"""What mkdocstrings' parser wants of docstrings, done when the site is built: an empty line before each section, and
`Examples:`, whose `>>>` lines it shows as code.

Our docstrings write sections under one another without empty lines, which reads better in a file.
"""

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Returns|Raises|Examples?):\n)")


class DocstringSections(Extension):
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = _SECTION.sub("\n\n", text)
