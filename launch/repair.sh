#!/usr/bin/env bash
# Make a distilled student that has lost what its noise meant, then repair it with a LoRA.
# Run again to resume; a finished run is left as it is. RUN chooses the folder.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_environment
run=${RUN:-runs/repair}
export HF_HUB_OFFLINE=1
teacher=gadjax/assets/shapes_flow_teacher
mkdir -p "$run"

if [ -f "$run/repaired/repair.json" ]; then
    echo "already done (remove $run to start over)"
else
    echo "1/2 distil a student by distribution matching alone"
    gadjax train --config configs/methods.py:dmd --workdir "$run/train" --config.teacher="$teacher"
    [ -d "$run/student" ] || gadjax export --workdir "$run/train" --out "$run/student"
    echo "2/2 repair it"
    gadjax repair --teacher "$teacher" --student "$run/student" \
        --prompts gadjax/assets/shapes_prompts.txt \
        --test-prompts gadjax/assets/shapes_test_prompts.txt --out "$run/repaired"
fi
echo "LoRA: $run/repaired/lora"
echo "before and after: $run/repaired/before_after.png, $run/repaired/repair.md"
