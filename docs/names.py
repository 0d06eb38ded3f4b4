# SPDX-License-Identifier: Apache-2.0
"""For Griffe, which reads the docstrings: ``weight, bias: [channels] ...`` is one entry of two names.

It would take ``bias`` for the type of ``weight,``: up to the first space is the name. A no-break space is none.
"""

import re

import griffe

ENTRY = re.compile(r"^ {4,}\*{0,2}\w+(?:, \*{0,2}\w+)+: ", re.MULTILINE)


class Names(griffe.Extension):
    """Joins the names of an entry."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = ENTRY.sub(
                lambda found: found[0].rstrip().replace(", ", ",\u00a0") + " ", obj.docstring.value
            )
