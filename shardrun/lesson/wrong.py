"""What a check raises."""


class Wrong(Exception):
    """The learner's answer is wrong; the message says how, in whole sentences."""


class Unsolved(Exception):
    """The exercise still raises NotImplementedError by its own line: it has not been begun.

    No RuntimeError, as NotImplementedError is: a check that catches the learner's errors lets it through.
    """
