"""RocketKV in vLLM: a plugin of the stock engine (docs/vllm.md). Without settings it changes nothing."""
