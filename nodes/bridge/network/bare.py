"""A model as loaded from its checkpoint, whatever its last use has left on it."""

from __future__ import annotations

import comfy.model_management


def bare(model):
    """The BaseModel that came in, without what its loaded clone has put on it: object patches and injections.

    Clones of a model share one BaseModel, which wears what the last loaded one put there until another one is loaded:
    compiled blocks under other names, adapters as modules of their own. Names of layers are read without them. Weights
    stay where and as they are; the clone puts its things on again when it is loaded next, which the host does before
    every use. Models that are not loaded are left alone.
    """
    for loaded in list(comfy.model_management.current_loaded_models):
        patcher = loaded.model
        if patcher is not None and getattr(patcher, "model", None) is model:
            patcher.unpatch_model(unpatch_weights=False)
    return model
