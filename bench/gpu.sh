#!/bin/sh
# What Covae does on an NVIDIA GPU: trains on it, exports for it, serves, benchmarks. Leaves records in bench/gpu.
#
# On a machine that has one, in the repository's root, with Covae and CUDA's torch installed as docs/serving.md says:
#
#     sh bench/gpu.sh && covae bench page
#
#     DEVICE=cpu SIZE=16x16x1 IMAGES=256 sh bench/gpu.sh /tmp/try  tries the script without one
set -eu
device=${DEVICE:-gpu} size=${SIZE:-64x64x3} images=${IMAGES:-10000} folder=${1:-bench/gpu}
families=${FAMILIES:-beta-vae sos-vae structured-vae hybrid-vae}
torch_device=cuda
test "$device" = gpu || torch_device=cpu
if test "$device" = gpu; then
    python -c 'import onnxruntime as ort; found = ort.get_available_providers()
"CUDAExecutionProvider" in found or exit(f"onnxruntime has {found}; install onnxruntime-gpu in its place")
import torch; torch.cuda.is_available() or exit("torch sees no GPU; install a build of it for CUDA")'
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

covae train sos-vae --data digits --epochs 8 --mean-epochs 4 --run "$work/run" --device "$torch_device"
for precision in float32 float16; do
    mkdir -p "$folder/$precision"
    # Compared with torch on the CPU: the table tells how far each output is from float32.
    covae export "$work/run" --name digits --repository "$work/$precision" --instance-kind "$device" --instances 2 \
        --precision "$precision" > "$folder/$precision/export.txt"
    cat "$folder/$precision/export.txt"
    # A trained model with two instances; the rest has one.
    covae bench generation digits --repository "$work/$precision" --images "$images" --repeats 5 \
        --folder "$folder/$precision-two-instances"
    # shellcheck disable=SC2086 - names of families
    covae bench generation $families --untrained "$size" --images "$images" --repeats 5 \
        --device "$device" --precision "$precision" --folder "$folder/$precision"
    covae bench latency sos-vae --untrained "$size" \
        --device "$device" --precision "$precision" --folder "$folder/$precision"
done
