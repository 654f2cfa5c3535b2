"""What runs in a batch pod: distillation, fine-tuning, quantization. Start it with `python -m slmops_trainer`."""
