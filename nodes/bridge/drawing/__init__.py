"""Pictures drawn by the host's own sampler: references of each LoRA, class pictures, thumbnails."""
