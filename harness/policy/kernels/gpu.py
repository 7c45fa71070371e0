"""Kernels for a GPU, in Triton, for what torch's own are several times slower at than the memory.

To be imported only where :func:`harness.policy.fusion.compiles` says that they can be built.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Keys that are read at once, warps, and steps of which the loads are under way: so that four blocks share a processor.
_KEYS, _WARPS, _STAGES = 32, 2, 3
_WIDTH = 1024  # columns of a row that are added up at once
_PROGRAMS = 528  # that share the rows of which something is added up: four a processor of an H200


def place_states(
    states: Tensor,
    gain: Tensor | None,
    epsilon: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    column: Tensor,
    heads: int,
) -> Tensor:
    """Normalise and rotate queries and keys of one token a sequence, and put keys and values where they are kept.

    Args:
        states: [n, heads + 2 x key heads, D], one behind the other.
        gain: [heads + key heads, D] of the normalisation, float32; none without one.
        epsilon: what is added to the mean square.
        cos: [n, D] cosines, float32.
        sin: [n, D] sines, negative where the second half of a head is turned to.
        keys: [n or more, key heads, columns, D], whose ``column`` is written.
        values: likewise.
        column: [1].
        heads: of the queries.

    Returns:
        [n, key heads, heads / key heads, D] the queries.
    """
    rows, every, dim = states.shape
    held = keys.shape[1]
    query = states.new_empty(rows, held, heads // held, dim)
    # Any tensor stands for those that are not there.
    normalization = (cos, column) if gain is None else (gain, epsilon)
    _place_states[rows, every](
        states, *normalization, cos, sin, query, keys, values, column,
        *keys.stride()[:3], *values.stride()[:3], heads, held,
        gain is not None, dim, triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
    return query


@triton.jit
def _place_states(
    states, gain, epsilon, cos, sin, query, keys, values, column,
    key_row, key_head, key_column, value_row, value_head, value_column, heads, held,
    NORMALIZES: tl.constexpr, DIM: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, ROOM)
    inside = place < DIM
    states += (row * (heads + 2 * held) + head) * DIM
    at = tl.load(column).to(tl.int64)
    given = tl.load(states + place, mask=inside, other=0.0)
    if head >= heads + held:
        target = values + row * value_row + (head - heads - held) * value_head + at * value_column
        tl.store(target + place, given.to(values.dtype.element_ty), mask=inside)
    else:
        other = (place + DIM // 2) % DIM
        state = given.to(tl.float32)
        turned = tl.load(states + other, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZES:
            scale = tl.rsqrt(tl.sum(state * state, 0) / DIM + tl.load(epsilon))
            state = state * scale * tl.load(gain + head * DIM + place, mask=inside, other=0.0)
            turned = turned * scale * tl.load(gain + head * DIM + other, mask=inside, other=0.0)
        state = state * tl.load(cos + row * DIM + place, mask=inside, other=0.0)
        state += turned * tl.load(sin + row * DIM + place, mask=inside, other=0.0)
        if head < heads:
            tl.store(query + (row * heads + head) * DIM + place, state.to(query.dtype.element_ty), mask=inside)
        else:
            target = keys + row * key_row + (head - heads) * key_head + at * key_column
            tl.store(target + place, state.to(keys.dtype.element_ty), mask=inside)


def attend_once(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, last: Tensor, scale: float) -> Tensor:
    """Attention of one decoded token a sequence, with the arithmetic of FlashAttention (arXiv 2205.14135).

    Args:
        query: [n, key heads, heads / key heads, D], bfloat16 or float16, one behind the other.
        key: [n or more, key heads, columns, D], of which rows may lie apart.
        value: [n or more, key heads, columns, Dv], likewise.
        seen: [n, L] bool, which keys a sequence sees: one or more.
        last: [1] the last column that any sequence sees.
        scale: of the scores.

    Returns:
        [n, key heads, heads / key heads, Dv].
    """
    rows, heads, group, dim = query.shape
    width = value.shape[3]
    result = query.new_empty(rows, heads, group, width)
    room = [max(16, triton.next_power_of_2(size)) for size in (group, dim, width)]
    _attend_once[rows, heads](
        query, key, value, seen, last, result,
        *key.stride()[:3], *value.stride()[:3], seen.stride(0), scale, heads,
        group, dim, width, *room, _KEYS, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return result


@triton.jit
def _attend_once(
    query, key, value, seen, last, result,
    key_row, key_head, key_column, value_row, value_head, value_column, seen_row, scale, heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    GROUP_ROOM: tl.constexpr, DIM_ROOM: tl.constexpr, WIDTH_ROOM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    of_group, of_dim, of_width = tl.arange(0, GROUP_ROOM), tl.arange(0, DIM_ROOM), tl.arange(0, WIDTH_ROOM)
    first = (row * heads + head) * GROUP
    queries = tl.load(
        query + (first + of_group[:, None]) * DIM + of_dim[None, :],
        mask=(of_group[:, None] < GROUP) & (of_dim[None, :] < DIM),
        other=0.0,
    )
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head
    seen += row * seen_row
    # Not -inf, whose differences are not numbers: sequences may see none of the first keys.
    largest = tl.full([GROUP_ROOM], -1e30, tl.float32)
    total = tl.zeros([GROUP_ROOM], tl.float32)
    summed = tl.zeros([GROUP_ROOM, WIDTH_ROOM], tl.float32)
    length = tl.load(last).to(tl.int32) + 1
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
    tl.store(
        result + (first + of_group[:, None]) * WIDTH + of_width[None, :],
        (summed / total[:, None]).to(result.dtype.element_ty),
        mask=(of_group[:, None] < GROUP) & (of_width[None, :] < WIDTH),
    )


def add_and_normalize(states: Tensor, update: Tensor, weight: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """The sum [n, D] of states [n, D] and their update [n, D], and the same over its root mean square, times the gain,
    in the update's precision."""
    states, update = states.contiguous(), update.contiguous()
    rows, dim = states.shape
    summed, normalized = torch.empty_like(states), torch.empty_like(update)
    room = triton.next_power_of_2(dim)
    _add_and_normalize[rows,](
        states, update, weight, epsilon, summed, normalized, dim, room, num_warps=_row_warps(room)
    )
    return summed, normalized


@triton.jit
def _add_and_normalize(states, update, weight, epsilon, summed, normalized, DIM: tl.constexpr, ROOM: tl.constexpr):
    place = tl.arange(0, ROOM)
    inside = place < DIM
    at = tl.program_id(0).to(tl.int64) * DIM + place
    state = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
    state += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(summed + at, state.to(summed.dtype.element_ty), mask=inside)
    state *= tl.rsqrt(tl.sum(state * state, 0) / DIM + tl.load(epsilon))
    state *= tl.load(weight + place, mask=inside, other=0.0)
    tl.store(normalized + at, state.to(normalized.dtype.element_ty), mask=inside)


def normalization_gradients(gradient: Tensor, states: Tensor, weight: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of root-mean-square normalisation, reading what it needs once.

    Args:
        gradient: [N, D].
        states: [N, D] that were normalised.
        weight: [D] the gain.
        epsilon: what was added to the mean square.

    Returns:
        those of the states [N, D] and of the gain [D].
    """
    gradient, states = gradient.contiguous(), states.contiguous()  # which may be parts of wider ones
    rows, dim = states.shape
    of_states = torch.empty_like(states)
    room, programs = triton.next_power_of_2(dim), min(rows, _PROGRAMS)
    of_weight = weight.new_empty(programs, dim)
    _normalization_gradients[programs,](
        gradient, states, weight, epsilon, of_states, of_weight, rows, dim, room, num_warps=_row_warps(room)
    )  # fmt: skip
    return of_states, of_weight.sum(0)


@triton.jit(do_not_specialize=["rows"])  # which change from batch to batch
def _normalization_gradients(
    gradient, states, weight, epsilon, of_states, of_weight, rows, DIM: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    place = tl.arange(0, ROOM)
    inside = place < DIM
    gain = tl.load(weight + place, mask=inside, other=0.0)
    added = tl.load(epsilon)
    total = tl.zeros([ROOM], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * DIM + place
        state = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(state * state, 0) / DIM + added)
        state *= scale
        total += given * state
        given *= gain
        # Along the vector itself nothing passes, since its length is divided out.
        given = (given - state * (tl.sum(given * state, 0) / DIM)) * scale
        tl.store(of_states + at, given.to(of_states.dtype.element_ty), mask=inside)
    tl.store(of_weight + tl.program_id(0) * DIM + place, total, mask=inside)


def _row_warps(room: int) -> int:
    return min(16, max(1, room // 256))


def sum_of_rows(rows: Tensor, chosen: Tensor, starts: Tensor) -> Tensor:
    """[N, C], sums of rows [M, C] in float32: the n-th of those from ``chosen[starts[n]]`` up to the next one's."""
    rows = rows.contiguous()
    result = rows.new_empty(len(starts), rows.shape[1])
    grid = (len(starts), triton.cdiv(rows.shape[1], _WIDTH))
    _sum_of_rows[grid](rows, chosen, starts, result, len(starts), len(chosen), rows.shape[1], _WIDTH)
    return result


@triton.jit(do_not_specialize=["count", "length"])  # which change from batch to batch
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
