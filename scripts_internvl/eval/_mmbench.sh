# shellcheck shell=sh
# Common part of the MMBench scripts: mmbench FOLDER SPLIT FLAG... answers, writes the submission, scores dev splits.
mmbench() {
    D=$EVAL_DATA/$1 split=$2
    shift 2
    need "$D/$split.tsv"
    answer model_vqa_mmbench "$D/$split.tsv" "" "$D/answers/$split/$NAME.jsonl" --single-pred-prompt "$@"
    step "$PYTHON" scripts/convert_mmbench_for_submission.py \
        --annotation-file "$D/$split.tsv" \
        --result-dir "$D/answers/$split" \
        --upload-dir "$D/answers_upload/$split" \
        --experiment "$NAME"
    case $split in
    *_dev_*)
        step "$PYTHON" llava/eval/eval_mmbench.py \
            --annotation-file "$D/$split.tsv" \
            --result-file "$D/answers/$split/$NAME.jsonl"
        ;;
    esac
}
