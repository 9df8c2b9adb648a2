"""One palette: of pages, pictures and terminals alike."""

import re
from pathlib import Path

from shardrun.colours import ACCENT, COLOURS, REFERENCE, SENT, SERIES

ROOT = Path(__file__).parents[2]
OWN = {"shardrun/colours.py", "shardrun/present/film.py"}
"""The palette itself, and a terminal's ink and paper."""


def test_no_colour_is_written_elsewhere() -> None:
    files = [*ROOT.glob("lessons/**/*.py"), *ROOT.glob("shardrun/**/*.py")]
    written = {}
    for path in files:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found = re.findall(r"[\"\'](#[0-9A-Fa-f]{6})[\"\']|cmap=[\"\']|colormaps\[|color=[\"\'](?!black|white)", text)
        if found and name not in OWN:
            written[name] = found
    assert len(files) > 50 and not written


def test_series_are_the_palettes_and_a_reference_is_none_of_it() -> None:
    assert set(SERIES) <= {*COLOURS.values(), SENT} and len(set(SERIES)) == len(SERIES)
    assert SERIES[:2] == (ACCENT, SENT) and REFERENCE not in {*COLOURS.values(), *SERIES}
