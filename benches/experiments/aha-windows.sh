#!/usr/bin/env bash
# AHA's window sweep and its controls on this repository's own text: docs/src/experiments/aha-windows.md says what for,
# common.sh how to run it.
set -euo pipefail
# shellcheck source=benches/experiments/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case $DEVICE in
  cpu) SEEDS=${SEEDS:-1} WINDOWS=${WINDOWS:-8 16 32 64 128} NEAR=${NEAR:-32} ;;
  *) SEEDS=${SEEDS:-1 2} WINDOWS=${WINDOWS:-16 32 64 128 256} NEAR=${NEAR:-128} ;;
esac
# What looking far costs in one more run with the window of the controls, beside the paper's 3e-4; none if empty.
STRONG=${STRONG-1e-2}

# The share of far that a run ended up with.
far_share() { "$BIFOCAL" report "$1" --json - | sed -n 's/^ *"far_share": \([0-9.e-]*\),$/\1/p'; }

# AHA with the window of the controls, and then a gate that looks far as often, at random.
gate_and_control() {
  train "$RUNS/aha-$NEAR-s$1" "$1" --attention aha --window "$NEAR"
  train "$RUNS/random-$NEAR-s$1" "$1" --attention random-gate --window "$NEAR" \
    --far-share "$(far_share "$RUNS/aha-$NEAR-s$1")"
}

warm_up --attention aha --window "$NEAR"
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
all_done

report all "$RUNS"/*-s[0-9]*
# Apart: beside the others it would pass for another seed.
[[ -z $STRONG ]] || report strong "$RUNS"/strong/*-s[0-9]*
for run in "$RUNS"/*-s"$first" "$RUNS"/strong/*; do
  [[ -d $run ]] || continue
  "$BIFOCAL" report "$run" --plot "$run/report.svg" >/dev/null
done
cat "$RUNS/all.md" ${STRONG:+"$RUNS/strong.md"}
