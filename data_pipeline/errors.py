"""The one error type meant for users."""


class InputError(ValueError):
    """Something the user gave is wrong; the message says what was found, expected, and to do."""
