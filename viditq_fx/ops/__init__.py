"""The op dialect: what passes produce and lowerings consume, defined once with its meaning."""

from viditq_fx.ops.activation import ACTIVATION_QUANTIZE
from viditq_fx.ops.attention import ATTENTION_INT8
from viditq_fx.ops.attention_eight_bit import ATTENTION_INT8_FP8, ATTENTION_INT8_INT8
from viditq_fx.ops.base import QuantOp, Sample, Tolerance, all_ops
from viditq_fx.ops.cat import CAT_INT8
from viditq_fx.ops.fp8 import LINEAR_W8A8_FP8, QUANTIZE_FP8_PER_CHANNEL, QUANTIZE_FP8_PER_TOKEN
from viditq_fx.ops.grid import DEQUANTIZE_WEIGHT_GRID, QUANTIZE_WEIGHT_GRID
from viditq_fx.ops.int4 import MATMUL_S8S4
from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.ops.linear_w4_block import LINEAR_W4A4, LINEAR_W4A8_BLOCK
from viditq_fx.ops.linear_w4a8 import LINEAR_W4A8
from viditq_fx.ops.low_rank import ADD_LOW_RANK, QUANTIZE_WEIGHT_LOW_RANK
from viditq_fx.ops.native import LINEAR_S8S8, MATMUL_S8S8
from viditq_fx.ops.norm import NORM_MODULATE_QUANTIZE
from viditq_fx.ops.onednn import LINEAR_EPILOGUE, MATMUL_F32S8, MATMUL_U8S8, SHIFT_TO_U8
from viditq_fx.ops.pack import PACK_INT4, PACK_INT8, READ_INT8, UNPACK_INT4, UNPACK_INT8
from viditq_fx.ops.quantize import (
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_GROUP,
    DEQUANTIZE_PER_TOKEN,
    QUANTIZE_PER_BLOCK,
    QUANTIZE_PER_CHANNEL,
    QUANTIZE_PER_GROUP,
    QUANTIZE_PER_TOKEN,
)
from viditq_fx.ops.rotate import ROTATE, ROTATE_QUANTIZE, TRANSFORM_WEIGHT
from viditq_fx.ops.static_scale import DEQUANTIZE_PER_BLOCK, QUANTIZE_STATIC
from viditq_fx.ops.weight_forms import LINEARS, linear_of
from viditq_fx.ops.zero_point import ADD_ZERO_POINT

__all__ = [
    "ACTIVATION_QUANTIZE",
    "ADD_LOW_RANK",
    "ADD_ZERO_POINT",
    "ATTENTION_INT8",
    "ATTENTION_INT8_FP8",
    "ATTENTION_INT8_INT8",
    "CAT_INT8",
    "DEQUANTIZE_PER_BLOCK",
    "DEQUANTIZE_PER_CHANNEL",
    "DEQUANTIZE_PER_GROUP",
    "DEQUANTIZE_PER_TOKEN",
    "DEQUANTIZE_WEIGHT_GRID",
    "LINEARS",
    "LINEAR_EPILOGUE",
    "LINEAR_S8S8",
    "LINEAR_W4A4",
    "LINEAR_W4A8",
    "LINEAR_W4A8_BLOCK",
    "LINEAR_W8A7",
    "LINEAR_W8A8",
    "LINEAR_W8A8_FP8",
    "MATMUL_F32S8",
    "MATMUL_S8S4",
    "MATMUL_S8S8",
    "MATMUL_U8S8",
    "NORM_MODULATE_QUANTIZE",
    "PACK_INT4",
    "PACK_INT8",
    "QUANTIZE_FP8_PER_CHANNEL",
    "QUANTIZE_FP8_PER_TOKEN",
    "QUANTIZE_PER_BLOCK",
    "QUANTIZE_PER_CHANNEL",
    "QUANTIZE_PER_GROUP",
    "QUANTIZE_PER_TOKEN",
    "QUANTIZE_STATIC",
    "QUANTIZE_WEIGHT_GRID",
    "QUANTIZE_WEIGHT_LOW_RANK",
    "READ_INT8",
    "ROTATE",
    "ROTATE_QUANTIZE",
    "SHIFT_TO_U8",
    "TRANSFORM_WEIGHT",
    "UNPACK_INT4",
    "UNPACK_INT8",
    "QuantOp",
    "Sample",
    "Tolerance",
    "all_ops",
    "linear_of",
]
