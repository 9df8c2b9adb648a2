"""Checks of lesson 18."""

from fractions import Fraction

from lessons.cases import formula, generated, st
from lessons.checking import expect_number

RATES = st.sampled_from([1e12, 312e12, 989e12])
BANDWIDTHS = st.sampled_from([1.25e9, 32e9, 50e9, 450e9])


def compute_seconds(theirs):
    for parameters, tokens, ranks, rate, mfu in (
        (124_000_000, 524_288, 6, 989e12, 0.4),
        (7_000_000_000, 4_000_000, 64, 312e12, 0.5),
    ):
        right = 6 * parameters * tokens / (ranks * rate * mfu)
        mistakes = {
            "That is forward alone: backward costs twice as much again.": right / 3,
            "That is backward alone.": right * 2 / 3,
            "That counts a multiplication and its addition as one operation; a rate counts them as two.": right / 2,
            "Every rank computes its own part of the tokens: divide by the ranks.": right * ranks,
            "No GPU reaches its peak: divide by the mfu too.": right * mfu,
            "The mfu makes it slower, not faster: divide by it.": right * mfu**2,
            "Backward costs as much as forward there. It computes two gradients: 4 operations.": right * 4 / 6,
            "That is checkpointing's, with another forward pass: 8 operations.": right * 8 / 6,
        }
        what = (
            f"{parameters:,} parameters and {tokens:,} tokens on {ranks} ranks of {rate / 1e12:.0f} TFLOP/s at "
            f"{mfu:.0%}, in seconds"
        )
        expect_number(theirs(parameters, tokens, ranks, rate, mfu), right, what, mistakes, ranks)
    formula(
        theirs, lambda p, t, n, rate, mfu: (2 * p * t + 4 * p * t) / n / rate / mfu, "in seconds", "ranks",
        parameters=st.integers(0, 10**11), tokens=st.integers(0, 10**7), ranks=st.integers(1, 64), rate=RATES,
        mfu=st.sampled_from([0.05, 0.4, 1.0]),
    )  # fmt: skip


def link_seconds(theirs):
    for payload, collective, ranks, gigabits in (
        (496_000_000, "all_reduce", 6, 400.0),
        (14_000_000_000, "all_gather", 16, 3600.0),
        (248_000_000, "reduce_scatter", 6, 10.0),
    ):
        twice = collective == "all_reduce"
        right = (2 if twice else 1) * (ranks - 1) / ranks * payload / (gigabits * 1e9 / 8)
        mistakes = {
            "The link's speed is in bits; the payload is in bytes: eight bits each.": right / 8,
            "That multiplies by eight where it should divide, or the other way round.": right * 8,
            "That is the payload over the link; a ring sends (N − 1)/N of it per pass.": right * ranks / (ranks - 1),
            "2³⁰ bits are no gigabit: 10⁹ are.": right * 1e9 / 2**30,
        }
        if twice:
            mistakes |= {
                "Both at once: eight times too little by bits, and twice by the all-reduce's second pass.": right / 16,
                "An all-reduce passes the ring twice.": right / 2,
                "That is the payload once; an all-reduce on a ring sends 2 (N − 1)/N of it.": (
                    payload / (gigabits * 1e9 / 8)
                ),
            }
        else:
            mistakes["That is an all-reduce; this collective passes the ring once."] = right * 2
        what = f"{payload:,} bytes by {collective} on {ranks} ranks at {gigabits:g} Gb/s, in seconds"
        expect_number(theirs(payload, collective, ranks, gigabits), right, what, mistakes, ranks)
    formula(
        theirs,
        lambda payload, collective, n, gigabits: (
            {"all_reduce": 16, "all_gather": 8, "reduce_scatter": 8}[collective] * (payload - payload / n)
            / (gigabits * 10**9)
        ),
        "in seconds", "ranks", payload=st.integers(0, 10**11),
        collective=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]), ranks=st.integers(1, 64),
        gigabits=st.sampled_from([10.0, 256.0, 400.0, 3600.0]),
    )  # fmt: skip


def least_tokens(theirs):
    for ranks, width, bandwidth, rate in ((6, 4, 450e9, 4e14), (16, 2, 32e9, 1.5e14)):
        right = 2 * (ranks - 1) / ranks * width * rate / (4 * bandwidth)
        mistakes = {
            "That hides the all-reduce behind forward and backward. Gradients come in backward: 4 operations per "
            "parameter and token.": right * 4 / 6,
            "That takes 2 operations per parameter and token; backward has 4.": right * 2,
            "An all-reduce passes the ring twice.": right / 2,
            "That is the payload; a ring sends 2 (N − 1)/N of it.": width * rate / (4 * bandwidth),
            "That sends all of the gradients twice; a ring sends (N − 1)/N of them per pass.": (
                2 * width * rate / (4 * bandwidth)
            ),
            "That is the tokens of all ranks together.": right * ranks,
            "It is the inverse: the quicker the GPU beside its link, the more tokens it needs.": 1 / right,
            "The bytes of a gradient are missing.": right / width,
            "Rate and bandwidth are exchanged there.": (2 * (ranks - 1) / ranks * width * bandwidth / (4 * rate)),
        }
        what = f"{ranks} ranks, gradients of {width} bytes, {bandwidth / 1e9:g} GB/s and {rate / 1e12:g} TFLOP/s"
        expect_number(theirs(ranks, width, bandwidth, rate), right, what, mistakes, ranks)
    formula(
        theirs, lambda n, width, bandwidth, rate: width * (1 - 1 / n) * rate / bandwidth / 2, "in tokens", "ranks",
        ranks=st.integers(1, 64), gradient_bytes=st.sampled_from([4, 2, 1]), bandwidth=BANDWIDTHS, rate=RATES,
    )  # fmt: skip


def _line(collective, purpose, calls, payload, ring, remainder=0):
    bytes_ = {"predicted": payload - remainder, "measured": payload, "remainder": remainder, "ring_bytes": ring}
    return {"collective": collective, "purpose": purpose, "calls": calls, **bytes_}


def record_seconds(theirs):
    _record(
        theirs,
        [
            _line("all_gather", "payload", 26, 4_800_000, 4_200_000.0),
            _line("reduce_scatter", "payload", 13, 3_600_000, 3_150_000.0),
            _line("all_reduce", "bookkeeping", 4, 16, 28.0),
        ],
        32e9, 10e-6, "a ledger of 43 calls at 32 GB/s and 10 µs, in seconds",
    )  # fmt: skip
    line = st.builds(
        _line, st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]),
        st.sampled_from(["payload", "bookkeeping"]), st.integers(1, 500), st.integers(0, 10**9),
        st.integers(0, 10**9).map(float), st.sampled_from([0, 640]),
    )  # fmt: skip
    generated(
        lambda traffic, bandwidth, latency: _record(
            theirs, traffic, bandwidth, latency,
            f"a ledger of {[(each['purpose'], each['calls'], each['ring_bytes']) for each in traffic]} (purpose, "
            f"calls, ring_bytes) at {bandwidth / 1e9:g} GB/s and {latency * 1e6:g} µs, in seconds",
        ),
        traffic=st.lists(line, max_size=4), bandwidth=BANDWIDTHS, latency=st.sampled_from([10e-6, 1e-3, 0.0]),
    )  # fmt: skip


def _record(theirs, traffic, bandwidth, latency, what):
    sent = calls = payload = bookkeeping = of_bookkeeping = 0.0
    for line in traffic:
        sent, calls, payload = sent + line["ring_bytes"], calls + line["calls"], payload + line["measured"]
        if line["purpose"] == "bookkeeping":
            bookkeeping, of_bookkeeping = bookkeeping + line["calls"], of_bookkeeping + line["ring_bytes"]
    right = sent / bandwidth + calls * latency
    known = {
        "The latency is missing: with small messages it is most of the time.": sent / bandwidth,
        "That has the latency once per line of the ledger; a line stands for many calls.": (
            sent / bandwidth + len(traffic) * latency
        ),
        "That has the latency once in all; every call costs it.": sent / bandwidth + latency,
        "The bookkeeping is missing. Its bytes are nothing, its calls take as long as any.": (
            (sent - of_bookkeeping) / bandwidth + (calls - bookkeeping) * latency
        ),
        "That takes the payload; on the wire are the ring's bytes.": payload / bandwidth + calls * latency,
        "That takes the predicted payload; on the wire are the ring's bytes, measured.": (
            sum(line["predicted"] for line in traffic) / bandwidth + calls * latency
        ),
        "That adds payload and ring bytes; they are the same bytes, counted in two ways.": (
            (payload + sent) / bandwidth + calls * latency
        ),
        "A line's bytes are those of all its calls: do not multiply them by the calls.": (
            sum(line["calls"] * line["ring_bytes"] for line in traffic) / bandwidth + calls * latency
        ),
        "That is the latency alone.": calls * latency,
    }
    expect_number(theirs([dict(line) for line in traffic], bandwidth, latency), right, what, known)


def exposed(theirs):
    for backward, messages in (
        ([3.0, 3.0, 4.0], [2.0, 2.0, 2.0]),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
        ([1.0, 1.0, 10.0], [3.0, 1.0, 1.0]),
        ([1.0, 6.0, 1.0, 2.0], [4.0, 1.0, 5.0, 1.0]),
        ([5.0], [3.0]),
    ):
        _exposed(theirs, backward, messages)
    quarters = st.integers(0, 40).map(lambda n: n / 4)
    generated(
        lambda buckets: _exposed(theirs, [b for b, _ in buckets], [m for _, m in buckets]),
        buckets=st.lists(st.tuples(quarters, quarters), min_size=1, max_size=6),
    )  # fmt: skip


def _exposed(theirs, backward, messages):
    end, total = sum(backward), sum(messages)
    begins, free, unqueued = [], Fraction(0), 0.0
    for i, message in enumerate(messages):
        ready = sum(map(Fraction, backward[: i + 1]))
        begins.append(max(ready, free))
        free = begins[-1] + Fraction(message)
        unqueued = max(unqueued, float(ready) + message)
    right = float(free) - end
    own = sum(max(0.0, message - seconds) for message, seconds in zip(messages, backward, strict=True))
    after = sum(max(0.0, message - seconds) for message, seconds in zip(messages, [*backward[1:], 0.0], strict=True))
    known = {
        "That is all of the communication: as if nothing were sent before backward ends.": total,
        "That is communication less compute. But the last bucket is complete only when backward ends, so its "
        "message cannot hide.": max(0.0, total - end),
        "That lets several messages use the link at once; one has to wait for the one before it.": unqueued - end,
        "That is the last message alone; it may have to wait until the link is free.": messages[-1],
        "That is when the last message ends, counted from the start of backward.": float(free),
        "You let messages start one after another from the beginning, before their gradients are there.": total - end,
        "That hides each message behind its own bucket's compute. It is sent after that, while later buckets are "
        "computed.": own,
        "That adds up what each bucket's message is longer than the compute after it. A link that is late may catch up "
        "during a long one.": after,
    }
    expect_number(
        theirs(list(backward), list(messages)), right,
        f"buckets after {backward} s of backward that take {messages} s on the link", known,
    )  # fmt: skip
