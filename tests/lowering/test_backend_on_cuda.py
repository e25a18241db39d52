"""The whole backend on a fake GPU: an unchanged model goes in, our template comes out."""

import re

import pytest
import torch
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.assemble import assemble_generated, kernel_sources
from nogpu.fake_cuda import cuda_code

from tests.small_models import Block
from viditq_fx.backend import viditq_backend

pytestmark = pytest.mark.slow
WIDTH = 256


def generate(scheme="w8a8", cc=90, selection="always"):
    """(generated code, report) of one DiT block in bf16, which is small: half of it is no faster quantized."""
    reports = []

    def compiler(gm, inputs):
        options = {"scheme": scheme, "selection": selection}
        reports.append(viditq_backend(gm, inputs, options=options).report)

    def make():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = Block(WIDTH).requires_grad_(False)
                return model, torch.empty(2, 512, WIDTH), torch.empty(2, WIDTH)
        finally:
            torch.set_default_dtype(torch.float32)

    return cuda_code(make, cc, compiler=compiler).text, reports[0]


@pytest.fixture(scope="module")
def generated():
    return generate()


def test_every_quantized_site_runs_the_template(generated):
    _, report = generated
    kernels = {s.fqn: s.kernel for s in report.sites if s.done}
    assert set(kernels) == {"q", "k", "v", "out", "up", "down"}
    assert all(kernel.startswith("triton:linear_w8a8") for kernel in kernels.values())
    assert report.site("modulation").done is None


def test_no_full_precision_gemm_is_left_but_the_kept_one(generated):
    code, _ = generated
    body = code[code.index("def call") :]
    assert len(re.findall(r"extern_kernels\.(mm|addmm)\(", body)) == 1  # the modulation linear
    assert len(re.findall(r"viditq|triton_tem", body)) >= 6


def test_what_is_no_faster_quantized_is_left_to_cublas():
    code, report = generate(selection="auto")
    body = code[code.index("def call") :]
    kept = [site.fqn for site in report.sites if site.done is None]
    assert "out" in kept
    assert "bf16 is as fast or faster on sm_90" in report.site("out").reason
    assert len(re.findall(r"extern_kernels\.(mm|addmm)\(", body)) == len(kept)


def test_weights_are_inputs(generated):
    code, _ = generated
    assert len(re.findall(r"assert_size_stride\(arg\d+_1, \(\d+, \d+\)", code)) >= 5
    assert "_frozen_param" not in code
    assert "constants" not in code.split("def call")[1].split("return")[0]


def attends(option, dynamic=False, cc=90):
    """(generated code, report of the attention) of one DiT block in bf16."""
    reports = []

    def compiler(gm, inputs):
        reports.append(viditq_backend(gm, inputs, options={"attention": option}).report)

    def make():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                return Block(WIDTH).requires_grad_(False), torch.empty(2, 512, WIDTH), torch.empty(2, WIDTH)
        finally:
            torch.set_default_dtype(torch.float32)

    code = cuda_code(make, cc, compiler=compiler, dynamic=dynamic).text
    (attention,) = reports[0].attention
    return code, attention


@pytest.mark.parametrize(
    ("option", "dynamic", "name", "scheme"),
    [
        ("int8", False, "attention_int8", "int8-qk"),
        ("int8", True, "attention_int8", "int8-qk"),
        ("int8-fp8", True, "attention_int8_fp8", "int8-qk-fp8-pv"),
        ("int8-int8", True, "attention_int8_int8", "int8-qk-int8-pv"),
    ],
)
def test_int8_attention_runs_its_kernel(option, dynamic, name, scheme):
    code, attention = attends(option, dynamic)
    assert (attention.kernel.split()[0], attention.done) == (f"triton:{name}", scheme)
    body = code[code.index("def call") :]
    assert len(re.findall(r"attention_int8_kernel\w*\.run\(", body)) == 1
    (kernel,) = (item for item in kernel_sources(code).items() if item[0].startswith("attention_int8_kernel"))
    result = assemble_generated(*kernel, 90)  # as Inductor passes its arguments
    assert result.spills == 0
    products = {"int8": {"IGMMA", "HGMMA"}, "int8-fp8": {"IGMMA", "QGMMA"}, "int8-int8": {"IGMMA"}}
    assert set(result.sass_mma) == products[option]
    assert "bmm" not in body
    assert "_scaled_dot_product" not in body


def test_values_in_fp8_are_refused_by_a_device_that_does_not_multiply_them():
    code, attention = attends("int8-fp8", cc=80)
    assert attention.done is None
    assert "the device is sm_80" in attention.reason
    assert "attention_int8" not in code


@pytest.mark.parametrize(
    ("scheme", "template"),
    [("w4a8", "linear_w4a8"), ("w4a8-g128", "linear_w4a8_g128"), ("fp8", "linear_w8a8_fp8")],
)
def test_other_schemes_run_their_templates(scheme, template):
    _, report = generate(scheme)
    done = {s.fqn: (s.done, s.kernel.split()[0]) for s in report.sites if s.done}
    assert done == dict.fromkeys(("q", "k", "v", "out", "up", "down"), (scheme, f"triton:{template}"))
    share = {"w4a8": 0.27, "w4a8-g128": 0.29, "fp8": 0.51}[scheme]
    assert all(s.bytes_packed <= share * s.bytes_full for s in report.sites if s.done)


def test_fp8_is_refused_by_a_device_that_does_not_multiply_it():
    code, report = generate("fp8", cc=80)
    refused = [s for s in report.sites if s.planned == "fp8"]
    assert len(refused) == 6
    assert all(s.done is None and "the device is sm_80" in s.reason for s in refused)
    assert "fp8" not in code
