"""Wrong attempts at lesson 18, and what their message must say."""

from lessons.checking import wrong_attempt


@wrong_attempt("compute_seconds", says="That is forward alone")
def forward_alone(parameters, tokens, ranks, rate, mfu):
    return 2 * parameters * tokens / (ranks * rate * mfu)


@wrong_attempt("compute_seconds", says="divide by the ranks")
def on_one_rank(parameters, tokens, ranks, rate, mfu):
    return 6 * parameters * tokens / (rate * mfu)


@wrong_attempt("compute_seconds", says="No GPU reaches its peak")
def at_the_peak(parameters, tokens, ranks, rate, mfu):
    return 6 * parameters * tokens / (ranks * rate)


@wrong_attempt("compute_seconds", says="a rate counts them as two")
def multiply_add_as_one(parameters, tokens, ranks, rate, mfu):
    return 3 * parameters * tokens / (ranks * rate * mfu)


@wrong_attempt("compute_seconds", says="divide by it")
def times_the_mfu(parameters, tokens, ranks, rate, mfu):
    return 6 * parameters * tokens * mfu / (ranks * rate)


@wrong_attempt("link_seconds", says="eight bits each")
def bits_for_bytes(payload, collective, ranks, gigabits):
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks * payload / (gigabits * 1e9)


@wrong_attempt("link_seconds", says="passes the ring twice")
def one_pass(payload, collective, ranks, gigabits):
    return (ranks - 1) / ranks * payload / (gigabits * 1e9 / 8)


@wrong_attempt("link_seconds", says="passes the ring once")
def always_all_reduce(payload, collective, ranks, gigabits):
    return 2 * (ranks - 1) / ranks * payload / (gigabits * 1e9 / 8)


@wrong_attempt("link_seconds", says="(N − 1)/N of it per pass")
def payload_over_the_link(payload, collective, ranks, gigabits):
    return (2 if collective == "all_reduce" else 1) * payload / (gigabits * 1e9 / 8)


@wrong_attempt("link_seconds", says="2³⁰ bits are no gigabit")
def binary_gigabits(payload, collective, ranks, gigabits):
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks * payload / (gigabits * 2**30 / 8)


@wrong_attempt("least_tokens", says="Gradients come in backward")
def behind_all(ranks, gradient_bytes, bandwidth, rate):
    return 2 * (ranks - 1) / ranks * gradient_bytes * rate / (6 * bandwidth)


@wrong_attempt("least_tokens", says="That is the payload")
def payload_alone(ranks, gradient_bytes, bandwidth, rate):
    return gradient_bytes * rate / (4 * bandwidth)


@wrong_attempt("least_tokens", says="It is the inverse")
def inverse(ranks, gradient_bytes, bandwidth, rate):
    return 4 * bandwidth / (2 * (ranks - 1) / ranks * gradient_bytes * rate)


@wrong_attempt("least_tokens", says="passes the ring twice")
def one_way(ranks, gradient_bytes, bandwidth, rate):
    return (ranks - 1) / ranks * gradient_bytes * rate / (4 * bandwidth)


@wrong_attempt("least_tokens", says="backward has 4")
def backward_as_forward(ranks, gradient_bytes, bandwidth, rate):
    return 2 * (ranks - 1) / ranks * gradient_bytes * rate / (2 * bandwidth)


@wrong_attempt("record_seconds", says="The latency is missing")
def no_latency(traffic, bandwidth, latency):
    return sum(line["ring_bytes"] for line in traffic) / bandwidth


@wrong_attempt("record_seconds", says="on the wire are the ring's bytes")
def payload_for_wire(traffic, bandwidth, latency):
    return sum(line["calls"] * latency + line["measured"] / bandwidth for line in traffic)


@wrong_attempt("record_seconds", says="a line stands for many calls")
def once_per_line(traffic, bandwidth, latency):
    return sum(latency + line["ring_bytes"] / bandwidth for line in traffic)


@wrong_attempt("record_seconds", says="The bookkeeping is missing")
def payload_lines(traffic, bandwidth, latency):
    lines = [line for line in traffic if line["purpose"] == "payload"]
    return sum(line["calls"] * latency + line["ring_bytes"] / bandwidth for line in lines)


@wrong_attempt("record_seconds", says="do not multiply them by the calls")
def bytes_of_each_call(traffic, bandwidth, latency):
    return sum(line["calls"] * (latency + line["ring_bytes"] / bandwidth) for line in traffic)


@wrong_attempt("record_seconds", says="changed `traffic`")
def empties_it(traffic, bandwidth, latency):
    seconds = 0.0
    while traffic:
        line = traffic.pop()
        seconds += line["calls"] * latency + line["ring_bytes"] / bandwidth
    return seconds


@wrong_attempt("exposed", says="as if nothing were sent before")
def nothing_hidden(backward, messages):
    return sum(messages)


@wrong_attempt("exposed", says="cannot hide")
def all_hidden(backward, messages):
    return max(0.0, sum(messages) - sum(backward))


@wrong_attempt("exposed", says="wait for the one before it")
def no_queue(backward, messages):
    ready = end = 0.0
    for seconds, message in zip(backward, messages, strict=True):
        ready += seconds
        end = max(end, ready + message)
    return end - ready


@wrong_attempt("exposed", says="counted from the start")
def from_the_start(backward, messages):
    ready = free = 0.0
    for seconds, message in zip(backward, messages, strict=True):
        ready += seconds
        free = max(ready, free) + message
    return free


@wrong_attempt("exposed", says="behind its own bucket's compute")
def each_behind_its_own(backward, messages):
    return sum(max(0.0, message - seconds) for message, seconds in zip(messages, backward, strict=True))


@wrong_attempt("exposed", says="may catch up")
def each_behind_the_next(backward, messages):
    return sum(max(0.0, m - seconds) for m, seconds in zip(messages, [*backward[1:], 0.0], strict=True))


@wrong_attempt("exposed", says="the last message alone")
def the_last_alone(backward, messages):
    return messages[-1]
