"""Steps whose numbers are wrong: the first wrong tensor is named, and skipping one changes nothing, anywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch

from speedrun.config import Config, OptimizerConfig
from speedrun.run.faults import PATIENCE, Faults, Found, first_nonfinite
from strategies import select
from strategies.loss_scale import DynamicLossScale
from tests.ranks import RankPool
from tests.speedrun.runs import STRATEGIES, launch_of, read, small, train_here


def no_need() -> Found:
    raise AssertionError("the step is not repeated")


def test_what_is_a_spike_and_what_follows() -> None:
    said: list[str] = []
    faults = Faults(Config(spike=2.0, on_nonfinite="skip"), said.append)
    assert faults.early and not faults.refuses(100.0)  # there is nothing yet to compare with
    for step in range(1, 41):
        assert faults.after_step(step, 10.0 if step < 9 else 3.0, 1.0, no_need)  # the median follows
    assert not faults.refuses(6.0) and faults.refuses(6.1) and faults.refuses(float("nan"))
    assert not faults.after_step(41, 6.1, float("inf"), no_need)
    assert said == [
        "warning: the loss is 6.1 at step 41, above spike = 2 times the usual 3; the step was left out",
    ]
    assert not faults.after_step(42, float("nan"), 1.0, lambda: Found("where")) and "nan at step 42; where" in said[1]
    assert not Faults(Config(), said.append).early  # the default waits for nothing
    with pytest.raises(FloatingPointError, match="the norm of the gradient is inf at step 3; where: lower"):
        Faults(Config(), said.append).after_step(3, 1.0, float("inf"), lambda: Found("where"))


def test_an_overflow_in_fp16_is_no_fault_unless_the_scale_cannot_fall() -> None:
    said: list[str] = []
    inf, scale = float("inf"), DynamicLossScale()
    faults = Faults(Config(), said.append)  # whose policy is to stop
    for step in range(1, 17):
        scale.update(overflow=True)
        assert not faults.after_step(step, 3.0, inf, no_need, scale)
    assert said[0] == "fp16 overflow at step 1: the step was left out; the loss scale is 32,768 now"
    assert len(said) == 16 and said[-1].endswith("the loss scale is 1 now") and faults.stuck == 1
    assert faults.after_step(17, 3.0, 1.0, no_need, scale) and faults.stuck == 0  # in a row
    for step in range(18, 18 + PATIENCE - 1):
        assert not faults.after_step(step, 3.0, inf, no_need, scale)
    stuck = r"4 steps in a row overflowed in fp16 with a loss scale, 1, that cannot fall further, and .* step 21; where"
    with pytest.raises(FloatingPointError, match=stuck):
        faults.after_step(21, 3.0, inf, lambda: Found("where"), scale)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 22; where"):  # no scale mends a forward pass
        Faults(Config(), said.append).after_step(22, float("nan"), inf, lambda: Found("where"), DynamicLossScale())
    spiking = Faults(Config(spike=2.0, on_nonfinite="skip"), said.append)
    for step in range(1, 10):
        spiking.after_step(step, 1.0, 1.0, no_need, scale)
    assert not spiking.after_step(10, 3.0, inf, no_need, DynamicLossScale()) and "above spike" in said[-1]


def poisoned_steps(name: str, precision: Any) -> tuple[list[bool], list[str]]:
    """On a rank: whether skipped steps left weights and state alone, and what is said of each way to go wrong."""
    from speedrun.model import GPT
    from speedrun.optim.policy import parameter_groups

    world_size = torch.distributed.get_world_size() if name != "single" else 1
    rank = torch.distributed.get_rank() if name != "single" else 0
    config = small()
    model = GPT(config.model)
    model.init_weights(1)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    strategy = select.start(launch_of(name, rank, world_size, precision))
    strategy.prepare(model, parameter_groups(shapes, OptimizerConfig(), "torch"), clip=1.0, accumulation=2)
    tokens = torch.randint(0, 256, (2, 2, 33), generator=torch.Generator().manual_seed(rank))

    def forward_and_backward(factor: float = 1.0) -> torch.Tensor:
        total = torch.zeros(())
        for i in range(2):
            with strategy.micro_batch(last=i == 1):
                loss = strategy.model(tokens[i, :, :-1], tokens[i, :, 1:]) * factor
                strategy.backward(loss)
            total += loss.detach() / 2
        return total

    def snapshot() -> list[torch.Tensor]:
        state = strategy.optimizer.full_state()
        return [*strategy.optimizer.full_weights().values(), *(t for s in state.values() for t in s.values())]

    def same(before: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))

    forward_and_backward()
    strategy.step()
    kept, said = [], []
    before = snapshot()
    forward_and_backward(float("inf") if rank == world_size - 1 else 1.0)  # one rank's gradient alone
    assert not torch.isfinite(torch.tensor(strategy.step()))
    kept.append(same(before))
    forward_and_backward()
    strategy.step(update=False)
    kept.append(same(before))
    # An activation, in the forward pass of one rank; then a gradient that only backward knows.
    mlp = next(m for path, m in strategy.model.named_modules() if path.endswith("blocks.1.mlp"))

    def spoil(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + float("nan") if rank == world_size - 1 else output

    def spoil_backward(module: Any, arguments: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient + float("nan") if rank == world_size - 1 else gradient)

    for hook in (spoil, spoil_backward):
        handle = mlp.register_forward_hook(hook)
        said.append(first_nonfinite(strategy, forward_and_backward).words)
        handle.remove()
        kept.append(same(before))
    said.append(first_nonfinite(strategy, forward_and_backward).words)
    forward_and_backward()
    assert torch.isfinite(torch.tensor(strategy.step()))  # and training goes on
    kept.append(not same(before))
    return kept, said


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "precision"),
    [("single", "fp32"), *((name, "fp32") for name in STRATEGIES), *((name, "bf16") for name in STRATEGIES[2:])]
    + [("ddp", "fp16"), ("zero1", "fp16"), ("zero3", "fp16")],
)
def test_a_step_left_out_changes_nothing_and_its_cause_is_named(ranks: RankPool, name: str, precision: str) -> None:
    world_size = 1 if name == "single" else 2
    for kept, said in ranks.run(world_size, poisoned_steps, name, precision):
        assert all(kept) and len(kept) == 5
        on = f"on rank {world_size - 1}"
        assert said[0] == f"first not finite is the output of blocks.1.mlp (forward), {on}"
        assert said[1].startswith("first not finite is the gradient of blocks.1.mlp") and said[1].endswith(on)
        assert said[2].startswith("all is finite when the same batch is repeated")


@pytest.mark.ranks
def test_the_loss_that_is_looked_at_before_an_update_is_in_the_books(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train_here, "ddp", small(out=str(tmp_path), on_nonfinite="skip"))
    for rank in read(tmp_path / "run", "ledger.json")["ranks"]:
        (line,) = (line for line in rank["traffic"] if line["purpose"] == "bookkeeping")
        assert line["measured"] > 4 and [line["remainder"] for line in rank["traffic"]] == [0] * len(rank["traffic"])
