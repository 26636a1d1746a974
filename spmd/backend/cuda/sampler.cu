// The next token of each row of logits, in a few passes over them and without a sort of the vocabulary.
//
// The tokens are those of spmd/sampling/sampler.py, whose docstring says what is chosen and in which order things are
// done. Every step that a choice depends on is the same operation on the same numbers as torch's there: float32
// subtraction, division, `expf` (hence the intrinsics: no fused multiply-add may take the place of two roundings), and
// sums of integers, which are the same in any order.
//
// A row is worked on by a cluster of `parts` thread blocks, each with as many warps; each warp has a contiguous slice
// of the vocabulary, of which it reads 256 tokens at a time. Passes over the logits:
//   1. the best score and its token: all that a greedy row needs;
//   2. with top_k or top_p: a histogram of scores, in BINS of equal width, of tokens and of their weights;
//   3. with top_k or top_p: the tokens of the bins that hold all that may stay, if they are few: sorted, cut and drawn
//      from in shared memory. If they are many, the lowest score that stays is looked for in the histogram of its bin,
//      of a part of that, and so on until its bin holds a single score: two passes as a rule, four at most for each of
//      top_k and top_p;
//   4. unless drawn in 3: the sum of weights of each slice; the slice with the drawn one is gone through once more;
//   5. with logprobs: the sum of the raw logits' exponentials, then the rank.
//
// Scores that weights are made of are (score - best) / temperature, so none is above 0. Their `key`, the bits of their
// magnitude, is the lower the better.
//
// Defined in front of this text: LOGIT, what logits are: 0 bfloat16, 1 float16, 2 float32.

typedef unsigned u32;
typedef unsigned long long u64;

constexpr int THREADS = 1024, WARPS = 32, WIDE = 8, STEP = 32 * WIDE;  // WIDE tokens a lane, STEP a warp at once
constexpr int BINS = THREADS, FEW = THREADS;
constexpr int NO_TOKEN = -1, IN_OUTPUT = 2;  // as in schedule/request.py and in sampling/penalties.py (ONE_OUTPUT)
constexpr u32 ALL = 0xFFFFFFFF, NAN_BEST = 0xFFFFFFFF, INFINITE = 0x7F800000;
constexpr u64 WEIGHT_OF_BEST = 1ull << 34;
constexpr float BINS_PER_UNIT = BINS / 24.0f;  // of score: below -23.6 weights are 0
constexpr float NEARLY = 1e-5f;  // relative: more than rounding can move a bin's edges

struct alignas(8) Row {  // of the plan; as ROW in sampler.py
  double top_p;
  float temperature, min_score, repetition, frequency, presence;  // temperature 0: greedy
  int top_k;                                                      // `vocab`: all
  u64 stream;
  int position, counts, bias, bias_end, asked;  // counts: row of the table; asked: row of `logprobs`; -1: none
};

#if LOGIT == 2
typedef float Logit;
#else
typedef unsigned short Logit;
#endif
constexpr int WORDS = WIDE * sizeof(Logit) / 16;
struct Vector { uint4 words[WORDS]; };  // WIDE logits

struct Histogram { u32 tokens[BINS], low[BINS], high[BINS]; };  // low and high: halves of the sum of weights
struct Sums { u64 tokens, weight; };
struct Place { u32 bin; Sums better, with; };  // sums of all better bins, and with this one's
struct Exact { u32 key; Sums better; };

// What the tokens that stay must reach: so many tokens, or (exclusive) a weight.
struct Goal {
  bool by_tokens;
  u64 tokens;
  double weight;
  __device__ bool reached(Sums s) const { return by_tokens ? s.tokens >= tokens : !((double)s.weight < weight); }
};

struct Shared {  // of a block; the others of its cluster read it
  Histogram coarse, fine;
  u64 few[FEW];
  u64 partial[WARPS];
  Place place;
  Sums sums;
  u64 total;
  u32 count, cut;
  int token;
};

struct Work {  // a block's share of a row
  Row row;
  Shared& shared;
  const Logit* logits;
  const int* counts;  // of the vocabulary, or null
  const int* bias_tokens;
  const float* biases;
  int vocab, parts, part, begin, end;  // begin, end: slice of this warp
  float best;
};

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

#ifndef ON_HOST  // where a test puts its own in their places
__device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

template <class T> __device__ T* in_block(T* here, int part) {
  u64 there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(part));
  return (T*)there;
}
#endif

// All threads of the row's blocks, whose writes to shared memory are seen by all of them behind it.
__device__ void together(int parts) {
  if (parts == 1) __syncthreads();
  else cluster_barrier();
}

// The same place in the shared memory of another block of the cluster.
template <class T> __device__ T* of(T* here, int parts, int part) { return parts == 1 ? here : in_block(here, part); }

// `v` of all threads of the row's blocks, taken together by `f`, on each of them.
template <class F> __device__ u64 over_row(const Work& w, u64 v, F f) {
  for (int d = 16; d; d /= 2) v = f(v, __shfl_xor_sync(ALL, v, d));
  if (lane() == 0) w.shared.partial[warp()] = v;
  together(w.parts);
  v = of(w.shared.partial, w.parts, 0)[lane()];
  for (int p = 1; p < w.parts; p++) v = f(v, of(w.shared.partial, w.parts, p)[lane()]);
  for (int d = 16; d; d /= 2) v = f(v, __shfl_xor_sync(ALL, v, d));
  together(w.parts);  // `partial` is free again
  return v;
}

__device__ u64 sum(u64 a, u64 b) { return a + b; }
__device__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

__device__ u64 up_to_lane(u64 v) {  // sum of this lane and those before it
  for (int d = 1; d < 32; d *= 2) {
    const u64 before = __shfl_up_sync(ALL, v, d);
    if (lane() >= d) v += before;
  }
  return v;
}

// Sum of `v` of this thread and those before it in the block.
__device__ u64 up_to_thread(Shared& shared, u64 v) {
  v = up_to_lane(v);
  if (lane() == 31) shared.partial[warp()] = v;
  __syncthreads();
  const u64 warps = up_to_lane(shared.partial[lane()]);
  const u64 before = __shfl_sync(ALL, warps, warp() ? warp() - 1 : 0);
  __syncthreads();
  return warp() ? v + before : v;
}

// ---- logits and scores ----

__device__ float widened(u32 half) {
#if LOGIT == 1
  float x;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(half));
  return x;
#else
  return __uint_as_float(half << 16);
#endif
}

__device__ void unpack(const Vector& v, float (&x)[WIDE]) {
  #pragma unroll
  for (int i = 0; i < WORDS; i++) {
    const u32 words[4] = {v.words[i].x, v.words[i].y, v.words[i].z, v.words[i].w};
    #pragma unroll
    for (int j = 0; j < 4; j++) {
#if LOGIT == 2
      x[i * 4 + j] = __uint_as_float(words[j]);
#else
      x[j * 2] = widened(words[j] & 0xFFFF), x[j * 2 + 1] = widened(words[j] >> 16);
#endif
    }
  }
}

__device__ Logit lowest() {  // minus infinity
#if LOGIT == 2
  return __uint_as_float(0xFF800000);
#else
  return LOGIT == 1 ? 0xFC00 : 0xFF80;
#endif
}

// The logits from token `at` on; minus infinity beyond the vocabulary.
__device__ Vector fetch(const Work& w, int at) {
  const Logit* from = w.logits + at;
  if (at + WIDE <= w.vocab && (u64)from % 16 == 0) return *(const Vector*)from;
  union { Vector v; Logit x[WIDE]; } some;
  #pragma unroll
  for (int j = 0; j < WIDE; j++) some.x[j] = at + j < w.vocab ? from[j] : lowest();
  return some.v;
}

__device__ void add_bias(const Work& w, int at, float (&x)[WIDE]) {
  int low = w.row.bias, high = w.row.bias_end;
  while (low < high) {  // the first entry from `at` on
    const int middle = (low + high) / 2;
    if (w.bias_tokens[middle] < at) low = middle + 1;
    else high = middle;
  }
  for (; low < w.row.bias_end && w.bias_tokens[low] < at + WIDE; low++)
    #pragma unroll
    for (int j = 0; j < WIDE; j++)
      if (w.bias_tokens[low] == at + j) x[j] = __fadd_rn(x[j], w.biases[low]);
}

__device__ float penalised(const Row& row, float x, int count) {
  const int times = count / IN_OUTPUT;
  if (count > 0) x = x > 0 ? __fdiv_rn(x, row.repetition) : __fmul_rn(x, row.repetition);
  if (times > 0) x = __fsub_rn(__fsub_rn(x, __fmul_rn(row.frequency, (float)times)), row.presence);
  return x;
}

__device__ void add_penalties(const Work& w, int at, float (&x)[WIDE]) {
  int count[WIDE];
  if (at + WIDE <= w.vocab && (u64)(w.counts + at) % 16 == 0) {
    *(int4*)count = *(const int4*)(w.counts + at);
    *(int4*)(count + 4) = *(const int4*)(w.counts + at + 4);
  } else {
    #pragma unroll
    for (int j = 0; j < WIDE; j++) count[j] = at + j < w.vocab ? w.counts[at + j] : 0;
  }
  #pragma unroll
  for (int j = 0; j < WIDE; j++)
    if (count[j]) x[j] = penalised(w.row, x[j], count[j]);
}

__device__ void change(const Work& w, int at, float (&x)[WIDE]) {
  if (w.row.bias < w.row.bias_end) add_bias(w, at, x);
  if (w.counts) add_penalties(w, at, x);
}

__device__ void load(const Work& w, int at, float (&x)[WIDE]) {
  unpack(fetch(w, at), x);
  change(w, at, x);
}

__device__ float logit(const Work& w, int token) {
  float x[WIDE], found = 0;
  const int at = token / WIDE * WIDE;
  unpack(fetch(w, at), x);
  #pragma unroll
  for (int j = 0; j < WIDE; j++)
    if (at + j == token) found = x[j];
  return found;
}

// `f(token, x)` for each token of this warp's slice: raw logits, or scores with bias and penalties.
template <bool RAW, class F> __device__ void each(const Work& w, F f) {
  int at = w.begin + lane() * WIDE;
  Vector next = fetch(w, at);
  for (; at < w.end; at += STEP) {
    float x[WIDE];
    unpack(next, x);
    next = fetch(w, at + STEP);
    if (!RAW) change(w, at, x);
    #pragma unroll
    for (int j = 0; j < WIDE; j++) f(at + j, x[j]);
  }
}

// ---- scores and weights ----

__device__ float scaled(const Work& w, float score) { return __fdiv_rn(__fsub_rn(score, w.best), w.row.temperature); }

__device__ u64 weight(float s) { return (u64)(long long)__fmul_rn(expf(s), (float)WEIGHT_OF_BEST); }

__device__ u32 key(float s) { return __float_as_uint(s) & 0x7FFFFFFF; }

__device__ float score_of(u32 key) { return -__uint_as_float(key); }

__device__ u32 bin_of(float s) { return (u32)fminf(__fmul_rn(-s, BINS_PER_UNIT), BINS - 1); }

// A number's bits, in the order of numbers, with NaN above all; and back.
__device__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);  // -0 equals 0
  return x != x ? NAN_BEST : bits ^ (bits >> 31 ? 0xFFFFFFFF : 0x80000000);
}

__device__ float decoded(u32 ordered) {
  return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000 : 0xFFFFFFFF));
}

// Best score, ordered, above the inverse of its token, the first of equal ones.
__device__ u64 best_token(const Work& w) {
  float best = __uint_as_float(0xFF800000);
  int token = 0;
  each<false>(w, [&](int t, float x) {
    if (x > best || x != x) best = x, token = t;  // nothing is larger than a NaN
  });
  return over_row(w, (u64)ordered(best) << 32 | (u32)~token, larger);
}

// ---- the lowest score that stays ----

__device__ void clear(Histogram& h) { h.tokens[threadIdx.x] = h.low[threadIdx.x] = h.high[threadIdx.x] = 0; }

__device__ void add(Histogram& h, u32 bin, u64 weight) {
  atomicAdd(&h.tokens[bin], 1);
  const u32 low = weight, old = atomicAdd(&h.low[bin], low);
  const u32 high = (u32)(weight >> 32) + (old + low < old);  // with what the lower half carries
  if (high) atomicAdd(&h.high[bin], high);
}

__device__ Sums in_bin(const Histogram& h, int bin) { return {h.tokens[bin], (u64)h.high[bin] << 32 | h.low[bin]}; }

// Histograms of the row's blocks added up, in each of them.
__device__ void add_up(const Work& w, Histogram& h) {
  together(w.parts);
  if (w.parts == 1) return;
  Sums all = {0, 0};
  for (int p = 0; p < w.parts; p++) {
    const Sums s = in_bin(*of(&h, w.parts, p), threadIdx.x);
    all.tokens += s.tokens, all.weight += s.weight;
  }
  together(w.parts);
  h.tokens[threadIdx.x] = all.tokens, h.low[threadIdx.x] = all.weight, h.high[threadIdx.x] = all.weight >> 32;
  together(w.parts);
}

__device__ Sums total(Shared& shared, const Histogram& h) {
  const Sums mine = in_bin(h, threadIdx.x);
  const Sums with = {up_to_thread(shared, mine.tokens), up_to_thread(shared, mine.weight)};
  if (threadIdx.x == THREADS - 1) shared.sums = with;
  __syncthreads();
  return shared.sums;
}

// The bin in which the goal is reached, where `before` is better than all bins. There is one.
__device__ Place search(Shared& shared, const Histogram& h, Sums before, Goal goal) {
  const Sums mine = in_bin(h, threadIdx.x);
  const Sums here = {up_to_thread(shared, mine.tokens), up_to_thread(shared, mine.weight)};
  const Sums with = {before.tokens + here.tokens, before.weight + here.weight};
  const Sums better = {with.tokens - mine.tokens, with.weight - mine.weight};
  if (!goal.reached(better) && goal.reached(with)) shared.place = {threadIdx.x, better, with};
  __syncthreads();
  const Place found = shared.place;
  __syncthreads();
  return found;
}

// The score at which the goal is reached, out of the bin where it is.
__device__ __noinline__ Exact refine(Work w, Place at, Goal goal) {
  u32 low = at.bin ? key(at.bin / BINS_PER_UNIT * (1 - NEARLY)) : 0;
  u32 high = key((at.bin + 1) / BINS_PER_UNIT * (1 + NEARLY));
  Sums better = at.better;
  int shift = 0;
  while ((high - low) >> shift >= BINS) shift++;
  while (true) {
    u64 least = ~0ull, most = 0;
    together(w.parts);
    clear(w.shared.fine);
    __syncthreads();
    each<false>(w, [&](int, float x) {
      const float s = scaled(w, x);
      if (!(s >= w.row.min_score) || bin_of(s) != at.bin) return;
      const u32 k = key(s);
      const u64 m = weight(s);
      if (k < low || k > high || !m) return;
      add(w.shared.fine, (k - low) >> shift, m);
      least = min(least, (u64)k), most = max(most, (u64)k);
    });
    add_up(w, w.shared.fine);
    least = ~over_row(w, ~least, larger), most = over_row(w, most, larger);
    if (least == most) return {(u32)least, better};
    const Place found = search(w.shared, w.shared.fine, better, goal);
    better = found.better;
    low += found.bin << shift;
    if (shift == 0) return {low, better};
    high = low + (1u << shift) - 1;
    shift = max(0, shift - 10);  // BINS is 2^10
  }
}

// ---- few tokens, in shared memory ----

__device__ void sort(u64* a, u32 size) {  // ascending; size a power of two
  for (u32 k = 2; k <= size; k *= 2)
    for (u32 d = k / 2; d; d /= 2) {
      const u32 i = threadIdx.x, other = i ^ d;
      if (other > i && other < size) {
        const u64 x = a[i], y = a[other];
        if ((x > y) == ((i & k) == 0)) a[i] = y, a[other] = x;
      }
      __syncthreads();
    }
}

__device__ double uniform(u64 stream, int position) {  // number `position` of SplitMix64, in [0, 1)
  u64 z = stream + (u64)(position + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return (double)((z ^ z >> 31) >> 11) * (1.0 / 9007199254740992.0);
}

// In [0, total): the number drawn is at most 1 - 2^-53 and the total below 2^53, so rounding doesn't reach it.
__device__ u64 target(const Row& row, u64 total) {
  return (u64)(long long)(uniform(row.stream, row.position) * (double)total);
}

// The tokens of all bins up to `last`, at most FEW, to the list of the row's first block: key above token.
__device__ __noinline__ void gather(Work w, u32 last) {
  u64* list = of(w.shared.few, w.parts, 0);
  u32* count = of(&w.shared.count, w.parts, 0);
  each<false>(w, [&](int token, float x) {
    const float s = scaled(w, x);
    if (s >= w.row.min_score && bin_of(s) <= last && weight(s)) list[atomicAdd(count, 1)] = (u64)key(s) << 32 | token;
  });
}

// Draw from the list, in one block, what top_k and top_p leave of it. `live`: sums of all tokens with a weight.
__device__ __noinline__ void draw_of_few(Work w, u32 count, Sums live) {
  Shared& shared = w.shared;
  const u32 i = threadIdx.x;
  u32 size = 32;
  while (size < count) size *= 2;
  if (i >= count && i < size) shared.few[i] = ~0ull;
  __syncthreads();
  sort(shared.few, size);
  const bool there = i < count;
  const u32 mine = there ? shared.few[i] >> 32 : INFINITE, token = there ? (u32)shared.few[i] : 0;
  const u64 own = there ? weight(score_of(mine)) : 0, with = up_to_thread(shared, own);
  const u64 most = min((u64)w.row.top_k, live.tokens);
  if (i == 0 && most == live.tokens) shared.total = live.weight;
  if (i + 1 == most && most < live.tokens) shared.total = with;
  __syncthreads();
  const double limit = w.row.top_p * (double)shared.total;
  const bool alone = !((double)WEIGHT_OF_BEST < limit);
  const bool kept = i < most && own && (double)(with - own) < limit, last = !(i + 1 < most && (double)with < limit);
  if (alone ? i == 0 : kept && last) shared.cut = mine;  // alone: the best score's key
  __syncthreads();
  if (i < size) shared.few[i] = there && mine <= shared.cut ? (u64)token << 32 | mine : ~0ull;
  __syncthreads();
  sort(shared.few, size);
  const u64 entry = i < size ? shared.few[i] : ~0ull;
  const u64 drawn = entry == ~0ull ? 0 : weight(score_of((u32)entry)), sums = up_to_thread(shared, drawn);
  if (i == THREADS - 1) shared.total = sums;
  __syncthreads();
  const u64 at = alone ? 0 : target(w.row, shared.total);
  if (sums - drawn <= at && at < sums) shared.token = entry >> 32;
}

// ---- many tokens ----

__device__ u64 kept_weight(const Work& w, float x, float cut) {
  const float s = scaled(w, x);
  return s >= cut ? weight(s) : 0;
}

// The token of this warp's slice with which the sum of weights goes beyond `at`; it is `before` in front of the slice.
__device__ __noinline__ int find_in_slice(Work w, float cut, u64 before, u64 at) {
  for (int base = w.begin; base < w.end; base += STEP) {
    float x[WIDE];
    u64 mine = 0;
    load(w, base + lane() * WIDE, x);
    #pragma unroll
    for (int j = 0; j < WIDE; j++) mine += kept_weight(w, x[j], cut);
    const u64 with = before + up_to_lane(mine);
    if (u32 beyond = __ballot_sync(ALL, at < with)) {
      int token = 0;
      u64 sums = with - mine;
      #pragma unroll
      for (int j = 0; j < WIDE; j++) {
        const u64 next = sums + kept_weight(w, x[j], cut);
        if (sums <= at && at < next) token = base + lane() * WIDE + j;
        sums = next;
      }
      return __shfl_sync(ALL, token, __ffs(beyond) - 1);
    }
    before = __shfl_sync(ALL, with, 31);
  }
  return NO_TOKEN;
}

// Draw among the tokens with scores of at least `cut`; the first of them if it stands alone.
__device__ __noinline__ int draw_of_many(Work w, float cut, bool alone) {
  u64 mine = 0, total = 0, before = 0;
  each<false>(w, [&](int, float x) { mine += kept_weight(w, x, cut); });
  for (int d = 16; d; d /= 2) mine += __shfl_xor_sync(ALL, mine, d);
  if (lane() == 0) w.shared.partial[warp()] = mine;
  together(w.parts);
  for (int p = 0; p < w.parts; p++) {
    const u64 slice = of(w.shared.partial, w.parts, p)[lane()], with = up_to_lane(slice);
    if (p < w.part) before += __shfl_sync(ALL, with, 31);
    if (p == w.part) before += __shfl_sync(ALL, with - slice, warp());
    total += __shfl_sync(ALL, with, 31);
  }
  const u64 at = alone ? 0 : target(w.row, total);
  if (before <= at && at < before + mine) {
    const int token = find_in_slice(w, cut, before, at);
    if (lane() == 0) *of(&w.shared.token, w.parts, 0) = token;
  }
  together(w.parts);
  return *of(&w.shared.token, w.parts, 0);
}

__device__ __noinline__ int draw(Work w) {
  const Row& row = w.row;
  Shared& shared = w.shared;
  float cut = row.min_score;
  if (row.top_k == w.vocab && row.top_p >= 1) return draw_of_many(w, cut, false);
  clear(shared.coarse);
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  each<false>(w, [&](int, float x) {
    const float s = scaled(w, x);
    const u64 m = s >= cut ? weight(s) : 0;
    if (m) add(shared.coarse, bin_of(s), m);
  });
  add_up(w, shared.coarse);
  const Sums live = total(shared, shared.coarse);
  const bool bounded = row.top_k < live.tokens;
  double limit = row.top_p * (double)live.weight;
  bool alone = !((double)WEIGHT_OF_BEST < limit);
  if (alone) return draw_of_many(w, 0, true);
  if (!bounded && row.top_p >= 1) return draw_of_many(w, cut, false);
  Goal goal = {bounded, (u64)row.top_k, limit};
  const Place at = search(shared, shared.coarse, {0, 0}, goal);
  if (at.with.tokens <= FEW) {
    gather(w, at.bin);
    together(w.parts);
    if (w.part == 0) draw_of_few(w, at.with.tokens, live);
    together(w.parts);
    return *of(&shared.token, w.parts, 0);
  }
  Exact lowest = refine(w, at, goal);
  if (bounded) {
    const u64 least = weight(score_of(lowest.key));
    limit = row.top_p * (double)(lowest.better.weight + (row.top_k - lowest.better.tokens) * least);
    alone = !((double)WEIGHT_OF_BEST < limit);
    goal = {false, 0, limit};
    if (!alone && row.top_p < 1) lowest = refine(w, search(shared, shared.coarse, {0, 0}, goal), goal);
  }
  return draw_of_many(w, alone ? 0 : score_of(lowest.key), alone);
}

// ---- log-probabilities ----

// Of the raw logits: the token's, its rank, and what is subtracted from a logit to make it one.
__device__ __noinline__ void write_logprobs(Work w, int token, double* to) {
  float best = w.best;
  if (w.counts || w.row.bias < w.row.bias_end) {
    best = __uint_as_float(0xFF800000);
    each<true>(w, [&](int, float x) { best = fmaxf(best, x); });
    best = decoded(over_row(w, ordered(best), larger));
  }
  u64 mine = 0;
  each<true>(w, [&](int, float x) { mine += (u64)(long long)(expf(x - best) * 17592186044416.0f); });  // 2^44
  const float log_sum = logf((float)((double)over_row(w, mine, sum) / 17592186044416.0));
  auto logprob = [&](float x) { return __fsub_rn(__fsub_rn(x, best), log_sum); };
  const float own = logprob(logit(w, token));
  u64 rank = 0;
  each<true>(w, [&](int, float x) { rank += logprob(x) >= own; });
  rank = over_row(w, rank, sum);
  if (w.part == 0 && threadIdx.x == 0) to[0] = own, to[1] = rank, to[2] = best, to[3] = log_sum;
}

// `logits`: rows `stride` numbers apart. `logprobs`: [asked, 4], see write_logprobs.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(const Logit* logits, long long stride, int vocab, const Row* rows, const int* bias_tokens, const float* biases,
       int* counts, long long* tokens, double* logprobs, int parts) {
  __shared__ Shared shared;
  const int index = blockIdx.x / parts, part = blockIdx.x % parts;
  const Row row = rows[index];
  int* const counted = row.counts < 0 ? nullptr : counts + (long long)row.counts * vocab;
  const int slice = (vocab + parts * WARPS * STEP - 1) / (parts * WARPS * STEP) * STEP;
  const int begin = (part * WARPS + warp()) * slice;
  Work w = {row, shared, logits + index * stride, counted, bias_tokens, biases, vocab, parts, part, begin,
            min(begin + slice, vocab), 0};
  const u64 found = best_token(w);
  w.best = decoded(found >> 32);
  const bool some = fabsf(w.best) < __uint_as_float(INFINITE);  // neither NaN nor infinite
  int token = NO_TOKEN;
  if (some) {
    token = row.temperature > 0 ? draw(w) : (int)~(u32)found;
    if (row.asked >= 0) write_logprobs(w, token, logprobs + 4 * row.asked);
  }
  together(parts);  // no block leaves, and no count changes, while another reads
  if (part > 0 || threadIdx.x > 0) return;
  tokens[index] = token;
  if (some && counted) counted[token] += IN_OUTPUT;
  if (!some && row.asked >= 0)
    for (int i = 0; i < 4; i++) logprobs[4 * row.asked + i] = i == 1 ? 0 : __uint_as_float(0x7FFFFFFF);
}
