"""The picture of a comparison: what each bar stands for, read back from the drawing."""

from pathlib import Path

import pytest

from shardrun.colours import COLOURS, SENT
from strategies.ledger.terms import CATEGORIES


def test_every_category_has_a_colour_of_its_own() -> None:
    assert list(COLOURS) == [*CATEGORIES, "activations", "other"]
    assert len({*COLOURS.values(), SENT}) == len(COLOURS) + 1


def test_bars_have_their_categories_colours_and_heights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_hex

    from shardrun.picture import draw_comparison

    mib = 2**20
    memory = {
        "ddp": {"parameters": 3 * mib, "master parameters": 0, "gradients": 2 * mib},
        "fsdp": {"parameters": mib, "master parameters": 0, "gradients": mib},
    }
    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw_comparison(memory, {"ddp": 5.0 * mib, "fsdp": 4.0 * mib}, 2, tmp_path / "compare.png")
    held, sent = plt.gcf().axes
    bars = [(to_hex(bar.get_facecolor()).upper(), bar.get_y(), bar.get_height()) for bar in held.patches]
    blue, orange = COLOURS["parameters"].upper(), COLOURS["gradients"].upper()
    assert bars == [(blue, 0, 3), (blue, 0, 1), (orange, 3, 2), (orange, 1, 1)]  # nothing for what nobody holds
    assert [text.get_text() for text in held.get_legend().get_texts()] == ["parameters", "gradients"]
    assert {to_hex(bar.get_facecolor()).upper() for bar in sent.patches} == {SENT}
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
