// The sizes of a kernel, and its shared memory. Between ptx.cuh and products.cuh. Defined before
// this text:
//   TYPE, SCOPE, ADJOINT
//   PRECISE                   float32 products in three parts
//   GATES, STATES, SAVED
//   CARRIED                   states before the constants, which resets leave alone
//   SEPARATE_RECURRENT_GRAD   dx is not dr
//   UNITS                     of every gate, in a block
//   BLOCKS                    that share one sequence's units
//   SEQUENCES                 in a block
//   SPLITS                    warps that share a sum
//   WEIGHT_REGISTERS          of a thread, for W_hh, the rest of which lies in shared memory; or 0
//   MASKS                     there are lengths, offsets or resets
//   RESETS                    there are resets
//   GRAD_OF_Y                 the adjoint has one; else it is 0
//   EVEN                      H is even, and pairs of numbers are aligned
//   PLAN                      its text
//   WAIT_LIMIT                in units of 2^32 ns, after which a wait for other blocks is an error
//   CELL                      the statements of cell_forward or cell_backward
//   STATE_PARAMETERS          of a kernel, for a tensor of each state, and STATE_POINTERS to them

// numbers in 4 and in 16 bytes
constexpr int WORD = 4 / sizeof(T);
constexpr int CHUNK = 4 * WORD;
constexpr int U = UNITS;
constexpr int C = BLOCKS;
constexpr int NB = SEQUENCES;
constexpr int NT = NB / 8;
// a warp has 16 units of all gates, and 1 / WK of the sum
constexpr int WM = U / 16;
constexpr int WK = SPLITS;
constexpr int THREADS = 32 * WM * WK;
// tiles of a warp; vectors of length H that are exchanged
constexpr int ROWS = ADJOINT ? 1 : GATES;
constexpr int VECTORS = ADJOINT ? GATES : 1;
// words of those vectors, and k-steps of 8 words for each warp
constexpr int WORDS = VECTORS * C * U / WORD;
constexpr int KS = ((WORDS / 8 + WK - 1) / WK + 1) / 2 * 2;
// k-steps whose weights stay in registers
constexpr int IN_REGISTERS = WEIGHT_REGISTERS / (8 * ROWS) * 2;
constexpr int HELD = WEIGHT_REGISTERS && IN_REGISTERS < KS ? IN_REGISTERS : KS;
// an odd number of 16 bytes: successive rows start in different banks
constexpr int PITCH = 8 * KS * WK + 4;
// pairs of each gate that a thread owns
constexpr int P = 2 * NT > WK ? 2 * NT / WK : 1;
// chunks that a warp publishes
constexpr int CHUNKS = VECTORS * P * 4 * (16 / CHUNK);
// lanes that send different chunks at a time, and blocks that they send them to
constexpr int CHUNK_LANES = CHUNKS % 32 == 0 ? 32 : CHUNKS % 16 == 0 ? 16 : 8;
constexpr int PEERS = 32 / CHUNK_LANES;
// whether numbers of 2 bytes come one at a time, each in a register of its own
constexpr bool APART = WORD > 1 && !EVEN;
// k-steps whose weights a thread loads at a time: 32 words, or, in halves, of many threads or
// beside many tiles, fewer
constexpr bool FEW = THREADS > 256 || (APART && NT > 3);
constexpr int K_LOADED = (ROWS > 1 ? 2 : FEW ? 4 : 8) / (APART ? 2 : 1);
// independent sums, so that products overlap; four of two products at least where there are
// registers, which numbers that are not in pairs take too
constexpr bool ONE_TILE = ROWS * NT == 1 && THREADS <= 256 && SCOPE != GRID;
constexpr bool FULL = PRECISE && SCOPE == GRID && ADJOINT && RESETS && !EVEN;
constexpr int OF_TILES = ROWS * NT < 4 && !FULL ? 2 : 1;
constexpr int CHAINS = ONE_TILE && KS > 4 && (EVEN || !PRECISE) ? 4 : OF_TILES;
// k-steps that a warp of a grid polls at a time, and how often
constexpr int POLLED = KS < 8 ? KS : 8;
constexpr int GROUPS = (KS + POLLED - 1) / POLLED;
// packets of 4 words that a grid exchanges, of 16 units four or two; words with their signs
constexpr int PARTS = 4 / WORD;
constexpr int PACKETS = WORDS * NB / 4;
constexpr int SIGNS = WK * GROUPS * NT * 16;
// steps by which memory is read ahead into the L2 cache
constexpr int AHEAD = 8;
// whether a step begins with the loads for the next one, which take registers of their own, or ends
// with them. A cluster's wait is for all loads in flight; the others differ in instructions, and in
// registers, of which W in half of them leaves too few where a pair takes two.
constexpr bool LEAVES_FEW = APART && ROWS * HELD >= 32;
constexpr bool EARLY = SCOPE == CLUSTER || (PRECISE && ADJOINT && MASKS) ||
                       (SCOPE == BLOCK && ADJOINT && GATES > 1 && !RESETS && !LEAVES_FEW);
// whether what is done with rows waits until the end of a step too: rows are loaded with x
constexpr bool LATE = MASKS && !EARLY;
// whether what was loaded is kept from being looked at before a step's sums are there: elsewhere it
// is not, or that costs more than it saves
constexpr bool IN_ORDER = !PRECISE && (SCOPE == BLOCK || (SCOPE == CLUSTER && ADJOINT));
// whether what is loaded before the time loop is waited for before it too
constexpr bool SETTLED = EARLY && SCOPE != GRID && (ADJOINT || !MASKS);
// whether there are registers for rows that are loaded a step ahead of their use
constexpr bool ROWS_AHEAD = MASKS && !(PRECISE && ADJOINT && (SCOPE == GRID || NT > 1));
// whether memory is read ahead into the L2 cache: in three parts the gates' products take the
// registers of a block; with masks it costs a block's adjoint 50 instructions
constexpr bool READS_AHEAD = MASKS ? !PRECISE && (SCOPE == CLUSTER || !ADJOINT)
                                   : !(PRECISE && SCOPE == BLOCK && ROWS > 1);

// an integer as large as a number
#if TYPE == FLOAT32
typedef u32 Bits;
#else
typedef u16 Bits;
#endif
// a thread's part of a 16 x 8 tile of W
typedef u32 Words[4];
constexpr u32 SIGN = 1u << 31;

struct __align__(128) Shared {
  u32 inbox[SCOPE == GRID ? 1 : 2][NB][SCOPE == GRID ? 4 : PITCH];
  T outbox[SCOPE == CLUSTER ? WM : 1][VECTORS][NB][16];
  // two in GRID, where warps may be a step ahead
  float sums[SCOPE == GRID ? 2 : 1][WK > 1 ? WM : 1][WK][ROWS][4 * NT][32];
  u64 barrier[2];
  // of the other k-steps, each thread's own
  uint4 weights[KS > HELD ? (KS - HELD) * ROWS : 1][KS > HELD ? THREADS : 1];
};
