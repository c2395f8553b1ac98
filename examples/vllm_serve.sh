#!/usr/bin/env bash
# Serve a model with compressed prompts, ask it a question over HTTP, and print the plugin's metrics.
#   examples/vllm_serve.sh MODEL [more arguments of vllm serve]      ROCKETKV_VLLM='{"token_budget": 1024}' changes the settings
set -euo pipefail

model=${1:?usage: examples/vllm_serve.sh MODEL [arguments of vllm serve]}
shift
port=${PORT:-8000}
export ROCKETKV_VLLM=${ROCKETKV_VLLM:-'{"token_budget": 512}'}
# Scheduler and workers write their metrics here; the server reads them.
PROMETHEUS_MULTIPROC_DIR=$(mktemp -d)
export PROMETHEUS_MULTIPROC_DIR
backend=(--attention-backend CUSTOM)
command -v nvidia-smi >/dev/null || command -v rocm-smi >/dev/null || backend=()  # a CPU has one backend

python -P -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name model --host 127.0.0.1 --port "$port" \
    --max-num-seqs 32 "${backend[@]}" "$@" &
server=$!
trap 'kill $server; wait $server || true; rm -rf "$PROMETHEUS_MULTIPROC_DIR"' EXIT
until curl --silent --fail "http://127.0.0.1:$port/health"; do
    kill -0 $server  # the server has ended: so does this script
    sleep 1
done

curl --silent --no-buffer "http://127.0.0.1:$port/v1/completions" --header 'Content-Type: application/json' \
    --data '{"model": "model", "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0, "stream": true}'
curl --silent "http://127.0.0.1:$port/metrics" | grep '^rocketkv:'
