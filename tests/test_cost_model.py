"""The cost model: linears of known models come out as they should, and the numbers move as physics has them."""

import pytest
import torch

from viditq_fx.cost_model import LAUNCH_US, RATES, Device, Problem, full_us, quantized_us
from viditq_fx.scheme import QuantScheme, available_schemes

W8A8, FP8 = QuantScheme.parse("w8a8"), QuantScheme.parse("fp8")


def device(number):
    row = RATES[number]
    return Device(capability=divmod(number, 10), processors=row.processors, bandwidth=row.bandwidth)


H200 = device(90)


def problem(rows, depth, width, dtype=torch.bfloat16):
    return Problem(rows=rows, depth=depth, width=width, dtype=dtype)


FLUX = [
    ((4608, 3072, 3072), False),  # behind attention
    ((4608, 3072, 12288), True),  # behind a norm
    ((4608, 12288, 3072), True),  # behind GELU
]


@pytest.mark.parametrize("number", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(("shape", "fused"), FLUX)
def test_linears_of_flux_gain_wherever_there_are_integer_units(number, shape, fused):
    p, gpu = problem(*shape), device(number)
    gain = full_us(p, gpu) / quantized_us(p, W8A8, gpu, fused=fused)
    # Published over compiled bf16, whole models: 1.24x on an H100; no more than the units' ratio is possible.
    assert 1.0 < gain < RATES[number].int8 / RATES[number].half + 0.05


def test_integers_lose_on_b300_which_has_hardly_any_and_fp8_does_not():
    p = problem(4608, 3072, 12288)
    assert quantized_us(p, W8A8, device(103), fused=True) > full_us(p, device(103))
    assert quantized_us(p, FP8, device(103), fused=True) < full_us(p, device(103))


@pytest.mark.parametrize("shape", [(1, 3072, 3072), (77, 4096, 1152), (512, 32, 32), (1024, 64, 64)])
@pytest.mark.parametrize("number", [80, 90])
def test_few_rows_and_few_channels_do_not_pay_for_a_pass(shape, number):
    p = problem(*shape)
    assert quantized_us(p, W8A8, device(number), fused=False) > full_us(p, device(number))


@pytest.mark.parametrize("scheme", [None, *available_schemes()])
@pytest.mark.parametrize("number", sorted(RATES))
def test_more_rows_never_take_less(number, scheme):
    gpu, times = device(number), []
    for rows in (1, 16, 17, 64, 65, 127, 512, 1000, 4096, 4097, 65536):
        p = problem(rows, 1152, 4608)
        times.append(
            full_us(p, gpu) if scheme is None else quantized_us(p, QuantScheme.parse(scheme), gpu, fused=True)
        )
    if times[0] is None:
        assert (scheme, RATES[number].fp8) == ("fp8", None)
        return
    assert times == sorted(times)
    assert times[0] > LAUNCH_US


def test_a_large_gemm_runs_at_its_rate_and_a_thin_one_at_the_memorys():
    square = problem(8192, 8192, 8448)  # whole waves of whole tiles on 132 multiprocessors
    ideal = 2 * 8192 * 8192 * 8448 / RATES[90].half / 1e6
    assert full_us(square, H200) == pytest.approx(ideal + LAUNCH_US, rel=0.05)
    thin = problem(16, 8192, 8192)
    moved = 2 * 8192 * 8192 / 4.8e6 / 0.8
    assert full_us(thin, H200) == pytest.approx(moved + LAUNCH_US, rel=0.05)


def test_a_shared_pass_is_paid_once_and_a_fused_one_not_at_all():
    p = problem(4608, 3072, 3072)
    alone, fused = (quantized_us(p, W8A8, H200, fused=fused) for fused in (False, True))
    third = quantized_us(p, W8A8, H200, fused=False, readers=3)
    assert 3 * (third - fused) == pytest.approx(alone - fused)
    assert 10 < alone - fused < 20  # 42 MB at 4 TB/s, and a launch


def test_a_card_with_half_the_multiprocessors_takes_twice_as_long():
    half = Device(capability=(9, 0), processors=66, bandwidth=4.8)
    p = problem(8192, 8192, 8448)
    assert full_us(p, half) == pytest.approx(2 * full_us(p, H200), rel=0.05)


def test_fp32_is_full_precision_at_fp32s_rate():
    p = problem(4608, 3072, 3072, torch.float32)
    assert full_us(p, H200) > 8 * full_us(problem(4608, 3072, 3072), H200)


M, K, N, G = 8192, 3072, 3072, 24
RATE = 4.8e6 * 0.8
"""Bytes of an H200 in a microsecond."""


@pytest.mark.parametrize(
    ("scheme", "plain", "moved", "launches"),
    [
        # Sums that the quantize writes; a pass of its own over the integers, behind a rotation.
        ("w8a8-asym", "w8a8", 4 * M, 0),
        ("w6a6-bgr", "w6a6", 4 * M, 0),
        ("w8a8-rot-asym", "w8a8-rot", M * K + 4 * M, 1),
        # Sums of blocks; they and the blocks' scales become one number a row.
        ("w4a8-bgr-block", "w4a8-block", 4 * M * G + 4 * M * (2 * G + 1), 1),
        # The pass, scales times zero points, the fp32 GEMM of depth 24.
        (
            "w4a8-g128-asym",
            "w4a8-g128",
            (M * K + 4 * M * G) + 12 * G * N + 4 * (M * G + N * G + M * N),
            3,
        ),
        # Input written in bf16, read by the first thin GEMM; the second writes a result.
        (
            "w4a8-svd16",
            "w4a8",
            2 * M * K + 2 * (M * K + 16 * K + 16 * M) + 2 * (16 * M + 16 * N + M * N),
            2,
        ),
        ("w4a8-bgr-svd32", "w4a8", 4 * M + 4 * M * K + 64 * K + 2 * 64 * M + 64 * N + 2 * M * N, 2),
    ],
)
def test_zero_points_and_the_branch_take_what_their_kernels_move(scheme, plain, moved, launches):
    """By hand, where the integer GEMM waits for its products and not for memory: its epilogue reads for free."""
    p = problem(M, K, N)
    found = [quantized_us(p, QuantScheme.parse(name), H200, fused=True) for name in (scheme, plain)]
    assert found[0] - found[1] == pytest.approx(moved / RATE + launches * LAUNCH_US, rel=1e-6)


@pytest.mark.parametrize("plain", ["w4a8-g64", "w4a8-g64-block"])
def test_groups_of_64_are_summed_apart_from_the_blocks_of_the_input(plain):
    """Twice as many sums as with groups of 128, and no quantize adds them up: its blocks are of 128."""
    p = problem(M, K, N)
    found = [quantized_us(p, QuantScheme.parse(name), H200, fused=True) for name in (f"{plain}-asym", plain)]
    kernels = (M * K + 8 * M * G) / RATE + 24 * G * N / RATE + 2 * LAUNCH_US
    products = full_us(problem(M, 2 * G, N, torch.float32), H200)
    assert found[0] - found[1] == pytest.approx(kernels + products, rel=1e-6)


def test_an_epilogue_that_reads_more_tells_where_memory_is_waited_for():
    rows, width = 16, 132 * 128  # a tile for each multiprocessor
    p = problem(rows, K, width)
    w8 = quantized_us(p, W8A8, H200, fused=True)
    moved = rows * K + width * (K + 4) + 2 * rows * width
    assert w8 == pytest.approx(moved / RATE + LAUNCH_US)
    asym = quantized_us(p, QuantScheme.parse("w8a8-asym"), H200, fused=True)
    # Zero points are read, sums written and read.
    assert asym - w8 == pytest.approx((4 * width + 4 * rows + 4 * rows) / RATE)


def test_readers_share_sums_and_the_inputs_writing_but_not_their_branches():
    p = problem(M, K, N)
    for scheme, shared in (
        ("w8a8-rot-asym", (M * K + 4 * M) / RATE + LAUNCH_US),
        ("w4a8-svd16", 2 * M * K / RATE),
    ):
        one, three = (quantized_us(p, QuantScheme.parse(scheme), H200, fused=True, readers=n) for n in (1, 3))
        assert one - three == pytest.approx(shared * 2 / 3)
