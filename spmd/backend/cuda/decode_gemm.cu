// Products of few rows on Hopper: out[rows, size] = inputs[rows, columns] * weights[size, columns]^T, in bf16.
//
// They are bound by reading the weights. One wave of thread blocks, each with its own OUTS weight rows, reads every
// byte once: one thread of a block keeps the copy engine busy, SLOTS steps ahead, the others multiply. Weight rows take
// the place of the matrix unit's 64 rows, the few rows of the inputs that of its narrow side. Where there are fewer
// tiles than multiprocessors, a cluster of PARTS blocks shares a tile, each with its part of the columns, and they add
// up in each other's shared memory: no workspace, no second kernel. Neither changes the order of the sums, so a row's
// result is the same bits at every run and whatever other rows there are.
//
// The kernel may be launched while the one in front of it still runs (programmatic dependent launch): it fills its
// shared memory with weights, 200 KB a multiprocessor, before it waits for the inputs. It lets the kernel behind it
// start as early in turn. Hence two rules:
// - The kernel in front must not write the weights.
// - A kernel behind that is launched early must wait in turn before it touches what kernels in front of it use.
//   Those launched as usual always do.
//
// Defined in front of this text: ROWS (a multiple of 8: rows of x of a block; blockIdx.y counts such blocks), OUTS (64,
// 128 or 192), HALVES (2: the weight holds gate and up, one after the other, and out = silu(gate) * up), PARTS, SLOTS,
// DEEP (copies of 64 columns a step; `columns` is a multiple of 64 * DEEP, at least PARTS of them) and MMA, which is
// the matrix unit's instruction for ROWS rows.

typedef unsigned u32;
typedef unsigned long long u64;
struct alignas(64) Map { u64 opaque[16]; };

constexpr int GROUPS = OUTS / 64, THREADS = GROUPS * 128;  // warpgroups and threads that multiply
constexpr int W_BYTES = OUTS * 128, X_BYTES = ROWS * 128, SLOT = DEEP * (W_BYTES + X_BYTES);
constexpr int WIDTH = OUTS / HALVES;  // columns of `out` that a tile makes
constexpr int PITCH = OUTS + 4;  // floats from row to row of the sums: four apart in banks, aligned to 16 bytes
constexpr u64 EVICT_FIRST = 0x12F0000000000000ull, EVICT_NORMAL = 0x1000000000000000ull;

__device__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void start(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared(barrier)), "r"(arrivals));
}

__device__ void wait(u32 barrier, u32 parity) {
  asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again;}"
               :: "r"(barrier), "r"(parity) : "memory");
}

__device__ void copy(u32 to, const Map& map, int column, int row, u32 barrier, u64 hint) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%2, %3}], [%4], %5;"
               :: "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(hint) : "memory");
}

// What the matrix unit needs to know of a tile in shared memory: rows of 128 bytes, swizzled in groups of 8.
__device__ u64 matrix(u32 at) { return (u64)((at & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }

__device__ void together() {  // the threads that multiply
  asm volatile("bar.sync 1, %0;" :: "r"(THREADS) : "memory");
}

__device__ u32 part() {
  u32 rank = 0;
  if (PARTS > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ int tile() { return blockIdx.x / PARTS; }

// One thread's work: all copies of its block, SLOTS ahead of the multiplication.
__device__ void load(const Map& weights, const Map& inputs, u32 base, u64* full, u64* empty, int first, int steps,
                     int size) {
  auto weight = [&](int i, int slot) {
    const u32 barrier = shared(&full[slot]);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(SLOT) : "memory");
    for (int d = 0; d < DEEP; d++)
      for (int h = 0; h < HALVES; h++)  // read once: not worth a place in L2
        copy(base + slot * SLOT + d * W_BYTES + h * (W_BYTES / HALVES), weights, ((first + i) * DEEP + d) * 64,
             h * size + tile() * WIDTH, barrier, EVICT_FIRST);
  };
  auto input = [&](int i, int slot) {
    const u32 at = base + slot * SLOT + DEEP * W_BYTES;
    for (int d = 0; d < DEEP; d++)
      copy(at + d * X_BYTES, inputs, ((first + i) * DEEP + d) * 64, blockIdx.y * ROWS, shared(&full[slot]),
           EVICT_NORMAL);
  };
  const int lead = steps < SLOTS ? steps : SLOTS;
  asm volatile("griddepcontrol.launch_dependents;");
  for (int i = 0; i < lead; i++) weight(i, i);
  asm volatile("griddepcontrol.wait;" ::: "memory");  // x is complete from here on
  for (int i = 0; i < lead; i++) input(i, i);
  int slot = 0, parity = 0;
  for (int i = lead; i < steps; i++) {
    wait(shared(&empty[slot]), parity);
    weight(i, slot);
    input(i, slot);
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
}

// A warpgroup's 64 weight rows times all rows of x.
__device__ void multiply(float (&sum)[ROWS / 2], u32 base, u64* full, u64* empty, int steps) {
  const int group = threadIdx.x / 128;
  int slot = 0, parity = 0, before = 0;
  for (int i = 0; i < steps; i++) {
    wait(shared(&full[slot]), parity);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    #pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const u64 a = matrix(base + slot * SLOT + d * W_BYTES + group * 8192);
      const u64 b = matrix(base + slot * SLOT + DEEP * W_BYTES + d * X_BYTES);
      #pragma unroll
      for (int k = 0; k < 4; k++) MMA(sum, a + 2 * k, b + 2 * k, i + d + k > 0);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    __syncwarp();
    if (i > 0 && threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared(&empty[before])) : "memory");
    before = slot;
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  #pragma unroll
  for (int i = 0; i < ROWS / 2; i++) asm volatile("" : "+f"(sum[i]) :: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  #pragma unroll
  for (int i = 0; i < ROWS / 2; i++) asm volatile("" : "+f"(sum[i]) :: "memory");
}

// The sums to shared memory, a row of x after the other: what a block's threads hold is the other way round.
__device__ void lay_out(float* sums, const float (&sum)[ROWS / 2]) {
  const int lane = threadIdx.x % 32, n = threadIdx.x / 32 * 16 + lane / 4, m = lane % 4 * 2;
  #pragma unroll
  for (int j = 0; j < ROWS / 8; j++)
    #pragma unroll
    for (int q = 0; q < 4; q++) sums[(j * 8 + m + q % 2) * PITCH + n + q / 2 * 8] = sum[j * 4 + q];
}

__device__ float4 read(u32 at, u32 rank) {
  float4 v;
  if (PARTS > 1) asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
  return v;
}

// Four sums of the parts, added in the same order at every run.
__device__ float4 total(u32 at) {
  float4 v = read(at, 0);
  #pragma unroll
  for (int p = 1; p < PARTS; p++) {
    const float4 o = read(at, p);
    v.x += o.x, v.y += o.y, v.z += o.z, v.w += o.w;
  }
  return v;
}

__device__ float silu(float x) { return x / (1 + __expf(-x)); }

// A block's share of the rows, stored as bf16.
__device__ void store(u32 sums, unsigned short* out, int rows, int size) {
  constexpr int EACH = (ROWS + PARTS - 1) / PARTS, WIDE = WIDTH / 4;
  const int above = blockIdx.y * ROWS, first = part() * EACH, last = min(min(ROWS, rows - above), first + EACH);
  for (int e = threadIdx.x; e < (last - first) * WIDE; e += THREADS) {
    const int m = first + e / WIDE, n = e % WIDE * 4;
    float4 v = total(sums + (m * PITCH + n) * 4);
    if (HALVES > 1) {
      const float4 up = total(sums + (m * PITCH + WIDTH + n) * 4);
      v.x = silu(v.x) * up.x, v.y = silu(v.y) * up.y, v.z = silu(v.z) * up.z, v.w = silu(v.w) * up.w;
    }
    uint2 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y.x) : "f"(v.y), "f"(v.x));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y.y) : "f"(v.w), "f"(v.z));
    *(uint2*)(out + (long long)(above + m) * size + tile() * WIDTH + n) = y;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
product(const __grid_constant__ Map weights, const __grid_constant__ Map inputs, unsigned short* out, int rows,
        int size, int columns) {
  extern __shared__ unsigned char raw[];
  __shared__ alignas(8) u64 full[SLOTS], empty[SLOTS];
  const u32 base = (shared(raw) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
  const int all = columns / (64 * DEEP), first = part() * all / PARTS, steps = (part() + 1) * all / PARTS - first;
  if (threadIdx.x == THREADS) {
    for (int i = 0; i < SLOTS; i++) start(&full[i], 1), start(&empty[i], THREADS / 32);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == THREADS) load(weights, inputs, base, full, empty, first, steps, size);
  if (threadIdx.x < THREADS) {
    float sum[ROWS / 2];
    multiply(sum, base, full, empty, steps);
    asm volatile("griddepcontrol.wait;" ::: "memory");  // before `out` changes
    together();  // the pipeline's memory is free
    lay_out((float*)(raw + (base - shared(raw))), sum);
  }
  __syncwarp();
  if (PARTS > 1)
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  else if (threadIdx.x < THREADS) together();
  if (threadIdx.x < THREADS) store(base, out, rows, size);
  __syncwarp();
  // no block leaves while another reads its sums
  if (PARTS > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
