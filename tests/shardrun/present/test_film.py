"""A presentation as an animated SVG, and the one that README shows."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.shardrun.present.conftest import Recorded, show

ROOT = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"


def checked(path: Path) -> ElementTree.Element:
    """The root of a film that loads nothing, runs nothing, and is as small as it has to be."""
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    root = ElementTree.fromstring(text)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "style", "defs", "g", "rect", "text", "use",
    }  # fmt: skip
    links = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert links and all(link.startswith("#l") for link in links)
    assert "url(" not in text and "@import" not in text and not re.search("/(root|home)/", text)
    ids = {element.get("id") for element in root.iter()}
    assert {link.removeprefix("#") for link in links} <= ids
    steps = [float(share) for share in re.findall(r"([\d.]+)%{transform", text)]
    assert steps == sorted(steps) and steps[0] == 0 and len(steps) >= 10
    assert "prefers-reduced-motion" in text
    return root


def words(root: ElementTree.Element) -> str:
    return "\n".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))


@pytest.mark.ranks
def test_a_replay_is_filmed(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardrun.present.film.SHORTEST", 0.0)
    monkeypatch.setattr("shardrun.present.show.FILMED_GAP", 0.0)
    film = tmp_path / "film.svg"
    status, printed, errors = show("4", "--replay", str(recorded.folder), "--auto", "0.01", "--film", str(film))
    assert status == 0 and f"Film: {film}" in printed, errors
    root = checked(film)
    shown = words(root)
    for part in ("part 1 of 15: Goal", "part 8 of 15: One step", "measured in step 8", "The page to share"):
        assert part in shown
    assert f"Made by: shardrun present 4 --replay RUN --auto 0.01 --film {film.name}" in "".join(root.itertext())


def test_a_film_needs_a_pace(tmp_path: Path) -> None:
    status, _, said = show("4", "--film", str(tmp_path / "film.svg"), "--out", str(tmp_path / "runs"))
    assert status == 2 and "--film needs a pace: add --auto SECONDS" in said and not list(tmp_path.iterdir())


def test_readme_shows_a_film_that_this_project_made() -> None:
    (name,) = re.findall(r"!\[[^]]*\]\((docs/[\w-]+\.svg)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    root = checked(ROOT / name)
    shown, made = words(root), "".join(root.itertext())
    assert f"Made by: shardrun present 5 --replay RUN --auto 3 --film {Path(name).name}" in made
    for part in ("Mental model", "Guess first", "The number: ", "under DDP, predicted", "One step", "The books"):
        assert part in shown
