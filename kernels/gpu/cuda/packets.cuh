// What blocks of a grid exchange through the L2 cache, in two buffers: packets, and words of signs.
// Between products.cuh and worker.cuh.
//   packets  [vector and 16 units, NT, 8 sequences, PARTS] of 4 words, of which the last has a
//            phase in place of its sign: 1 when the buffer is used first, then 0, 1...
//   signs    [WK, GROUPS, NT, 4, 4]: of a warp's packets for sequences of one parity in a word,
//            whose own sign is the phase again; of 4 pairs of k-steps of the receiver what one
//            warp sends
#if SCOPE == GRID
DEVICE u32 phase(int c) { return c & 2 ? 0 : SIGN; }
DEVICE u32 with_sign(u32 word, u32 sign) { return (word & ~SIGN) | (sign & SIGN); }
// A lane collects a packet of its own words and those of other lanes.
DEVICE uint4 packet_of(Pair pair) {
  const u32* const own = (const u32*)&pair;
#if TYPE == FLOAT32
  return {own[0], own[1], of_lane(own[0], 4), of_lane(own[1], 4)};
#else
  return {own[0], of_lane(own[0], 4), of_lane(own[0], 8), of_lane(own[0], 12)};
#endif
}
// Among the words of signs that of a column of tiles (all sequences of a parity) from `sender`, 16
// units of a vector: half a pair of k-steps or all of it.
DEVICE int place_of_signs(int sender, int column) {
  const int pair = sender / WORD;
  const int group = pair / (KS / 2) * GROUPS + pair % (KS / 2) / 4;
  const int from = (group * NT + column / 2) * 4 + sender % WORD * 2 + column % 2;
  return from * 4 + pair % (KS / 2) % 4;
}

// What a lane multiplies in POLLED k-steps with a tile.
struct Seen {
  uint4 packets[POLLED / 2];
  uint4 signs;
  DEVICE u32 sign(int pair) const { return ((const u32*)&signs)[pair]; }
  DEVICE u32 word(int pair, int i) const { return ((const u32*)&packets[pair])[i]; }
  // In place of a packet that nobody sends.
  DEVICE void nothing(int c, int pair) {
    packets[pair] = {0, 0, 0, phase(c)};
    ((u32*)&signs)[pair] = phase(c);
  }
  DEVICE bool arrived(int c) const {
    u32 wrong = 0;
    EACH(pair, POLLED / 2) {
      wrong |= word(pair, 3) ^ phase(c);
      wrong |= sign(pair) ^ phase(c);
    }
    return !(wrong & SIGN);
  }
  // The last words get their signs again, of which the one of this lane's packet comes from here.
  DEVICE void restore_signs(int lane) {
    const int sender_lane = lane / 8 + lane % PARTS * (32 / PARTS);
    EACH(pair, POLLED / 2)
      packets[pair].w = with_sign(word(pair, 3), sign(pair) << (31 - sender_lane));
  }
};
#endif

