"""The error for bad input: one sentence about something that a user can change."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The command line prints it without a traceback."""


def in_one_line(error: BaseException) -> str:
    """The message of another library's error, or of its cause if it has one, shortened to fit into a sentence."""
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
