"""Language models that see: images and videos of prompts as tensors, families of models, what is shown instead."""
