"""What a check raises."""


class Wrong(Exception):
    """The learner's answer is wrong; the message says how, in whole sentences."""
