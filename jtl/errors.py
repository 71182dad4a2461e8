"""Errors about the user's input, and about a training run that diverged.

A command-line program catches ``UserError`` and prints one line. Any other exception is a bug and needs its traceback.
"""


class UserError(Exception):
    """jtl refuses an input; the message says what was expected, what was found and what to do."""


class InputError(UserError, ValueError):
    """A value, shape, file or combination is invalid."""


class MissingError(UserError, KeyError):
    """A name does not exist: a batch field, a path in a tree, a technique."""

    def __str__(self) -> str:
        """Return the message itself, which ``KeyError`` would quote."""
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class Diverged(FloatingPointError):
    """A loss, gradient or parameter is no longer finite."""
