"""Formats of every kind, for properties that hold of all; they fit a matrix of (64, 32)."""

SHAPE = (64, 32)
SYMMETRIC = ("int8", "int8:token", "int3:group=8,axis=-1", "int2:block=4x8", "ternary:group=8", "mxint8:rule=rne")
INTEGERS = (
    *SYMMETRIC, "int4:full15,group=8", "int4:signed_max,group=8", "int7:asym,tensor", "int4:asym,group=8",
    "int4:asym,group=8,zero=float", "int4:asym,token,zero=min", "q4_1",
)  # fmt: skip
FLOATS = (
    "fp8_e4m3", "fp8_e5m2:tensor", "fp6_e2m3:group=8,scale=bf16", "mxfp6_e3m2", "mxfp4", "mxfp4:axis=-1,rule=ceil", "nvfp4",
)  # fmt: skip
TABLES = ("binary", "nf4:group=8,double", "fp4_bnb:group=8,scale=f16", "log2_4", "logsqrt2_4:token")
ALL = (*INTEGERS, *FLOATS, *TABLES)
