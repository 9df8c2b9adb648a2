"""Strategy-neutral checkpoints: saved by any strategy at any world size, loaded by any other at any other.

    step_00000010/
        rank_000.safetensors …   per rank that saved: its elements of every tensor, each flat; see pieces.py
        index.json               what there is: tensors by name with their shape, and which file holds which elements
        SHA256SUMS               a hash of every other file, in the form that `sha256sum -c` reads

What makes it neutral is that a tensor is a list of intervals of its flattened elements, as everywhere in `strategies`
(layout.py): whoever loads reads the elements that it holds, out of whichever files hold them. Nothing is pickled.

    format.py    the index: written, read, checked          folder.py    one complete folder or none; which ones to keep
    shards.py    safetensors files: written, read, checked  save.py      the saver: copy, then write in the background
    pieces.py    which tensors an optimizer is made of      load.py      check, then read what this rank holds
    finite.py    whether every value is finite
"""
