"""What tests share: checkpoints, servers, planted faults, the emulator of GPUs, references."""
