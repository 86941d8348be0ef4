"""What vLLM lacks on the CPU: metadata kernels and operators of DeepSeek-V4 in torch."""
