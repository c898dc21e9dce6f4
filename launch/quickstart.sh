#!/usr/bin/env bash
# Distil the bundled teacher to a 4-step student, export it to diffusers, sample, evaluate.
# Run again to resume; a finished run is left as it is. RUN chooses the folder.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_environment
run=${RUN:-runs/quickstart}
export HF_HUB_OFFLINE=1
teacher=gadjax/assets/shapes_flow_teacher
prompts=gadjax/assets/shapes_test_prompts.txt
mkdir -p "$run"

if [ -f "$run/report/report.md" ]; then
    echo "already done (remove $run to start over)"
else
    echo "1/5 convert the teacher to Flax parameters, checked against diffusers"
    [ -d "$run/teacher" ] || gadjax convert "$teacher" "$run/teacher" --check
    echo "2/5 distil: DMD + GAD + the diversity anchor"
    gadjax train --config configs/shapes_gad.py:quickstart --workdir "$run/train" \
        --config.teacher="$run/teacher"
    echo "3/5 export a diffusers pipeline, checked against diffusers"
    [ -d "$run/student" ] || gadjax export --workdir "$run/train" --out "$run/student"
    echo "4/5 sample: with gadjax, then with diffusers in PyTorch"
    [ -d "$run/samples" ] || gadjax sample --model "$run/student" \
        --prompts gadjax/assets/shapes_demo_prompts.txt --out "$run/samples"
    [ -d "$run/samples_diffusers" ] || python launch/sample_with_diffusers.py \
        "$run/student" gadjax/assets/shapes_demo_prompts.txt "$run/samples_diffusers"
    echo "5/5 evaluate"
    gadjax evaluate --teacher "$teacher" --student "$run/student" --prompts "$prompts" \
        --library 32 --out "$run/report"
fi
echo "images: $run/report/samples.png"
echo "report: $run/report/report.html (numbers: report.md)"
