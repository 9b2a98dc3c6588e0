// A CUDA runtime whose device is the machine of this folder, and what torch's stable ABI says about CUDA devices.
// Linked with the objects of csrc/cuda in the place of libcudart: planning, packing, grids, requests for shared memory
// and the order of launches are then the product's own, on CPU tensors.
//
// The memory that a kernel may use is that of the tensors whose address the operator has asked for.
#include <cuda_runtime_api.h>
#include "cuda/launch.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// The machine; see machine/warp.cpp.
extern "C" {
void* ptx_parse(const char* text);
const char* ptx_answer();
void ptx_set_adding(int adding);
void ptx_set_counting(bool counting);
void ptx_counts(int64_t* counts);
void* ptx_memory();
void ptx_memory_add(void* memory, uint64_t begin, uint64_t end, bool fresh);
void ptx_memory_free(void* memory);
int ptx_params(const void* module, const char* name, int64_t* offsets);
int64_t ptx_launch(const void* module, const char* name, const uint32_t* dims, int64_t shared, const uint8_t* params,
                   void* memory, bool backwards);
}

mfef::cuda::TestSettings mfef::cuda::test_settings{kMostPartials, 0, false};

namespace {

// --- state ---------------------------------------------------------------------------------------

// Parsed when the first of its kernels is launched.
struct Module {
  std::string text;
  void* parsed = nullptr;
};

struct Function {
  Module* module = nullptr;
  std::string name;
  int64_t shared_allowed = 48 * 1024;
};

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};

struct Settings {
  int64_t shared_limit = 227 * 1024;
  int64_t max_blocks = 2147483647;
  bool backwards = false;
};

struct Runtime {
  std::map<const void*, Function> functions;
  void* memory = ptx_memory();  // of the current call
  std::vector<Configuration> configurations;
  Settings settings;
  std::string message = "no error", log;
  cudaError_t last = cudaSuccess;
};

Runtime& runtime() {
  static Runtime one;
  return one;
}

cudaError_t fail(std::string what) {
  runtime().message = std::move(what);
  return runtime().last = cudaErrorLaunchFailure;
}

// The function of this name in the library behind this one.
template <class F>
F* next(F*, const char* name) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  void* found = torch ? dlsym(torch, name) : nullptr;
  if (!found) throw std::runtime_error(std::string("libtorch_cpu.so has no ") + name);
  return reinterpret_cast<F*>(found);
}

AOTITorchError data_of(AtenTensorHandle tensor, void** data) {
  static auto* const get = next(&aoti_torch_get_data_ptr, "aoti_torch_get_data_ptr");
  return get(tensor, data);
}

// --- fat binaries --------------------------------------------------------------------------------

// As nvcc writes them: a wrapper, a header, entries of a header and their content each.
struct Wrapper {
  uint32_t magic, version;
  const uint8_t* data;
};
struct Header {
  uint32_t magic;
  uint16_t version, header_size;
  uint64_t size;
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_size;
  uint64_t size;
  uint32_t compressed_size;
};
constexpr uint32_t kWrapperMagic = 0x466243b1, kHeaderMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1;

std::string ptx_of(const void* fatbin) {
  const auto* wrapper = static_cast<const Wrapper*>(fatbin);
  if (wrapper->magic != kWrapperMagic) throw std::runtime_error("not a fat binary");
  Header header;
  std::memcpy(&header, wrapper->data, sizeof header);
  if (header.magic != kHeaderMagic) throw std::runtime_error("not a fat binary");
  const uint8_t* at = wrapper->data + header.header_size;
  for (const uint8_t* end = at + header.size; at < end;) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    if (entry.kind == kPtx) {
      if (entry.compressed_size) throw std::runtime_error("compressed PTX; compile with --no-compress");
      const char* text = reinterpret_cast<const char*>(at + entry.header_size);
      return std::string(text, strnlen(text, entry.size));
    }
    at += entry.header_size + entry.size;
  }
  throw std::runtime_error("a fat binary without PTX");
}

// The storage of a tensor may be used from now on, until the next operator.
void allow(AtenTensorHandle tensor, const void* data, bool fresh) {
  int64_t bytes = 0, offset = 0;
  int32_t dtype = 0;
  aoti_torch_get_storage_size(tensor, &bytes);
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_dtype(tensor, &dtype);
  const uint64_t begin = reinterpret_cast<uint64_t>(data) - uint64_t(offset) * aoti_torch_dtype_element_size(dtype);
  if (bytes) ptx_memory_add(runtime().memory, begin, begin + uint64_t(bytes), fresh);
}

std::string readable(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

// --- launches ------------------------------------------------------------------------------------

std::string refusal(const Function& function, const dim3& grid, const dim3& block, size_t shared) {
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) return "a thread block of " + std::to_string(threads) + " threads";
  if (grid.x < 1 || grid.x > 2147483647u || grid.y < 1 || grid.y > 65535u || grid.z < 1 || grid.z > 65535u) {
    return "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
  }
  if (int64_t(shared) > function.shared_allowed) {
    return std::to_string(shared) + " bytes of shared memory, of which " + std::to_string(function.shared_allowed) +
           " are allowed";
  }
  return "";
}

cudaError_t launch(const void* host_function, dim3 grid, const dim3& block, void** arguments, size_t shared) {
  Runtime& r = runtime();
  const auto found = r.functions.find(host_function);
  if (found == r.functions.end()) return fail("a kernel that was not registered");
  const Function& function = found->second;
  const std::string refused = refusal(function, grid, block, shared);
  if (!refused.empty()) return fail(refused + ": kernel " + readable(function.name));
  if (int64_t(grid.x) > r.settings.max_blocks) grid.x = unsigned(r.settings.max_blocks);
  Module& module = *function.module;
  if (!module.parsed) module.parsed = ptx_parse(module.text.c_str());
  if (!module.parsed) return fail(ptx_answer());
  const char* name = function.name.c_str();
  const int count_of_params = ptx_params(module.parsed, name, nullptr);
  if (count_of_params < 0) return fail(ptx_answer());
  std::vector<int64_t> places(size_t(2 * count_of_params));
  ptx_params(module.parsed, name, places.data());
  std::vector<uint8_t> params(places.empty() ? 0 : size_t(places[places.size() - 2] + places.back()));
  for (size_t n = 0; n < places.size(); n += 2) {
    std::memcpy(&params[size_t(places[n])], arguments[n / 2], size_t(places[n + 1]));
  }
  const uint32_t dims[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const int64_t count =
      ptx_launch(module.parsed, name, dims, int64_t(shared), params.data(), r.memory, r.settings.backwards);
  const std::string answer = ptx_answer();
  if (count < 0 || !answer.empty()) return fail(answer.substr(0, answer.find('\n')));
  r.log += std::to_string(count) + "\t" + std::to_string(grid.x) + "\t" + std::to_string(block.x) + "\t" +
           std::to_string(shared);
  int64_t counts[15];
  ptx_counts(counts);
  for (int64_t value : counts) r.log += "\t" + std::to_string(value);
  r.log += "\t" + readable(function.name) + "\n";
  return r.last = cudaSuccess;
}

}  // namespace

// --- the CUDA runtime ----------------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void* fatbin) {
  static std::list<Module> modules;
  return reinterpret_cast<void**>(&modules.emplace_back(Module{ptx_of(fatbin)}));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void** module, const char* host_function, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  runtime().functions[host_function] = {reinterpret_cast<Module*>(module), name, 48 * 1024};
}
// Variables of the module, none of which a kernel of ours reads.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  runtime().configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = runtime().configurations.back();
  runtime().configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared);
}
// What nvcc 13 calls instead, with a handle of the kernel.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Runtime& r = runtime();
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return fail("an attribute that is not known");
  if (value > r.settings.shared_limit) return fail("more shared memory than a thread block may have");
  r.functions.at(function).shared_allowed = value;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return fail("an attribute that is not known");
  *value = int(runtime().settings.shared_limit);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(runtime().last, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return runtime().message.c_str(); }
const char* cudaGetErrorName(cudaError_t) { return "the PTX machine"; }

// --- torch's stable ABI --------------------------------------------------------------------------

// The first that an operator asks for: what belonged to the call before is out of bounds.
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ptx_memory_free(std::exchange(runtime().memory, ptx_memory()));
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error == cudaSuccess ? nullptr : strdup(runtime().message.c_str());
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = data_of(tensor, data);
  if (error == AOTI_TORCH_SUCCESS) allow(tensor, *data, false);
  return error;
}

AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor) {
  static auto* const empty = next(&aoti_torch_empty_strided, "aoti_torch_empty_strided");
  const AOTITorchError error = empty(dims, sizes, strides, dtype, device_type, device_index, tensor);
  void* data = nullptr;
  if (error == AOTI_TORCH_SUCCESS) {
    data_of(*tensor, &data);
    allow(*tensor, data, true);
  }
  return error;
}

}  // extern "C"

// --- what Python calls ---------------------------------------------------------------------------

// apart: weight gradients of small maps are always a launch of their own.
EXPORT void mfef_ptx_settings(int64_t shared_limit, int64_t max_blocks, bool backwards, int adding, bool one_slice,
                              bool apart) {
  runtime().settings = {shared_limit, max_blocks, backwards};
  ptx_set_adding(adding);
  mfef::cuda::test_settings.one_slice = one_slice;
  mfef::cuda::test_settings.most_partials = apart ? 0 : mfef::cuda::kMostPartials;
}

// One more range that kernels may use, until an operator is called.
EXPORT void mfef_ptx_allow(uint64_t begin, uint64_t bytes) {
  ptx_memory_add(runtime().memory, begin, begin + bytes, false);
}

// Bytes that the calls since the last question had beside their tensors.
EXPORT int64_t mfef_ptx_scratch() { return std::exchange(mfef::cuda::test_settings.scratch_bytes, 0); }

EXPORT void mfef_ptx_counting(bool counting) { ptx_set_counting(counting); }

// The launches since the last question, one a line: instructions, blocks, threads, bytes of shared memory, what
// ptx_counts has, kernel.
EXPORT const char* mfef_ptx_log() {
  static std::string answer;
  answer = std::exchange(runtime().log, "");
  return answer.c_str();
}
