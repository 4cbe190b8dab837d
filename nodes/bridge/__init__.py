"""The only place that imports comfy.*: files and keys to pairs, patchers to predictors, application, progress."""
