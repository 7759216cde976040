"""What a user can do something about, said in one sentence."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The command line prints it without a traceback."""
