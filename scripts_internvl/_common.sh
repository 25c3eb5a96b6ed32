# shellcheck shell=sh
# Common part of the recipes of this folder, which source it from the repository root and call:
#
#   use_batch PER_GPU GLOBAL   published batch size per GPU (a loss group), and samples per optimizer step
#   use_zero STAGE             the DeepSpeed configuration scripts/zeroSTAGE.json
#   pretrain FLAG...           stage 1: the projector
#   finetune FLAG...           stage 2: the language model and the projector
#   finetune_with_slurm FLAG...  stage 2 on a mixture of datasets, started by srun
#
# Environment: GPUS (per node; 0 trains on the CPU), NNODES, NODE_RANK, MASTER_ADDR, PORT, BATCH (batch size per GPU),
# OUTPUT_DIR, PYTHON; for srun PARTITION, GPUS (in total), GPUS_PER_NODE, CPUS_PER_TASK, QUOTA_TYPE, SRUN_ARGS.
# GPUS, NNODES and BATCH change the speed alone: a step takes the published number of samples and weights them as
# published. Flags of the command line take precedence.
# --dry-run, or LLAVA_DRY_RUN=1, prints the command instead of running it.
set -eu

RECIPE=$(basename "$0" .sh)
OUTPUT_DIR=${OUTPUT_DIR:-work_dirs/$RECIPE}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
PYTHON=${PYTHON:-python}
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PYTHONUNBUFFERED=1 # writes each line to train.log and the screen at once
export PYTHONPATH PYTHONUNBUFFERED

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

for number in "${GPUS:-0}" "$NNODES" "$NODE_RANK" "$PORT" "${BATCH:-1}"; do
    case $number in '' | *[!0-9]*) fail "GPUS, NNODES, NODE_RANK, PORT and BATCH must be integers of at least 0, got '$number'." ;; esac
done

# GPUS, else the number of CUDA_VISIBLE_DEVICES, else 8 as in the published runs.
gpus() {
    if [ -n "${GPUS:-}" ]; then
        echo "$GPUS"
    elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | awk -F, '{ print NF }'
    else
        echo 8
    fi
}

use_batch() {
    group=$1
    per_gpu=${BATCH:-$1}
    global=$2
    total=$(($(gpus) * NNODES))
    [ "$total" -gt 0 ] || total=1
    fit_batch
}

fit_batch() {
    [ "$total" -le "$global" ] || fail "There are more GPUs ($total) than samples per step ($global); lower GPUS or NNODES."
    [ "$per_gpu" -gt 0 ] || fail "BATCH must be at least 1, got 0."
    if [ $((per_gpu * total)) -gt "$global" ]; then
        per_gpu=$(((global + total - 1) / total))
    fi
}

# The first of these names that exists below pretrained/, or the first: a folder may have its name on the hub.
tower() {
    for name in "$@"; do
        if [ -d "pretrained/$name" ]; then
            echo "./pretrained/$name"
            return
        fi
    done
    echo "./pretrained/$1"
}

use_zero() {
    zero_config=./scripts/zero$1.json
}

# Flags common to all recipes; those that follow take precedence.
train() {
    launch \
        --mm_projector_type mlp2x_gelu \
        --mm_use_im_start_end False \
        --mm_use_im_patch_token False \
        --bf16 True \
        --output_dir "$OUTPUT_DIR" \
        --num_train_epochs 1 \
        --per_device_train_batch_size "$per_gpu" \
        --per_device_eval_batch_size 4 \
        --global_batch_size "$global" \
        --loss_group_size "$group" \
        --evaluation_strategy no \
        --save_strategy steps \
        --save_steps 1000 \
        --save_total_limit 3 \
        --weight_decay 0. \
        --warmup_ratio 0.03 \
        --lr_scheduler_type cosine \
        --logging_steps 1 \
        --model_max_length 2048 \
        --gradient_checkpointing True \
        --dataloader_num_workers 4 \
        --lazy_preprocess True \
        --report_to tensorboard \
        "$@"
}

pretrain() {
    launcher=${launcher:-torch_launcher}
    train \
        --version plain \
        --tune_mm_mlp_adapter True \
        --learning_rate 1e-3 \
        --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
        --image_folder ./playground/data/LLaVA-Pretrain/images \
        "$@"
}

# Flags common to both forms of stage 2; the projector is that of the stage-1 recipe of the same name.
finetune_any() {
    train \
        --version v1 \
        --image_aspect_ratio pad \
        --learning_rate 2e-5 \
        --pretrain_mm_mlp_adapter "./work_dirs/pretrain_${RECIPE#finetune_}/mm_projector.bin" \
        "$@"
}

finetune() {
    launcher=${launcher:-torch_launcher}
    finetune_any \
        --group_by_modality_length True \
        --data_path ./playground/llava_v1_5_mix665k.json \
        --image_folder ./playground/data \
        "$@"
}

finetune_with_slurm() {
    launcher=slurm_launcher
    finetune_any \
        --group_by_modality_length False \
        --meta_path ./scripts_internvl/meta/custom_data.json \
        "$@"
}

# Removes --dry-run from the flags, finds the output directory, then starts the program.
launch() {
    dry_run=${LLAVA_DRY_RUN:-}
    count=$#
    flag=
    while [ "$count" -gt 0 ]; do
        [ "$flag" != --output_dir ] || OUTPUT_DIR=$1
        flag=$1
        case $flag in --output_dir=*) OUTPUT_DIR=${flag#*=} ;; esac
        shift
        count=$((count - 1))
        if [ "$flag" = --dry-run ]; then
            dry_run=1
        else
            set -- "$@" "$flag"
        fi
    done
    "$launcher" "$@"
}

torch_launcher() {
    count=$(gpus)
    if [ "$count" -eq 0 ]; then
        run "$PYTHON" llava/train/train.py --use_cpu True "$@"
        return
    fi
    if [ "$NNODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        fail "MASTER_ADDR is required with NNODES=$NNODES; set it to the address of the node with NODE_RANK=0."
    fi
    [ -z "${zero_config:-}" ] || set -- --deepspeed "$zero_config" "$@"
    run torchrun \
        --nnodes="$NNODES" \
        --node_rank="$NODE_RANK" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="$PORT" \
        --nproc_per_node="$count" \
        llava/train/train_mem.py --tf32 True "$@"
}

slurm_launcher() {
    nodes=$((GPUS / GPUS_PER_NODE))
    [ $((nodes * GPUS_PER_NODE)) -eq "$GPUS" ] || fail "GPUS must be a multiple of GPUS_PER_NODE=$GPUS_PER_NODE, got $GPUS."
    set -- "$PYTHON" -u llava/train/train_mem_custom.py --tf32 True --deepspeed "$zero_config" "$@"
    # shellcheck disable=SC2086 # SRUN_ARGS is a list of arguments
    run srun \
        --partition="$PARTITION" \
        --gres=gpu:"$GPUS_PER_NODE" \
        --nodes="$nodes" \
        --ntasks="$GPUS" \
        --ntasks-per-node="$GPUS_PER_NODE" \
        --cpus-per-task="$CPUS_PER_TASK" \
        --kill-on-bad-exit=1 \
        ${QUOTA_TYPE:+--quotatype="$QUOTA_TYPE"} \
        ${SRUN_ARGS:-} \
        "$@"
}

# Runs a command, writes its output to the screen and appends it to train.log; returns its exit status. Shell and tee
# outlive a SIGTERM to all processes of a job, because training saves a checkpoint then.
run() {
    if [ -n "$dry_run" ]; then
        print_command "$@"
        return
    fi
    command -v "$1" >/dev/null || fail "$1 was not found on PATH; activate the environment in which llava is installed."
    mkdir -p "$OUTPUT_DIR"
    exec 4>&1
    trap : TERM # a subshell forgets it
    status=$(
        trap : TERM
        {
            {
                trap : TERM
                "$@" 2>&1 && echo 0 >&3 || echo $? >&3
            } | (trap '' INT TERM && exec tee -a "$OUTPUT_DIR/train.log") >&4
        } 3>&1
    )
    trap - TERM
    exec 4>&-
    [ "$status" -eq 0 ] || printf 'error: %s ended with status %s; its output is in %s/train.log\n' "$RECIPE" "$status" "$OUTPUT_DIR" >&2
    return "$status"
}

# Prints a command as one line of shell syntax.
print_command() {
    for word in "$@"; do
        case $word in
        '' | *[!A-Za-z0-9_./=:,@%+-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        printf '%s ' "$word"
    done
    echo
}
