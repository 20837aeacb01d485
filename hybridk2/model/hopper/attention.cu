// Absorbed attention of decoding over the paged latent cache, for Hopper cards (sm_90a).
//
// What it computes and why it is cut into shares of keys stands in hybridk2/model/triton/mla.py,
// which does the same on every card. This one exists because a Hopper card can do what Triton's
// language does not say: a tile of keys is brought by one instruction of the copy engine, the three
// groups of warps of a program are at different tiles at the same time, and the shares are joined
// in the same launch.
//
// A program owns all 64 heads of one share of one row's keys. Its groups of four warps:
//   0        scores: 64 heads x 32 keys, softmax weights; thread 0 also asks for the tiles to come
//   1 and 2  sums of weighted latents, 256 of the 512 columns each, in registers
// Tiles travel through a ring of four in shared memory (`full`: a tile has come; `empty`: all
// twelve warps are done with it), weights through a ring of two (`weighted`, `used`). Queries stay
// (`queried`: they have come). Tiles leave the L2 cache first and shares last: shares are read
// again.
//
// Shares are joined by all programs of the launch, each a part of the outputs, once the last share
// is there: all of them have to be on the card at the same time, so the launch is cooperative. A
// counter for each row tells when; every launch with as many rows adds the same number to it.
//
// Roundings: products of bf16 numbers, fp32 sums; softmax weights to bf16, and a share's mean of
// latents to fp16, an eighth of that. Weights are relative to a score that follows the largest one
// only when that is 2^8 times as heavy: bf16 and fp32 numbers are as exact there.
//
// `make ptx` writes attention.ptx, which is what is shipped and loaded.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

constexpr int kHeads = 64, kRank = 512, kDim = 576;  // a latent: 512 and 64 rotated
constexpr int kPage = 64, kKeys = 32;
constexpr int kTiles = 4, kWeights = 2;  // places in the rings
constexpr int kAhead = 2;                // tiles that are asked for before they are needed
constexpr int kThreads = 384, kWarps = 12;
constexpr int kMostShares = 11 * kWarps;  // of one row
constexpr float kGrowth = 8;              // log2 of how much heavier a score may be

// Shared memory. A block is 64 columns of a tile, as the copy engine and the tensor cores want it:
// a line of 128 bytes for each key (or head), whose eight chunks of 16 bytes are exchanged by the
// line's number.
constexpr int kLine = 128, kBlocks = kDim / 64;
constexpr int kQueryBlock = kHeads * kLine, kTileBlock = kKeys * kLine;
constexpr int kTile = kBlocks * kTileBlock, kWeight = kHeads * kKeys * 2;
constexpr int kAtTiles = kBlocks * kQueryBlock;
constexpr int kAtWeights = kAtTiles + kTiles * kTile;
constexpr int kAtShrink = kAtWeights + kWeights * kWeight;   // floats: (kWeights, 64)
constexpr int kAtNorms = kAtShrink + kWeights * kHeads * 4;  // floats: (64)
constexpr int kAtBarriers = kAtNorms + kHeads * 4;
constexpr int kSharedBytes = kAtBarriers + 8 * (2 * (kTiles + kWeights) + 1);
static_assert(kSharedBytes <= 227 * 1024);
// After the last tile: means of the share, as they are stored; then, joining, (warps, 256) floats
// and two floats for each warp.
constexpr int kHalf = kRank / 2, kMeanLine = kHalf * 2;
static_assert(2 * kHeads * kMeanLine <= kTiles * kTile);

struct Arguments {
  const int* page_table;  // (rows, table_stride)
  const int* lengths;     // (rows)
  // (rows, shares, 2, 64, 256): halves of the columns. Of a head's 32 chunks of eight columns eight
  // at a time are exchanged by the head's number, so that writing them meets all banks.
  __half* means;
  float2* stats;                 // (rows, 64, shares): reference score, sum of weights
  unsigned long long* counters;  // (36): of `rows` rows those from rows * (rows - 1) / 2 on
  float* out;                    // (rows, 64, 512)
  long long table_stride;        // in elements
  float scale;                   // of scores, times log2(e)
  int shares;                    // of a row, at most kMostShares and the launch's programs a row
};
static_assert(sizeof(Arguments) == 64);

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase end no sooner than so many bytes have come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// For the threads of whole groups; 0 is __syncthreads.
template <int kCount>
__device__ __forceinline__ void group_barrier(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kCount) : "memory");
}

// What threads wrote becomes visible to the copy engine and the tensor cores.
__device__ __forceinline__ void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 32 keys of a page, from `key` on, whole latents.
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, int key, int page,
                                          uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(0), "r"(key), "r"(0), "r"(page), "r"(barrier), "l"(policy)
      : "memory");
}

// All of a row's.
__device__ __forceinline__ void load_queries(uint32_t to, const CUtensorMap* map, int row,
                                             uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %2, %2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(0), "r"(row), "r"(barrier)
      : "memory");
}

// How the tensor cores find a matrix in shared memory: bytes between blocks of columns (for a
// matrix that lies transposed) and between groups of eight lines; lines of 128 bytes or of 64.
constexpr uint64_t kLinesOf128 = 1, kLinesOf64 = 2;
__device__ __forceinline__ uint64_t matrix(uint32_t at, int block, int group, uint64_t lines) {
  return static_cast<uint64_t>((at & 0x3FFFF) >> 4) | static_cast<uint64_t>(block >> 4) << 16 |
         static_cast<uint64_t>(group >> 4) << 32 | lines << 62;
}

#define EIGHT(d, n)                                                                           \
  "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), \
      "+f"(d[n + 6]), "+f"(d[n + 7])

// d (64, 32) = a (64, 16) b (32, 16) transposed, or that added to it.
__device__ __forceinline__ void add_scores(float (&d)[16], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, add, 1, 1, 0, 0;\n}\n"
      : EIGHT(d, 0), EIGHT(d, 8)
      : "l"(a), "l"(b), "r"(add));
}

// d (64, 128) += a (64, 16) b (16, 128).
__device__ __forceinline__ void add_latents(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, 1, 1, 1, 0, 1;\n"
      : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24), EIGHT(d, 32), EIGHT(d, 40),
        EIGHT(d, 48), EIGHT(d, 56)
      : "l"(a), "l"(b));
}

#undef EIGHT

__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float over_four(float x, bool largest) {
  for (int distance = 1; distance <= 2; distance *= 2) {
    const float other = __shfl_xor_sync(~0u, x, distance);
    x = largest ? fmaxf(x, other) : x + other;
  }
  return x;
}

__device__ __forceinline__ float over_warp(float x, bool largest) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_xor_sync(~0u, x, distance);
    x = largest ? fmaxf(x, other) : x + other;
  }
  return x;
}

// The share of keys that a program has: tiles from first to last of the row's.
struct Share {
  int tiles, each, first, last;

  __device__ Share(int length, int shares, int number) {
    tiles = (length + kKeys - 1) / kKeys;
    each = (tiles + shares - 1) / shares;
    first = min(number * each, tiles);
    last = number < shares ? min(first + each, tiles) : first;
  }

  __device__ int count() const { return last - first; }
  __device__ int used() const { return each == 0 ? 0 : (tiles + each - 1) / each; }  // shares
};

// A thread of the tensor cores' results has two rows, and of each two columns in eight.
struct Place {
  int warp, row, column;

  __device__ explicit Place(int thread)
      : warp(thread / 32 % 4), row(16 * warp + thread % 32 / 4), column(thread % 4 * 2) {}
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    hybridk2_attention(const __grid_constant__ CUtensorMap latents,
                       const __grid_constant__ CUtensorMap queries, const Arguments given) {
  extern __shared__ __align__(1024) uint8_t room[];
  const uint32_t base = shared_address(room);
  const int thread = threadIdx.x, group = thread / 128, warp = thread / 32, lane = thread % 32;
  const uint32_t full = base + kAtBarriers, empty = full + 8 * kTiles,
                 weighted = empty + 8 * kTiles, used = weighted + 8 * kWeights,
                 queried = used + 8 * kWeights;
  // The launch may have been made before the kernel in front of it is done.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int row = blockIdx.y, shares = given.shares;
  const int length = given.lengths[row];
  if (thread == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&latents) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&queries) : "memory");
    for (int i = 0; i < kTiles; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kWarps);
    }
    for (int i = 0; i < kWeights; i++) {
      barrier_init(weighted + 8 * i, 4);
      barrier_init(used + 8 * i, 8);
    }
    barrier_init(queried, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  const Share share(length, shares, blockIdx.x);
  uint64_t policy = 0;  // of thread 0: tiles leave the cache first
  const auto ask = [&](int i) {
    const int tile = share.first + i, place = i % kTiles;
    if (i >= kTiles) barrier_wait(empty + 8 * place, (i / kTiles + 1) % 2);
    barrier_expect(full + 8 * place, kTile);
    const int page = given.page_table[row * given.table_stride + tile * kKeys / kPage];
    load_tile(base + kAtTiles + place * kTile, &latents, tile * kKeys % kPage, page,
              full + 8 * place, policy);
  };
  if (thread == 0) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    for (int i = 0; i < min(kAhead, share.count()); i++) {
      ask(i);
      if (i == 0) {
        barrier_expect(queried, kBlocks * kQueryBlock);
        load_queries(base, &queries, row, queried);
      }
    }
  }
  // The counter when all are there. This program is not counted yet, so it is less now, and not
  // less than it was after the launch before.
  constexpr int kCounting = 64;
  unsigned long long* const counter = given.counters + gridDim.y * (gridDim.y - 1) / 2 + row;
  unsigned long long target = 0;
  if (thread == kCounting) {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(target) : "l"(counter) : "memory");
    target = (target / gridDim.x + 1) * gridDim.x;
  }
  __syncthreads();

  const Place mine(thread);
  float* const norms = reinterpret_cast<float*>(room + kAtNorms);
  if (group == 0) {
    float reference[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    if (share.count() > 0) barrier_wait(queried, 0);
    for (int i = 0; i < share.count(); i++) {
      const int place = i % kTiles, slot = i % kWeights;
      const uint32_t keys = base + kAtTiles + place * kTile;
      barrier_wait(full + 8 * place, i / kTiles % 2);
      float scores[16];
      products_begin();
#pragma unroll
      for (int block = 0; block < kBlocks; block++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          add_scores(scores, matrix(base + block * kQueryBlock + k * 32, 0, 8 * kLine, kLinesOf128),
                     matrix(keys + block * kTileBlock + k * 32, 0, 8 * kLine, kLinesOf128),
                     block + k > 0);
        }
      }
      products_commit();
      if (thread == 0 && i + kAhead < share.count()) ask(i + kAhead);
      __syncwarp();
      products_wait();

      const int valid = length - (share.first + i) * kKeys;
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const int key = j / 4 * 8 + mine.column + j % 2;
        scores[j] = key < valid ? scores[j] * given.scale : -INFINITY;
      }
      if (valid < kKeys) {
        // What lies beyond the length may be NaN, and 0 * NaN is not 0.
        group_barrier<128>(2);  // all four warps have read the keys
        for (int n = thread; n < (kKeys - valid) * (kDim / 8); n += 128) {
          const int key = valid + n / (kDim / 8), chunk = n % (kDim / 8);
          *reinterpret_cast<uint4*>(room + kAtTiles + place * kTile + chunk / 8 * kTileBlock +
                                    key * kLine + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
        }
      }
      float shrink[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float largest = -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          largest = fmaxf(largest, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
        }
        largest = over_four(largest, true);
        const float next = largest > reference[half] + kGrowth ? largest : reference[half];
        shrink[half] = power_of_two(reference[half] - next);
        reference[half] = next;
        total[half] *= shrink[half];
      }
      if (i >= kWeights) barrier_wait(used + 8 * slot, (i / kWeights + 1) % 2);
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int head = mine.row + 8 * half;
          const float left = power_of_two(scores[4 * j + 2 * half] - reference[half]);
          const float right = power_of_two(scores[4 * j + 2 * half + 1] - reference[half]);
          total[half] += left + right;
          *reinterpret_cast<__nv_bfloat162*>(room + kAtWeights + slot * kWeight + head * 64 +
                                             (j ^ head / 2 % 4) * 16 + mine.column * 2) =
              __floats2bfloat162_rn(left, right);
        }
      }
      float* const shrinks = reinterpret_cast<float*>(room + kAtShrink) + slot * kHeads;
      if (lane % 4 == 0) {
        shrinks[mine.row] = shrink[0];
        shrinks[mine.row + 8] = shrink[1];
      }
      publish_shared();
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(weighted + 8 * slot);
        barrier_arrive(empty + 8 * place);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int head = mine.row + 8 * half;
      const float sum = over_four(total[half], false);
      if (lane % 4 == 0 && share.count() > 0) {
        norms[head] = 1 / sum;
        given.stats[(row * kHeads + head) * shares + blockIdx.x] =
            make_float2(reference[half], sum);
      }
    }
    group_barrier<kThreads>(1);
  } else {
    // The columns of this group, the first and the second half of them.
    const int columns = (group - 1) * 256;
    float sums[2][64];
#pragma unroll
    for (int j = 0; j < 64; j++) sums[0][j] = sums[1][j] = 0;
    for (int i = 0; i < share.count(); i++) {
      const int place = i % kTiles, slot = i % kWeights;
      barrier_wait(weighted + 8 * slot, i / kWeights % 2);
      barrier_wait(full + 8 * place, i / kTiles % 2);
      const float* const shrinks = reinterpret_cast<const float*>(room + kAtShrink) + slot * kHeads;
      const float upper = shrinks[mine.row], lower = shrinks[mine.row + 8];
      if (__any_sync(~0u, upper != 1 || lower != 1)) {
#pragma unroll
        for (int j = 0; j < 64; j++) {
          sums[0][j] *= j % 4 < 2 ? upper : lower;
          sums[1][j] *= j % 4 < 2 ? upper : lower;
        }
      }
      const uint32_t weights = base + kAtWeights + slot * kWeight;
      const uint32_t tile = base + kAtTiles + place * kTile + columns / 64 * kTileBlock;
      products_begin();
#pragma unroll
      for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          add_latents(sums[half], matrix(weights + k * 32, 0, 8 * 64, kLinesOf64),
                      matrix(tile + half * 2 * kTileBlock + k * 16 * kLine, kTileBlock, 8 * kLine,
                             kLinesOf128));
        }
      }
      products_commit();
      products_wait();
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(used + 8 * slot);
        barrier_arrive(empty + 8 * place);
      }
    }
    group_barrier<kThreads>(1);
    if (share.count() > 0) {
      // A warp's heads and columns are its own, so it sends them off as soon as it has them.
      uint8_t* const lines = room + kAtTiles + ((group - 1) * kHeads + mine.row) * kMeanLine;
      const float upper = norms[mine.row], lower = norms[mine.row + 8];
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const float* const four = sums[half] + 4 * j;
          uint8_t* const to = lines + ((half * 16 + j) ^ mine.row % 8) * 16 + mine.column * 2;
          *reinterpret_cast<__half2*>(to) = __floats2half2_rn(four[0] * upper, four[1] * upper);
          *reinterpret_cast<__half2*>(to + 8 * kMeanLine) =
              __floats2half2_rn(four[2] * lower, four[3] * lower);
        }
      }
      publish_shared();
      __syncwarp();
      if (lane == 0) {
        const int line = (group - 1) * kHeads + 16 * mine.warp;
        __half* const to =
            given.means +
            (static_cast<int64_t>(row * shares + blockIdx.x) * 2 * kHeads + line) * kHalf;
        uint64_t keep;
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
        asm volatile(
            "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
                to),
            "r"(base + kAtTiles + line * kMeanLine), "n"(16 * kMeanLine), "l"(keep)
            : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      }
      __syncwarp();
    }
  }

  // Release and acquire are cumulative: what a program's threads wrote before the first barrier is
  // seen by the threads of every program behind its second.
  __syncthreads();
  if (thread == kCounting) {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
    unsigned long long now;
    do {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(counter) : "memory");
    } while (now < target);
  }
  __syncwarp();
  __syncthreads();

  // Half of a head's columns at a time, eight of them a thread; each warp adds every twelfth share,
  // weighted relative to the largest score among those.
  for (int slice = blockIdx.x; slice < 2 * kHeads; slice += gridDim.x) {
    const int head = slice / 2, half = slice % 2;
    constexpr int kEach = kMostShares / kWarps;
    const int count = (share.used() - warp + kWarps - 1) / kWarps;  // of this warp's shares
    const float2* const stats = given.stats + (row * kHeads + head) * shares + warp;
    const uint4* const means = reinterpret_cast<const uint4*>(
        given.means +
        ((static_cast<int64_t>(row * shares + warp) * 2 + half) * kHeads + head) * kHalf);
    constexpr int kStride = kWarps * kHeads * kRank / 8;
    float2 found = make_float2(-INFINITY, 0);
    if (lane < count) found = __ldcg(stats + lane * kWarps);
    uint4 eights[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      eights[i] =
          i < count ? __ldcg(means + i * kStride + (lane ^ head % 8)) : make_uint4(0, 0, 0, 0);
    }
    const float largest = over_warp(found.x, true);
    const float factor = count > 0 ? found.y * power_of_two(found.x - largest) : 0;
    const float total = over_warp(factor, false);
    float sums[8] = {};
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const float mine = __shfl_sync(~0u, factor, i);
      const __half2* const pairs = reinterpret_cast<const __half2*>(&eights[i]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 pair = __half22float2(pairs[j]);
        sums[2 * j] += mine * pair.x;
        sums[2 * j + 1] += mine * pair.y;
      }
    }
    float4* const parts = reinterpret_cast<float4*>(room);
    float2* const weights = reinterpret_cast<float2*>(room + kWarps * kHalf * 4);
    if (slice >= gridDim.x) __syncthreads();  // the slice before has been read
    parts[warp * 64 + lane * 2] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    parts[warp * 64 + lane * 2 + 1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
    if (lane == 0) weights[warp] = make_float2(largest, total);
    __syncthreads();
    if (thread < kHalf) {
      float most = -INFINITY, sum = 0, all = 0;
#pragma unroll
      for (int i = 0; i < kWarps; i++) most = fmaxf(most, weights[i].x);
#pragma unroll
      for (int i = 0; i < kWarps; i++) {
        const float relative = power_of_two(weights[i].x - most);
        sum += relative * reinterpret_cast<const float*>(room)[i * kHalf + thread];
        all += relative * weights[i].y;
      }
      // Without keys both are 0, and so is the mean of a padding row.
      given.out[(row * kHeads + head) * kRank + half * kHalf + thread] =
          share.used() > 0 ? sum / all : 0;
    }
  }
}
