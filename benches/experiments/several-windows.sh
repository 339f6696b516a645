#!/usr/bin/env bash
# Several windows to choose from, beside one window or full, and beside a state in place of far vision, on this
# repository's own text: docs/src/experiments/several-windows.md says what for, common.sh how to run it.
set -euo pipefail
# shellcheck source=benches/experiments/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case $DEVICE in
  cpu) SEEDS=${SEEDS:-1} WINDOWS=${WINDOWS:-8 32 128} ;;
  *) SEEDS=${SEEDS:-1 2} WINDOWS=${WINDOWS:-16 64 256} ;;
esac
# What keys cost: the paper's price of looking far, and one that matters to the loss.
PRICES=${PRICES:-3e-4 1e-2}

warm_up --attention multi-window --window "${WINDOWS// /,}"
for seed in $SEEDS; do
  for price in $PRICES; do
    beside train "$RUNS/several-$price-s$seed" "$seed" --attention multi-window --window "${WINDOWS// /,}" \
      --penalty "$price"
    for window in $WINDOWS; do
      beside train "$RUNS/aha-$window-$price-s$seed" "$seed" --attention aha --window "$window" --penalty "$price"
    done
  done
  for window in $WINDOWS; do
    beside train "$RUNS/window-$window-s$seed" "$seed" --attention window --window "$window"
  done
  beside train "$RUNS/rattention-${WINDOWS%% *}-s$seed" "$seed" --attention rattention --window "${WINDOWS%% *}"
  beside train "$RUNS/dense-s$seed" "$seed" --attention full
done
all_done

report all "$RUNS"/*-s[0-9]*
cat "$RUNS/all.md"
