"""Errors that speak of the user's input, and of a training that diverged.

A command line catches ``UserError`` and prints one line; anything else is a defect, whose traceback is needed.
"""


class UserError(Exception):
    """An input that jtl refuses; the message names what was expected, what was found and what to do."""


class InputError(UserError, ValueError):
    """A value, a shape, a file or a combination that cannot be worked with."""


class MissingError(UserError, KeyError):
    """A name that is not there: a field of a batch, a path in a tree, a technique."""

    def __str__(self) -> str:
        """The message itself, which a KeyError would quote."""
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class Diverged(FloatingPointError):
    """A loss, a gradient or a parameter is no longer finite."""
