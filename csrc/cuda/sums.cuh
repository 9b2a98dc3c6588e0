// The last launch of a backward: every element of every parameter's gradient, from what the launches before left.
//
// A thread block writes neighbouring elements; for each, one thread or, where sums are long, kSumParts threads add up a
// part of the terms, in order, and one adds the parts. Terms are slices of the batch (convolutions), images (MLP and
// bias, where a term is a product of two vectors that the backward left, an outer product for each image) or blocks of
// images (spatial). Elements are in the order of their partial sums. Memory: reads what is left once, neighbouring
// elements side by side, and writes the gradients in their own strides.
#pragma once

#include "device.cuh"

namespace mfef::cuda {

constexpr int kSumThreads = 256, kSumParts = 8;

// Threads of an element: one where no sum is longer than a run.
MFEF_HD int sum_parts(const BlockArgs& a) {
  const bool short_sums =
      a.slices <= kRun && a.bias_terms <= kRun && (!a.sizes.hidden || (a.sizes.batch <= kRun && a.blocks <= kRun));
  return short_sums ? 1 : kSumParts;
}

// One of `parts` parts of a sum; none of it where only the place of the element is asked for.
struct Part {
  int index, parts;
};

// Of the sum over `count` terms. run(first, n): of n terms from `first` on.
template <class Run>
MFEF_DEVICE float part_of_runs(int64_t count, Part part, const Run& run) {
  const bool some = part.index < part.parts;
  const int64_t begin = part.parts == 1 ? 0 : count * part.index / part.parts;
  const int64_t end = !some ? begin : part.parts == 1 ? count : count * (part.index + 1) / part.parts;
  float sum = 0.0f;
  for (int64_t first = begin; first < end; first += kRun) {
    sum += run(first, end - first < kRun ? int(end - first) : kRun);
  }
  return sum;
}

template <class Term>
MFEF_DEVICE float part_of_sum(int64_t count, Part part, const Term& term) {
  return part_of_runs(count, part,
                      [&](int64_t first, int n) { return sum_of(n, [&](int i) { return term(first + i); }); });
}

// The same of numbers `step` apart, with the loads of a whole run under way at once.
MFEF_DEVICE float part_of_sum(int64_t count, Part part, const float* from, int64_t step) {
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
MFEF_DEVICE float part_of_output(const BlockArgs& a, int64_t e, Part part, Parameter* to, int64_t* offset) {
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
    const int parts = sum_parts(a), outputs = kSumThreads / parts;
    float* sums = block.shared;
    for (int64_t first = block.index * outputs; first < a.outputs; first += block.count * outputs) {
      Parameter to;
      int64_t offset;
      if (parts == 1) {
        block.phase([&](int thread) {
          const int64_t e = first + thread;
          if (e >= a.outputs) return;
          const float sum = part_of_output(a, e, {0, 1}, &to, &offset);
          store(to, a.element, offset, sum);
        });
        continue;
      }
      block.phase([&](int thread) {
        const int64_t e = first + thread % outputs;
        sums[thread] = e < a.outputs ? part_of_output(a, e, {thread / outputs, parts}, &to, &offset) : 0.0f;
      });
      block.phase([&](int thread) {
        const int64_t e = first + thread;
        if (thread >= outputs || e >= a.outputs) return;
        float sum = 0.0f;
        for (int part = 0; part < parts; ++part) sum += sums[part * outputs + thread];
        part_of_output(a, e, {parts, parts}, &to, &offset);
        store(to, a.element, offset, sum);
      });
    }
  }
};

}  // namespace mfef::cuda
