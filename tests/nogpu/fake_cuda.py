"""A CUDA device that is not there: Inductor writes its CUDA code and Triton assembles it, with no GPU.

`fake_cuda(cc)` patches, for the time of a `with` block, what Inductor and Triton ask a device about;
nothing can be launched. Works on a CPU-only torch (2.13) and on a CUDA build without a GPU (2.11).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

# compute capability: (name, multiprocessors, shared memory of one in KiB, threads of one, L2 in MiB)
DEVICES = {
    80: ("NVIDIA A100-SXM4-80GB", 108, 164, 2048, 40),
    89: ("NVIDIA GeForce RTX 4090", 128, 100, 1536, 72),
    90: ("NVIDIA H200", 132, 228, 2048, 50),
    100: ("NVIDIA B200", 148, 228, 2048, 126),
}

GUARD_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
static DeviceGuardImplRegistrar guard(DeviceType::CUDA, new NoOpDeviceGuardImpl<DeviceType::CUDA>());
}
"""


def missing() -> str | None:
    """Why CUDA code cannot be generated on this machine, or None: the reason for a test to skip."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    if not torch.backends.cuda.is_built() and shutil.which("g++") is None:
        return "a CPU-only torch needs g++ to register a no-op CUDA device guard"
    return None


@functools.cache
def install_device_guard() -> None:
    """Let tensors claim to be on CUDA: register c10's own no-op guard, which a CPU-only build leaves out."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    root = Path(torch.__file__).parent
    key = hashlib.sha256((GUARD_SOURCE + torch.__version__).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"noop_cuda_guard_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        source = folder / f"{key}_{os.getpid()}.cpp"
        source.write_text(GUARD_SOURCE)
        built = source.with_suffix(".so")
        flags = [
            "-O0",
            "-std=c++20",
            "-fPIC",
            "-shared",
            f"-I{root / 'include'}",
            f"-L{root / 'lib'}",
            "-lc10",
        ]
        subprocess.run(["g++", str(source), "-o", str(built), *flags], check=True)
        built.replace(library)
    ctypes.CDLL(str(library))


def properties(cc: int) -> types.SimpleNamespace:
    """What `torch.cuda.get_device_properties` would say of that device."""
    name, processors, shared_kib, threads, l2_mib = DEVICES[cc]
    return types.SimpleNamespace(
        name=name,
        major=cc // 10,
        minor=cc % 10,
        multi_processor_count=processors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        L2_cache_size=l2_mib << 20,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=(shared_kib - 1) << 10,
        shared_memory_per_multiprocessor=shared_kib << 10,
        gcnArchName="",
        is_integrated=False,
        is_multi_gpu_board=False,
        uuid="fake",
        pci_bus_id=0,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
    )


class FakeDriver:
    """As much of a Triton driver as Inductor's code generation and `triton.compile` ask for."""

    def __init__(self, cc: int) -> None:
        from triton.backends.compiler import GPUTarget

        shared, processors = (DEVICES[cc][2] - 1) << 10, DEVICES[cc][1]
        limits = {"max_shared_mem": shared, "multiprocessor_count": processors, "warpSize": 32}
        limits |= {"max_num_regs": 65536, "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0}
        self.target = GPUTarget("cuda", cc, 32)
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: limits, load_binary=self.refuse
        )
        self.launcher_cls = self.refuse

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("fake_cuda: there is no device to load or launch a kernel on")

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def set_current_device(self, device: Any) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_device_capability(self, *args: Any) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def device_interface(cc: int) -> type:
    """Dynamo's and Inductor's view of the device."""
    from torch._dynamo.device_interface import DeviceInterface

    props = properties(cc)

    class FakeInterface(DeviceInterface):
        device = torch.cuda.device
        Stream = torch.cuda.Stream
        Event = torch.cuda.Event

        class Worker:
            set_device = staticmethod(lambda device: None)
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: props)

        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)
        device_count = staticmethod(lambda: 1)
        stream = staticmethod(lambda stream: contextlib.nullcontext())
        current_stream = staticmethod(lambda *args: None)
        set_stream = staticmethod(lambda stream: None)
        get_raw_stream = staticmethod(lambda index: 0)
        synchronize = staticmethod(lambda device=None: None)
        maybe_exchange_device = staticmethod(lambda device: 0)
        exchange_device = staticmethod(lambda device: 0)
        memory_allocated = staticmethod(lambda device=None: 0)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        is_dtype_supported = staticmethod(lambda dtype, including_emulation=False: True)
        is_available = staticmethod(lambda: True)
        get_compute_capability = staticmethod(lambda device=None: cc)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)
        get_device_properties = staticmethod(lambda device=None: props)

    return FakeInterface


def _forget_probes() -> None:
    """Clear what torch remembers of the device: it would outlive the `with` block otherwise."""
    import torch._inductor.codecache as codecache
    import torch._inductor.utils as inductor_utils
    import torch.utils._triton as triton_utils
    from torch._inductor.runtime.hints import DeviceProperties

    found: list[Any] = [v for m in (codecache, inductor_utils, triton_utils) for v in vars(m).values()]
    found += [codecache.CacheBase.get_system, getattr(DeviceProperties.create, "__func__", None)]
    for probe in found:
        if isinstance(probe, functools._lru_cache_wrapper):
            probe.cache_clear()


def _patches(cc: int) -> Iterator[Any]:
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import torch._subclasses.fake_tensor as fake_tensor

    props, cuda = properties(cc), functools.partial(mock.patch.object, torch.cuda)
    yield cuda("device_count", lambda: 1)
    yield cuda("current_device", lambda: 0)
    yield cuda("get_device_properties", lambda device=None: props)
    yield cuda("get_device_capability", lambda device=None: divmod(cc, 10))
    yield cuda("get_device_name", lambda device=None: props.name)
    yield cuda("is_bf16_supported", lambda *args, **kwargs: True)
    yield cuda("_lazy_init", lambda: None)
    yield cuda("is_initialized", lambda: False)
    yield cuda("synchronize", lambda *args: None)
    yield mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0")
    yield mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None)
    yield mock.patch.object(fake_tensor, "init_gpu_context", return_value=None)
    yield mock.patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda self: True))


@contextlib.contextmanager
def fake_cuda(cc: int) -> Iterator[None]:
    """Inside, the machine seems to hold one GPU of compute capability `cc` (80, 89, 90 or 100)."""
    import torch._dynamo.device_interface as interfaces
    from triton.runtime import driver

    install_device_guard()
    list(interfaces.get_registered_device_interfaces())  # fills the registry, which is patched next
    fake = device_interface(cc)
    with contextlib.ExitStack() as stack:
        for patch in _patches(cc):
            stack.enter_context(patch)
        stack.enter_context(mock.patch.dict(interfaces.device_interfaces, {"cuda": fake, "cuda:0": fake}))
        stack.callback(setattr, driver, "_active", getattr(driver, "_active", None))
        driver.set_active(FakeDriver(cc))
        stack.callback(_forget_probes)
        _forget_probes()
        yield


class GeneratedCode(NamedTuple):
    """What Inductor wrote for one graph."""

    text: str
    arguments: tuple[str, ...]
    """Dynamo's name of each argument of `call`, such as "l_x_" or "l_self_buffers_w_"."""


def cuda_code(
    make: Callable[[], tuple[Any, ...]],
    cc: int = 90,
    dynamic: bool | None = None,
    compiler: Callable[[torch.fx.GraphModule, list[Any]], Any] | None = None,
) -> GeneratedCode:
    """Inductor's generated code on a fake device for `function(*inputs)`.

    `make` returns (function, *inputs); it runs under a fake mode and makes CUDA tensors. `compiler`
    takes Dynamo's graph to Inductor; None is Inductor's own compile_fx.
    """
    import torch._inductor.config as config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import get_code
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments: list[tuple[str, ...]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        arguments.append(tuple(node.name for node in gm.graph.find_nodes(op="placeholder")))
        (compiler or compile_fx)(gm, inputs)
        outputs = len(gm.graph.output_node().args[0])
        return lambda *args: [None] * outputs  # there is nothing to run

    # Constant folding would compute its constants on the device; padding is decided by timing there.
    settings = {
        "force_disable_caches": True,
        "compile_threads": 1,
        "joint_graph_constant_folding": False,
        "shape_padding": False,
    }
    torch._dynamo.reset()
    with fake_cuda(cc), config.patch(settings), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        function, *inputs = make()
        codes = get_code(torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend), *inputs)
    # Under dynamic=True Dynamo may hand a graph over a second time, with its symbolic floats made numbers.
    assert len(arguments) <= (2 if dynamic else 1), f"expected one graph, got {len(arguments)}"
    return GeneratedCode(next(code for code in reversed(codes) if "def call" in code), arguments[-1])
