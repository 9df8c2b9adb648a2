"""What one GPU says of this project, in one command.

    make gpu                                     # 8 minutes on the first GPU; given again, it goes on where it stopped
    python -m benchmarks.gpu --minutes 15        # the same with whatever Python and torch the machine has
    python -m benchmarks.gpu --only attention    # one part, once more; may be repeated
    python -m benchmarks.gpu --peer ../nanoGPT   # beside the model of a checkout of nanoGPT

The parts (parts.py) run one after another, in order of worth, each in processes of its own with a limit in seconds.
What they find is written as it comes: FOLDER/CARD.json and CARD.md, and what they print to FOLDER/CARD/PART.log. The
card's own matrix-product and copy rates stand beside every part, so that ratios can be compared over cards.

Without a GPU, or with --tiny, all parts run at sizes that say nothing but that the script works, into runs/gpu-tiny.

    parts.py     the parts, their limits and the packages they need
    runner.py    a part's processes, their limit and their end
    results.py   what a part writes, as it comes; report.py makes Markdown of it
    card.py checks.py run.py books.py certificate.py steps.py kernels.py attention.py doctor.py    the parts themselves
    alone.py     one rank under a strategy in a process of its own, without the seconds of accelerate launch
    sizes.py     what is trained, and the sizes of --tiny
"""
