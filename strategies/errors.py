"""The class of a user's mistake. Plain Python, and no strategy: every part of the project may import it."""


class UserError(ValueError):
    """A mistake of the user's, in one sentence that names the thing, its value and the way out: it is shown in place of
    a traceback. A ValueError of a library is not one: nobody wrote it for the person who reads it.
    """
