"""Evaluation of upsamplers: linear probes on frozen upsampled features, and fidelity without labels."""
