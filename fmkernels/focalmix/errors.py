"""The exception for bad input. The command line prints it as one line and exits with 2."""


class InputError(ValueError):
    """Bad input: names the file, row or field, what was expected and what came."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class InputWarning(UserWarning):
    """Suspicious input, in one line. The command line prints it and goes on."""
