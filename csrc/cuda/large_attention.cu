#include "large_attention.cuh"

#include "launch.cuh"

namespace mfef::cuda {

const char* launch_channel_gates(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<ChannelGates, kLargeThreads>(args, args.sizes.batch, kLargeThreads, plan.maps.shared_gates, stream);
}
const char* launch_pool_channels(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<PoolChannels, kLargeThreads>(args, args.blocks, kLargeThreads, plan.maps.shared_piece, stream);
}
const char* launch_gate_map(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<GateMap, kLargeThreads>(args, args.blocks, kLargeThreads, plan.maps.shared_piece, stream);
}
const char* launch_pixel_gradient(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<PixelGradient, kLargeThreads>(args, args.blocks, kLargeThreads, plan.maps.shared_piece_backward,
                                              stream);
}
const char* launch_channel_gradient(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<ChannelGradient, kLargeThreads>(args, args.blocks, kLargeThreads, plan.maps.shared_piece_backward,
                                                stream);
}
const char* launch_mlp_backward(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<MlpBackward, kLargeThreads>(args, args.sizes.batch, kLargeThreads, plan.maps.shared_mlp, stream);
}
const char* launch_map_gradient(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<MapGradient, kLargeThreads>(args, args.blocks, kLargeThreads, plan.maps.shared_piece, stream);
}

}  // namespace mfef::cuda
