"""The one error that a user sees as a line."""


class InputError(Exception):
    """Something the user gave cannot be used; the message says what is wrong and what to do."""
