# shellcheck shell=bash disable=SC2034
# What submit.sh runs with. Everything lies on a file system that all nodes see.
ENVIRONMENT=/shared/cyto-env          # python3 -m venv, then pip install 'cytobarcode[torch]'
IMAGES=/shared/cells.parquet          # a table, or a folder with one sub-folder per class
OUT=/shared/cyto-run
SHARDS=8                              # tasks of extract and encode
EXTRACT=(--backbone dinobloom-b --weights /shared/DinoBloom-B.pth)
TRAIN=(--precision bf16)
ENCODE=()
BARCODE=(--tau 0.2)
CONCEPTS=()
SBATCH=(--time=04:00:00)              # for every job: account, partition, limits
SBATCH_GPU=(--gres=gpu:1 --cpus-per-task=16 --mem=32G)
SBATCH_CPU=(--cpus-per-task=16 --mem=48G)
