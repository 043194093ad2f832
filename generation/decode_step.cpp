// One token of each of B rows through the decoder, in one call: what `cpu_decoder.py` does one
// operation after another. `compiled_decoder.py` compiles this, and mirrors the structures below.
//
// The threads share each product by its outputs, and attention by rows and heads; what is small
// (norms, the residual path) each does for itself, because waiting for the others takes longer. The
// sums of a row are taken in the same order in any batch.
//
// Shapes: B rows, C = d_model, F = d_ff, H heads of width D = C / H, S places in the cache, V =
// vocab_size. All numbers are float32 but the weights of products, and matrices are row by row.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST_ROWS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, MOST_ROWS = 2;  // as many sums as its 16 registers hold
#else
constexpr int LANES = 4, MOST_ROWS = 4;
#endif
constexpr int PANEL = 4 * LANES;  // outputs whose weights lie side by side

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

enum Dtype : int64_t { FLOAT32, BFLOAT16 };
enum NormKind : int64_t { NONE, LAYER, RMS };
enum Activation : int64_t { IDENTITY, RELU, GELU };

struct Linear {            // x W^T + b
  const void *weight;      // (outputs / PANEL, inputs, PANEL), the last panel filled up with zeros;
                           // of bfloat16 two inputs side by side: (.., inputs / 2, PANEL, 2)
  const float *bias;       // filled up as well; null: none
  int64_t inputs, outputs, dtype;
};

struct Norm {
  int64_t kind;
  const float *weight, *bias;
  float eps;
};

struct Layer {
  Linear qkv, output, linear1, linear2;
  Norm norm1, norm2;
};

struct Decoder {
  int64_t d_model, n_heads, n_layers, norm_first, activation, embed_dtype;
  float embedding_scale;
  const void *embed;       // (V, C)
  const float *positions;  // (max_len, C)
  Norm embed_norm, final_norm;
  const Layer *layers;
  Linear logits;
};

struct Cache {             // keys and values (L, B, H, S, D), with strides in numbers
  void *keys, *values;
  int64_t dtype, layer_stride, row_stride, head_stride;
};

static int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

static inline Floats widen(const float *p) { return *(const Floats *)p; }
static inline Floats widen(const uint16_t *p) {  // bfloat16
  return (Floats)(__builtin_convertvector(*(const Halves *)p, Words) << 16);
}

static inline float to_float(float x) { return x; }
static inline float to_float(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}

// The bits of a bfloat16, rounded to the nearest, to an even one halfway.
static inline uint16_t to_bfloat16(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
static inline void store(float x, float &y) { y = x; }
static inline void store(float x, uint16_t &y) { y = to_bfloat16(x); }

// sums + w x: for each type of weights, as many inputs at a time as one lane holds.
static inline Floats weigh(Floats sums, const float *w, const float *x) {
  return sums + widen(w) * *x;
}
#if defined(__AVX512BF16__)
typedef uint32_t Bf16Input;  // two inputs, as bfloat16
static inline Floats weigh(Floats sums, const uint32_t *w, const Bf16Input *x) {
  __m512i weights = _mm512_loadu_si512(w), inputs = _mm512_set1_epi32((int)*x);
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)inputs);
}
#else
struct Bf16Input { float low, high; };
static inline Floats weigh(Floats sums, const uint32_t *w, const Bf16Input *x) {
  Words words = *(const Words *)w;
  sums += (Floats)(words << 16) * x->low;
  return sums + (Floats)(words & 0xffff0000u) * x->high;
}
#endif

// As the products of bfloat16 weights take their inputs: (B, K) -> (B, ceil(K / 2)).
static void pair_up(int64_t B, int64_t K, const float *x, int64_t x_stride, Bf16Input *y) {
  int64_t pairs = (K + 1) / 2;
  for (int64_t row = 0; row < B; row++, x += x_stride, y += pairs)
    for (int64_t i = 0; i < pairs; i++) {
      float two[2] = {x[2 * i], 2 * i + 1 < K ? x[2 * i + 1] : 0.0f};
#if defined(__AVX512BF16__)
      y[i] = to_bfloat16(two[0]) | (uint32_t)to_bfloat16(two[1]) << 16;
#else
      y[i] = {two[0], two[1]};
#endif
    }
}

// e^x within 2 in the last place, in a form that compilers turn into vector instructions.
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // x / ln 2, rounded
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes, expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t power = ((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  return p * scale;
}

static void activate(float *y, int64_t n, int64_t activation) {
  if (activation == RELU) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = y[i] > 0 ? y[i] : 0;
  } else if (activation == GELU) {  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      float u = 0.79788456f * (y[i] + 0.044715f * y[i] * y[i] * y[i]);
      y[i] = y[i] / (1.0f + exponential(-2.0f * u));
    }
  }
}

// PANEL outputs of a few rows, their sums in registers. x: (ROWS, steps), y: (ROWS, stride).
template <int ROWS, class Weight, class Input>
static inline void tile(const Linear &linear, int64_t panel, int64_t steps, const Input *x,
                        float *y, int64_t stride, int64_t x_stride, int64_t activation) {
  const Weight *weight = (const Weight *)linear.weight + panel * steps * PANEL;
  Floats sums[ROWS][4] = {};
  for (int64_t k = 0; k < steps; k++, weight += PANEL) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
      for (int row = 0; row < ROWS; row++)
        sums[row][j] = weigh(sums[row][j], weight + j * LANES, x + row * x_stride + k);
    }
  }
  for (int row = 0; row < ROWS; row++) {
    float *out = y + row * stride + panel * PANEL;
    for (int j = 0; j < 4; j++) {
      int64_t first = panel * PANEL + j * LANES;
      if (linear.bias) sums[row][j] += widen(linear.bias + first);
      *(Floats *)(out + j * LANES) = sums[row][j];
    }
    activate(out, PANEL, activation);
  }
}

template <class Weight, class Input>
static void share_of_product(const Linear &linear, int64_t B, int64_t steps, const Input *x,
                             int64_t x_stride, float *y, int64_t activation) {
  int64_t panels = padded(linear.outputs) / PANEL, stride = panels * PANEL;
  int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
  for (int64_t panel = panels * me / threads; panel < panels * (me + 1) / threads; panel++) {
    int64_t row = 0;
    for (; row + MOST_ROWS <= B; row += MOST_ROWS)
      tile<MOST_ROWS, Weight>(linear, panel, steps, x + row * x_stride, y + row * stride, stride,
                              x_stride, activation);
    for (; row < B; row++)
      tile<1, Weight>(linear, panel, steps, x + row * x_stride, y + row * stride, stride, x_stride,
                      activation);
  }
}

// This thread's share of y = activation(x W^T + b): (B, inputs) -> (B, padded(outputs)).
static void product(const Linear &linear, int64_t B, const float *x, int64_t x_stride,
                    Bf16Input *pairs, float *y, int64_t activation = IDENTITY) {
  int64_t K = linear.inputs;
  if (linear.dtype == FLOAT32) {
    share_of_product<float>(linear, B, K, x, x_stride, y, activation);
  } else {
    pair_up(B, K, x, x_stride, pairs);
    share_of_product<uint32_t>(linear, B, (K + 1) / 2, pairs, (K + 1) / 2, y, activation);
  }
}

// y = norm(x), (B, C) each, which may be the same memory.
static void normalise(const Norm &norm, int64_t B, int64_t C, const float *x, float *y) {
  for (int64_t row = 0; row < B; row++, x += C, y += C) {
    float mean = 0, square = 0;
    if (norm.kind == LAYER) {
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < C; i++) mean += x[i];
      mean /= C;
    }
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < C; i++) square += (x[i] - mean) * (x[i] - mean);
    float factor = norm.kind == NONE ? 1.0f : 1.0f / sqrtf(square / C + norm.eps);
#pragma omp simd
    for (int64_t i = 0; i < C; i++) y[i] = (x[i] - mean) * factor;
    if (norm.weight) {
#pragma omp simd
      for (int64_t i = 0; i < C; i++) y[i] = y[i] * norm.weight[i] + norm.bias[i];
    }
  }
}

static void add(int64_t B, int64_t C, float *x, const float *y, int64_t y_stride) {
  for (int64_t row = 0; row < B; row++)
    for (int64_t i = 0; i < C; i++) x[row * C + i] += y[row * y_stride + i];
}

static inline float total(Floats sums) {
  float lanes[LANES];
  memcpy(lanes, &sums, sizeof lanes);
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma omp simd
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class Number>
static inline float dot(const float *x, const Number *y, int64_t D) {
  Floats sums = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) sums += widen(x + d) * widen(y + d);
  float sum = total(sums);
  for (; d < D; d++) sum += x[d] * to_float(y[d]);
  return sum;
}

// y = weights V of a few columns, their sums in registers: V (S, D), y (COLUMNS * LANES).
template <int COLUMNS, class Number>
static inline void mix(const float *weights, const Number *V, int64_t S, int64_t D, float *y) {
  Floats sums[COLUMNS] = {};
  for (int64_t s = 0; s < S; s++)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) sums[j] += weights[s] * widen(V + s * D + j * LANES);
  memcpy(y, sums, sizeof sums);
}

// softmax(q K^T / sqrt(D)) V of one head: S keys and values (S, D); `weights` has room for S.
template <class Number>
static void attend(const float *q, const Number *K, const Number *V, int64_t S, int64_t D,
                   float *weights, float *y) {
  float scale = 1.0f / sqrtf((float)D), largest = -INFINITY, sum = 0;
  for (int64_t s = 0; s < S; s++) {
    // the values are read next; without this a step of 16 rows takes a tenth longer
    for (int64_t d = 0; d < D; d += 64 / (int64_t)sizeof(Number)) __builtin_prefetch(V + s * D + d);
    weights[s] = scale * dot(q, K + s * D, D);
    largest = std::max(largest, weights[s]);
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < S; s++) {
    weights[s] = exponential(weights[s] - largest);
    sum += weights[s];
  }
  for (int64_t s = 0; s < S; s++) weights[s] /= sum;
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) mix<4>(weights, V + d, S, D, y + d);
  for (; d + LANES <= D; d += LANES) mix<1>(weights, V + d, S, D, y + d);
  for (; d < D; d++) {
    y[d] = 0;
    for (int64_t s = 0; s < S; s++) y[d] += weights[s] * to_float(V[s * D + d]);
  }
}

// This thread's share of attention: stores the new keys and values, and reads them all.
template <class Number>
static void share_of_attention(const Decoder &decoder, const Cache &cache, int64_t layer, int64_t B,
                               const int64_t *places, const float *qkv, int64_t stride,
                               float *weights, float *y) {
  int64_t C = decoder.d_model, H = decoder.n_heads, D = C / H;
  int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
  for (int64_t i = B * H * me / threads; i < B * H * (me + 1) / threads; i++) {
    int64_t row = i / H, head = i % H, place = places[row];
    int64_t first = layer * cache.layer_stride + row * cache.row_stride + head * cache.head_stride;
    Number *K = (Number *)cache.keys + first, *V = (Number *)cache.values + first;
    const float *q = qkv + row * stride + head * D;
    for (int64_t d = 0; d < D; d++) store(q[C + d], K[place * D + d]);
    for (int64_t d = 0; d < D; d++) store(q[2 * C + d], V[place * D + d]);
    attend(q, K, V, place + 1, D, weights, y + row * C + head * D);
  }
}

static void embed(const Decoder &decoder, int64_t B, const int64_t *ids, const int64_t *places,
                  float *x) {
  int64_t C = decoder.d_model;
  for (int64_t row = 0; row < B; row++)
    for (int64_t i = 0; i < C; i++) {
      int64_t from = ids[row] * C + i;
      float value = decoder.embed_dtype == FLOAT32
                        ? ((const float *)decoder.embed)[from]
                        : to_float(((const uint16_t *)decoder.embed)[from]);
      x[row * C + i] = value * decoder.embedding_scale + decoder.positions[places[row] * C + i];
    }
}

extern "C" int64_t panel() { return PANEL; }

// Logits (B, padded(V)) after `ids` (B), which come at `places` (B) of the cache.
extern "C" void step(const Decoder *given, const Cache *cache, int64_t B, const int64_t *ids,
                     const int64_t *places, float *logits, int64_t threads) {
  const Decoder &decoder = *given;
  int64_t C = decoder.d_model, wide = padded(C), most = 0;
  for (int64_t row = 0; row < B; row++) most = places[row] > most ? places[row] : most;
  const Linear &first = decoder.layers[0].qkv, &up = decoder.layers[0].linear1;
  int64_t qkv_stride = padded(first.outputs), up_stride = padded(up.outputs);
  // what the threads share; no two products that follow on each other write to the same
  std::unique_ptr<float[]> shared(new float[B * (qkv_stride + C + wide + up_stride + wide)]);
  float *qkv = shared.get(), *heads = qkv + B * qkv_stride, *y1 = heads + B * C;
  float *inner = y1 + B * wide, *y2 = inner + B * up_stride;
  auto *attention =
      cache->dtype == FLOAT32 ? share_of_attention<float> : share_of_attention<uint16_t>;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> own(new float[2 * B * C + most + 1]);
    float *x = own.get(), *h = x + B * C, *weights = h + B * C;
    std::unique_ptr<Bf16Input[]> paired(new Bf16Input[B * (std::max(C, up.outputs) / 2 + 1)]);
    Bf16Input *pairs = paired.get();
    embed(decoder, B, ids, places, x);
    normalise(decoder.embed_norm, B, C, x, x);
    for (int64_t l = 0; l < decoder.n_layers; l++) {
      const Layer &layer = decoder.layers[l];
      const float *in = x;
      if (decoder.norm_first) normalise(layer.norm1, B, C, x, h), in = h;
      product(layer.qkv, B, in, C, pairs, qkv);
#pragma omp barrier
      attention(decoder, *cache, l, B, places, qkv, qkv_stride, weights, heads);
#pragma omp barrier
      product(layer.output, B, heads, C, pairs, y1);
#pragma omp barrier
      add(B, C, x, y1, wide);
      if (decoder.norm_first) normalise(layer.norm2, B, C, x, h);
      else normalise(layer.norm1, B, C, x, x);
      product(layer.linear1, B, in, C, pairs, inner, decoder.activation);
#pragma omp barrier
      product(layer.linear2, B, inner, up_stride, pairs, y2);
#pragma omp barrier
      add(B, C, x, y2, wide);
      if (!decoder.norm_first) normalise(layer.norm2, B, C, x, x);
    }
    normalise(decoder.final_norm, B, C, x, x);
    product(decoder.logits, B, x, C, pairs, logits);
  }
}

// The token at which the sum of the weights of a row's k largest logits, and of all that tie with
// the last of them, passes `number` of it; -1 where the largest logit is no number.
static int64_t sample(const float *logits, int64_t V, int64_t k, double temperature,
                      double number) {
  // k blocks have a logit that is at least the k-th largest of their maxima: no other block counts
  int64_t span = std::max<int64_t>(1, std::min<int64_t>(64, V / (4 * k)));
  int64_t blocks = (V + span - 1) / span;
  std::vector<float> largest(blocks);
  bool wrong = false;
  for (int64_t b = 0; b < blocks; b++) {
    float most = -INFINITY;
    int nan = 0;
#pragma omp simd reduction(max : most) reduction(| : nan)
    for (int64_t i = b * span; i < std::min(V, (b + 1) * span); i++) {
      most = logits[i] > most ? logits[i] : most;
      nan |= logits[i] != logits[i];
    }
    largest[b] = most;
    wrong |= nan;
  }
  float most = *std::max_element(largest.begin(), largest.end());
  if (wrong || !isfinite(most)) return -1;
  std::vector<float> found = largest;
  std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<float>());
  float least = found[k - 1];
  std::vector<int64_t> ids;
  found.clear();
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = b * span; largest[b] >= least && i < std::min(V, (b + 1) * span); i++)
      if (logits[i] >= least) ids.push_back(i), found.push_back(logits[i]);
  std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<float>());
  least = found[k - 1];
  std::vector<double> reached;
  double sum = 0;
  for (int64_t id : ids) {
    if (logits[id] >= least) sum += exp(((double)logits[id] - most) / temperature);
    reached.push_back(sum);
  }
  auto place = std::upper_bound(reached.begin(), reached.end(), number * sum);
  if (place == reached.end()) place = std::lower_bound(reached.begin(), reached.end(), sum);
  return ids[place - reached.begin()];
}

// `torch_sampling.sample_tokens` for 0 < k < V and no top-p: logits (B, V), B numbers and tokens.
extern "C" void sample_top_k(const float *logits, int64_t stride, int64_t B, int64_t V, int64_t k,
                             double temperature, const double *numbers, int64_t *tokens,
                             int64_t threads) {
#pragma omp parallel for num_threads(threads) if (B > 1)
  for (int64_t row = 0; row < B; row++)
    tokens[row] = sample(logits + row * stride, V, k, temperature, numbers[row]);
}
