"""Post-training: chat template, tuning data, and the ablation of its stages."""
