"""Other right solutions of lesson 18."""

from lessons.checking import right_attempt


@right_attempt("record_seconds")
def in_two_sums(traffic, bandwidth, latency):
    calls = bytes_ = 0
    for line in traffic:
        calls += line["calls"]
        bytes_ += line["ring_bytes"]
    return latency * calls + bytes_ / bandwidth


@right_attempt("exposed")
def the_longest_queue(backward, messages):
    """The link is never idle after some bucket i: the last message ends when i is ready and all from i on are sent."""
    ready = [sum(backward[: i + 1]) for i in range(len(backward))]
    return max(at + sum(messages[i:]) for i, at in enumerate(ready)) - ready[-1]
