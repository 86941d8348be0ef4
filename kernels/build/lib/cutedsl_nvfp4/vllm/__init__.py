"""The vLLM side: plugin, kernel classes, model glue. Nothing outside this folder imports vLLM."""
