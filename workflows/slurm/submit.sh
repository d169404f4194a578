#!/usr/bin/env bash
# Submits extract, train, encode, then barcode and concepts, each after the one before: bash submit.sh [SETTINGS.sh]
# Run it again after a failure or a time limit: what is finished ends at once, the rest continues.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
settings=$(realpath "${1:-$here/settings.sh}")
# shellcheck source=settings.sh
source "$settings"
mkdir -p "$OUT/logs"
last=$((SHARDS - 1))

submit() { # NAME DEPENDENCY OPTION...: the number of the job
    local name=$1 after=$2 number=%j
    shift 2
    [[ "$*" != *--array=* ]] || number=%A_%a # without an array, SLURM writes 4294967294 for %a
    sbatch --parsable --job-name="cyto-$name" --output="$OUT/logs/$name-$number.log" --signal=B:TERM@120 \
        ${after:+--dependency=afterok:$after} "${SBATCH[@]}" "$@" "$here/job.sh" "$name" "$settings"
}

extract=$(submit extract "" --array="0-$last" "${SBATCH_GPU[@]}")
train=$(submit train "$extract" --requeue "${SBATCH_GPU[@]}")
encode=$(submit encode "$train" --array="0-$last" "${SBATCH_GPU[@]}")
barcode=$(submit barcode "$encode" "${SBATCH_CPU[@]}")
concepts=$(submit concepts "$encode" "${SBATCH_CPU[@]}")
echo "submitted: extract $extract, train $train, encode $encode, barcode $barcode, concepts $concepts; logs in $OUT/logs"
