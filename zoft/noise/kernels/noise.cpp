// The noise of zoft/noise/source.py on a CPU: the bits of its eager torch code, made a tile at a time and used while in cache.
//
// Every float operation here is one of eager torch, rounded on its own: without -ffp-contract=off a fused multiply-add
// would change the last bit. A call stays inside one block of words (noise._BLOCK_WORDS), so that word indices fit 32
// bits; `offset` counts from the block's start. `omp simd` stands where an output may be its own input, element by
// element: the compiler could not know that it may still take 16 at a time.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kTile = 1024;  // elements of z in flight in a thread: 6 KiB of stack, and whole words of every law

struct Stream {
  uint32_t low, high;  // the block's key
  const float* table;  // 65,536 quantiles; null: Rademacher
  float factor;        // sphere: what the Gaussian is scaled with
};

inline uint32_t mix(uint32_t word) {
  word = (word ^ (word >> 16)) * 0x7FEB352Du;
  word = (word ^ (word >> 15)) * 0x846CA68Bu;
  return word ^ (word >> 16);
}

inline uint32_t random_word(const Stream& stream, uint32_t index) {
  return mix(mix((index * 0x9E3779B9u) ^ stream.low) + stream.high);
}

void make_tile(const Stream& stream, int64_t tile, float* z) {
  uint32_t words[kTile / 2];
  const int count = stream.table ? kTile / 2 : kTile / 32;
  const uint32_t first = static_cast<uint32_t>(tile * count);
  for (int i = 0; i < count; ++i) words[i] = random_word(stream, first + i);
  if (stream.table) {
    uint16_t halves[kTile];  // the low half of a word comes first: little-endian, as every device torch runs on
    std::memcpy(halves, words, sizeof halves);
    for (int i = 0; i < kTile; ++i) z[i] = stream.table[halves[i]] * stream.factor;
  } else {
    for (int word = 0; word < count; ++word)
      for (int bit = 0; bit < 32; ++bit) z[32 * word + bit] = words[word] >> bit & 1 ? 1.0f : -1.0f;
  }
}

// use(z, at, count): `count` elements of z that belong to positions [at, at + count) of the caller's tensor.
template <class Use>
void for_each_tile(const Stream& stream, int64_t offset, int64_t count, int threads, Use use) {
  const int64_t stop = offset + count, first = offset / kTile, last = (stop + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t tile = first; tile < last; ++tile) {
    float z[kTile];
    make_tile(stream, tile, z);
    const int64_t begin = tile * kTile < offset ? offset : tile * kTile;
    const int64_t end = (tile + 1) * kTile > stop ? stop : (tile + 1) * kTile;
    use(z + (begin - tile * kTile), begin - offset, static_cast<int>(end - begin));
  }
}

// ---- the dtypes of weights: how each is read into the wide dtype and rounded, once, to nearest even ------------------

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float32 {
  using Stored = float;
  using Wide = float;
  static Wide read(Stored value) { return value; }
  static Stored round(Wide value) { return value; }
};

struct Float64 {
  using Stored = double;
  using Wide = double;
  static Wide read(Stored value) { return value; }
  static Stored round(Wide value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  using Wide = float;
  static Wide read(Stored value) { return float_of(static_cast<uint32_t>(value) << 16); }
  static Stored round(Wide value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<Stored>(value != value ? 0x7FC0 : rounded);
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Wide = float;
  static Wide read(Stored value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16, rest = value & 0x7FFF;
    const uint32_t normal = (rest << 13) + (rest >= 0x7C00 ? 224u << 23 : 112u << 23);  // infinities keep their place
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
    return float_of(sign | (rest < 0x0400 ? subnormal : normal));
  }
  static Stored round(Wide value) {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000, rest = bits_of(value) & 0x7FFFFFFF;
    const uint32_t normal = (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);  // 0.5's last bit is 2^-24
    const uint32_t large = rest > 0x7F800000 ? 0x7E00 : 0x7C00;
    return static_cast<Stored>(sign | (rest < 0x38800000 ? subnormal : rest < 0x477FF000 ? normal : large));
  }
};

template <class Dtype>
void perturb(const Stream& stream, int64_t offset, int64_t count, int threads, const void* weight_, int num_scales,
             const double* scales, void* const* outs) {
  using Stored = typename Dtype::Stored;
  using Wide = typename Dtype::Wide;
  const Stored* weight = static_cast<const Stored*>(weight_);
  for_each_tile(stream, offset, count, threads, [=](const float* z, int64_t at, int n) {
    for (int i = 0; i < num_scales; ++i) {
      const Wide scale = static_cast<Wide>(scales[i]);
      Stored* out = static_cast<Stored*>(outs[i]);
#pragma omp simd
      for (int j = 0; j < n; ++j)
        out[at + j] = Dtype::round(static_cast<Wide>(z[j]) * scale + Dtype::read(weight[at + j]));
    }
  });
}

}  // namespace

extern "C" {

// out = z
void zoft_draw(const Stream* stream, int64_t offset, int64_t count, int threads, float* out) {
  for_each_tile(*stream, offset, count, threads,
                [=](const float* z, int64_t at, int n) { std::memcpy(out + at, z, n * sizeof *z); });
}

// out += scale * z
void zoft_add(const Stream* stream, int64_t offset, int64_t count, int threads, float scale, float* out) {
  for_each_tile(*stream, offset, count, threads, [=](const float* z, int64_t at, int n) {
    for (int j = 0; j < n; ++j) out[at + j] += z[j] * scale;
  });
}

// outs[i] = weight + scales[i] * z; dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64
void zoft_perturb(const Stream* stream, int64_t offset, int64_t count, int threads, int dtype, const void* weight,
                  int num_scales, const double* scales, void* const* outs) {
  const auto run = dtype == 0   ? perturb<Float32>
                   : dtype == 1 ? perturb<BFloat16>
                   : dtype == 2 ? perturb<Float16>
                                : perturb<Float64>;
  run(*stream, offset, count, threads, weight, num_scales, scales, outs);
}

// out[i] = z[indices[i]]
void zoft_gather(const Stream* stream, int64_t count, int threads, const int64_t* indices, float* out) {
  const Stream s = *stream;
  if (s.table) {
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1) schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t word = random_word(s, static_cast<uint32_t>(indices[i] >> 1));
      out[i] = s.table[word >> (indices[i] & 1) * 16 & 0xFFFF] * s.factor;
    }
  } else {
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1) schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t word = random_word(s, static_cast<uint32_t>(indices[i] >> 5));
      out[i] = word >> (indices[i] & 31) & 1 ? 1.0f : -1.0f;
    }
  }
}

// out[i, j] += scale * sum_k left[i, k] right[k, j]: term by term, each rounded by itself, as zoft/subspaces/low_rank.py.
void zoft_add_product(int64_t rows, int64_t columns, int rank, int threads, const float* left, const float* right,
                      float scale, float* out) {
  constexpr int64_t kTile = 1024;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const float* u = left + i * rank;
    for (int64_t at = 0; at < columns; at += kTile) {
      const int n = static_cast<int>(columns - at < kTile ? columns - at : kTile);
      const float* v = right + at;
      float z[kTile];
      for (int j = 0; j < n; ++j) z[j] = u[0] * v[j];
      for (int k = 1; k < rank; ++k)
        for (int j = 0; j < n; ++j) z[j] += u[k] * v[k * columns + j];
      float* w = out + i * columns + at;
      for (int j = 0; j < n; ++j) w[j] += z[j] * scale;
    }
  }
}

// The words themselves; `offset` and `count` are of words.
void zoft_words(const Stream* stream, int64_t offset, int64_t count, int threads, uint32_t* out) {
  const Stream s = *stream;
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1) schedule(static)
  for (int64_t i = 0; i < count; ++i) out[i] = random_word(s, static_cast<uint32_t>(offset + i));
}

// Sum of squares in units of 2^-32: exact, as long as count <= 2^26 (quantiles are integers below 2^19, times 2^-16).
int64_t zoft_squared_norm(const Stream* stream, int64_t offset, int64_t count, int threads) {
  int64_t total = 0;
  for_each_tile(*stream, offset, count, threads, [&total](const float* z, int64_t, int n) {
    int64_t sum = 0;
    for (int j = 0; j < n; ++j) {
      const int64_t value = static_cast<int32_t>(z[j] * 65536.0f);
      sum += value * value;
    }
#pragma omp atomic
    total += sum;
  });
  return total;
}

}  // extern "C"
