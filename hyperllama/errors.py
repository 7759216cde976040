"""What a user can do something about, said in one sentence."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The command line prints it without a traceback."""


def in_one_line(error: BaseException) -> str:
    """What another library's error says, or its cause where it has one, short enough for a sentence of ours."""
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
