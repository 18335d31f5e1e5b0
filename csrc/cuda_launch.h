// Streams and launch errors for the CUDA files, on the stable ABI.
//
// A library built beside a CPU torch must load there and, later, in a CUDA torch: the three symbols of libtorch_cuda
// are weak, and calling an op where they are missing is an error and not a jump to address zero.
#pragma once

#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace eventlens {

// torch's current stream on the device of a tensor, which becomes the current device while this lives.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(device_of(tensor)) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  static int32_t device_of(const Tensor& tensor) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                    "the extension does not see libtorch_cuda; build it beside this torch");
    return tensor.get_device_index();
  }
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline unsigned blocks(int64_t number) {
  STD_TORCH_CHECK(number <= INT32_MAX, number, " blocks are more than a launch takes (", INT32_MAX, ")");
  return static_cast<unsigned>(number);
}

// More than 48 KiB of dynamic shared memory has to be asked for; an A100 has 163 KiB for a block, an H100 227 KiB.
template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  STD_TORCH_CHECK(bytes <= 160 * 1024, "the tables of one box need ", bytes, " bytes of shared memory, at most ",
                  160 * 1024, " are there: a smaller grid or output_size is needed");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace eventlens
