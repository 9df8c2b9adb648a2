"""No accelerate config asks for a strategy of one's own: its file does. For strategies.catalogue. Plain Python."""

from strategies.config_keys import Key, Request

DISTRIBUTED_TYPE = "MULTI_GPU"
"""As DDP is launched."""

SECTION = ""

KEYS: dict[str, Key] = {}


def claims(config: Request) -> bool:
    """Never."""
    return False
