"""What a function does to its arguments is seen, said in one sentence, and undone where a check can go on."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shardrun.lesson import called
from shardrun.lesson.arguments import Snapshot
from shardrun.lesson.wrong import Unsolved, Wrong


@pytest.fixture(autouse=True)
def no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(called, "CALLS", called.Calls(files=(__file__,)))


def a_matrix() -> torch.Tensor:
    return torch.arange(6.0).view(2, 3)


def a_view() -> torch.Tensor:
    return torch.arange(12.0)[4:8]


def with_gradient() -> torch.Tensor:
    tensor = torch.ones(3, requires_grad=True)
    tensor.grad = torch.ones(3)
    return tensor


def a_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def spoil_the_base(tensor: torch.Tensor) -> None:
    base = tensor._base
    assert base is not None
    base[0] = 9.0


def put_back(tensor: torch.Tensor) -> None:
    tensor += 1
    tensor -= 1


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "values": (a_matrix, lambda x: x.mul_(2), "`x`.*numbers are others"),
    "one bit of a nan": (lambda: torch.tensor([np.nan]), lambda x: x.view(torch.int32).add_(1), "`x`.*numbers"),
    "by way of numpy": (a_matrix, lambda x: x.numpy().fill(1.0), "`x`.*numbers"),
    "by way of data": (a_matrix, lambda x: x.data.zero_(), "`x`.*numbers"),
    "beside a view": (a_view, spoil_the_base, "`x`.*numbers"),
    "and put back": (a_matrix, put_back, "written into `x`"),
    "storage": (a_matrix, lambda x: setattr(x, "data", x.clone()), "given `x`, .*another storage"),
    "dtype": (a_matrix, lambda x: setattr(x, "data", x.double()), "given `x`, .*another dtype"),
    "shape": (a_matrix, lambda x: x.resize_(3, 2), "given `x`, .*another shape"),
    "stride": (a_matrix, lambda x: x.t_(), "given `x`, "),
    "requires_grad": (a_matrix, lambda x: x.requires_grad_(), "requires_grad was False and is True"),
    "gradient made": (lambda: torch.ones(2, requires_grad=True), lambda x: x.sum().backward(), "gradient.*has a grad"),
    "gradient gone": (with_gradient, lambda x: setattr(x, "grad", None), "gradient of `x`.*none any more"),
    "gradient divided": (with_gradient, lambda x: x.grad.div_(2), "gradient of `x`"),
    "a tensor's hook": (with_gradient, lambda x: x.register_hook(lambda g: g), "hooks are still on it"),
    "a module's hook": (a_model, lambda x: x[0].register_forward_hook(lambda *a: None), "0 of `x`.*hooks are still"),
    "a parameter": (a_model, lambda x: x[0].weight.data.zero_(), "0.weight of `x`.*numbers"),
    "a parameter's gradient": (a_model, lambda x: x[0].weight.sum().backward(), "gradient of 0.weight of `x`"),
    "a buffer": (a_model, lambda x: x[1].running_mean.add_(1), "1.running_mean of `x`"),
    "another parameter": (a_model, lambda x: setattr(x[0], "bias", None), "0 of `x`"),
    "training": (a_model, lambda x: x.eval(), "training was True and is False"),
    "a sorted list": (lambda: [3, 1, 2], lambda x: x.sort(), "entries stand in another order"),
    "a shorter list": (lambda: [3, 1, 2], lambda x: x.pop(), "had 3 entries and has 2"),
    "a longer list": (lambda: [3, 1], lambda x: x.append(1), "had 2 entries and has 3"),
    "an entry": (lambda: [3, 1], lambda x: x.__setitem__(0, 4), "other entries"),
    "a nested list": (lambda: {"a": [1, 2]}, lambda x: x["a"].reverse(), "entry 'a' of `x`.*another order"),
    "a dictionary": (lambda: {"a": 1}, lambda x: x.update(a=2), "other entries"),
    "a key": (lambda: {"a": 1, "b": 2}, lambda x: x.pop("a"), "had 2 entries and has 1"),
    "a tensor in a tuple": (lambda: (1, (a_matrix(),)), lambda x: x[1][0].zero_(), "entry 0 of entry 1 of `x`"),
    "an attribute": (lambda: SimpleNamespace(a=1), lambda x: setattr(x, "a", 2), "`x`"),
    "an array": (lambda: np.arange(3), lambda x: x.sort() if x.size > 5 else x.fill(1), "`x`.*numbers"),
    "an array's flag": (lambda: np.arange(3), lambda x: setattr(x.flags, "writeable", False), "writeable was True"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_named(what: str) -> None:
    make, change, words = CHANGES[what]
    given = make()
    before = Snapshot({"x": given})
    assert before.changed({}) == ""
    change(given)
    sentence = before.changed({})
    assert sentence.startswith("Your function has ")
    with pytest.raises(Wrong, match=words):
        raise Wrong(sentence)
    assert before.changed({"x": ["anything"]}) == ""


def test_what_may_change_may_and_nothing_else() -> None:
    weight = a_matrix()
    view = weight[0]
    before = Snapshot({"weight": weight})
    view.fill_(7.0)
    assert before.changed({"weight": ["values"]}) == ""
    weight.data = weight.clone()
    assert "changed in place, for others hold views" in before.changed({"weight": ["values"]})
    model = a_model()
    before = Snapshot({"model": model})
    model[0].weight.sum().backward()
    assert before.changed({"model": ["gradients in place"]}) == "" == before.changed({"model": ["gradients"]})
    before = Snapshot({"model": model})
    model[0].weight.grad = torch.zeros(2, 2)
    assert "another gradient tensor" in before.changed({"model": ["gradients in place"]})
    assert before.changed({"model": ["gradients"]}) == ""
    model.eval()
    assert "training" in before.changed({"model": ["gradients", "values"]})


def test_a_check_goes_on_with_what_was_given() -> None:
    def spoils(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        rows.sort()
        return x.mul_(2).clone()

    x, rows = a_matrix(), [2, 1]
    assert torch.equal(called.watched(spoils, ("x", "rows"))(x, rows), 2 * a_matrix())
    assert torch.equal(x, a_matrix()) and rows == [2, 1]
    assert "changed `x`, which belongs to its caller" in called.CALLS.changed


def test_what_is_also_the_result_cannot_be_put_back() -> None:
    with pytest.raises(Wrong, match="changed `x`"):
        called.watched(lambda y: y.mul_(2), ("x",))(a_matrix())


def test_looking_is_not_noticed() -> None:
    """Neither by a mode that counts memory, nor by autograd."""
    from lessons.meters import Largest, kept

    x = torch.ones(1000, requires_grad=True)
    with Largest() as memory:
        _, saved = kept(lambda: called.watched(lambda x: x[:3] * 2, ("x",))(x))
    assert memory.elements == 3 and len(saved) == 0


def test_functions_among_the_arguments_are_called_and_not_looked_into() -> None:
    calls = []
    assert called.watched(lambda update, x: update(x), ("update", "x"))(lambda x: calls.append(x) or 3, 1) == 3
    assert calls == [1] and not called.CALLS.changed


def test_gradients_left_off_are_seen() -> None:
    def leaves_them_off() -> None:
        torch.set_grad_enabled(False)

    with pytest.raises(Wrong, match="with torch.no_grad"):
        function = called.watched(leaves_them_off)
        function()
        raise Wrong(called.CALLS.changed)
    assert torch.is_grad_enabled()


def test_only_the_exercise_s_own_line_is_not_begun() -> None:
    def own() -> None:
        raise NotImplementedError

    def with_a_text() -> None:
        raise NotImplementedError("later")

    def of_torch() -> None:
        torch.zeros(2).to(torch.float8_e4m3fn).max()

    with pytest.raises(Unsolved):
        called.watched(own)()
    for function in (with_a_text, of_torch):
        with pytest.raises(NotImplementedError):
            called.watched(function)()
    assert called.is_the_learners(called.CALLS.raised or ValueError())
