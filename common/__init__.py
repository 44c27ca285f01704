"""What the scripts share: loss, networks, data, evaluation, the plumbing of a training loop."""


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong and what was expected.

    Library functions raise it; `train.launch` prints it and exits with code 1.
    """
