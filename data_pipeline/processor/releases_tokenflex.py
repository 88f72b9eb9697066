"""The releases of transformers that an exported folder works with; checked as the folder is loaded.

Beside the model's code lies a link to this file, since each of the two is exported on its own.
"""

import re

from transformers import __version__
from transformers.utils import logging

# Both are tested, and so is the one in requirements.txt; tests/environments has the three.
OLDEST, NEWEST = "5.4.0", "5.24.0"


def check_transformers(found: str = __version__) -> None:
    """Raise ImportError for a release before OLDEST; warn, once, of one after NEWEST."""
    if _minor(found) < _minor(OLDEST):
        raise ImportError(
            f"transformers {found} is installed; this model needs {OLDEST} to {NEWEST}: "
            f"pip install 'transformers>={OLDEST}'"
        )
    if _minor(found) > _minor(NEWEST):
        logging.get_logger("transformers").warning_once(
            f"transformers {found} is installed; this model was tested with {OLDEST} to {NEWEST}. "
            f"If it fails or answers oddly: pip install transformers=={NEWEST}"
        )


def _minor(version: str) -> tuple[int, ...]:
    """Major and minor number; a patch of a tested release counts as tested."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


check_transformers()
