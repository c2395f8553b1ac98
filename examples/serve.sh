#!/bin/sh
# Serve a model, with a document that has been read beforehand: sh examples/serve.sh MODEL TEXT
# Then: python examples/serve_client.py --model NAME --file TEXT, or a browser at http://127.0.0.1:8000
set -eu
model=${1:-HuggingFaceTB/SmolLM2-135M-Instruct}
text=${2:-README.md}
contexts=${CONTEXTS:-contexts}

mkdir -p "$contexts"
rocketkv compress "$text" --model "$model" --method rocketkv-mt+ --budget 512 -o "$contexts/document.safetensors"
exec rocketkv serve --model "$model" --method rocketkv-mt+ --budget 512 --contexts "$contexts" --port "${PORT:-8000}"
