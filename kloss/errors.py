"""The exception for a user's mistake that one line can explain."""


class UserError(ValueError):
    """Bad input: says what was given, what is allowed and where. The command line prints it and exits with status 2."""
