"""Device code of a MoE layer for few tokens in two launches; `few_tokens.py` launches it, and says what it computes.

Both kernels stream weights [rows of w, K] once, as the first operand, against the activations of a few tokens. With
ROWS = 1 they multiply on the vector units, else on the matrix units. Weights become the activations' type in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_PAIR = tl.constexpr(1 << 30)
"""Larger than the number of any pair."""
WORD = tl.constexpr(16)
"""Bits of what a loop reads to find its weights: the compiler copies ahead what has 32, at the weights' expense."""
LINE_BYTES = tl.constexpr(128)


@triton.jit(do_not_specialize=("tokens", "candidates", "counters"))  # type: ignore[untyped-decorator]
def up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, scale_ptr, ids_ptr, routed_weights_ptr, act_ptr, plan_ptr, arrived_ptr, tokens, candidates, counters,
    K, columns,
    stride_x, stride_we, stride_wn, stride_se, stride_sn, stride_sk,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, GROUPED: tl.constexpr, BY_EXPERT: tl.constexpr, PLAN_CHUNK: tl.constexpr,
    STORED: tl.constexpr, SCALING: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    EVEN_K: tl.constexpr, WEIGHS_INPUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [pairs, tiles of columns], or grouped [1 + candidates, tiles of columns], of which the first plans.

    Programs of one expert run together where pairs share it, so that its weights come from memory once.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(1)
    if arrived_ptr is not None:  # noqa: SIM102 - decided at compile time
        if tile == 0 and tl.program_id(0) == 0:
            for start in range(0, counters, 128):
                at = start + tl.arange(0, 128)
                tl.store(arrived_ptr + at, tl.zeros((128,), tl.int32), mask=at < counters)
    row = tl.arange(0, ROWS)
    if GROUPED:
        slot = tl.arange(0, SLOTS)
        pairs = row[:, None] * TOP_K + slot[None, :]
        there = (row < tokens)[:, None] & (slot < TOP_K)[None, :]
        ids = tl.load(ids_ptr + pairs, mask=there, other=-1).to(tl.int32)
        candidate = tl.program_id(0) - 1
        if candidate < 0:
            if tile == 0:
                _plan(ids, pairs, ids_ptr, plan_ptr, candidates, ROWS, SLOTS, PLAN_CHUNK, BY_EXPERT)
            return
        expert = candidate if BY_EXPERT else tl.load(ids_ptr + candidate).to(tl.int32)
        is_hit = (ids == expert) & there
        first = tl.min(tl.min(tl.where(is_hit, pairs, NO_PAIR), axis=1), axis=0)
        # One program makes all of an expert's rows: that of the expert, or of the first pair that asks for it.
        if (first if BY_EXPERT else tl.where(first == candidate, 0, NO_PAIR)) == NO_PAIR:
            return
        if expert < 0:
            return
        used = tl.max(is_hit.to(tl.int32), axis=1) > 0
        token = row.to(tl.int64)
        target = candidate.to(tl.int64) * ROWS + row
        routed = tl.load(routed_weights_ptr + pairs, mask=is_hit, other=0.0).to(tl.float32)
        routed = tl.sum(routed, axis=1)
    else:
        pair = tl.program_id(0)
        expert = tl.load(ids_ptr + pair).to(tl.int32)
        if expert < 0:
            return
        used = row == 0
        token = row.to(tl.int64) * 0 + pair // TOP_K
        target = row.to(tl.int64) * 0 + pair
        routed = tl.load(routed_weights_ptr + pair).to(tl.float32) + tl.zeros((ROWS,), tl.float32)
    w_ptr += expert.to(tl.int64) * stride_we
    if SCALING != "none":
        scale_ptr += expert.to(tl.int64) * stride_se

    if ROWS == 1:
        pair = tl.program_id(0)
        gate, up = _vector_pair(
            x_ptr + (pair // TOP_K).to(tl.int64) * stride_x, w_ptr, scale_ptr, tile * COLUMNS, K, columns,
            stride_wn, stride_sn, stride_sk, COLUMNS, BLOCK_K, STAGES, STORED, SCALING, GROUP_N, GROUP_K, EVEN_K,
        )  # fmt: skip
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inner = _swiglu(gate, up, tl.load(routed_weights_ptr + pair).to(tl.float32), WEIGHS_INPUT)
        act_ptrs = act_ptr + pair.to(tl.int64) * columns + column
        tl.store(act_ptrs, inner.to(act_ptr.dtype.element_ty), mask=column < columns)
    else:
        gate, up = _matrix_pair(
            x_ptr + token * stride_x, used, w_ptr, scale_ptr, tile * COLUMNS, K, columns,
            stride_wn, stride_sn, stride_sk, ROWS, COLUMNS, BLOCK_K, STAGES, STORED, SCALING, GROUP_N, GROUP_K, EVEN_K,
        )  # fmt: skip
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inner = _swiglu(gate, up, routed[None, :], WEIGHS_INPUT)
        act_ptrs = act_ptr + target[None, :] * columns + column[:, None]
        tl.store(act_ptrs, inner.to(act_ptr.dtype.element_ty), mask=used[None, :] & (column < columns)[:, None])


@triton.jit(do_not_specialize=("tokens",))  # type: ignore[untyped-decorator]
def down_kernel(  # type: ignore[no-untyped-def]
    act_ptr, w_ptr, scale_ptr, ids_ptr, plan_ptr, arrived_ptr, parts_ptr, out_ptr, tokens, K, columns,
    routed_scaling_factor,
    stride_out, stride_we, stride_wn, stride_se, stride_sn, stride_sk,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, GROUPED: tl.constexpr, STORED: tl.constexpr, SCALING: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    SPLIT: tl.constexpr, PREFETCHED: tl.constexpr, LINES: tl.constexpr, ROW_BYTES: tl.constexpr,
):  # fmt: skip
    """Grid [tokens, tiles of columns, parts], grouped [1, tiles of columns, parts].

    K goes through the experts of a part, one by one. Of several parts the last to end adds all up, in their order.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w_row = tl.minimum(column, columns - 1)
    part = tl.program_id(2)
    first_pair = tl.program_id(0) * TOP_K
    w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * stride_wn
    if PDL:
        for slot in tl.static_range(PREFETCHED):
            ahead_ptr = ids_ptr + first_pair + TOP_K * part // SPLIT + slot
            ahead = tl.maximum(tl.load(ahead_ptr).to(tl.int64), 0)
            _prefetch(w_ptrs + ahead * stride_we, LINES, ROW_BYTES)
        tl.extra.cuda.gdc_wait()
    turns = TOP_K
    if GROUPED:
        turns = tl.load(plan_ptr).to(tl.int32)
    begin = turns * part // SPLIT * STEPS
    end = turns * (part + 1) // SPLIT * STEPS
    LOW_STRIDE: tl.constexpr = ids_ptr.dtype.element_ty.primitive_bitwidth // WORD
    low_ids_ptr = ids_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    depth = tl.arange(0, BLOCK_K)
    stored_depth = _stored_depth(BLOCK_K, STORED)
    row = tl.arange(0, ROWS)
    if SCALING != "none":
        scale_ptr += _scale_row(w_row, SCALING, GROUP_N, ROWS, COLUMNS) * stride_sn
    if ROWS == 1:
        total = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        turn = step // STEPS
        k = step % STEPS * BLOCK_K
        if GROUPED:
            entry_ptr = plan_ptr + 1 + turn * (2 + (ROWS + WORD - 1) // WORD)
            first_row = tl.load(entry_ptr).to(tl.int64) * ROWS
            expert = tl.load(entry_ptr + 1).to(tl.int64)
            is_here = expert >= 0
            users = _users(entry_ptr + 2, ROWS)
        else:
            first_row = (first_pair + turn).to(tl.int64)
            expert = tl.load(low_ids_ptr + (first_pair + turn) * LOW_STRIDE).to(tl.int64)
            is_here = expert >= 0
            users = is_here.to(tl.int64)
            expert = tl.maximum(expert, 0)
        stored_k = k // 2 if STORED == "int4" else k
        w_mask = is_here if EVEN_K else is_here & (stored_k + stored_depth < _stored_length(K, STORED))[None, :]
        w = tl.load(w_ptrs + expert * stride_we + (stored_k + stored_depth)[None, :], mask=w_mask, other=0.0)
        if ROWS == 1:
            a_mask = is_here if EVEN_K else is_here & (k + depth < K)
            a = tl.load(act_ptr + first_row * K + k + depth, mask=a_mask, other=0.0).to(tl.float32)
            real = _real(w, STORED, tl.float32)
            if SCALING == "block":
                at = expert * stride_se + (k + depth) // GROUP_K * stride_sk
                scale = tl.load(scale_ptr + at, mask=k + depth < K, other=0.0).to(tl.float32)
                total += real * (a * scale)[None, :]
            elif SCALING != "none":
                scale = tl.load(scale_ptr + expert * stride_se + k // GROUP_K * stride_sk).to(tl.float32)
                total += real * a[None, :] * scale[:, None]
            else:
                total += real * a[None, :]
        else:
            used = ((users >> row) & 1) != 0
            a_ptrs = act_ptr + (first_row + row)[:, None] * K + (k + depth)[None, :]
            a_mask = used[:, None] if EVEN_K else used[:, None] & (k + depth < K)[None, :]
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)
            if STORED == "float8":
                a = a.to(tl.float16)
            if SCALING != "none":
                scale = tl.load(scale_ptr + expert * stride_se + k // GROUP_K * stride_sk).to(tl.float32)
                acc += tl.dot(_real(w, STORED, a.dtype), a.T) * scale[:, None]
            else:
                acc = tl.dot(_real(w, STORED, a.dtype), a.T, acc)
    if ROWS == 1:
        acc = tl.sum(total, axis=1)[:, None]
    token = (tl.program_id(0) + row).to(tl.int64)
    is_token = row < tokens if GROUPED else row == 0
    is_here = is_token[None, :] & (column < columns)[:, None]
    out_ptrs = out_ptr + token[None, :] * stride_out + column[:, None]
    if SPLIT == 1:
        tl.store(out_ptrs, (acc * routed_scaling_factor).to(out_ptr.dtype.element_ty), mask=is_here)
    else:
        size = tokens.to(tl.int64) * columns
        part_ptrs = parts_ptr + token[None, :] * columns + column[:, None]
        tl.store(part_ptrs + part * size, acc, mask=is_here)
        tl.debug_barrier()
        arrived = tl.atomic_add(
            arrived_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1, sem="acq_rel", scope="gpu"
        )
        if arrived == SPLIT - 1:
            tl.debug_barrier()
            sums = tl.zeros((COLUMNS, ROWS), tl.float32)
            for other in tl.static_range(SPLIT):
                sums += tl.load(part_ptrs + other * size, mask=is_here, other=0.0, cache_modifier=".cg")
            tl.store(out_ptrs, (sums * routed_scaling_factor).to(out_ptr.dtype.element_ty), mask=is_here)


@triton.jit  # type: ignore[untyped-decorator]
def _plan(  # type: ignore[no-untyped-def]
    ids, pairs, ids_ptr, plan_ptr, candidates,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, BY_EXPERT: tl.constexpr,
):  # fmt: skip
    """For `down`: how many candidates have tokens; then of each, in order, candidate, expert, a bit for each token."""
    count = 0
    row = tl.arange(0, ROWS)
    for start in range(0, candidates, CHUNK):
        candidate = start + tl.arange(0, CHUNK)
        is_candidate = candidate < candidates
        if BY_EXPERT:
            expert = candidate
        else:
            expert = tl.load(ids_ptr + candidate, mask=is_candidate, other=-1).to(tl.int32)
        is_hit = (ids[:, :, None] == expert[None, None, :]) & (ids >= 0)[:, :, None]
        first = tl.min(tl.min(tl.where(is_hit, pairs[:, :, None], NO_PAIR), axis=1), axis=0)
        used = tl.max(is_hit.to(tl.int32), axis=1)
        is_active = is_candidate & (first != NO_PAIR if BY_EXPERT else first == candidate)
        rank = count + tl.cumsum(is_active.to(tl.int32), axis=0) - 1
        entry_ptrs = plan_ptr + 1 + rank * (2 + (ROWS + WORD - 1) // WORD)
        tl.store(entry_ptrs, candidate.to(tl.int16), mask=is_active)
        tl.store(entry_ptrs + 1, expert.to(tl.int16), mask=is_active)
        for word in tl.static_range((ROWS + WORD - 1) // WORD):
            bits = tl.where((row // WORD == word)[:, None], used << (row % WORD)[:, None], 0)
            tl.store(entry_ptrs + 2 + word, tl.sum(bits, axis=0).to(tl.int16), mask=is_active)
        count += tl.sum(is_active.to(tl.int32), axis=0)
    tl.store(plan_ptr, tl.cast(count, tl.int16))


@triton.jit  # type: ignore[untyped-decorator]
def _users(word_ptr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One bit for each token that takes the expert."""
    users = tl.load(word_ptr).to(tl.int64) & 0xFFFF
    for word in tl.static_range(1, (ROWS + WORD - 1) // WORD):
        users |= (tl.load(word_ptr + word).to(tl.int64) & 0xFFFF) << (WORD * word)
    return users


@triton.jit  # type: ignore[untyped-decorator]
def _vector_pair(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, scale_ptr, first, K, columns, stride_wn, stride_sn, stride_sk,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STORED: tl.constexpr, SCALING: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Gate and up [COLUMNS] of one token."""
    w_row = tl.minimum(first + tl.arange(0, COLUMNS), columns - 1)
    depth = tl.arange(0, BLOCK_K)
    stored_depth = _stored_depth(BLOCK_K, STORED)
    gate_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * stride_wn + stored_depth[None, :]
    up_ptrs = gate_ptrs + columns.to(tl.int64) * stride_wn
    gate_scale_ptr = scale_ptr
    up_scale_ptr = scale_ptr
    if SCALING != "none":
        gate_scale_ptr += _scale_row(w_row, SCALING, GROUP_N, 1, COLUMNS) * stride_sn
        up_scale_ptr += _scale_row(w_row + columns, SCALING, GROUP_N, 1, COLUMNS) * stride_sn
    gate_sums = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
    up_sums = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        stored_k = k // 2 if STORED == "int4" else k
        if EVEN_K:
            x = tl.load(x_ptr + k + depth).to(tl.float32)
            gate = tl.load(gate_ptrs + stored_k)
            up = tl.load(up_ptrs + stored_k)
        else:
            is_stored = (stored_k + stored_depth < _stored_length(K, STORED))[None, :]
            x = tl.load(x_ptr + k + depth, mask=k + depth < K, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptrs + stored_k, mask=is_stored, other=0.0)
            up = tl.load(up_ptrs + stored_k, mask=is_stored, other=0.0)
        gate = _real(gate, STORED, tl.float32)
        up = _real(up, STORED, tl.float32)
        if SCALING == "block":
            at = (k + depth) // GROUP_K * stride_sk
            gate_scale = tl.load(gate_scale_ptr + at, mask=k + depth < K, other=0.0)
            up_scale = tl.load(up_scale_ptr + at, mask=k + depth < K, other=0.0)
            gate_sums += gate * (x * gate_scale)[None, :]
            up_sums += up * (x * up_scale)[None, :]
        elif SCALING == "group":
            at = k // GROUP_K * stride_sk
            gate_sums += gate * x[None, :] * tl.load(gate_scale_ptr + at).to(tl.float32)[:, None]
            up_sums += up * x[None, :] * tl.load(up_scale_ptr + at).to(tl.float32)[:, None]
        else:
            gate_sums += gate * x[None, :]
            up_sums += up * x[None, :]
    gate = tl.sum(gate_sums, axis=1)
    up = tl.sum(up_sums, axis=1)
    if SCALING == "row":
        gate *= tl.load(gate_scale_ptr)
        up *= tl.load(up_scale_ptr)
    return gate, up


@triton.jit  # type: ignore[untyped-decorator]
def _matrix_pair(  # type: ignore[no-untyped-def]
    x_ptrs, used, w_ptr, scale_ptr, first, K, columns, stride_wn, stride_sn, stride_sk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STORED: tl.constexpr,
    SCALING: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Gate and up [COLUMNS, ROWS]: one product, whose first half of the rows are those of gate."""
    both = tl.arange(0, 2 * COLUMNS)
    w_row = tl.minimum(first + both % COLUMNS, columns - 1) + both // COLUMNS * columns
    depth = tl.arange(0, BLOCK_K)
    stored_depth = _stored_depth(BLOCK_K, STORED)
    w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * stride_wn + stored_depth[None, :]
    x_ptrs = x_ptrs[:, None] + depth[None, :]
    scale_ptrs = scale_ptr
    if SCALING != "none":
        scale_ptrs += w_row // GROUP_N * stride_sn
    acc = tl.zeros((2 * COLUMNS, ROWS), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        stored_k = k // 2 if STORED == "int4" else k
        if EVEN_K:
            x = tl.load(x_ptrs + k, mask=used[:, None], other=0.0)
            w = tl.load(w_ptrs + stored_k)
        else:
            x = tl.load(x_ptrs + k, mask=used[:, None] & (k + depth < K)[None, :], other=0.0)
            w = tl.load(
                w_ptrs + stored_k, mask=(stored_k + stored_depth < _stored_length(K, STORED))[None, :], other=0.0
            )
        if STORED == "float8":
            x = x.to(tl.float16)  # what the hardware makes of float8; bfloat16 would cost four times the conversion
        if SCALING != "none" and SCALING != "row":  # noqa: PLR1714 - Triton knows no sets
            scale = tl.load(scale_ptrs + k // GROUP_K * stride_sk).to(tl.float32)
            acc += tl.dot(_real(w, STORED, x.dtype), x.T) * scale[:, None]
        else:
            acc = tl.dot(_real(w, STORED, x.dtype), x.T, acc)
    if SCALING == "row":
        acc *= tl.load(scale_ptrs)[:, None]
    return tl.split(tl.permute(tl.reshape(acc, (2, COLUMNS, ROWS)), (1, 2, 0)))


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu(gate, up, routed_weight, WEIGHS_INPUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32, times the router's weight: before the activation where the engine weighs the experts' input."""
    if WEIGHS_INPUT:
        gate *= routed_weight
        up *= routed_weight
        return gate * tl.sigmoid(gate) * up
    else:
        return gate * tl.sigmoid(gate) * up * routed_weight


@triton.jit  # type: ignore[untyped-decorator]
def _scale_row(w_row, SCALING: tl.constexpr, GROUP_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of scales: one for a tile where it multiplies a vector of blocks, else one for each row of w."""
    if ROWS == 1 and SCALING == "block":
        return tl.min(w_row, axis=0) // GROUP_N
    else:
        return w_row // GROUP_N


@triton.jit  # type: ignore[untyped-decorator]
def _stored_depth(BLOCK_K: tl.constexpr, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    if STORED == "int4":
        return tl.arange(0, BLOCK_K // 2)
    else:
        return tl.arange(0, BLOCK_K)


@triton.jit  # type: ignore[untyped-decorator]
def _stored_length(K, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    if STORED == "int4":
        return K // 2
    else:
        return K


@triton.jit  # type: ignore[untyped-decorator]
def _real(stored, STORED: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unscaled values; integers are exact in bfloat16, which has 8 bits for them."""
    if STORED == "int4":
        low = (stored & 15).to(tl.int16) - 8
        high = (stored >> 4).to(tl.int16) - 8
        return tl.interleave(low, high).to(dtype)
    elif STORED == "uint8":
        return (stored.to(tl.int16) - 128).to(dtype)
    elif STORED == "float8":
        return stored.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif STORED == "float8_bits":
        if dtype == tl.float16:
            return _float8_as_float16(stored)
        else:
            return _float8_as_bfloat16(stored).to(dtype)
    else:
        return stored.to(dtype)


@triton.jit
def _float8_as_bfloat16(stored):  # type: ignore[no-untyped-def]
    """float8_e4m3 in uint8, exactly: sign and 7 bits moved into place, times 2**120 for the difference of the biases.

    The compiler's own conversion goes through the slow unit (F2F), a sixteenth of a multiply's rate on Hopper.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, low_bits, high_bits;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.u32 low_bits, low, 4;
        shr.u32 high_bits, high, 4;
        and.b32 low_bits, low_bits, 0x07F007F0;
        and.b32 high_bits, high_bits, 0x07F007F0;
        lop3.b32 low, low, 0x80008000, low_bits, 0xEA;
        lop3.b32 high, high, 0x80008000, high_bits, 0xEA;
        mov.b32 low_bits, 0x7B807B80;
        mov.b32 high_bits, 0x80008000;
        fma.rn.bf16x2 $0, low, low_bits, high_bits;
        fma.rn.bf16x2 $1, high, low_bits, high_bits;
        }
        """,
        "=r,=r,r", [stored], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _float8_as_float16(stored):  # type: ignore[no-untyped-def]
    """As `_float8_as_bfloat16`, times 2**8."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, low_bits, high_bits;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.u32 low_bits, low, 1;
        shr.u32 high_bits, high, 1;
        and.b32 low_bits, low_bits, 0x3F803F80;
        and.b32 high_bits, high_bits, 0x3F803F80;
        lop3.b32 low, low, 0x80008000, low_bits, 0xEA;
        lop3.b32 high, high, 0x80008000, high_bits, 0xEA;
        mov.b32 low_bits, 0x5C005C00;
        mov.b32 high_bits, 0x80008000;
        fma.rn.f16x2 $0, low, low_bits, high_bits;
        fma.rn.f16x2 $1, high, low_bits, high_bits;
        }
        """,
        "=r,=r,r", [stored], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _prefetch(row_ptrs, LINES: tl.constexpr, ROW_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for rows of weights [n, 1] to be in L2; nothing waits."""
    at = tl.minimum(tl.arange(0, LINES) * LINE_BYTES, ROW_BYTES - 1)
    address = row_ptrs.to(tl.int64) + at.to(tl.int64)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
