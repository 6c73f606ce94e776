#!/bin/bash
# Supervised fine-tuning. Copy to train_sft.sh, and hostfile.example to hostfile (one host a line),
# set the variables, and run it on the first host of the hostfile.

# --- set these -----------------------------------------------------------------------------
PROJECT_NAME=""
# Directories; the run's own name is appended.
PARENT_SAVE_DIR=""
PARENT_TENSORBOARD_DIR=""
PARENT_CONFIG_FILE=""
# A model directory: a checkpoint's modeling/ for one.
PRETRAINED_MODEL_PATH=""
# Parts of a dataset that prepare_sft_dataset.py wrote.
declare -a dataset=(
    "PATH_TO_DATASET/part-00000"
)
NPROC_PER_NODE=8
# -------------------------------------------------------------------------------------------

set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

TIMESTAMP=$(date +%Y-%m-%d-%H-%M-%S)
FULL_PROJECT_NAME="${PROJECT_NAME}-${TIMESTAMP}"
SAVE_DIR="${PARENT_SAVE_DIR%/}/${FULL_PROJECT_NAME}"
TENSORBOARD_DIR="${PARENT_TENSORBOARD_DIR%/}/${FULL_PROJECT_NAME}"
CONFIG_FILE="${PARENT_CONFIG_FILE%/}/${FULL_PROJECT_NAME}.json"

# A hostfile that cannot be used as it is ends the script here. (colossalai run would pass over
# a blank line, and end with exit code 0 at a host that is there twice.)
colossal-llama doctor --hostfile hostfile

colossalai run --nproc_per_node "$NPROC_PER_NODE" --hostfile hostfile --master_port 30013 train.py \
    --pretrained "$PRETRAINED_MODEL_PATH" \
    --dataset "${dataset[@]}" \
    --plugin "zero2" \
    --save_interval 400 \
    --save_dir "$SAVE_DIR" \
    --tensorboard_dir "$TENSORBOARD_DIR" \
    --config_file "$CONFIG_FILE" \
    --num_epochs 3 \
    --micro_batch_size 4 \
    --accumulation_steps 8 \
    --lr 5e-5 \
    --mixed_precision "bf16" \
    --grad_clip 1.0 \
    --weight_decay 0.01 \
    --use_grad_checkpoint \
    --use_flash_attn \
    --use_neft
