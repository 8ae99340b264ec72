// What rows past an end hold; called before all else, while registers are free.
// 0, of the block's sequences and units, in tensors [planes, R, N, vectors, H].
DEVICE void zero_past_ends(T* to, int planes, int vectors, const i64* lengths, i64 steps, i64 B,
                           i64 R, i64 H, i64 first_tile) {
  const i64 row = gridDim.z * vectors * H;
  for (int i = threadIdx.x; i < NB * U; i += THREADS) {
    const i64 b = (first_tile + blockIdx.y) * NB + i / U;
    const i64 unit = blockIdx.x * U + i % U;
    if (b >= B || unit >= H) continue;
    for (i64 t = lengths[b]; t < steps; ++t)
      for (int k = 0; k < planes; ++k)
        for (int v = 0; v < vectors; ++v)
          to[(k * R + t * B + b) * row + (blockIdx.z * vectors + v) * H + unit] = 0;
  }
}
// No bit, in `marks` [R]; and all bits of the rows that are steps of the block's sequences.
DEVICE void mark_rows(Bits* marks, const i64* lengths, i64 steps, i64 B, i64 first_tile) {
  for (i64 i = threadIdx.x; i < steps * NB; i += THREADS) {
    const i64 t = i / NB;
    const i64 b = (first_tile + blockIdx.y) * NB + i % NB;
    if (b < B) marks[t * B + b] = t < lengths[b] ? (Bits)~0 : (Bits)0;
  }
}

