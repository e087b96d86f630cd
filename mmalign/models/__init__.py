"""Models: load, encode, the common forward and the places of LoRA, one table of families per modality."""
