"""The exception for what a user can get wrong, and what its messages share."""


class UserError(Exception):
    """A mistake of the user's: one plain line that names the thing and the way out.

    Whatever finds one raises this. In a notebook it is an exception like any other; a command prints its line and
    exits with `status` (see configurator.excepthook).
    """
    status = 1


def some(names, most=3):
    """'a, b, c and 2 more'"""
    names = [*map(str, names)]
    return ', '.join(names[:most]) + f' and {len(names) - most} more' * (len(names) > most)
