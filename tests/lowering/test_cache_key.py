"""What our part of Inductor's cache key holds."""

import torch

from viditq_fx.lowering.inductor_compat import cache_fingerprint, source_digest


def test_code_for_other_vectors_is_not_taken_from_the_cache(monkeypatch):
    keys = set()
    for capability in ("AVX2", "AVX512", "DEFAULT"):
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        source_digest.cache_clear()
        keys.add(cache_fingerprint().uuid())
    source_digest.cache_clear()
    assert len(keys) == 3
