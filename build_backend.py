"""Answers `pip install .`: there is nothing to install, this checkout is run in place."""

import sys
from typing import NoReturn

MESSAGE = """\
error: this project is not a package to install; it is run in place, from the root of its checkout
(an installed `kernels` would overwrite Hugging Face's package of that name).
Run `make setup`, or: pip install -r requirements.txt; then `python -m training.train CONFIG`."""


def get_requires_for_build_wheel(config_settings: object = None) -> NoReturn:
    """Say what to do instead; pip shows it and stops."""
    sys.exit(MESSAGE)


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
build_wheel = build_editable = build_sdist = get_requires_for_build_wheel
