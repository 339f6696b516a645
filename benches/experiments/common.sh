# What experiments share: where to train, sizes, runs that go on, and runs beside each other. Sourced by a script that
# has set nothing but `set -euo pipefail`.
#
#   benches/experiments/NAME.sh DEVICE FOLDER      from the repository's root, with the tool built (./dev demo)
#
# Runs that are finished are left alone and runs that were interrupted go on, so a script can be started again. JOBS of
# them share the device, which gains nothing on a GPU. On `cpu` all is small enough for two cores.
DEVICE=${1:?usage: $0 DEVICE FOLDER}
RUNS=${2:?usage: $0 DEVICE FOLDER}
BIFOCAL=${BIFOCAL:-target/release/bifocal}
TEXT=(docs/src crates benches fuzz README.md CONTRIBUTING.md CHANGELOG.md)
JOBS=${JOBS:-1}
PRECISION=f32
case $DEVICE in
  cpu)
    STEPS=${STEPS:-300}
    SIZE=(--layers 2 --model-dim 64 --heads 4 --kv-heads 4 --feed-forward 176 --context 256 --batch 8)
    ;;
  *)
    STEPS=${STEPS:-400}
    SIZE=(--layers 4 --model-dim 256 --heads 4 --kv-heads 4 --feed-forward 704 --context 1024 --batch 16)
    [[ $DEVICE != cuda ]] || PRECISION=bf16
    ;;
esac

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

# beside COMMAND..: in the background, as soon as fewer than JOBS are.
failed=0
beside() {
  while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || failed=1; done
  "$@" &
}

# Waits for all, and stops if any has failed.
all_done() {
  while [[ -n $(jobs -rp) ]]; do wait -n || failed=1; done
  if ((failed)); then exit 1; fi
}

# warm_up OPTIONS..: kernels are compiled once, and then loaded by all.
warm_up() {
  [[ $DEVICE == cpu || -e $RUNS/warm-up/checkpoint ]] || (STEPS=2 && train "$RUNS/warm-up" 1 "$@")
}

# report NAME RUNS..: NAME.svg, NAME.md and NAME.json of all of them.
report() {
  "$BIFOCAL" report "${@:2}" --plot "$RUNS/$1.svg" --markdown "$RUNS/$1.md" --json "$RUNS/$1.json" >/dev/null
}
