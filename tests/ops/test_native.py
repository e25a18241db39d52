"""Our int8 GEMM for CPUs without VNNI: exact for every operand, on every instruction set it is built for."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.cpu_kernels import build, int8_gemm
from viditq_fx.errors import KernelBuildError
from viditq_fx.lowering import select_cpu
from viditq_fx.ops import native
from viditq_fx.ops.blocked import blocked_weight, is_freed, own, plain_weight, resident_bytes
from viditq_fx.ops.linear import linear_epilogue

needs_kernel = pytest.mark.skipif(int8_gemm.unavailable() is not None, reason=str(int8_gemm.unavailable()))
SETS = ("AVX2", "AVX512")


def use(monkeypatch, name: str) -> None:
    """Build for one instruction set, as a machine with no more than it would."""
    if SETS.index(name) > SETS.index(build.instruction_set()):
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setattr(build, "instruction_set", lambda: name)
    forget()


def forget() -> None:
    int8_gemm._library.cache_clear()
    int8_gemm.unavailable.cache_clear()
    native._wrong.cache_clear()


@pytest.fixture(autouse=True)
def _built_anew():
    yield
    forget()


def exact(x, w):
    return (x.double() @ w.double().t()).to(torch.float32)


def product(x, w, bits):
    return int8_gemm.multiply(x, int8_gemm.pack(w, bits), w.shape[0], bits)


@needs_kernel
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", int8_gemm.BITS)
def test_exact_for_any_shape_and_the_operands_that_saturate_first(monkeypatch, name, bits):
    use(monkeypatch, name)
    high = 2 ** (bits - 1) - 1
    shapes = st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 70))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(shape=shapes, seed=st.integers(0, 2**31), kind=st.sampled_from(("random", "extreme", "largest")))
    def holds(shape, seed, kind):
        rows, depth, width = shape
        gen = torch.Generator().manual_seed(seed)
        if kind == "random":
            x = torch.randint(-high, high + 1, (rows, depth), generator=gen, dtype=torch.int8)
            w = torch.randint(-128, 128, (width, depth), generator=gen, dtype=torch.int8)
        elif kind == "extreme":  # every value at one end of its range
            x = torch.randint(0, 2, (rows, depth), generator=gen, dtype=torch.int8) * (2 * high) - high
            w = torch.randint(0, 2, (width, depth), generator=gen, dtype=torch.int8).mul(2).sub(1) * 127
        else:
            x, w = torch.full((rows, depth), high), torch.full((width, depth), -128 if seed % 2 else 127)
            x, w = x.to(torch.int8), w.to(torch.int8)
        assert torch.equal(product(x, w, bits), exact(x, w))

    holds()


@needs_kernel
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", int8_gemm.BITS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_blocks_of_k_and_threads_change_nothing(monkeypatch, name, bits, threads):
    use(monkeypatch, name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gen = torch.Generator().manual_seed(threads)
        for rows, depth, width in ((1, 4609, 100), (300, 2304, 9), (65, 5000, 33)):  # K beyond one block
            x = torch.randint(-63, 64, (rows, depth), generator=gen, dtype=torch.int8)
            w = torch.randint(-127, 128, (width, depth), generator=gen, dtype=torch.int8)
            assert torch.equal(product(x, w, bits), exact(x, w))
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("bits", int8_gemm.BITS)
def test_integers_are_in_memory_once_and_read_back(bits):
    w = torch.randint(-128, 128, (37, 83), dtype=torch.int8)
    key = own(w.clone())
    copy = blocked_weight(key, native.layout(bits))
    assert is_freed(key)
    assert blocked_weight(key, native.layout(bits)) is copy
    assert torch.equal(plain_weight(key), w)
    assert resident_bytes(key) == copy.numel()
    other = blocked_weight(key, native.layout(15 - bits))  # the other scheme reads the same weight
    assert torch.equal(int8_gemm.unpack(other, w.shape, 15 - bits), w)
    assert blocked_weight(key, native.layout(bits)) is copy


@needs_kernel
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", int8_gemm.BITS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_epilogue_rounds_as_the_reference_does(monkeypatch, name, bits, with_bias):
    use(monkeypatch, name)
    gen = torch.Generator().manual_seed(bits)
    for shape, width in (((3, 5, 48), 33), ((70, 2600), 40), ((1, 7), 1)):
        high = 2 ** (bits - 1)
        x = torch.randint(1 - high, high, shape, generator=gen, dtype=torch.int8)
        w = torch.randint(-127, 128, (width, shape[-1]), generator=gen, dtype=torch.int8)
        x_scale, w_scale = torch.rand(*shape[:-1], 1, generator=gen), torch.rand(width, generator=gen)
        bias = torch.randn(width, generator=gen).half() if with_bias else None
        want = linear_epilogue(native.matmul_s8s8(x, w, bits), x_scale, w_scale, bias, torch.float32)
        assert torch.equal(native.linear_s8s8(x, x_scale, w, w_scale, bias, bits), want)


@needs_kernel
def test_packed_bytes_stay_close_to_a_byte_a_weight():
    for bits in int8_gemm.BITS:
        w = torch.randint(-127, 128, (1152, 1152), dtype=torch.int8)
        assert int8_gemm.pack(w, bits).numel() <= 1.02 * w.numel()


@needs_kernel
@pytest.mark.parametrize("bits", int8_gemm.BITS)
def test_views_and_empty_operands(bits):
    x = torch.randint(-63, 64, (6, 5, 48), dtype=torch.int8)
    w = torch.randint(-127, 128, (9, 48), dtype=torch.int8)
    assert torch.equal(native.matmul_s8s8(x[::2], w, bits), exact(x[::2].reshape(-1, 48), w).reshape(3, 5, 9))
    swapped = x.transpose(0, 1)
    assert torch.equal(
        native.matmul_s8s8(swapped, w, bits), exact(swapped.reshape(-1, 48), w).reshape(5, 6, 9)
    )
    assert native.matmul_s8s8(x[:0], w, bits).shape == (0, 5, 9)
    assert native.matmul_s8s8(x[..., :0], w[:, :0], bits).eq(0).all()
    with pytest.raises(ValueError, match="int8 x int8"):
        native.matmul_s8s8(x.float(), w, bits)


def test_without_a_compiler_the_reference_computes_and_the_report_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    forget()
    assert "install g++" in native.native_unavailable()
    x = torch.randint(-63, 64, (3, 16), dtype=torch.int8)
    w = torch.randint(-127, 128, (5, 16), dtype=torch.int8)
    assert torch.equal(native.matmul_s8s8(x, w, 8), exact(x, w))
    monkeypatch.setattr(select_cpu, "onednn_is_exact", lambda bits: bits == 7)
    assert select_cpu.choose_cpu_kernel(7).kernel == "onednn-u7"
    choice = select_cpu.choose_cpu_kernel(8)
    assert choice.kernel == "fp32-exact"
    assert "install g++" in choice.reason
    assert "w8a7" in choice.reason


@needs_kernel
def test_without_vnni_our_kernel_is_chosen(monkeypatch):
    monkeypatch.setattr(select_cpu, "onednn_is_exact", lambda bits: bits == 7)
    names = [select_cpu.choose_cpu_kernel(bits) for bits in (8, 7)]
    prefix = build.instruction_set().lower()
    assert [(c.kernel, c.reason) for c in names] == [(f"{prefix}-s8", None), (f"{prefix}-u7", None)]


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(monkeypatch, tmp_path):
    fails = tmp_path / "fails"
    fails.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n'
    )
    fails.chmod(fails.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(fails))
    monkeypatch.setenv("VIDITQ_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    assert "no such thing" in int8_gemm.unavailable()
    assert list((tmp_path / "cache").iterdir()) == []


TINY = 'extern "C" int answer() { return 42; }'
"""A library that is built at once."""


@needs_kernel
def test_a_broken_file_in_the_cache_is_built_again(monkeypatch, tmp_path):
    source = tmp_path / "tiny.cpp"
    source.write_text(TINY)
    monkeypatch.setenv("VIDITQ_CACHE_DIR", str(tmp_path / "first"))
    build.load_library(source)
    (built,) = (tmp_path / "first").glob("*.so")
    size = built.stat().st_size
    for number, keep in enumerate((0, 600, size - 1)):  # a library cut short kills the process that loads it
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", folder)
        (folder / built.name).write_bytes(built.read_bytes()[:keep])
        monkeypatch.setenv("VIDITQ_CACHE_DIR", str(folder))
        assert build.load_library(source).answer() == 42
        assert (folder / built.name).stat().st_size == size


@needs_kernel
def test_two_that_build_at_once_both_get_a_whole_library(monkeypatch, tmp_path):
    """Every step of one stands beside the same step of the other: both compile, both put files in place."""
    source, together, replace = tmp_path / "tiny.cpp", threading.Barrier(2, timeout=60), os.replace
    source.write_text(TINY)
    monkeypatch.setenv("VIDITQ_CACHE_DIR", str(tmp_path / "cache"))

    def in_step(built, target):
        together.wait()
        replace(built, target)
        together.wait()

    monkeypatch.setattr(build.os, "replace", in_step)
    with ThreadPoolExecutor(2) as pool:
        loaded = [f.result() for f in [pool.submit(build.load_library, source) for _ in range(2)]]
    assert [library.answer() for library in loaded] == [42, 42]
    monkeypatch.setattr(build, "_compile", lambda *args: pytest.fail("what is in the cache is not whole"))
    assert build.load_library(source).answer() == 42
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the library and its digest


@needs_kernel
def test_a_cache_that_cannot_be_written_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIDITQ_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(KernelBuildError, match=r"kept in .*file, set VIDITQ_CACHE_DIR"):
        build.load_library(int8_gemm.SOURCE)


def test_another_cpu_is_a_reason(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    forget()
    assert "aarch64" in int8_gemm.unavailable()
