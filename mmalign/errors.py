"""The one exception for faults that the user can mend."""


class UserError(ValueError):
    """A fault of the input, the config or the environment, told in one message.

    Form of the message: *where: got X, want Y. What to do.* The command line prints it and exits with code 2.
    """
