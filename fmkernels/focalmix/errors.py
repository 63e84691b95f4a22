"""Bad input, and what to say of other errors."""


class InputError(ValueError):
    """Bad input: names the file, row or field, what was expected and what came.

    The command line prints it as one line and exits with 2.
    """


class InputWarning(UserWarning):
    """Suspicious input, in one line. The command line prints it and goes on."""


class SkippedWarning(InputWarning):
    """Files that are no scans are left out, as they should be."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch says that the memory of the host or of a GPU is full."""
    # torch has a type for GPUs and raises RuntimeError for the host; importing torch here is slow
    texts = ("can't allocate memory", "not enough memory")
    is_host = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return isinstance(error, MemoryError) or is_host or type(error).__name__ == "OutOfMemoryError"
