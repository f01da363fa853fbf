"""The exception for what a user can get wrong."""


class UserError(Exception):
    """A mistake of the user's: one plain line that names the thing and the way out.

    Whatever finds one raises this. In a notebook it is an exception like any other; a command prints its line and
    exits with `status` (see configurator.excepthook).
    """
    status = 1
