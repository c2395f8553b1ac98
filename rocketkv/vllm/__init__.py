"""RocketKV in vLLM: a plugin of the stock engine (docs/vllm.md). Only `settings` imports without vLLM."""
