"""ZipLoRA Optimize: a pair zipped on a model, shown and told of."""
