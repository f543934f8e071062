"""Offline preparation of models: training of the demo, distillation of drafts, quantization, measurement."""
