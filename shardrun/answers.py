"""What `plan`, `diff`, `compare` and `explain` print with --json: one head for all of them (docs/json.md)."""

from typing import Any

from strategies import strict_json

SCHEMA = 3


def json_answer(verb: str, inputs: dict[str, Any], advice: list[str], notes: list[str], **found: Any) -> str:
    """inputs: all that the figures are of; advice, notes: sentences; found: what the verb has to say beside them."""
    head = {"schema": SCHEMA, "verb": verb, "inputs": inputs, "advice": advice, "notes": notes}
    return strict_json.dumps({**head, **found}, indent=2)
