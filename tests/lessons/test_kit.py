"""What the demos share: how far a long part is, said by rank 0 every few seconds."""

from types import SimpleNamespace

import pytest

from lessons.kit import Progress


@pytest.mark.parametrize(("rank", "seconds", "said"), [(0, 0.0, 2), (0, 60.0, 0), (1, 0.0, 0)])
def test_progress(
    rank: int, seconds: float, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "SECONDS", seconds)
    times = iter([0.0, 1.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr("lessons.kit.time.monotonic", lambda: next(times))
    progress = Progress(SimpleNamespace(rank=rank), "steps", 2)  # type: ignore[arg-type]
    progress(1)
    progress(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["  (steps: 1 of 2)", "  (steps: 2 of 2)"][:said]
