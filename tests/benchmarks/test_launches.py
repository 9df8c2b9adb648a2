"""How launches are counted where there is no GPU: the rules alone. The counts themselves take minutes."""

import pytest

from benchmarks.launches_step import CHUNK, CHUNKS, LISTS, foreach_launches


@pytest.mark.parametrize("depth", LISTS)
def test_a_foreach_kernel_takes_so_many_small_tensors_at_a_time(depth: int) -> None:
    most = LISTS[depth]
    assert [foreach_launches([5] * count, depth) for count in (0, 1, most, most + 1, 3 * most)] == [0, 1, 1, 2, 3]


def test_a_large_tensor_takes_several_launches() -> None:
    assert foreach_launches([CHUNK * CHUNKS], 2) == 1
    assert foreach_launches([CHUNK * CHUNKS + 1], 2) == 2
    assert foreach_launches([CHUNK * CHUNKS * 3, 1], 2) == 4


def test_launches_of_generated_code_are_its_calls() -> None:
    pytest.importorskip("triton")
    from benchmarks.launches_device import launches_in

    code = """
def call(args):
    triton_poi_fused_add_0.run(buf0, 10, stream=stream0)
    extern_kernels.mm(buf0, buf1, out=buf2)
    buf3 = torch.ops.speedrun.gram.default(buf2)
    buf4 = buf3[0]
"""
    assert launches_in("triton_poi_fused_add_0.run = None\n" + code) == 3
