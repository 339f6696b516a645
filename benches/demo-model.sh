#!/usr/bin/env bash
# Makes crates/cli/src/demo/model, what `bifocal demo` shows: two small layers of AHA that have read the book, as it was then.
# The same text and the same kind of CPU give the same file, bit for bit. Takes about five minutes on two cores.
#
#   benches/demo-model.sh      from the repository's root, with the tool built (./dev demo)
set -euo pipefail
BIFOCAL=${BIFOCAL:-target/release/bifocal}
RUN=$(mktemp -d)/demo-model
"$BIFOCAL" train --text docs/src --out "$RUN" --attention aha --window 64 --layers 2 --model-dim 64 --heads 4 --kv-heads 2 \
  --feed-forward 128 --context 2048 --batch 2 --steps 700 --learning-rate 2e-3 --seed 7
"$BIFOCAL" export "$RUN" crates/cli/src/demo/model
