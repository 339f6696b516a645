#!/usr/bin/env bash
# What there is to run on a machine with an NVIDIA GPU, in this order: is it right, is it safe, how fast is it, how fast
# are others. `./dev gpu` packs this script with the tool. It needs the CUDA toolkit; peers need PyTorch as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
export PATH=$PATH:$CUDA_PATH/bin
[[ -x bifocal ]] || { gunzip -k bifocal.gz; chmod +x bifocal; }
mkdir -p results

# The device, and its kernels: the second run only loads what the first compiled.
./bifocal doctor --device cuda
./bifocal warm --device cuda --element bf16 --heads 16 --head-dim 128 --json results/warm-first.json
./bifocal warm --device cuda --element bf16 --heads 16 --head-dim 128 --json results/warm-again.json

# Every property, on every routine that the device has.
./bifocal check --device cuda

# A reduced suite under NVIDIA's checkers: stray accesses, then races in shared memory.
for property in gates_equal_the_oracle plans_equal_the_oracle attention_equals_the_oracle aha_equals_the_oracle \
  packed_sequences_never_mix warpgroup_products_are_plain_sums gradients_equal_the_oracle \
  selected_gradients_equal_the_oracle packed_gradients_equal_the_oracle linear_attention_equals_the_oracle \
  routed_linear_rows_equal_the_oracle predicted_masses_equal_the_oracle; do
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 ./bifocal check --device cuda --cases 1 --only "$property"
  done
done

# Ours: lengths, shares, how routes are drawn, head dims, grouped queries.
bench() { ./bifocal bench --device cuda --element bf16 --model-dim 2048 --runs 21 "${@:2}" --json "results/ours-$1.json"; }
bench 128 --heads 16 --head-dim 128 --lengths 2048,4096,8192,16384,32768
bench 128-long --heads 16 --head-dim 128 --lengths 65536 --cases full,l2a
bench 128-share-116 --heads 16 --head-dim 128 --lengths 32768 --cases router,aha --window 128 --far-share 0.116
bench 128-share-280 --heads 16 --head-dim 128 --lengths 32768 --cases router,aha --window 128 --far-share 0.28
bench 128-clustered --heads 16 --head-dim 128 --lengths 32768 --cases router,aha --gates clustered
bench 128-skewed --heads 16 --head-dim 128 --lengths 32768 --cases router,aha --gates skewed
bench 128-mma --heads 16 --head-dim 128 --lengths 2048,16384 --cases full,windowed --routine mma
bench 64 --heads 16 --head-dim 64 --lengths 16384 --cases full,windowed
bench 96 --heads 16 --head-dim 96 --lengths 16384 --cases full,windowed
bench 256 --heads 16 --head-dim 256 --lengths 16384 --cases full,windowed
bench 128-grouped --heads 32 --kv-heads 8 --head-dim 128 --lengths 32768 --cases full,router,aha

# QAdA's decision and RATTENTION's far branch, and both by the routine for every device; then what they are part of.
far=moments,moments-portable,linear,linear-portable
bench 128-far --heads 16 --head-dim 128 --lengths 8192,32768 --window 1024 --cases full,windowed,$far,qada
bench 128-far-grouped --heads 16 --kv-heads 4 --head-dim 128 --lengths 32768,131072 --window 512 --cases windowed,linear,rattention
bench 64-far --heads 16 --kv-heads 4 --head-dim 64 --lengths 32768 --window 512 --cases windowed,$far,rattention

# Ours, forward and backward, and the memory of it: twice the length is to take twice as much.
attention=full,windowed,aha,aha-exact,l2a
bench 128-backward --heads 16 --head-dim 128 --lengths 4096,16384,32768,65536 --cases $attention --backward
bench 128-backward-mma --heads 16 --head-dim 128 --lengths 4096,16384 --cases full,windowed --backward --routine mma
bench 64-backward --heads 16 --head-dim 64 --lengths 16384 --cases full,windowed --backward
bench 256-backward --heads 16 --head-dim 256 --lengths 16384 --cases full,windowed --backward

# Decode: dense, windowed, AHA by several shares and by those of real layers, L2A switched off, router and plan; by batch, with
# grouped queries, over pages.
decode() { ./bifocal bench decode --device cuda --element bf16 --head-dim 128 --model-dim 2048 --runs 21 "${@:2}" --json "results/ours-decode-$1.json"; }
for batch in 1 8 32; do decode "aha-$batch" --batch $batch --heads 16 --lengths 8192,32768 --far-share 0.1,0.3; done
for batch in 1 8; do decode "grouped-$batch" --batch $batch --heads 32 --kv-heads 8 --lengths 4096,32768; done
decode aha-paged --batch 8 --heads 16 --lengths 32768 --page-size 16
decode grouped-paged --batch 8 --heads 32 --kv-heads 8 --lengths 32768 --page-size 16
decode speculative --batch 8 --heads 32 --kv-heads 8 --lengths 32768 --queries 4

# Others, at the same shapes.
peers() { python3 peers/torch_cuda.py "${@:2}" --json "results/torch-$1.json"; }
dense=sdpa_flash,sdpa_cudnn
peers 128 --heads 16 --head-dim 128 --lengths 2048,4096,8192,16384,32768
peers 128-long --heads 16 --head-dim 128 --lengths 65536 --cases $dense
peers 64 --heads 16 --head-dim 64 --lengths 16384 --cases $dense,flex_window
peers 96 --heads 16 --head-dim 96 --lengths 16384 --cases $dense,flex_window
peers 256 --heads 16 --head-dim 256 --lengths 16384 --cases $dense,flex_window
peers 128-grouped --heads 32 --kv-heads 8 --head-dim 128 --lengths 32768 --cases $dense,flex_full
peers 128-backward --heads 16 --head-dim 128 --lengths 4096,16384,32768,65536 --cases $dense,flex_window --backward
peers 128-backward-aha --heads 16 --head-dim 128 --lengths 16384,32768 --cases flex_aha --backward
peers 64-backward --heads 16 --head-dim 64 --lengths 16384 --cases $dense --backward
peers 256-backward --heads 16 --head-dim 256 --lengths 16384 --cases $dense --backward

# Linear attention, which RATTENTION adds to the window; what is not there (`pip install fla-core`) is said not to be measured.
python3 peers/fla_linear.py --heads 16 --kv-heads 4 --lengths 32768 --json results/fla-linear.json
python3 peers/fla_linear.py --heads 16 --kv-heads 4 --lengths 32768 --backward --json results/fla-linear-backward.json
peers 128-window-512 --heads 16 --kv-heads 4 --head-dim 128 --lengths 32768 --window 512 --cases flex_window

# The same for decode; what is not there (FlashInfer is `pip install flashinfer-python==0.5.3`) is said not to be measured.
for library in torch flashinfer; do
  peers_decode() { python3 peers/${library}_decode.py "${@:2}" --json "results/$library-decode-$1.json"; }
  for batch in 1 8 32; do peers_decode "aha-$batch" --batch $batch --heads 16 --lengths 8192,32768; done
  for batch in 1 8; do peers_decode "grouped-$batch" --batch $batch --heads 32 --kv-heads 8 --lengths 4096,32768; done
done

# Both, side by side.
./bifocal compare results/ours-*.json results/torch-*.json results/f*.json --markdown results/compare.md --plot results/compare.svg
cat results/compare.md
