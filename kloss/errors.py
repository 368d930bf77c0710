"""The one exception that means: the person who called made a mistake, and one line can say which."""


class UserError(ValueError):
    """Bad input from outside: says what was given, what is allowed and where; the command line prints it and exits with 2."""
