"""The one exception the trainer raises for what its user can put right."""


class TrainError(Exception):
    """A problem with the data, the options or the machine; its text is the whole message.

    The command line prints it without a traceback and exits with status 1.
    """
