#!/usr/bin/env bash
# One job of submit.sh: job.sh STEP SETTINGS.sh
set -euo pipefail

CONCEPTS=() # a settings file of before does not have it
# shellcheck source=settings.sh
source "$2"
# shellcheck source=/dev/null
source "$ENVIRONMENT/bin/activate"
cores=${SLURM_CPUS_PER_TASK:-1}
shard=${SLURM_ARRAY_TASK_ID:-0}/$SHARDS

# exec: cyto itself gets the signal before the time limit, finishes what is in flight, and ends
case $1 in
    extract)
        exec cyto cache extract "$IMAGES" "$OUT/cells.acts.zarr" "${EXTRACT[@]}" --workers "$cores" --shard "$shard"
        ;;
    train)
        exec cyto sae train "$OUT/cells.acts.zarr" -o "$OUT/cells.sae" "${TRAIN[@]}"
        ;;
    encode)
        exec cyto sae encode "$OUT/cells.acts.zarr" "$OUT/cells.sae" -o "$OUT/cells.latents.zarr" "${ENCODE[@]}" --shard "$shard"
        ;;
    barcode)
        exec cyto barcode "$OUT/cells.latents.zarr" -o "$OUT/cells.barcodes" "${BARCODE[@]}" --workers "$cores"
        ;;
    concepts)
        exec cyto concept stats "$OUT/cells.latents.zarr" -o "$OUT/cells.concepts" "${CONCEPTS[@]}" --workers "$cores"
        ;;
    *)
        echo "expected extract, train, encode, barcode or concepts; found $1" >&2
        exit 2
        ;;
esac
