"""The kernels' own structures in ctypes, field by field as the C sources beside this file have them.

Their sizes are compared with those that a library was compiled with before it is used.
"""

from ctypes import Structure, c_float, c_int, c_int32, c_int64, c_void_p, sizeof
from enum import IntEnum, auto

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The kernels' element types, as `vector.h` numbers them."""


class AttentionCall(Structure):
    """`struct attention` of `attention.h`, which says what each field is."""

    _fields_ = (
        ("out", c_void_p),
        ("query", c_void_p),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_table", c_void_p),
        ("kv_lens", c_void_p),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("num_rows", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("value_dim", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("dtype", c_int),
    )


class AttentionLayer(Structure):
    """`struct attention_layer` of `paged_attention.c`."""

    _fields_ = (
        ("attention", AttentionCall),
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_row_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value_row_stride", c_int64),
        ("value_head_stride", c_int64),
    )


class LoraWeightsEntry(Structure):
    """`struct lora_weights` of `lora.c`."""

    _fields_ = (
        ("lora_A", c_void_p),
        ("lora_B", c_void_p),
        ("bias", c_void_p),
        ("gain", c_void_p),
        ("rank", c_int64),
        ("scaling", c_float),
    )


class LoraPart(Structure):
    """`struct lora_part` of `lora.c`."""

    _fields_ = (
        ("weights", c_void_p),
        ("base_bias", c_void_p),
        ("column", c_int64),
        ("out_features", c_int64),
        ("low_column", c_int64),
    )


class LoraCall(Structure):
    """`struct lora` of `lora.c`."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("parts", c_void_p),
        ("segments", c_void_p),
        ("num_parts", c_int64),
        ("num_segments", c_int64),
        ("in_features", c_int64),
        ("num_slots", c_int64),
        ("low", c_void_p),
        ("low_stride", c_int64),
        ("dtype", c_int),
    )


class LoraLayer(Structure):
    """`struct lora_layer` of `lora.c`."""

    _fields_ = (("lora", LoraCall), ("layer", c_int64))


class ChainOperandEntry(Structure):
    """`struct chain_operand` of `chain.c`."""

    _fields_ = (
        ("address", c_void_p),
        ("strides", c_int64 * 4),
        ("dtype", c_int64),
    )


class ChainOp(Structure):
    """`struct chain_op` of `chain.c`."""

    _fields_ = (
        ("code", c_int32),
        ("kind", c_int32),
        ("out", c_int32),
        ("a", c_int32),
        ("b", c_int32),
        ("length", c_int32),
        ("value", c_float),
        ("unused", c_int32),
    )


class ChainCall(Structure):
    """`struct chain` of `chain.c`."""

    _fields_ = (
        ("operands", c_void_p),
        ("ops", c_void_p),
        ("num_ops", c_int64),
        ("sizes", c_int64 * 4),
        ("num_vectors", c_int64),
        ("num_floats", c_int64),
        ("num_computed", c_int64),
    )


class ProductCall(Structure):
    """`struct product` of `product.c`."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("num_rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int64),
        ("x_dtype", c_int64),
    )


class Int8ProductCall(Structure):
    """`struct int8_product` of `int8_product.c`."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("packed", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("num_rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int64),
        ("x_dtype", c_int64),
    )


class GatherCall(Structure):
    """`struct gather` of `operators.c`."""

    _fields_ = (
        ("out", c_void_p),
        ("table", c_void_p),
        ("indices", c_void_p),
        ("num_rows", c_int64),
        ("row_bytes", c_int64),
    )


class MapCall(Structure):
    """`struct map` of `operators.c`."""

    _fields_ = (("out", c_void_p), ("in_", c_void_p), ("length", c_int64), ("code", c_int64))


class KeepCall(Structure):
    """`struct keep` of `operators.c`."""

    _fields_ = (("rows", c_void_p), ("row_stride", c_int64), ("row_bytes", c_int64))


class MapCode(IntEnum):
    """`enum map_code` of `operators.c`."""

    FROM_INT64 = 0
    COS = auto()
    SIN = auto()


class Pass(Structure):
    """`struct pass` of `pass.h`."""

    _fields_ = (
        ("slots", c_void_p),
        ("block_table", c_void_p),
        ("kv_lens", c_void_p),
        ("table_width", c_int64),
        ("spans", c_void_p),
        ("num_spans", c_int64),
        ("wanted", c_void_p),
        ("num_wanted", c_int64),
        ("reached", c_void_p),
        ("low", c_void_p),
        ("begun", c_void_p),
    )


ROW_COUNTS: dict[type[Structure], tuple[str, ...]] = {
    AttentionCall: ("num_rows",),
    ChainCall: ("sizes", "num_vectors"),
    ProductCall: ("num_rows",),
    Int8ProductCall: ("num_rows",),
    GatherCall: ("num_rows",),
    MapCall: ("length",),
}
"""Fields that say for how many rows something is done: with less there, it is done for the first of them."""


class Step(Structure):
    """`struct step` of `team.h`."""

    _fields_ = (("run", c_void_p), ("call", c_void_p))


PRODUCT_BLOCK = 64
"""Outputs that lie together in packed int8 weights, as `int8_product.c` reads them."""


class Code(IntEnum):
    """`enum code` of `chain.c`."""

    LOAD = 0
    STORE = auto()
    COPY = auto()
    ADD = auto()
    SUB = auto()
    MUL = auto()
    DIV = auto()
    NEG = auto()
    SQUARE = auto()
    RSQRT = auto()
    MEAN = auto()
    SIGMOID = auto()
    SILU = auto()
    TANH = auto()
    GELU_TANH = auto()
    RELU = auto()
    ROUND = auto()


class Kind(IntEnum):
    """What a chain operator's second argument is, as `chain.c` numbers it."""

    VECTOR = 0
    FIRST = 1
    CONSTANT = 2


SIZES = {
    "fathom_sizeof_attention": sizeof(AttentionCall),
    "fathom_sizeof_attention_layer": sizeof(AttentionLayer),
    "fathom_sizeof_lora_weights": sizeof(LoraWeightsEntry),
    "fathom_sizeof_lora_part": sizeof(LoraPart),
    "fathom_sizeof_lora": sizeof(LoraCall),
    "fathom_sizeof_lora_layer": sizeof(LoraLayer),
    "fathom_sizeof_chain": sizeof(ChainCall),
    "fathom_sizeof_chain_op": sizeof(ChainOp),
    "fathom_sizeof_chain_operand": sizeof(ChainOperandEntry),
    "fathom_num_chain_codes": len(Code),
    "fathom_sizeof_gather": sizeof(GatherCall),
    "fathom_sizeof_map": sizeof(MapCall),
    "fathom_num_map_codes": len(MapCode),
    "fathom_sizeof_keep": sizeof(KeepCall),
    "fathom_sizeof_product": sizeof(ProductCall),
    "fathom_sizeof_int8_product": sizeof(Int8ProductCall),
    "fathom_product_block": PRODUCT_BLOCK,
    "fathom_sizeof_pass": sizeof(Pass),
    "fathom_sizeof_step": sizeof(Step),
}
"""What a library that was compiled from sources which fit this file says of its structures."""
