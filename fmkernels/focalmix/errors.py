"""The one exception that means "your input is wrong": the command line prints it as one line and exits with 2."""


class InputError(ValueError):
    """Bad input from outside: names the file, row or field, what was expected and what came."""
