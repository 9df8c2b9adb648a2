"""What is written in and beside the picture. Text of the learner's cannot disturb a terminal or break an SVG."""

import unicodedata

from shardrun.lesson.messages.read import SentMessage, Together, exposed

LETTERS = {
    "all_reduce": "A", "all_gather": "G", "reduce_scatter": "S", "all_to_all": "X", "broadcast": "B", "reduce": "R",
    "gather": "g", "scatter": "s", "barrier": "b", "send": "→", "recv": "←",
}  # fmt: skip
"""Where a box has no room for the whole name."""


def safe(text: str, most: int = 200) -> str:
    """On one line, without characters that a terminal obeys or that XML forbids."""
    kept = "".join(" " if letter in "\n\t" else letter for letter in text)
    kept = "".join(letter for letter in kept if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Cn", "Co"))
    return kept if len(kept) <= most else f"{kept[: most - 2]} …"


def letter(message: SentMessage) -> str:
    return LETTERS.get(message.collective, "?")


def is_open(message: SentMessage) -> bool:
    """Whether nobody has seen it come to its end, who could have."""
    return not message.waited and not message.inside


def short_bytes(amount: int) -> str:
    """1234 → 1.2k."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if amount >= size:
            digits = f"{amount / size:.1f}"
            return f"{digits.removesuffix('.0') if len(digits) < 5 else round(amount / size)}{unit}"
    return str(amount)


def labels(message: SentMessage) -> list[str]:
    """What may stand in its box, the longest first."""
    peer = "" if message.peer is None else str(message.peer)
    name, sign = safe(message.collective), letter(message) + peer
    if peer:
        name += f" {sign}"
    size = short_bytes(message.bytes)
    return [f"{name} {message.bytes:,} B", f"{name} {size}", f"{sign} {size}", sign]


SIGNS = {"computes": "█", "waits": "░", "travels": "[ ]", "exposed": "!", "open": "…"}
"""How a terminal shows what an SVG has colours for."""


def legend(sides: list[Together]) -> list[tuple[str, str]]:
    """What occurs, and what it means: (one of SIGNS or nothing, words)."""
    calls = [call for side in sides for call in side]
    messages = [message for call in calls for message in call.messages]
    occurring = [
        (any(call.computes for call in calls), "computes", "computes"),
        (messages, "waits", "waits"),
        (messages, "travels", "on its way: collective and bytes"),
        (any(exposed(call) for call in calls), "exposed", "waited for with nothing to compute"),
        (any(map(is_open, messages)), "open", "not waited for, or not over"),
        (any(message.inside for message in messages), "", "one column: sent inside torch, its waiting is not seen"),
    ]
    found = [(sign, words) for occurs, sign, words in occurring if occurs]
    names = dict.fromkeys(message.collective for message in messages)
    return found + [("", f"{LETTERS.get(name, '?')} {safe(name)}") for name in names] or [("", "Nothing is sent.")]


ALL, MOST, EXPOSED = "all ranks", "most from one rank", "of all, exposed (!)"


def totals(side: Together) -> dict[str, str]:
    """Collective → how often all ranks together call it, with how much; then sums."""
    found: dict[str, list[int]] = {}
    ranks = [[message for message in call.messages if message.collective != "recv"] for call in side]
    late = [call.messages[number] for call in side for number in exposed(call)]
    for message in (message for messages in ranks for message in messages):
        found.setdefault(safe(message.collective), []).append(message.bytes)
    sizes = [[message.bytes for message in messages] for messages in ranks]
    if len(found) > 1:
        found[ALL] = [size for each in sizes for size in each]
    if found:
        found[MOST] = max(sizes, key=lambda each: (sum(each), len(each)))
    if late:
        found[EXPOSED] = [message.bytes for message in late]
    return {kind: f"×{len(each)}  {sum(each):,} B" for kind, each in found.items()}
