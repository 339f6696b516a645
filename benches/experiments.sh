#!/usr/bin/env bash
# AHA's window sweep and its controls on this repository's own text: docs/src/experiments/aha-windows.md says what for.
#
#   benches/experiments.sh DEVICE FOLDER      from the repository's root, with the tool built (./dev demo)
#
# Runs that are finished are left alone and runs that were interrupted go on, so the script can be started again. JOBS of
# them share the device, which gains nothing on a GPU. On `cpu` all is small enough for two cores.
set -euo pipefail
DEVICE=${1:?usage: benches/experiments.sh DEVICE FOLDER}
RUNS=${2:?usage: benches/experiments.sh DEVICE FOLDER}
BIFOCAL=${BIFOCAL:-target/release/bifocal}
TEXT=(docs/src crates benches fuzz README.md CONTRIBUTING.md CHANGELOG.md)
case $DEVICE in
  cpu)
    JOBS=${JOBS:-1} STEPS=${STEPS:-300} SEEDS=${SEEDS:-1} WINDOWS=${WINDOWS:-8 16 32 64 128} NEAR=${NEAR:-32}
    SIZE=(--layers 2 --model-dim 64 --heads 4 --kv-heads 4 --feed-forward 176 --context 256 --batch 8)
    PRECISION=f32
    ;;
  *)
    JOBS=${JOBS:-1} STEPS=${STEPS:-400} SEEDS=${SEEDS:-1 2} WINDOWS=${WINDOWS:-16 32 64 128 256} NEAR=${NEAR:-128}
    SIZE=(--layers 4 --model-dim 256 --heads 4 --kv-heads 4 --feed-forward 704 --context 1024 --batch 16)
    PRECISION=f32
    [[ $DEVICE != cuda ]] || PRECISION=bf16
    ;;
esac
# What looking far costs in one more run with the window of the controls, beside the paper's 3e-4; none if empty.
STRONG=${STRONG-1e-2}

# train FOLDER SEED OPTIONS..
train() {
  local folder=$1 start=$SECONDS
  mkdir -p "$folder"
  if [[ -e $folder/run.json ]]; then
    set -- --resume --out "$folder"
  else
    # MORE is a list of options.
    # shellcheck disable=SC2086
    set -- --device "$DEVICE" --precision "$PRECISION" --out "$folder" --seed "$2" --steps "$STEPS" --log-every 20 \
      "${SIZE[@]}" "${@:3}" ${MORE:-} --text "${TEXT[@]}"
  fi
  if "$BIFOCAL" train "$@" >>"$folder/train.log" 2>&1; then
    echo "$folder: $((SECONDS - start)) s"
  else
    echo "$folder: failed, see $folder/train.log" >&2
    return 1
  fi
}

# The share of far that a run ended up with.
far_share() { "$BIFOCAL" report "$1" --json - | sed -n 's/^ *"far_share": \([0-9.e-]*\),$/\1/p'; }

# AHA with the window of the controls, and then a gate that looks far as often, at random.
gate_and_control() {
  train "$RUNS/aha-$NEAR-s$1" "$1" --attention aha --window "$NEAR"
  train "$RUNS/random-$NEAR-s$1" "$1" --attention random-gate --window "$NEAR" \
    --far-share "$(far_share "$RUNS/aha-$NEAR-s$1")"
}

# beside COMMAND..: in the background, as soon as fewer than JOBS are.
failed=0
beside() {
  while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || failed=1; done
  "$@" &
}

# Kernels are compiled once, and then loaded by all.
[[ $DEVICE == cpu || -e $RUNS/warm-up/checkpoint ]] ||
  (STEPS=2 && train "$RUNS/warm-up" 1 --attention aha --window "$NEAR")

first=${SEEDS%% *}
for seed in $SEEDS; do
  beside gate_and_control "$seed"
  for window in $WINDOWS; do
    [[ $window == "$NEAR" ]] || beside train "$RUNS/aha-$window-s$seed" "$seed" --attention aha --window "$window"
  done
  beside train "$RUNS/dense-s$seed" "$seed" --attention full
  beside train "$RUNS/window-$NEAR-s$seed" "$seed" --attention window --window "$NEAR"
done
[[ -z $STRONG ]] ||
  beside train "$RUNS/strong/aha-$NEAR-s$first" "$first" --attention aha --window "$NEAR" --penalty "$STRONG"
while [[ -n $(jobs -rp) ]]; do wait -n || failed=1; done
if ((failed)); then exit 1; fi

"$BIFOCAL" report "$RUNS"/*-s[0-9]* --plot "$RUNS/all.svg" --markdown "$RUNS/all.md" --json "$RUNS/all.json" >/dev/null
# Apart: beside the others it would pass for another seed.
if [[ -n $STRONG ]]; then
  "$BIFOCAL" report "$RUNS"/strong/*-s[0-9]* --markdown "$RUNS/strong.md" >/dev/null
fi
for run in "$RUNS"/*-s"$first" "$RUNS"/strong/*; do
  [[ -d $run ]] || continue
  "$BIFOCAL" report "$run" --plot "$run/report.svg" >/dev/null
done
cat "$RUNS/all.md" ${STRONG:+"$RUNS/strong.md"}
