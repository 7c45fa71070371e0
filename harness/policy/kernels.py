"""Kernels for a GPU, in Triton, for what torch's own are several times slower at than the memory.

To be imported only where :func:`harness.policy.fusion.compiles` says that they can be built.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 32  # read at once
_WIDTH = 1024  # columns of a row that are added up at once


def attend_once(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of one decoded token a sequence, with the arithmetic of FlashAttention (arXiv 2205.14135).

    Args:
        query: [n, key heads, heads / key heads, D], bfloat16 or float16.
        key: [n, key heads, L, D], of which rows may lie apart.
        value: [n, key heads, L, Dv], likewise.
        seen: [n, L] bool, which keys a sequence sees: one or more.
        scale: of the scores.

    Returns:
        [n, key heads, heads / key heads, Dv].
    """
    rows, heads, group, dim = query.shape
    length, width = value.shape[2:]
    result = query.new_empty(rows, heads, group, width)
    if query.stride()[1:] != (group * dim, dim, 1):
        query = query.contiguous()
    _attend_once[rows, heads](
        query,
        key,
        value,
        seen,
        result,
        query.stride(0),
        *key.stride()[:3],
        *value.stride()[:3],
        seen.stride(0),
        length,
        scale,
        heads,
        group,
        dim,
        width,
        max(16, triton.next_power_of_2(group)),
        max(16, triton.next_power_of_2(dim)),
        max(16, triton.next_power_of_2(width)),
        _KEYS,
        num_warps=2,
        num_stages=4,
    )
    return result


@triton.jit
def _attend_once(
    query, key, value, seen, result,
    query_row, key_row, key_head, key_column, value_row, value_head, value_column, seen_row,
    length, scale, heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    GROUP_ROOM: tl.constexpr, DIM_ROOM: tl.constexpr, WIDTH_ROOM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    of_group, of_dim, of_width = tl.arange(0, GROUP_ROOM), tl.arange(0, DIM_ROOM), tl.arange(0, WIDTH_ROOM)
    places = row * query_row + (head * GROUP + of_group[:, None]) * DIM + of_dim[None, :]
    queries = tl.load(query + places, mask=(of_group[:, None] < GROUP) & (of_dim[None, :] < DIM), other=0.0)
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head
    seen += row * seen_row
    # Not -inf, whose differences are not numbers: sequences may see none of the first keys.
    largest = tl.full([GROUP_ROOM], -1e30, tl.float32)
    total = tl.zeros([GROUP_ROOM], tl.float32)
    summed = tl.zeros([GROUP_ROOM, WIDTH_ROOM], tl.float32)
    for start in range(0, length, KEYS):
        columns = start + tl.arange(0, KEYS)
        inside = columns < length
        visible = tl.load(seen + columns, mask=inside, other=0) != 0
        keys = tl.load(
            key + columns[:, None] * key_column + of_dim[None, :],
            mask=inside[:, None] & (of_dim[None, :] < DIM),
            other=0.0,
        )
        values = tl.load(
            value + columns[:, None] * value_column + of_width[None, :],
            mask=inside[:, None] & (of_width[None, :] < WIDTH),
            other=0.0,
        )
        scores = tl.dot(queries, tl.trans(keys)) * scale
        above = tl.maximum(largest, tl.max(tl.where(visible[None, :], scores, -1e30), 1))
        weights = tl.where(visible[None, :], tl.exp(scores - above[:, None]), 0.0)
        shrunk = tl.exp(largest - above)
        total = total * shrunk + tl.sum(weights, 1)
        summed = summed * shrunk[:, None] + tl.dot(weights.to(values.dtype), values)
        largest = above
    places = ((row * heads + head) * GROUP + of_group[:, None]) * WIDTH + of_width[None, :]
    tl.store(
        result + places,
        (summed / total[:, None]).to(result.dtype.element_ty),
        mask=(of_group[:, None] < GROUP) & (of_width[None, :] < WIDTH),
    )


def sum_of_rows(rows: Tensor, chosen: Tensor, starts: Tensor) -> Tensor:
    """[N, C], sums of rows [M, C] in float32: the n-th of those from ``chosen[starts[n]]`` up to the next one's."""
    rows = rows.contiguous()
    result = rows.new_empty(len(starts), rows.shape[1])
    grid = (len(starts), triton.cdiv(rows.shape[1], _WIDTH))
    _sum_of_rows[grid](rows, chosen, starts, result, len(starts), len(chosen), rows.shape[1], _WIDTH)
    return result


@triton.jit
def _sum_of_rows(rows, chosen, starts, result, count, length, width, WIDTH: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    start = tl.load(starts + place)
    end = tl.load(starts + place + 1, mask=place + 1 < count, other=length)
    total = tl.zeros([WIDTH], tl.float32)
    for index in range(start, end):
        row = tl.load(chosen + index)
        total += tl.load(rows + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place * width + columns, total.to(result.dtype.element_ty), mask=inside)
