// SPDX-License-Identifier: Apache-2.0
// Small arrays of the host, kept on the device from call to call, as kernels/window_lattice.py.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace ssldiff {

// The interior bands of a canvas look alike, so that a few entries serve most canvases.
constexpr size_t kKeptUploads = 256;

struct KeptUpload {
  torch::stable::Tensor tensor;
  bool pinned;  // a CUDA graph holds its address
};

// The values as a tensor on the device of `like`, uploaded once as long as they are kept.
inline torch::stable::Tensor kept_upload(const torch::stable::Tensor& like,
                                         const std::vector<int64_t>& values, cudaStream_t stream) {
  using Key = std::pair<int64_t, std::vector<int64_t>>;
  // Never destroyed: at exit the device may be gone before them.
  static auto* kept = new std::map<Key, KeptUpload>();
  static auto* mutex = new std::mutex();
  const std::lock_guard<std::mutex> lock(*mutex);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  const bool capturing = status != cudaStreamCaptureStatusNone;
  const Key key{like.get_device_index(), values};
  auto found = kept->find(key);
  if (found == kept->end()) {
    STD_TORCH_CHECK(!capturing,
                    "ssldiff_fast: a CUDA graph is being captured, but these windows were never "
                    "on the GPU; run the same call once before the capture.");
    if (kept->size() >= kKeptUploads) {
      STD_CUDA_CHECK(cudaDeviceSynchronize());  // kernels of any stream may still read them
      for (auto entry = kept->begin(); entry != kept->end();) {
        entry = entry->second.pinned ? std::next(entry) : kept->erase(entry);
      }
    }
    torch::stable::Tensor device = torch::stable::new_empty(
        like, {static_cast<int64_t>(values.size())}, torch::headeronly::ScalarType::Long);
    STD_CUDA_CHECK(cudaMemcpyAsync(device.mutable_data_ptr(), values.data(),
                                   values.size() * sizeof(int64_t), cudaMemcpyHostToDevice,
                                   stream));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream));  // other streams may find it here
    found = kept->emplace(key, KeptUpload{device, false}).first;
  }
  found->second.pinned = found->second.pinned || capturing;
  return found->second.tensor;
}

}  // namespace ssldiff
