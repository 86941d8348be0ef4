"""How demo/ was made: texts, training with NVFP4 rounding, export, expected output, planted errors."""
