"""How Triton launches are cut: the block of a pass over rows, and chunks of rows. Needs no Triton."""

import pytest

from lumos_kernels.launch import LaunchConfig, RowConfig, equal_chunk


def test_options_have_the_names_of_a_launch_and_leave_out_what_is_not_set():
    assert LaunchConfig(num_warps=4).options(fp_fusion=True) == {"num_warps": 4, "enable_fp_fusion": True}
    full = LaunchConfig(num_warps=8, num_stages=3, max_registers=64)
    assert full.options(fp_fusion=False) == {
        "num_warps": 8, "num_stages": 3, "maxnreg": 64, "enable_fp_fusion": False,
    }  # fmt: skip


@pytest.mark.parametrize("config", [RowConfig(block=2048, num_warps=8), RowConfig(block=16384, num_warps=16)])
def test_a_row_takes_the_smallest_power_of_two_that_holds_it(config):
    """Triton's blocks are powers of two, and a warp keeps its share of the block."""
    share = config.block // config.num_warps
    for classes in (0, 1, 2, 3, share - 1, share, share + 1, 2 * share + 1, config.block, config.block + 1, 64_000):
        fitted = config.fitted(classes)
        assert fitted.block & (fitted.block - 1) == 0
        assert share <= fitted.block <= config.block
        assert fitted.block >= min(classes, config.block)
        assert fitted.block // 2 < max(classes, share)
        assert fitted.block // fitted.num_warps == share


@pytest.mark.parametrize("multiple", [1, 4, 128])
def test_chunks_are_the_fewest_and_equal_up_to_the_multiple(multiple):
    for rows in range(0, 3000, 7):
        for most in (multiple, 3 * multiple, 10 * multiple):
            size = equal_chunk(rows, most, multiple)
            assert size % multiple == 0
            assert multiple <= size <= most
            count = max(-(-rows // most), 1)
            assert -(-rows // size) <= count
            assert size - multiple < max(rows / count, 1)
