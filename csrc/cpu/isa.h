// Which instruction set runs: the widest one that was compiled and that this processor has, unless one
// is forced.
#pragma once

#include <string>
#include <vector>

#include "block.h"

namespace mfef::cpu {

// Compiled into this library, narrowest first.
std::vector<std::string> compiled_isas();
// Of those, what this processor can run.
std::vector<std::string> usable_isas();
// Forces one ("" for the widest). Throws std::invalid_argument with what would do.
void force_isa(const std::string& name);
// The kernels in use.
const Kernels& kernels();

// Forces a plan ("images", "pixels", "" for automatic). Throws std::invalid_argument.
void force_plan(const std::string& name);
std::string forced_plan();
// Forces the convolution of the images plan ("direct", "fft" wherever it can, "" for automatic). Throws
// std::invalid_argument.
void force_convolution(const std::string& name);
std::string forced_convolution_name();
Convolution forced_convolution();
// The plan for a problem whose sizes, branches and hidden width are filled in. It depends on the shape and
// the instruction set alone, never on the number of threads, so that results do not either.
Plan choose_plan(const BlockArgs& args, int lanes);

}  // namespace mfef::cpu
