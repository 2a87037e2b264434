"""Does it help? CLIP against ProtoCLIP with the same encoders, data and training loop: plans, runs, statistics, tables."""
