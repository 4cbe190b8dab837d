"""What a LoRA file is to the host: read, named, and put on a model's layers as one of a pair."""
