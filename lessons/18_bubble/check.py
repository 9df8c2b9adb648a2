"""Checks of lesson 18."""

from lessons.checking import expect_number


def compute_seconds(theirs):
    for parameters, tokens, ranks, rate, mfu in (
        (124_000_000, 524_288, 8, 989e12, 0.4),
        (7_000_000_000, 4_000_000, 64, 312e12, 0.5),
    ):
        right = 6 * parameters * tokens / (ranks * rate * mfu)
        expect_number(
            theirs(parameters, tokens, ranks, rate, mfu),
            right,
            f"{parameters:,} parameters and {tokens:,} tokens on {ranks} ranks of {rate / 1e12:.0f} TFLOP/s at "
            f"{mfu:.0%}, in seconds",
            {
                "That is forward alone: backward costs twice as much again.": right / 3,
                "That is backward alone.": right * 2 / 3,
                "That counts a multiplication and its addition as one operation; a rate counts them as two.": right / 2,
                "Every rank computes its own part of the tokens: divide by the ranks.": right * ranks,
                "No GPU reaches its peak: divide by the mfu too.": right * mfu,
                "The mfu makes it slower, not faster: divide by it.": right * mfu**2,
            },
        )


def link_seconds(theirs):
    for payload, collective, ranks, gigabits in (
        (496_000_000, "all_reduce", 8, 400.0),
        (14_000_000_000, "all_gather", 16, 3600.0),
        (248_000_000, "reduce_scatter", 2, 10.0),
    ):
        passes = 2 if collective == "all_reduce" else 1
        right = passes * (ranks - 1) / ranks * payload / (gigabits * 1e9 / 8)
        expect_number(
            theirs(payload, collective, ranks, gigabits),
            right,
            f"{payload:,} bytes by {collective} on {ranks} ranks at {gigabits:g} Gb/s, in seconds",
            {
                "The link's speed is in bits; the payload is in bytes: eight bits each.": right / 8,
                "That multiplies by eight where it should divide, or the other way round.": right * 8,
                "Both at once: eight times too little by bits, and twice by the all-reduce's second pass.": right / 16,
                "An all-reduce passes the ring twice.": right / 2 if passes == 2 else -1,
                "That is an all-reduce; this collective passes the ring once.": right * 2 if passes == 1 else -1,
                "That is the payload over the link; a ring sends (N − 1)/N of it per pass.": (
                    passes * payload / (gigabits * 1e9 / 8)
                ),
                "That is the payload once; an all-reduce on a ring sends 2 (N − 1)/N of it.": (
                    payload / (gigabits * 1e9 / 8) if passes == 2 else -1
                ),
            },
        )


def least_tokens(theirs):
    for ranks, width, bandwidth, rate in ((8, 4, 450e9, 4e14), (16, 2, 32e9, 1.5e14)):
        right = 2 * (ranks - 1) / ranks * width * rate / (4 * bandwidth)
        expect_number(
            theirs(ranks, width, bandwidth, rate),
            right,
            f"{ranks} ranks, gradients of {width} bytes, {bandwidth / 1e9:g} GB/s and {rate / 1e12:g} TFLOP/s",
            {
                "That hides the all-reduce behind forward and backward. Gradients come in backward: 4 operations per "
                "parameter and token.": right * 4 / 6,
                "That takes 2 operations per parameter and token; backward has 4.": right * 2,
                "An all-reduce passes the ring twice.": right / 2,
                "That is the payload; a ring sends 2 (N − 1)/N of it.": width * rate / (4 * bandwidth),
                "That sends all of the gradients twice; a ring sends (N − 1)/N of them per pass.": (
                    2 * width * rate / (4 * bandwidth)
                ),
                "That is the tokens of all ranks together.": right * ranks,
                "It is the inverse: the quicker the GPU beside its link, the more tokens it needs.": (1 / right),
            },
        )


def _line(collective, purpose, calls, payload, ring):
    bytes_ = {"predicted": payload, "measured": payload, "remainder": 0, "ring_bytes": ring}
    return {"collective": collective, "purpose": purpose, "calls": calls, **bytes_}


def record_seconds(theirs):
    traffic = [
        _line("all_gather", "payload", 26, 4_800_000, 4_200_000.0),
        _line("reduce_scatter", "payload", 13, 3_600_000, 3_150_000.0),
        _line("all_reduce", "bookkeeping", 4, 16, 28.0),
    ]
    bandwidth, latency = 32e9, 10e-6
    sent, calls = sum(line["ring_bytes"] for line in traffic), sum(line["calls"] for line in traffic)
    expect_number(
        theirs([dict(line) for line in traffic], bandwidth, latency),
        sent / bandwidth + calls * latency,
        "a ledger of 43 calls at 32 GB/s and 10 µs, in seconds",
        {
            "The latency is missing: with small messages it is most of the time.": sent / bandwidth,
            "That has the latency once per line of the ledger; a line stands for many calls.": (
                sent / bandwidth + len(traffic) * latency
            ),
            "The bookkeeping is missing. Its bytes are nothing, its calls take as long as any.": (
                sent / bandwidth + (calls - 4) * latency
            ),
            "That takes the payload; on the wire are the ring's bytes.": (
                sum(line["measured"] for line in traffic) / bandwidth + calls * latency
            ),
            "That adds payload and ring bytes; they are the same bytes, counted in two ways.": (
                sum(line["measured"] + line["ring_bytes"] for line in traffic) / bandwidth + calls * latency
            ),
            "That is the latency alone.": calls * latency,
        },
    )


def exposed(theirs):
    for backward, messages in (
        ([3.0, 3.0, 4.0], [2.0, 2.0, 2.0]),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
        ([1.0, 6.0, 1.0, 2.0], [4.0, 1.0, 5.0, 1.0]),
        ([5.0], [3.0]),
    ):
        ready = free = 0.0
        starts, unqueued = [], 0.0
        for seconds, message in zip(backward, messages, strict=True):
            ready += seconds
            unqueued = max(unqueued, ready + message)
            starts.append(max(ready, free))
            free = starts[-1] + message
        expect_number(
            theirs(list(backward), list(messages)),
            free - ready,
            f"buckets after {backward} s of backward that take {messages} s on the link",
            {
                "That is all of the communication: as if nothing were sent before backward ends.": sum(messages),
                "That is communication less compute. But the last bucket is complete only when backward ends, so its "
                "message cannot hide.": max(0.0, sum(messages) - sum(backward)),
                "That lets several messages use the link at once; one has to wait for the one before it.": (
                    unqueued - ready
                ),
                "That is the last message alone; it may have to wait until the link is free.": messages[-1],
                "That is when the last message ends, counted from the start of backward.": free,
                "You let messages start one after another from the beginning, before their gradients are there.": (
                    sum(messages) - ready
                ),
            },
        )
