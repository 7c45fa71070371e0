"""Kernels for one core of a CPU, in Numba; arrays are contiguous, and of float32 or int64.

All are compiled, or read from where they are kept, when the first one is imported: no step is to pay for that.
"""

from harness.policy.kernels.cpu import attention, decoding, elements, experts, products, vocabulary

__all__ = ["attention", "decoding", "elements", "experts", "products", "vocabulary"]
