"""Which kernels are built for a linear: the estimate's best, all under timing, or what a file names; split K alone."""

import pytest
import torch

pytest.importorskip("triton", reason="the templates import Triton")

from viditq_fx.lowering import inductor_compat, tuned_configs
from viditq_fx.lowering.linear import EXTERN, ROUTES, _configs, _shortlist
from viditq_fx.lowering.tuned_configs import remember
from viditq_fx.ops.linear import LINEAR_W8A8
from viditq_fx.triton_templates.base import LinearProblem

H200 = "NVIDIA H200"
W8A8 = LINEAR_W8A8.overload
DEEP, SHALLOW = (64, 10240, 1536), (77, 3072, 12288)
"""M, K, N with few tiles and a deep K, where splitting pays; and with many tiles, where it does not."""


@pytest.fixture
def shortlist(monkeypatch, tmp_path):
    """`shortlist(shape, timing)` -> (labels built, why, labels that could be chosen)."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    monkeypatch.setattr(tuned_configs, "SHIPPED", tmp_path)

    def ask(shape, timing, files=True):
        monkeypatch.setattr(inductor_compat, "wants_autotuning", lambda: timing)
        templates = ROUTES[W8A8].templates
        configs, _ = _configs(templates, templates, problem(shape))
        device = torch.device("cuda")
        labels, why = _shortlist(W8A8, device, problem(shape), configs, (EXTERN,), files=files)
        return labels, why, configs

    return ask


def problem(shape):
    rows, depth, width = shape
    return LinearProblem(
        rows=rows,
        width=width,
        depth=depth,
        out_dtype=torch.bfloat16,
        capability=(9, 0),
        processors=132,
    )


def splits(labels):
    return [label for label in labels if " split " in label]


@pytest.mark.parametrize("timing", [False, True])
def test_split_k_comes_alone_where_the_estimate_prefers_it(shortlist, timing):
    labels, why, configs = shortlist(DEEP, timing)
    assert labels == (next(iter(configs)),)
    assert splits(labels)
    assert why == ["estimated best tile"]


def test_split_k_is_never_among_the_timed(shortlist):
    labels, why, configs = shortlist(SHALLOW, timing=True)
    assert splits(configs)
    assert labels == (*(label for label in configs if label not in splits(configs)), EXTERN)
    assert why == [f"fastest of {len(labels)} timed"]
    assert shortlist(SHALLOW, timing=False)[0] == labels[:1]


def test_what_walks_over_tiles_is_timed_and_not_the_estimates_choice(shortlist):
    labels, _, _ = shortlist((4608, 3072, 3072), timing=True)
    kernels = {label.removeprefix("triton:").split()[0] for label in labels}
    assert kernels == {"linear_w8a8", "linear_w8a8_persistent", "linear_w8a8_tma", EXTERN}
    assert labels[0].startswith("triton:linear_w8a8 ")


def test_a_file_may_name_a_split_or_speak_against_it(shortlist):
    for shape in (DEEP, SHALLOW):
        configs = shortlist(shape, timing=False)[2]
        for kernel in (splits(configs)[-1], next(c for c in configs if c not in splits(configs)), EXTERN):
            remember("linear_w8a8", problem(shape), H200, kernel)
            for timing in (False, True):
                assert shortlist(shape, timing)[:2] == ((kernel,), ["fastest when this machine timed it"])
    assert shortlist(SHALLOW, timing=False, files=False)[1] == ["estimated best tile"]
