#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mfef::cpu {

#define MFEF_DECLARE(isa)        \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
#if defined(MFEF_HAVE_ISA_baseline)
MFEF_DECLARE(baseline)
#endif
#if defined(MFEF_HAVE_ISA_avx2)
MFEF_DECLARE(avx2)
#endif
#if defined(MFEF_HAVE_ISA_avx512)
MFEF_DECLARE(avx512)
#endif
#if defined(MFEF_HAVE_ISA_avx512_bf16)
MFEF_DECLARE(avx512_bf16)
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool usable;
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if defined(MFEF_HAVE_ISA_baseline)
  found.push_back({&baseline::kKernels, true});
#endif
#if defined(MFEF_HAVE_ISA_avx2)
  found.push_back({&avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#if defined(MFEF_HAVE_ISA_avx512) || defined(MFEF_HAVE_ISA_avx512_bf16)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(MFEF_HAVE_ISA_avx512)
  found.push_back({&avx512::kKernels, has_avx512});
#endif
#if defined(MFEF_HAVE_ISA_avx512_bf16)
  found.push_back({&avx512_bf16::kKernels, has_avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
  return found;
}

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all.empty() ? "none" : all;
}

const Kernels* find(const std::string& name) {
  const Kernels* best = nullptr;
  for (const Candidate& c : candidates()) {
    if (c.usable && (name.empty() || name == c.kernels->name)) best = c.kernels;
  }
  if (!best) {
    throw std::invalid_argument("CPU instruction set '" + name + "' cannot be used; built: " + joined(compiled_isas()) +
                                "; this processor runs: " + joined(usable_isas()));
  }
  return best;
}

std::atomic<const Kernels*> in_use{nullptr};
std::atomic<int> plan_in_force{-1};
std::atomic<Convolution> convolution_in_force{Convolution::kByShape};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.kernels->name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.usable) names.push_back(c.kernels->name);
  }
  return names;
}

void force_isa(const std::string& name) { in_use = find(name); }

const Kernels& kernels() {
  const Kernels* k = in_use;
  if (!k) {
    const char* wanted = std::getenv("MFEF_USE_ISA");
    in_use = k = find(wanted ? wanted : "");
  }
  return *k;
}

void force_plan(const std::string& name) {
  if (name.empty()) {
    plan_in_force = -1;
  } else if (name == "images") {
    plan_in_force = int(Plan::kImages);
  } else if (name == "pixels") {
    plan_in_force = int(Plan::kPixels);
  } else {
    throw std::invalid_argument("plan '" + name + "' is unknown; use 'images', 'pixels', or '' to choose by shape");
  }
}

std::string forced_plan() {
  const int plan = plan_in_force;
  return plan < 0 ? "" : plan == int(Plan::kImages) ? "images" : "pixels";
}

void force_convolution(const std::string& name) {
  if (name.empty()) {
    convolution_in_force = Convolution::kByShape;
  } else if (name == "direct") {
    convolution_in_force = Convolution::kDirect;
  } else if (name == "fft") {
    convolution_in_force = Convolution::kFft;
  } else {
    throw std::invalid_argument("convolution '" + name + "' is unknown; use 'direct', 'fft', or '' to choose by shape");
  }
}

Convolution forced_convolution() { return convolution_in_force; }

std::string forced_convolution_name() {
  const Convolution forced = convolution_in_force;
  return forced == Convolution::kByShape ? "" : forced == Convolution::kDirect ? "direct" : "fft";
}

Plan choose_plan(const BlockArgs& a, int lanes) {
  const int forced = plan_in_force;
  if (forced >= 0) return Plan(forced);
  // Vector multiply-adds of either plan, the attention's passes counted as kAttention per vector of y.
  constexpr double kAttention = 24;
  const double pixels = double(a.height) * double(a.width);
  const double blocks = double((a.batch + lanes - 1) / lanes);
  double images_cost = blocks * double(a.out) * pixels * kAttention;
  double pixels_cost = double(a.batch) * double(a.out) * double((int64_t(pixels) + lanes - 1) / lanes) * kAttention;
  for (int i = 0; i < a.branch_count; ++i) {
    const Branch& b = a.branches[i];
    const double products = double(b.out) * double(b.in / b.groups) * double(b.k);
    const int64_t radius = b.k / 2;
    // Rows of taps outside the map are skipped by the images plan, columns mostly multiplied.
    const double rows = double(b.k < a.height ? b.k : a.height);
    images_cost += blocks * products * rows * pixels;
    const double vectors = double((a.height * (a.width + radius) + lanes - 1) / lanes);
    pixels_cost += double(a.batch) * products * double(b.k) * vectors;
  }
  // A block of images far beyond the L2 cache is read again from L3 or memory by every pass.
  const double block_bytes = double(a.in + a.out) * pixels * double(lanes) * double(compute_bytes(a.element));
  if (block_bytes > 16e6) images_cost *= 1.3;
  return images_cost <= pixels_cost ? Plan::kImages : Plan::kPixels;
}

}  // namespace mfef::cpu
