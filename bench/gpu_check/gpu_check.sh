#!/usr/bin/env bash
# A first run of Cyto on a GPU machine without a network, in about six minutes; bench-run, five more, when asked for.
#
#   bash bench/gpu_check/gpu_check.sh prepare DEST      with pip: the checkout and the missing wheels into DEST (16 MB)
#   bash DEST/gpu_check.sh run                          on the GPU machine: results in $OUT, or DEST/out
#   CYTO_DEVICE=cpu bash DEST/gpu_check.sh run          a rehearsal with tiny sizes
#   STAGES="probe bench-run" bash DEST/gpu_check.sh run  these stages only, as after a correction
#
# A rehearsal needs Triton 3.7: the interpreter of 3.6 fails with numpy 2.4.
# Expected on the GPU machine: Python 3.12, torch with CUDA, triton, timm, numba, pandas, pyarrow, scikit-learn, pytest.
# The most useful stages come first, each with its own time limit. No setting of the GPU is changed. The versions there
# are not the ones in constraints.txt, so pytest does not turn warnings into errors. No test that needs a golden store runs.
set -u
here=$(cd "$(dirname "$0")" && pwd)
case "${1:-run}" in
prepare)
    repository=$(git -C "$here" rev-parse --show-toplevel) destination=$2
    mkdir -p "$destination/project" "$destination/whl"
    git -C "$repository" archive HEAD bench cli.py cytocache cytosae stores tests pyproject.toml README.md |
        tar -x -C "$destination/project"
    rm -rf "$destination/project/tests/golden"
    cp "$here/gpu_check.sh" "$destination/"
    platforms=()
    for tag in any manylinux1_x86_64 manylinux2014_x86_64 manylinux_2_5_x86_64 manylinux_2_17_x86_64 \
        manylinux_2_27_x86_64 manylinux_2_28_x86_64; do
        platforms+=(--platform "$tag")
    done
    for name in zarr numcodecs donfig google-crc32c anndata array-api-compat legacy-api-wrap natsort scverse-misc \
        session-info2 dask distributed locket partd tblib tornado zict lazy_loader; do
        pinned=$(grep -i "^$name==" "$repository/constraints.txt" || echo "$name")
        python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
            --abi cp312 --abi abi3 --abi none "${platforms[@]}" -d "$destination/whl" "$pinned" || exit 1
    done
    du -sh "$destination" "$destination/whl"
    ;;
run)
    out=${OUT:-$here/out} project=$here/project device=${CYTO_DEVICE:-cuda} site=$(mktemp -d) began=$SECONDS
    mkdir -p "$out"
    exec > >(tee "$out/log.txt") 2>&1
    if compgen -G "$here/whl/*.whl" > /dev/null; then
        python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$here"/whl/*.whl || exit 1
    fi
    export PYTHONPATH=$site:$project PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TRITON_CACHE_DIR=$site/triton
    stage() { # name, seconds, command...
        local name=$1 limit=$2
        shift 2
        case " ${STAGES:-probe pytest pipeline ranks bench-step bench-extract bench-encode} " in
        *" $name "*) ;;
        *) return ;;
        esac
        echo "=== $name ($((SECONDS - began)) s, at most $limit)"
        timeout -k 5 "$limit" "$@"
        echo "=== $name: exit $?, $((SECONDS - began)) s"
    }
    probe=() pipeline=()
    if [ "$device" = cpu ]; then
        probe=(--latents 512 --width 64 --tokens 514)
        pipeline=(--images 12 --steps 8 --backbone random-vit-tiny --expansion 2 --batch-tokens 257)
    fi
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv 2> /dev/null
    cd "$project" || exit 1
    stage probe 120 python3 bench/gpu_check/probe.py "$out" --device "$device" "${probe[@]}"
    pytest=(python3 -m pytest -q -n 6 -p no:cacheprovider -o filterwarnings=ignore -o addopts= --timeout 60)
    # one by one: a file that cannot be imported there would keep the others from running
    stage pytest 75 "${pytest[@]}" tests/cytosae/training/test_gpu_kernels.py tests/cytosae/training/test_device_batches.py \
        tests/cytosae/training/test_gpu_told.py > "$out/pytest.txt" 2>&1 < /dev/null
    stage pytest 30 "${pytest[@]}" -n 0 tests/cytosae/latents/test_encode.py::test_a_gpu_compacts_as_the_cpu_does \
        >> "$out/pytest.txt" 2>&1 < /dev/null
    tail -40 "$out/pytest.txt"
    stage pipeline 90 python3 bench/gpu_check/pipeline.py "$out" --device "$device" "${pipeline[@]}"
    [ "$device" = cpu ] && exit 0
    gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l)
    if [ "$gpus" -gt 1 ]; then # several processes: NCCL starts, and a process that is killed does not keep the others
        stage ranks 180 python3 bench/gpu_check/ranks.py "$out" --processes "$gpus"
    fi
    stage bench-step 75 sh -c "python3 bench/sae_step_gpu.py --rounds 5 --modes default --fold-b-dec > '$out/bench-step.json'"
    stage bench-extract 60 sh -c "python3 bench/extract.py --device cuda --images 4096 --batch-size 128 \
        --chunk-images 256 --rounds 2 > '$out/bench-extract.json'"
    stage bench-encode 75 sh -c "python3 bench/encode.py --device cuda --images 1024 --chunk-images 256 --precision bf16 \
        --rounds 2 > '$out/bench-encode.json'"
    stage bench-run 300 sh -c "python3 bench/sae_step_gpu.py --run --rounds 2 --modes default --micro-batches 16448 \
        --our-micro-batches 16448 > '$out/bench-run.json'"
    cat "$out"/bench-*.json
    echo "all: $((SECONDS - began)) s"
    ;;
esac
