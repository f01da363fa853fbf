#!/usr/bin/env bash
# Measure and check on this machine's GPUs, without a network, and write ${OUT:-.}/gpu_report.md as it goes.
#
#   bash tests/gpu.sh                    all sections, in at most LIMIT=540 seconds
#   bash tests/gpu.sh rates layouts      only these
#   bash tests/gpu.sh --quick            fewer batch sizes, steps and layouts
#   LIMIT=1500 NANOGPT=FOLDER BUILD_NANOGPT=FOLDER HELLASWAG=FILE TIKTOKEN_CACHE_DIR=FOLDER bash tests/gpu.sh
#
# The first two folders are checkouts to compare with, HELLASWAG is hellaswag_val.jsonl.
sections=() options=() failed=0 limit=${LIMIT:-540}
for arg; do [[ $arg == --* ]] && options+=("$arg") || sections+=("$arg"); done
[ ${#sections[@]} -gt 0 ] || sections=(machine rates profile loop layouts float16 resume dpo hellaswag generate ablations)
mkdir -p "${OUT:-.}" && report=$(realpath "${OUT:-.}")/gpu_report.md && log=$(mktemp) || exit
for name in NANOGPT BUILD_NANOGPT HELLASWAG TIKTOKEN_CACHE_DIR; do
    [ -z "${!name}" ] || export "$name=$(realpath "${!name}")"
done
touch "$report" && before=$(stat -c %s "$report") && cd "$(dirname "$0")/.." || exit
for section in "${sections[@]}"; do
    began=$SECONDS left=$((limit - SECONDS))
    [ ${#sections[@]} -eq 1 ] || [ $left -lt $((limit / 2)) ] || left=$((limit / 2))  # one that hangs leaves time
    [ $left -gt 15 ] || { printf '\n## %s\n\nskipped: no time left\n' "$section" >> "$report"; failed=1; continue; }
    timeout -k 10 $left python3 -u tests/gpu_report.py --section="$section" --seconds=$left "${options[@]}" \
        >> "$report" 2> "$log"
    status=$?  # 124: out of time
    if [ $status -ne 0 ]; then
        failed=1
        printf '\n**failed, exit status %s**\n\n```\n%s\n```\n' $status "$(tail -n 25 "$log")" >> "$report"
    fi
    printf '\n%s s\n' $((SECONDS - began)) >> "$report"
done
rm "$log"
tail -c +$((before + 1)) "$report"
exit $failed
