"""The one exception that means "your input is wrong": the command line prints it as one line and exits with 2."""


class InputError(ValueError):
    """Bad input from outside: names the file, row or field, what was expected and what came."""


def first_line(error: Exception) -> str:
    """What an exception of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
