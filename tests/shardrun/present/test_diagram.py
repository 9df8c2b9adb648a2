"""Mermaid diagrams as arrows."""

import pytest

from shardrun.present.diagram import arrows


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("flowchart LR\n A[one] --> B(two)", "one ──▶ two"),
        ('flowchart TD\n A["a [x]<br/>below"] -->|says| B\n A -- says --> C{why?}',
         "a [x] (below) ── says ──▶ B\na [x] ── says ──▶ why?"),
        ("graph LR\n A --> B --> C\n A & B -.-> D([end])", "A ──▶ B\nB ──▶ C\nA ──▶ end\nB ──▶ end"),
        ("flowchart LR\n A[all of<br/>it] <--> B\n B --> A\n %% nothing\n classDef x fill:#fff",
         "all of it ◀──▶ B\nB ──▶ all of it"),
        ("flowchart LR\n subgraph r0 [rank 0]\n a[w] --> b[x]\n end\n subgraph rank 1\n c[y]\n end\n b == sent ==> c",
         "rank 0: w ──▶ rank 0: x\nrank 0: x ── sent ──▶ rank 1: y"),
        ("sequenceDiagram\n participant A as rank 0\n participant B\n Note over A,B: equal\n A->>B: bucket\n"
         " B-->>B: adds\n loop twice\n B->>A: back\n end",
         "— equal —\nrank 0 ──▶ B: bucket\nB: adds\n— twice —\nB ──▶ rank 0: back"),
        ("gantt\n title t\n dateFormat s\n section GPU\n work :a, 0, 10s\n wait :crit, b, after a, 20s\n section link\n"
         " send :5, 5s",
         f"t\nGPU   work  {'█' * 20}\n      wait  {' ' * 20}{'█' * 40}\nlink  send  {' ' * 10}{'█' * 10}"),
        ("gantt\n work :a, 2026-01-01, 3d", ""),
        ("pie\n nothing", ""),
        ("flowchart LR\n A --> B\n what is this", ""),
        ("sequenceDiagram\n what is this", ""),
    ],
)  # fmt: skip
def test_arrows(source: str, lines: str) -> None:
    assert arrows(source) == lines.splitlines()


def test_a_long_arrow_goes_on_below() -> None:
    found = arrows(f"flowchart LR\n A[{'word ' * 15}] --> B[{'other ' * 15}]")
    assert len(found) > 1 and all(len(line) <= 92 for line in found) and found[1].startswith("      ")
