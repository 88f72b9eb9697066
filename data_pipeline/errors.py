"""The one error type meant for users."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class InputError(ValueError):
    """Something the user gave is wrong; the message says what was found, expected, and to do."""


def for_users(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with its ValueErrors as `InputError`: the processor's files know only those."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise InputError(str(error)) from error

    return call
