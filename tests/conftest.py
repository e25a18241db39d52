"""Shared set-up: no state of one test's compilation reaches the next, and workers side by side share the cores."""

import os

import pytest

# Before torch is imported, and in the environment, so that processes which tests start do the same: without it
# each worker of pytest-xdist starts a thread for every core. What has to hold with several threads asks for them.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import hypothesis  # noqa: E402
import torch  # noqa: E402

# The same examples each time: a failure that comes and goes tells nobody what broke it.
hypothesis.settings.register_profile("viditq", derandomize=True, deadline=None)
hypothesis.settings.load_profile("viditq")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
