"""Activations of the feed-forward kernels, and their derivatives, in fp32.

Both names of GELU as torch has them; the tanh form by a sigmoid, x s(2 u), which is the same:
1 + tanh(u) = 2 s(2 u).
"""

import math

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TWICE_U = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBE = tl.constexpr(0.044715)
_3_CUBE = tl.constexpr(3 * 0.044715)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without an exponential that overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``ACTIVATION(x)`` elementwise; "" is x itself. NaN stays NaN, as in torch."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu2":
        y = tl.where(x < 0, 0.0, x)
        y = y * y
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        y = x * sigmoid((x + x * x * x * _CUBE) * _TWICE_U)
    elif ACTIVATION == "silu":
        y = x * sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "")
        y = x
    return y


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """Derivative of ``activate`` at ``x``; that of ReLU at 0 is 0, as in torch."""
    if ACTIVATION == "relu":
        dy = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        dy = tl.where(x <= 0, 0.0, 2.0 * x)
    elif ACTIVATION == "gelu":
        dy = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _DENSITY * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid((x + x * x * x * _CUBE) * _TWICE_U)
        dy = s + x * s * (1.0 - s) * _TWICE_U * (1.0 + x * x * _3_CUBE)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s = sigmoid(x)
        dy = s + x * s * (1.0 - s)
    return dy
