"""The one error type that is meant for the user's eyes."""


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one line that names the value and the way out; command-line programs print it
    and exit with code 2, without a traceback.
    """
