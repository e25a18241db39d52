"""Which tiles the attention kernel takes, by architecture, head width, mask and what P V is computed in."""

from __future__ import annotations

from dataclasses import dataclass

from viditq_fx.triton_templates.base import architecture


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Tile of one program: `block_m` queries (a divisor of 128) over `block_n` keys at a time."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}"


def _tiles(*tile: int) -> AttentionConfig:
    return AttentionConfig(block_m=tile[0], block_n=tile[1], num_stages=tile[2], num_warps=tile[3])


# (architecture, has a mask) -> configs for heads up to 64, 128 and 256 wide. Estimates from peers' tiles until
# `benchmarks/gpu.py` has measured them. A mask's addresses and values take registers: larger tiles spill there,
# and none of these does (tests).
CONFIGS = {
    (80, False): (_tiles(128, 64, 3, 8), _tiles(128, 64, 3, 8), _tiles(64, 64, 2, 8)),
    (80, True): (_tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8), _tiles(32, 32, 2, 8)),
    (89, False): (_tiles(128, 64, 2, 8), _tiles(64, 64, 2, 8), _tiles(64, 64, 2, 8)),
    (89, True): (_tiles(64, 64, 2, 8), _tiles(64, 64, 2, 8), _tiles(32, 32, 2, 8)),
    (90, False): (_tiles(128, 128, 3, 8), _tiles(128, 128, 3, 8), _tiles(64, 64, 2, 8)),
    (90, True): (_tiles(64, 64, 2, 8), _tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8)),
    (100, False): (_tiles(128, 64, 3, 8), _tiles(128, 128, 2, 8), _tiles(64, 64, 2, 8)),
    (100, True): (_tiles(64, 64, 2, 8), _tiles(64, 64, 1, 8), _tiles(64, 32, 2, 8)),
}
# Likewise for P V in 8 bits, by (architecture, has a mask, values). What a tile of keys adds is a second accumulator
# beside the sum, so heads of 256 take few rows. sm_80 multiplies no e4m3.
EIGHT_BIT_CONFIGS = {
    (80, False, "int8"): (_tiles(128, 64, 3, 8), _tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8)),
    (80, True, "int8"): (_tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8), _tiles(32, 32, 2, 8)),
    (89, False, "fp8"): (_tiles(128, 64, 3, 8), _tiles(128, 64, 3, 8), _tiles(64, 32, 2, 8)),
    (89, True, "fp8"): (_tiles(128, 64, 2, 8), _tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8)),
    (89, False, "int8"): (_tiles(128, 64, 3, 8), _tiles(128, 64, 2, 8), _tiles(64, 32, 2, 8)),
    (89, True, "int8"): (_tiles(64, 64, 2, 8), _tiles(64, 64, 2, 8), _tiles(32, 32, 2, 8)),
    (90, False, "fp8"): (_tiles(128, 128, 3, 8), _tiles(128, 128, 3, 8), _tiles(64, 32, 1, 8)),
    (90, True, "fp8"): (_tiles(128, 64, 2, 8), _tiles(64, 32, 2, 8), _tiles(64, 32, 2, 8)),
    (90, False, "int8"): (_tiles(128, 64, 3, 8), _tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8)),
    (90, True, "int8"): (_tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8), _tiles(32, 32, 2, 8)),
    (100, False, "fp8"): (_tiles(128, 64, 3, 8), _tiles(128, 128, 2, 8), _tiles(64, 32, 2, 8)),
    (100, True, "fp8"): (_tiles(64, 64, 2, 8), _tiles(64, 64, 1, 8), _tiles(64, 32, 1, 8)),
    (100, False, "int8"): (_tiles(128, 64, 3, 8), _tiles(64, 64, 1, 8), _tiles(32, 32, 2, 8)),
    (100, True, "int8"): (_tiles(64, 64, 2, 8), _tiles(64, 32, 2, 8), _tiles(32, 32, 2, 8)),
}


FIRST_ON_BLACKWELL = (3, 7)
"""First Triton whose compiler takes 8-bit P V behind a mask on sm_100; 3.6 ends in "Illegal shared layout"."""


def why_no_eight_bit_values(capability: tuple[int, int]) -> str | None:
    """Why the installed Triton compiles no attention with P V in 8 bits for a device, or None."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if architecture(capability) == 100 and version < FIRST_ON_BLACKWELL:
        wanted = ".".join(map(str, FIRST_ON_BLACKWELL))
        return (
            f"P V in 8 bits on sm_{capability[0]}{capability[1]} needs Triton {wanted} or later, not "
            f"{triton.__version__}: attention='int8' needs no newer one"
        )
    return None


def config_for(
    capability: tuple[int, int], head: int, masked: bool, values: str = "16 bits"
) -> AttentionConfig:
    """The config for a head width; an architecture that is not in the list takes that of sm_80.

    Raises ValueError for fp8 where no hardware multiplies it.
    """
    arch = architecture(capability) or 80
    if values == "fp8" and (arch, False, values) not in EIGHT_BIT_CONFIGS:
        raise ValueError(f"attention in fp8 needs sm_89 or later, not sm_{arch}: take attention_int8_int8")
    by_width = CONFIGS[arch, masked] if values == "16 bits" else EIGHT_BIT_CONFIGS[arch, masked, values]
    return by_width[0 if head <= 64 else 1 if head <= 128 else 2]
