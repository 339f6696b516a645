#!/usr/bin/env bash
# AHA's window sweep and its controls on this repository's own text: docs/src/experiments/aha-windows.md says what for.
#
#   benches/experiments.sh DEVICE FOLDER      from the repository's root, with the tool built (./dev demo)
#
# Runs that are finished are left alone and runs that were interrupted go on, so the script can be started again.
set -euo pipefail
DEVICE=${1:?usage: benches/experiments.sh DEVICE FOLDER}
OUT=${2:?usage: benches/experiments.sh DEVICE FOLDER}
BIFOCAL=${BIFOCAL:-target/release/bifocal}
STEPS=${STEPS:-4000}
SEEDS=${SEEDS:-1 2 3}
WINDOWS=${WINDOWS:-16 32 64 128 256}
TEXT=(docs/src crates benches fuzz README.md CONTRIBUTING.md CHANGELOG.md)
SIZE=(--layers 6 --model-dim 384 --heads 6 --kv-heads 6 --feed-forward 1024 --context 1024 --batch 16)
PRECISION=f32
[[ $DEVICE != cuda ]] || PRECISION=bf16

# run NAME SEED OPTIONS..
run() {
  local folder=$OUT/$1-s$2
  if [[ -e $folder/run.json ]]; then
    "$BIFOCAL" train --resume --out "$folder"
    return
  fi
  # MORE is a list of options.
  # shellcheck disable=SC2086
  "$BIFOCAL" train --device "$DEVICE" --precision "$PRECISION" --out "$folder" --seed "$2" --steps "$STEPS" \
    "${SIZE[@]}" "${@:3}" ${MORE:-} --text "${TEXT[@]}"
}

# The share of far that a run ended up with.
far_share() { "$BIFOCAL" report "$1" --json - | sed -n 's/^ *"far_share": \([0-9.e-]*\),$/\1/p'; }

mkdir -p "$OUT"
for seed in $SEEDS; do
  for window in $WINDOWS; do
    run "aha-$window" "$seed" --attention aha --window "$window"
  done
  run dense "$seed" --attention full
  run window-128 "$seed" --attention window --window 128
  # As often as the gate that was learned, or a tenth where the sweep leaves that window out.
  share=0.1
  [[ ! -e $OUT/aha-128-s$seed ]] || share=$(far_share "$OUT/aha-128-s$seed")
  run random-128 "$seed" --attention random-gate --window 128 --far-share "$share"
done

first=${SEEDS%% *}
"$BIFOCAL" report "$OUT"/*-s* --plot "$OUT/all.svg" --markdown "$OUT/all.md" --json "$OUT/all.json"
for run in "$OUT"/*-s"$first"; do
  "$BIFOCAL" report "$run" --plot "$run/report.svg" >/dev/null
done
cat "$OUT/all.md"
