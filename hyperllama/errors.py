"""The error for bad input: one sentence about something that a user can change."""

import re


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The command line prints it without a traceback.

    A word of 1,000 characters or more, which is no name of anything, is shown by its ends.
    """

    def __init__(self, message: object = ""):
        super().__init__(re.sub(r"\S{1000,}", lambda word: f"{word[0][:200]}...{word[0][-60:]}", str(message)))


def in_one_line(error: BaseException) -> str:
    """The message of another library's error, or of its cause if it has one, shortened to fit into a sentence."""
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
