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

// Where outputs go, and what turns a sum into one: sum * the token's scale * the row's scale + bias, then activation.
struct Finish {
  const float* input_scales;  // [tokens]
  const float* scales;        // [rows], 16-byte aligned
  const uint16_t* bias;       // [rows] of T, 16-byte aligned, or null
  uint16_t* outputs;          // [tokens][rows] of T, 16-byte aligned
  int tokens, rows;
};

// In groups of 32 rows, packed codes have row 8 p + 2 j + e at position 8 j + 2 p + e (see vlmquant.packing.pack_w8). So
// what mma_m16n8k16 calls columns 2 pair and 2 pair + 1 of the four products j of a group are, in one lane, the rows
// 8 pair to 8 pair + 7: neighbours in memory, which a lane stores at once.

// Scales and biases of a lane's eight rows, and where they begin.
template <class T> struct RowTerms {
  float scales[8], biases[8];
  int row;
  VQ_DEVICE RowTerms(const Finish& to, int group_row, int lane) {
    row = group_row + lane % 4 * 8;
    VQ_UNROLL for (int i = 0; i < 8; ++i) scales[i] = biases[i] = 0.f;
    if (row + 8 <= to.rows) {
      VQ_UNROLL for (int i = 0; i < 2; ++i) {
        const float4 four = *(const float4*)(to.scales + row + 4 * i);
        scales[4 * i] = four.x;
        scales[4 * i + 1] = four.y;
        scales[4 * i + 2] = four.z;
        scales[4 * i + 3] = four.w;
      }
      if (to.bias) {
        const uint4 eight = *(const uint4*)(to.bias + row);
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
        VQ_UNROLL for (int i = 0; i < 4; ++i) {
          biases[2 * i] = low_float<T>(words[i]);
          biases[2 * i + 1] = high_float<T>(words[i]);
        }
      }
    } else {
      VQ_UNROLL for (int i = 0; i < 8; ++i) {
        if (row + i < to.rows) {
          scales[i] = to.scales[row + i];
          if (to.bias) biases[i] = low_float<T>(to.bias[row + i]);
        }
      }
    }
  }
};

// Scales of a lane's two tokens, token and token + 8.
struct TokenScales {
  float values[2];
  int token;
  VQ_DEVICE TokenScales(const Finish& to, int first_token, int lane) {
    token = first_token + lane / 4;
    VQ_UNROLL for (int i = 0; i < 2; ++i) {
      values[i] = token + 8 * i < to.tokens ? to.input_scales[token + 8 * i] : 0.f;
    }
  }
};

// Stores 16 tokens x 32 rows; sums(j, i) is sums[i] of the product j of the group.
template <class T, int ACTIVATION, class Sums>
VQ_DEVICE void store_outputs(const Finish& to, const TokenScales& tokens, const RowTerms<T>& rows, const Sums& sums) {
  VQ_UNROLL for (int half = 0; half < 2; ++half) {
    uint32_t words[4];
    VQ_UNROLL for (int j = 0; j < 4; ++j) {
      float two[2];
      VQ_UNROLL for (int e = 0; e < 2; ++e) {
        const float scaled = (float)sums(j, 2 * half + e) * tokens.values[half];
        const float plain = multiply_add(scaled, rows.scales[2 * j + e], rows.biases[2 * j + e]);
        two[e] = activate<ACTIVATION>(plain);
      }
      words[j] = round_pair<T>(two[0], two[1]);
    }
    const int token = tokens.token + 8 * half;
    uint16_t* at = to.outputs + (size_t)token * to.rows + rows.row;
    if (token < to.tokens) {
      if (rows.row + 8 <= to.rows && to.rows % 8 == 0) {
        uint4 all;
        all.x = words[0];
        all.y = words[1];
        all.z = words[2];
        all.w = words[3];
        *(uint4*)at = all;
      } else {
        VQ_UNROLL for (int i = 0; i < 8; ++i) {
          if (rows.row + i < to.rows) at[i] = (uint16_t)(words[i / 2] >> (i % 2 * 16));
        }
      }
    }
  }
}

}  // namespace vq
