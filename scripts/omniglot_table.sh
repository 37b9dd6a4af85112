#!/usr/bin/env bash
# Trains every algorithm on Omniglot (quarter turns as classes) in four settings, then prints the table of results.
#   scripts/omniglot_table.sh [ALGO ...]      # all of them, or some; TASKS="5way1shot" for some settings;
#                                             # SPLIT=shuffled: characters of all alphabets (default: vinyals);
#                                             # WORDS="seed=1 device=cpu": more options for every run;
#                                             # OUT=FOLDER (default: runs/table/SPLIT), another for each SPLIT and WORDS
# Finished rows are skipped and unfinished ones resumed, so that the script can be stopped and started again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
split=${SPLIT:-vinyals}
out=${OUT:-runs/table/$split}
trap 'exit 130' INT TERM # the run that is stopped ends by itself; without this, bash would start the next one
tasks=${TASKS:-5way1shot 5way5shot 20way1shot 20way5shot}
algos=("$@")
if [ ${#algos[@]} -eq 0 ]; then
    mapfile -t algos < <(scripts/fsl algos | cut -d' ' -f1 | grep -v -e '^finetune$' -e '^protonet$')
    algos=(finetune protonet "${algos[@]}") # first: others start from their networks
fi
failed=0
for task in $tasks; do
    for algo in "${algos[@]}"; do
        row=$out/$task/$algo
        [ -f "$row/result.json" ] && continue
        if [ -f "$row/last.pt" ]; then
            words=(resume="$row/last.pt")
        else
            words=(algo="$algo" dataset=omniglot dataset.split="$split" task="$task" out="$row" resume=auto ${WORDS:-})
            # If this algorithm would train a first stage, it starts from the finished row of that stage's algorithm instead.
            first=$(scripts/fsl train algo="$algo" dataset=omniglot --cfg job | awk '
                /^pretrain: train$/ { found = 1 } /^pretrain_algo:/ { if (found) print $2 }')
            [ -n "$first" ] && [ -f "$out/$task/$first/result.json" ] && words+=(pretrain="$out/$task/$first/best.pt")
        fi
        scripts/fsl train "${words[@]}" || { echo "$algo $task failed" >&2; failed=1; }
    done
done
.venv/bin/python - "$out" <<'PYTHON' || failed=1
import json, sys
from pathlib import Path

print("| algorithm | split | task | seed | accuracy, % | norm | best step / steps | wall time, s |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
for file in sorted(Path(sys.argv[1]).glob("*/*/result.json")):
    row = json.loads(file.read_text())
    if "steps" not in row:  # an evaluation that somebody has put beside the trainings
        continue
    print(f"| `{row['algo']}` | {row['dataset_options']['split']} | {row['way']}-way {row['shot']}-shot | {row['train_seed']} | {100 * row['accuracy']:.2f} ± {100 * row['ci95']:.2f} "
          f"| {row['norm']} | {row['step']} / {row['steps']} | {row['wall_time_s']:.0f} |")
PYTHON
exit $failed
