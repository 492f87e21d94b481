// What the int8 products share: from exact integer sums to outputs.
#pragma once
#include "primitives.cuh"
namespace vq {

// What an output goes through last.
enum Activation { PLAIN, GELU, GELU_TANH, QUICK_GELU };

// GELU is x * P(a normal variable < x); its tail as Abramowitz and Stegun 7.1.26, within 1e-7 of the exact one.
// GELU_TANH is the usual approximation, 0.5 x (1 + tanh u), which is x / (1 + exp(-2 u)). QUICK_GELU: x / (1 +
// exp(-1.702 x)).
template <int ACTIVATION> VQ_DEVICE float activate(float x) {
  const float log2_e = 1.44269504f;
  if (ACTIVATION == GELU) {
    const float z = (x < 0 ? -x : x) * 0.70710678f;
    const float t = reciprocal_approx(multiply_add(0.3275911f, z, 1.f));
    float sum = multiply_add(1.061405429f, t, -1.453152027f);
    sum = multiply_add(sum, t, 1.421413741f);
    sum = multiply_add(sum, t, -0.284496736f);
    sum = multiply_add(sum, t, 0.254829592f);
    const float tail = 0.5f * sum * t * exp2_approx(-log2_e * z * z);
    return x * (x < 0 ? tail : 1 - tail);
  }
  if (ACTIVATION == GELU_TANH) {
    const float u = x * multiply_add(0.0356774081f, x * x, 0.797884561f);  // sqrt(2 / pi) (x + 0.044715 x^3)
    return x * reciprocal_approx(1 + exp2_approx(-2 * log2_e * u));
  }
  if (ACTIVATION == QUICK_GELU) return x * reciprocal_approx(1 + exp2_approx(-1.702f * log2_e * x));
  return x;
}

// The four lanes 4 i to 4 i + 3 hold a 4 x 4 matrix, each a column; afterwards each has a row.
VQ_DEVICE void transpose_quad(uint32_t (&words)[4], int lane) {
  VQ_UNROLL for (int bit = 1; bit <= 2; bit *= 2) VQ_UNROLL for (int low = 0; low < 4; ++low) {
    if (low & bit) continue;
    const int high = low | bit;
    const uint32_t got = shuffle_xor(lane & bit ? words[low] : words[high], bit);
    if (lane & bit) {
      words[low] = got;
    } else {
      words[high] = got;
    }
  }
}

// Where outputs go, and what turns a sum into one: sum * the token's scale * the row's scale + bias, then activation.
struct Finish {
  const float* input_scales;  // [tokens]
  const float* scales;        // [rows]
  const uint16_t* bias;       // [rows] of T, or null
  uint16_t* outputs;          // [tokens][rows] of T
  int tokens, rows;
};

// Stores 16 tokens x 32 rows: sums[j] are those of mma_m16n8k16 for rows first_row + 8 j to + 7. Four lanes trade, so
// that each stores 16 bytes of one token. Scales and bias begin at a multiple of 8 bytes, outputs of 16.
template <class T, int ACTIVATION, class Sums>
VQ_DEVICE void store_outputs(const Finish& to, const Sums& sums, int first_token, int first_row, int lane) {
  const int top_token = first_token + lane / 4, pair = lane % 4;
  const float top_scale = top_token < to.tokens ? to.input_scales[top_token] : 0.f;
  const float bottom_scale = top_token + 8 < to.tokens ? to.input_scales[top_token + 8] : 0.f;
  uint32_t words[2][4];
  VQ_UNROLL for (int j = 0; j < 4; ++j) {
    const int row = first_row + 8 * j + 2 * pair;
    float2 scale, bias;
    scale.x = scale.y = bias.x = bias.y = 0.f;
    if (row + 1 < to.rows) {
      scale = *(const float2*)(to.scales + row);
      if (to.bias) {
        const uint32_t two = *(const uint32_t*)(to.bias + row);
        bias.x = low_float<T>(two);
        bias.y = high_float<T>(two);
      }
    } else if (row < to.rows) {
      scale.x = to.scales[row];
      if (to.bias) bias.x = low_float<T>(to.bias[row]);
    }
    VQ_UNROLL for (int half = 0; half < 2; ++half) {
      const float input_scale = half ? bottom_scale : top_scale;
      const float first = (float)sums(j, 2 * half) * input_scale * scale.x + bias.x;
      const float second = (float)sums(j, 2 * half + 1) * input_scale * scale.y + bias.y;
      words[half][j] = (uint32_t)round_to<T>(activate<ACTIVATION>(first)) |
                       (uint32_t)round_to<T>(activate<ACTIVATION>(second)) << 16;
    }
  }
  VQ_UNROLL for (int half = 0; half < 2; ++half) {
    transpose_quad(words[half], lane);
    const int token = top_token + 8 * half, row = first_row + 8 * pair;
    uint16_t* at = to.outputs + (size_t)token * to.rows + row;
    if (token < to.tokens && row < to.rows) {
      if (to.rows % 8 == 0) {
        uint4 all;
        all.x = words[half][0];
        all.y = words[half][1];
        all.z = words[half][2];
        all.w = words[half][3];
        *(uint4*)at = all;
      } else {
        VQ_UNROLL for (int i = 0; i < 8; ++i) {
          if (row + i < to.rows) at[i] = (uint16_t)(words[half][i / 2] >> (i % 2 * 16));
        }
      }
    }
  }
}

}  // namespace vq
