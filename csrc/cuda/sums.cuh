// The last launch of a backward: every element of every parameter's gradient, from what the launches before left.
//
// A thread block writes kOutputs neighbouring elements; for each, kSumParts threads add up a part of the terms, in
// order, and one adds the parts. Terms are slices of the batch (convolutions), images (MLP and bias, where a term is
// a product of two vectors that the backward left, an outer product for each image) or blocks of images (spatial).
// Elements are in the order of their partial sums. Memory: reads what is left once, neighbouring elements side by side,
// and writes the gradients in their own strides.
#pragma once

#include "device.cuh"

namespace mfef::cuda {

constexpr int kOutputs = 32, kSumParts = 8;

// One part of the sum over `count` terms; 0 for the part after the last. run(first, n): of n terms from `first` on.
template <class Run>
MFEF_DEVICE float part_of_runs(int64_t count, int part, const Run& run) {
  const int64_t begin = count * part / kSumParts, end = part < kSumParts ? count * (part + 1) / kSumParts : begin;
  float sum = 0.0f;
  for (int64_t first = begin; first < end; first += kRun) {
    sum += run(first, end - first < kRun ? int(end - first) : kRun);
  }
  return sum;
}

template <class Term>
MFEF_DEVICE float part_of_sum(int64_t count, int part, const Term& term) {
  return part_of_runs(count, part,
                      [&](int64_t first, int n) { return sum_of(n, [&](int i) { return term(first + i); }); });
}

// The same of numbers `step` apart, with the loads of a whole run under way at once.
MFEF_DEVICE float part_of_sum(int64_t count, int part, const float* from, int64_t step) {
  return part_of_runs(count, part, [&](int64_t first, int n) {
    const float* at = from + first * step;
    float terms[kRun], sum = 0.0f;
    MFEF_UNROLL
    for (int i = 0; i < kRun; ++i, at += step) terms[i] = i < n ? *at : 0.0f;
    MFEF_UNROLL
    for (int i = 0; i < kRun; ++i) sum += terms[i];
    return sum;
  });
}

// A part of element `e` of all gradients; *to and *offset say where the element is.
MFEF_DEVICE float part_of_output(const BlockArgs& a, int64_t e, int part, Parameter* to, int64_t* offset) {
  const Sizes& s = a.sizes;
  const Gradients& g = a.grads;
  const int64_t batch = s.batch, channels = s.out, hidden = s.hidden;
  for (int i = 0; g.weights && i < s.branch_count; ++i) {
    const Branch& b = s.branches[i];
    const int64_t full = b.full_k, inputs = b.in_per_group(), count = b.out * inputs * full * full;
    if (e >= count) {
      e -= count;
      continue;
    }
    const bool taps_last = !a.weights_in_backward;  // see place_of_sum
    const int64_t pair = taps_last ? e / (full * full) : e % (b.out * inputs),
                  tap = taps_last ? e % (full * full) : e / (b.out * inputs);
    const int64_t out = taps_last ? pair / inputs : pair % b.out, in = taps_last ? pair % inputs : pair / b.out;
    const int64_t x = tap % full, y = tap / full, kx = x - (full - b.k) / 2, ky = y - (full - b.k) / 2;
    *to = g.branches[i];
    *offset = out * to->stride[0] + in * to->stride[1] + y * to->stride[2] + x * to->stride[3];
    if (kx < 0 || kx >= b.k || ky < 0 || ky >= b.k) return 0.0f;
    const float* from =
        g.weights + first_sum(s, i) + place_of_sum(b, a.weights_in_backward, int(out), int(in), int(ky), int(kx));
    return part_of_sum(batch ? a.slices : 0, part, from, first_sum(s, s.branch_count));
  }
  if (g.bias.data) {
    if (e < channels) {
      *to = g.bias;
      *offset = e * to->stride[0];
      return part_of_sum(a.bias_terms, part, g.channel_sums + e, channels);
    }
    e -= channels;
  }
  if (e < hidden * channels) {
    const int64_t j = e / channels, c = e % channels;
    *to = g.fc1_weight;
    *offset = j * to->stride[0] + c * to->stride[1];
    return part_of_sum(batch, part, [&](int64_t n) {
      return fmaf(g.hidden_mean[n * hidden + j], a.mean[n * channels + c],
                  g.hidden_max[n * hidden + j] * a.max[n * channels + c]);
    });
  }
  e -= hidden * channels;
  if (e < hidden * channels) {
    const int64_t c = e / hidden, j = e % hidden;
    *to = g.fc2_weight;
    *offset = c * to->stride[0] + j * to->stride[1];
    return part_of_sum(batch, part,
                       [&](int64_t n) { return g.logit[n * channels + c] * g.hidden_sum[n * hidden + j]; });
  }
  e -= hidden * channels;
  if (g.fc1_bias.data) {
    if (e < hidden) {
      *to = g.fc1_bias;
      *offset = e * to->stride[0];
      return part_of_sum(batch, part,
                         [&](int64_t n) { return g.hidden_mean[n * hidden + e] + g.hidden_max[n * hidden + e]; });
    }
    e -= hidden;
  }
  if (g.fc2_bias.data) {
    if (e < channels) {
      *to = g.fc2_bias;
      *offset = e * to->stride[0];
      return 2.0f * part_of_sum(batch, part, g.logit + e, channels);
    }
    e -= channels;
  }
  const int64_t full = s.spatial_full, k = s.spatial_k, x = e % full, y = e / full % full, map = e / (full * full);
  const int64_t kx = x - (full - k) / 2, ky = y - (full - k) / 2;
  *to = g.spatial_weight;
  *offset = map * to->stride[1] + y * to->stride[2] + x * to->stride[3];
  if (kx < 0 || kx >= k || ky < 0 || ky >= k) return 0.0f;
  return part_of_sum(a.blocks, part, g.spatial + (map * k + ky) * k + kx, 2 * k * k);
}

struct Sums {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    float* parts = block.shared;
    for (int64_t first = block.index * kOutputs; first < a.outputs; first += block.count * kOutputs) {
      block.phase([&](int thread) {
        const int64_t e = first + thread % kOutputs;
        Parameter to;
        int64_t offset;
        parts[thread] = e < a.outputs ? part_of_output(a, e, thread / kOutputs, &to, &offset) : 0.0f;
      });
      block.phase([&](int thread) {
        const int64_t e = first + thread;
        if (thread >= kOutputs || e >= a.outputs) return;
        float sum = 0.0f;
        for (int part = 0; part < kSumParts; ++part) sum += parts[part * kOutputs + thread];
        // The place of the element, with no term to add up.
        Parameter to;
        int64_t offset;
        part_of_output(a, e, kSumParts, &to, &offset);
        store(to, a.element, offset, sum);
      });
    }
  }
};

}  // namespace mfef::cuda
