#!/usr/bin/env bash
# Captions a folder on all GPUs of this machine: a worker on each, and one queue, so that none waits for another.
# Run again, it goes on where it stopped. A machine without a GPU works on its CPU.
#
#     examples/multi_gpu.sh [VIDEOS [OUT]]
#
# CUDA_VISIBLE_DEVICES=0,2, or --gpus 0,2, leaves the others alone.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
exec specvlm caption "${1:-$root/examples/videos}" --preset demo --gpus all -o "${2:-multi-gpu-out}"
